"""Harmonic ResNet, ResNeXt and SE-ResNeXt (Ulicny, Krylov, Dahyot, arXiv:2001.06570)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .block import HarmonicBlock2d
from .checkpoints import convert_state_dict
from .conv import HarmonicConv2d
from .pretrained import REPOSITORY, TAG, build_model, paper_cfg, released_cfg
from .swap import Levels, check_channels, expand_levels, make_harmonic

__all__ = ['HarmonicResNet', 'checkpoint_filter_fn']

_STEM_POOLS = (None, 'avg', 'max')
_TIMM_TAPS = 5  # timm's ResNet counts the stem and four stages


class HarmonicResNet(ResNet):
    """timm's ResNet with harmonic layers in place of its k x k convolutions, k > 1.

    The root is a `HarmonicBlock2d` (normalised responses), every other one a `HarmonicConv2d`. Without a pool the
    root has stride 4, and the stem is no feature of its own: features have the reductions 4, 8, 16, 32.

    Args:
        block: timm's BasicBlock or Bottleneck.
        layers: Number of blocks in each of the four stages.
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the images.
        levels: The paper's lambda for the four stages: None (all frequencies), an integer for all, or four entries.
        stem_pool: None for a root of stride 4 without pooling, 'avg' or 'max' for stride 2 and a 3 x 3 pool.
        harmonic_stem: Whether the root is harmonic.
        harmonic_blocks: Whether the other convolutions are.
        normalization: Of the DCT functions, 'l1' (the authors') or 'ortho'.
        zero_init_last: Whether residual branches start at zero, see timm's ResNet.
        **kwargs: Whatever timm's ResNet takes.

    Raises:
        ValueError: If an option is out of range, naming it.
        TypeError: If levels has another type, or a keyword is unknown.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        levels: Levels = None,
        stem_pool: str | None = None,
        harmonic_stem: bool = True,
        harmonic_blocks: bool = True,
        normalization: str = 'l1',
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        check_channels(num_classes, in_chans)
        stage_levels = expand_levels(levels, 4)
        if stem_pool not in _STEM_POOLS:
            raise ValueError(f'stem_pool must be one of {_STEM_POOLS}, got {stem_pool!r}.')
        if stem_pool != 'max' and kwargs.get('replace_stem_pool'):
            raise ValueError(f"replace_stem_pool stands for max pooling: set stem_pool='max', got {stem_pool!r}.")
        super().__init__(
            block, layers, num_classes=num_classes, in_chans=in_chans, zero_init_last=zero_init_last, **kwargs
        )

        root = 'conv1' if isinstance(self.conv1, nn.Conv2d) else 'conv1.0'  # timm's deep stem is a Sequential
        if stem_pool is None:
            self.get_submodule(root).stride = (4, 4)
            self.maxpool = nn.Identity()
            self.feature_info = self.feature_info[1:]
        elif stem_pool == 'avg':
            self.maxpool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)

        self.levels = stage_levels

        def level_of(name: str) -> int | None:
            stage = re.match(r'layer(\d)', name)
            return stage_levels[int(stage.group(1)) - 1] if stage else None

        make_harmonic(
            self,
            root,
            level_of,
            harmonic_stem=harmonic_stem,
            harmonic_blocks=harmonic_blocks,
            normalization=normalization,
        )

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialises the weights, see timm's ResNet and `reset_parameters` of the harmonic layers."""
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, (HarmonicBlock2d, HarmonicConv2d)):
                module.reset_parameters()

    def _timm_taps(self, indices: int | Sequence[int] | None) -> int | list[int]:
        """Indices into feature_info as timm's ResNet counts them: it always has the stem as tap 0."""
        count = len(self.feature_info)
        if indices is None:
            return count
        given = [indices] if isinstance(indices, int) else list(indices)
        low, high = (1, count) if isinstance(indices, int) else (-count, count - 1)
        if not all(low <= i <= high for i in given):
            raise ValueError(f'feature indices must be from {low} to {high}, got {indices!r}.')
        return indices if isinstance(indices, int) else [i if i < 0 else i + _TIMM_TAPS - count for i in given]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's ResNet, with indices into this network's feature_info."""
        return super().forward_intermediates(
            x,
            self._timm_taps(indices),
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """As timm's ResNet, with indices into this network's feature_info."""
        taps, timm_taps = self.feature_info, self._timm_taps(indices)
        offset = _TIMM_TAPS - len(taps)
        self.feature_info = [{}] * offset + taps  # timm looks up the width of a tap by its own index
        try:
            taken = super().prune_intermediate_layers(timm_taps, prune_norm=prune_norm, prune_head=prune_head)
        finally:
            self.feature_info = taps
        return [i - offset for i in taken]


_RESNET18 = dict(block=BasicBlock, layers=(2, 2, 2, 2))
_RESNET34 = dict(block=BasicBlock, layers=(3, 4, 6, 3))
_RESNET50 = dict(block=Bottleneck, layers=(3, 4, 6, 3))
_RESNET101 = dict(block=Bottleneck, layers=(3, 4, 23, 3))
_RESNET152 = dict(block=Bottleneck, layers=(3, 8, 36, 3))
_SE = dict(block_args=dict(attn_layer='se'), avg_down=True, zero_init_last=True)
_PLAIN = dict(harmonic_stem=False, harmonic_blocks=False)

# The paper's networks and their family. SE-ResNeXts start with zero residual branches, the others do not, as in the
# authors' code.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    'harm_resnet18': _RESNET18,
    'harm_resnet34': _RESNET34,
    'harm_resnet50': _RESNET50,
    'harm_resnet101': _RESNET101,
    'harm_resnet152': _RESNET152,
    'harm_resnet50_avgpool': dict(_RESNET50, stem_pool='avg'),
    'harm_resnet50_progressive': dict(_RESNET50, stem_pool='avg', levels=(None, None, 3, 2)),
    'harm1_resnet50': dict(_RESNET50, harmonic_blocks=False),
    'harm0_resnet50': dict(_RESNET50, **_PLAIN),
    'harm_resnext50_32x4d': dict(_RESNET50, cardinality=32, base_width=4, stem_pool='max'),
    'harm_resnext101_32x4d': dict(_RESNET101, cardinality=32, base_width=4, stem_pool='max'),
    'harm_resnext101_32x8d': dict(_RESNET101, cardinality=32, base_width=8, stem_pool='max'),
    'harm_resnext101_64x4d': dict(_RESNET101, cardinality=64, base_width=4, stem_pool='max'),
    'harm_seresnext50_32x4d': dict(_RESNET50, cardinality=32, base_width=4, stem_pool='max', **_SE),
    'harm_seresnext101_32x4d': dict(_RESNET101, cardinality=32, base_width=4, stem_pool='max', **_SE),
    'harm_seresnext101_64x4d': dict(_RESNET101, cardinality=64, base_width=4, **_SE),
    'harm0_seresnext101_32x4d': dict(_RESNET101, cardinality=32, base_width=4, stem_pool='max', **_SE, **_PLAIN),
}

# The authors' names of parameters, as regular expressions, and ours.
KEY_NAMES = {r'(^|\.)harm(\d)\.': r'\1conv\2.'}
checkpoint_filter_fn = partial(convert_state_dict, names=KEY_NAMES, norm='bn1')


def _create(variant: str, pretrained: bool, **kwargs: Any) -> HarmonicResNet:
    args = dict(_ARCHITECTURES[variant], **kwargs)
    taps = _TIMM_TAPS if args.get('stem_pool') else _TIMM_TAPS - 1
    return build_model(
        HarmonicResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(taps))),
        **args,
    )


_FIRST_AND_LAST = dict(first_conv='conv1', classifier='fc')


def _errors(top1: str, top5: str, page: str, *more: str) -> tuple[str, ...]:
    """Notes of a released weight. Errors are percentages on ImageNet-1k's validation set, one crop."""
    return (
        f'paper: top-1 error {top1} %, top-5 error {top5} % ({REPOSITORY}/tree/master/{page})',
        *more,
        'not re-measured',
    )


