"""Harmonic ResNet, ResNeXt and SE-ResNeXt (Ulicny, Krylov, Dahyot, arXiv:2001.06570)."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model_deprecations
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..common import InputError
from ..conversion.swap import harmonic_layers
from .checkpoints import convert_state_dict
from .options import StageLevels, check_channels, levels_of_stages, make_network_harmonic, register, tap_indices
from .paper import PAPER, notes_of, paper_cfg
from .weights import TAG, released_cfg

_TIMM_TAPS = 5  # of timm's ResNet: the stem and four stages


class HarmonicResNet(ResNet):
    """timm's ResNet with harmonic layers in place of its k x k convolutions, k > 1.

    The stem is a `HarmonicBlock2d` (normalised responses), every other convolution a `HarmonicConv2d`. Without a pool
    the stem has stride 4 and does not count as a feature: features have the reductions 4, 8, 16, 32.

    Args:
        levels: The paper's lambda for the four stages: None (all frequencies), an integer for all, or four entries.
        stem_pool: None for a stem of stride 4 without pooling, 'avg' or 'max' for stride 2 and a 3 x 3 pool.
        harmonic_stem: Whether the stem is harmonic.
        harmonic_blocks: Whether the other convolutions are.
        normalization: Of the DCT functions, 'l1' (the authors') or 'ortho'.
        smoothness: How much training favours smooth filters, see `HarmonicConv2d`; None for the authors' network.
        **kwargs: Options of timm's ResNet, as are block, layers, num_classes, in_chans and zero_init_last.

    Raises:
        InputError: If an option is out of range, naming it.
        TypeError: If levels or smoothness has another type, or a keyword is unknown.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        levels: StageLevels = None,
        stem_pool: str | None = None,
        harmonic_stem: bool = True,
        harmonic_blocks: bool = True,
        normalization: str = 'l1',
        smoothness: float | None = None,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        check_channels(num_classes, in_chans)
        self.levels = levels_of_stages(levels, 4)
        if stem_pool not in (None, 'avg', 'max'):
            raise InputError(f"stem_pool must be one of (None, 'avg', 'max'), got {stem_pool!r}.")
        if stem_pool != 'max' and kwargs.get('replace_stem_pool'):
            raise InputError(f"replace_stem_pool replaces max pooling: set stem_pool='max', got {stem_pool!r}.")
        super().__init__(
            block, layers, num_classes=num_classes, in_chans=in_chans, zero_init_last=zero_init_last, **kwargs
        )
        stem = 'conv1' if isinstance(self.conv1, nn.Conv2d) else 'conv1.0'  # timm's deep stem is a Sequential
        if stem_pool != 'max':
            self.maxpool = nn.AvgPool2d(kernel_size=3, stride=2, padding=1) if stem_pool else nn.Identity()
        if stem_pool is None:
            self.get_submodule(stem).stride = (4, 4)
            del self.feature_info[0]
        basis = dict(normalization=normalization, smoothness=smoothness)
        make_network_harmonic(self, stem, self._level_of, harmonic_stem, harmonic_blocks, basis)

    def _level_of(self, name: str) -> int | None:
        stage = re.match(r'layer(\d)', name)
        return self.levels[int(stage.group(1)) - 1] if stage else None

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialises the weights, see timm's ResNet and `reset_parameters` of the harmonic layers."""
        super().init_weights(zero_init_last=zero_init_last)
        for layer in harmonic_layers(self).values():
            layer.reset_parameters()

    def _timm_taps(self, indices: int | Sequence[int] | None) -> list[int]:
        """Translates indices into feature_info into those of timm's ResNet, whose tap 0 is always the stem."""
        count = len(self.feature_info)
        return [i + _TIMM_TAPS - count for i in tap_indices(indices, count)]

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Does what timm's ResNet does, with indices into this network's feature_info."""
        return super().forward_intermediates(x, self._timm_taps(indices), *args, **kwargs)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """Does what timm's ResNet does, with indices into this network's feature_info."""
        taps, timm_taps = self.feature_info, self._timm_taps(indices)
        offset = _TIMM_TAPS - len(taps)
        self.feature_info: list[Any] = [{}] * offset + taps  # timm looks up the width of a tap by its own index
        try:
            taken = super().prune_intermediate_layers(timm_taps, *args, **kwargs)
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

# The paper's networks and their family. As in the authors' code, only SE-ResNeXts start with zero residual branches.
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
checkpoint_filter_fn = partial(convert_state_dict, names=KEY_NAMES, norms=['bn1'])

_LAYERS = dict(first_conv='conv1', classifier='fc')
# Once a file of ours is on the Hub, its SHA-256 is pinned here by architecture: 64 hex digits.
_PINS: dict[str, str] = {}
_RELEASED = {name: PAPER[name] for name in _ARCHITECTURES if name in PAPER and PAPER[name]['file']}

_cfgs = {
    f'{name}.{TAG}': released_cfg(f'{name}.{TAG}', row['file'], _PINS.get(name, ''), notes_of(row), **_LAYERS)
    for name, row in _RELEASED.items()
}
_cfgs |= {name: paper_cfg(**_LAYERS) for name in _ARCHITECTURES if name not in _RELEASED}
default_cfgs = generate_default_cfgs(_cfgs)

register(HarmonicResNet, _ARCHITECTURES, checkpoint_filter_fn, lambda args: 5 if args.get('stem_pool') else 4)
_AUTHORS_NAMES = {f'harm_se_resnext101_{size}': f'harm_seresnext101_{size}' for size in ('32x4d', '64x4d')}
register_model_deprecations(__name__, _AUTHORS_NAMES)
