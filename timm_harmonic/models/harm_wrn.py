"""Harmonic wide residual networks for small images (Ulicny, Krylov, Dahyot, arXiv:2001.06570)."""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import generate_default_cfgs
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from ..common import InputError
from ..layers import HarmonicLayer
from .checkpoints import StateDict, convert_state_dict
from .options import StageLevels, check_channels, levels_of_stages, make_network_harmonic, register, tap_indices
from .paper import paper_cfg

_STEM_WIDTH = 16
_TIMM_STRIDE = 4  # of timm's stem with its pool, which its ResNetV2 assumes


class HarmonicWRN(ResNetV2):
    """Wide residual network (Zagoruyko, Komodakis, arXiv:1605.07146) with harmonic layers for its 3 x 3 convolutions.

    It is timm's ResNetV2 with a 3 x 3 stem, no pool, and three groups of pre-activation blocks of 16, 32 and 64 times
    the width. The stem is a `HarmonicBlock2d` (normalised responses), every other 3 x 3 convolution a `HarmonicConv2d`.
    The authors' initialisation applies: Kaiming normal over fan-in, batch-norm weights uniform in [0, 1].

    Args:
        depth: Layers, 6 n + 4 with n blocks in each group.
        width: Factor of the groups' channels.
        levels: The paper's lambda for the three groups. The stem keeps all frequencies.
        stem_stride: Stride of the stem, 1 for images of about 32 x 32, 2 for about 96 x 96 (the authors' for STL-10).
        conv_drop_rate: Dropout between the two convolutions of a block. drop_rate is that before the classifier.
        output_stride: Largest stride of the features: later groups are dilated instead.
        **kwargs: Other options of timm's ResNetV2, except its stem, widths and normalisation. See `HarmonicResNet` for
            arguments that are not listed, and for errors.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 8,
        num_classes: int = 10,
        in_chans: int = 3,
        levels: StageLevels = None,
        stem_stride: int = 1,
        conv_drop_rate: float = 0.0,
        harmonic_stem: bool = True,
        harmonic_blocks: bool = True,
        normalization: str = 'l1',
        smoothness: float | None = None,
        output_stride: int = 32,
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        check_channels(num_classes, in_chans)
        self.levels = levels_of_stages(levels, 3)
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f'depth must be 6 n + 4 (10, 16, 22, 28, ...), got {depth!r}.')
        if stem_stride not in (1, 2):
            raise InputError(f'stem_stride must be 1 or 2, got {stem_stride!r}.')
        if output_stride not in (1, 2, 4, 8, 16, 32) or output_stride < stem_stride:
            raise InputError(f'output_stride must be a power of 2 from {stem_stride=} to 32, got {output_stride!r}.')
        super().__init__(
            layers=[(depth - 4) // 6] * 3,
            channels=tuple(base * width for base in (16, 32, 64)),
            num_classes=num_classes,
            in_chans=in_chans,
            stem_chs=_STEM_WIDTH,
            output_stride=output_stride * _TIMM_STRIDE // stem_stride,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            **kwargs,
        )
        dd: dict[str, Any] = {name: kwargs.get(name) for name in ('device', 'dtype')}
        conv = nn.Conv2d(in_chans, _STEM_WIDTH, 3, stem_stride, 1, bias=False, **dd)
        self.stem = nn.Sequential(OrderedDict(conv=conv))
        stem, *groups = self.feature_info
        stem['reduction'] = stem_stride
        for info in groups:
            info['reduction'] = info['reduction'] * stem_stride // _TIMM_STRIDE
        for block in [block for group in self.stages for block in group.blocks] if conv_drop_rate else ():
            block.norm2.drop = nn.Dropout(conv_drop_rate)  # before its activation, which keeps zeros
        basis = dict(normalization=normalization, smoothness=smoothness)
        make_network_harmonic(self, 'stem.conv', self._level_of, harmonic_stem, harmonic_blocks, basis)
        self.init_weights(zero_init_last)

    def _level_of(self, name: str) -> int | None:
        group = re.match(r'stages\.(\d)', name)
        return self.levels[int(group.group(1))] if group else None

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialises the weights as the authors do: Kaiming normal over fan-in, batch-norm weights in [0, 1]."""
        for module in self.modules():
            if isinstance(module, HarmonicLayer):
                module.reset_parameters()
            if isinstance(module, (HarmonicLayer, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, mode='fan_in', nonlinearity='relu')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in [block for group in self.stages for block in group.blocks] if zero_init_last else ():
            block.zero_init_last()

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Does what timm's ResNetV2 does, with indices into this network's feature_info."""
        return super().forward_intermediates(x, tap_indices(indices, len(self.feature_info)), *args, **kwargs)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """Does what timm's ResNetV2 does, with indices into this network's feature_info."""
        return super().prune_intermediate_layers(tap_indices(indices, len(self.feature_info)), *args, **kwargs)


_PLAIN = dict(harmonic_stem=False, harmonic_blocks=False)

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    'harm_wrn16_8': dict(depth=16, width=8),
    'harm_wrn16_8_progressive': dict(depth=16, width=8, levels=(None, 3, 2)),
    'harm_wrn28_10': dict(depth=28, width=10),
    'harm1_wrn28_10': dict(depth=28, width=10, harmonic_blocks=False),
    'harm0_wrn16_8': dict(depth=16, width=8, **_PLAIN),
    'harm0_wrn28_10': dict(depth=28, width=10, **_PLAIN),
}

KEY_NAMES = {
    r'^(harmonic0\.conv|conv0)$': 'stem.conv.weight',
    r'^harmonic0\.bn\.': 'stem.conv.bn.',
    r'^group(\d)\.block(\d+)\.': r'stages.\1.blocks.\2.',
    r'\.(harmonic0\.conv|conv0)$': '.conv1.weight',
    r'\.(harmonic1\.conv|conv1)$': '.conv2.weight',
    r'\.convdim$': '.downsample.conv.weight',
    r'(blocks\.\d+)\.bn0\.': r'\1.norm1.',
    r'(blocks\.\d+)\.bn1\.': r'\1.norm2.',
    r'^bn\.': 'norm.',
    r'^fc\.': 'head.fc.',
}


def checkpoint_filter_fn(checkpoint: StateDict, model: nn.Module) -> StateDict:
    """Converts a checkpoint, see `convert_state_dict`. The authors' scripts save {params, epoch, optimizer}."""
    # The norms that see the stem's output: the first, unless its block passes that output on.
    norms = ['stages.0.blocks.0.norm1']
    if model.get_submodule('stages.0.blocks.0').downsample is None:
        count = sum(name.endswith('norm1') for name, _ in model.named_modules() if name.startswith('stages.0.'))
        norms = [f'stages.0.blocks.{i}.norm1' for i in range(count)] + ['stages.1.blocks.0.norm1']
    return convert_state_dict(checkpoint, model, names=KEY_NAMES, norms=norms)


# The authors' preparation of CIFAR-10 images.
_CIFAR: dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
    std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
)
default_cfgs = generate_default_cfgs(
    {name: paper_cfg(first_conv='stem.conv', classifier='head.fc', **_CIFAR) for name in _ARCHITECTURES}
)

register(HarmonicWRN, _ARCHITECTURES, checkpoint_filter_fn, lambda args: 4, flatten_sequential=True)