# By architecture: the authors' file and the paper's figures. A published file is pinned here by sha256='...'.
_RELEASED: dict[str, dict[str, Any]] = {
    'harm_resnet50': dict(
        file='harm_resnet50-eec30392.pth',
        notes=_errors('23.11', '6.63', 'imagenet', "the authors' benchmark script says 76.98 % top-1 accuracy"),
    ),
    'harm_resnet101': dict(file='harm_resnet101-62e185b1.pth', notes=_errors('21.48', '5.75', 'imagenet')),
    'harm0_seresnext101_32x4d': dict(
        file='se_resnext101_32x4d-3250bf17.pth',
        notes=_errors('19.81 at 224, 18.80 at 320', '4.90 at 224, 4.19 at 320', 'imagenet/resnext'),
    ),
    'harm_seresnext101_32x4d': dict(
        file='harm_se_resnext101_32x4d-e5b7b14d.pth',
        notes=_errors('19.55 at 224, 18.72 at 320', '4.79 at 224, 4.23 at 320', 'imagenet/resnext'),
    ),
    'harm_seresnext101_64x4d': dict(
        file='harm_se_resnext101_64x4d-74a0d9f0.pth',
        notes=_errors(
            '18.36 at 224, 17.34 at 320',
            '4.37 at 224, 3.71 at 320',
            'imagenet/resnext',
            'another page of the authors gives 82.85 % top-1 accuracy at 320',
        ),
    ),
}

default_cfgs = generate_default_cfgs(
    {
        **{
            f'{name}.{TAG}': released_cfg(f'{name}.{TAG}', **released, **_FIRST_AND_LAST)
            for name, released in _RELEASED.items()
        },
        **{name: paper_cfg(**_FIRST_AND_LAST) for name in _ARCHITECTURES if name not in _RELEASED},
    }
)


@register_model
def harm_resnet18(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNet-18, stride-4 root."""
    return _create('harm_resnet18', pretrained, **kwargs)


@register_model
def harm_resnet34(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNet-34, stride-4 root."""
    return _create('harm_resnet34', pretrained, **kwargs)


@register_model
def harm_resnet50(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-ResNet-50 of the paper: stride-4 root, no pooling."""
    return _create('harm_resnet50', pretrained, **kwargs)


@register_model
def harm_resnet101(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-ResNet-101 of the paper: stride-4 root, no pooling."""
    return _create('harm_resnet101', pretrained, **kwargs)


@register_model
def harm_resnet152(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNet-152, stride-4 root."""
    return _create('harm_resnet152', pretrained, **kwargs)


@register_model
def harm_resnet50_avgpool(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-ResNet-50 (avgpool) of the paper: stride-2 root, then average pooling."""
    return _create('harm_resnet50_avgpool', pretrained, **kwargs)


@register_model
def harm_resnet50_progressive(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-ResNet-50 with progressive lambda: levels (None, None, 3, 2), average pooling."""
    return _create('harm_resnet50_progressive', pretrained, **kwargs)


@register_model
def harm1_resnet50(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm1-ResNet-50 of the paper: only the root is harmonic, stride 4."""
    return _create('harm1_resnet50', pretrained, **kwargs)


@register_model
def harm0_resnet50(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """ResNet-50 (no pool), the paper's baseline: nothing is harmonic, stride-4 root."""
    return _create('harm0_resnet50', pretrained, **kwargs)


@register_model
def harm_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNeXt-50 32x4d, max-pooled stem."""
    return _create('harm_resnext50_32x4d', pretrained, **kwargs)


@register_model
def harm_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNeXt-101 32x4d, max-pooled stem."""
    return _create('harm_resnext101_32x4d', pretrained, **kwargs)


@register_model
def harm_resnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNeXt-101 32x8d, max-pooled stem."""
    return _create('harm_resnext101_32x8d', pretrained, **kwargs)


@register_model
def harm_resnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic ResNeXt-101 64x4d, max-pooled stem."""
    return _create('harm_resnext101_64x4d', pretrained, **kwargs)


@register_model
def harm_seresnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harmonic SE-ResNeXt-50 32x4d, max-pooled stem, average-pool downsampling."""
    return _create('harm_seresnext50_32x4d', pretrained, **kwargs)


@register_model
def harm_seresnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-SE-ResNeXt-101 32x4d of the paper: max-pooled stem, average-pool downsampling."""
    return _create('harm_seresnext101_32x4d', pretrained, **kwargs)


@register_model
def harm_seresnext101_64x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """Harm-SE-ResNeXt-101 64x4d of the paper: stride-4 root, no pooling, average-pool downsampling."""
    return _create('harm_seresnext101_64x4d', pretrained, **kwargs)


@register_model
def harm0_seresnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> HarmonicResNet:
    """SE-ResNeXt-101 32x4d, the paper's baseline: nothing is harmonic."""
    return _create('harm0_seresnext101_32x4d', pretrained, **kwargs)


register_model_deprecations(
    __name__,
    {
        'harm_se_resnext101_32x4d': 'harm_seresnext101_32x4d',
        'harm_se_resnext101_64x4d': 'harm_seresnext101_64x4d',
    },
)
