"""Harmonic VGG (Ulicny, Krylov, Dahyot, arXiv:2001.06570)."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.vgg import VGG, cfgs
from torch import nn

from .checkpoints import convert_state_dict
from .options import StageLevels, check_channels, levels_of_stages, make_network_harmonic, register
from .paper import paper_cfg


class HarmonicVGG(VGG):
    """timm's VGG with harmonic layers in place of its 3 x 3 convolutions.

    The stem is a `HarmonicBlock2d` (normalised responses), every other convolution a `HarmonicConv2d`. The classifier's
    layers, which timm writes as convolutions, stay plain and start as the authors' linear layers do.

    Args:
        cfg: Widths and 'M' for pooling, as in timm's VGG.
        levels: The paper's lambda for the five resolutions. The stem belongs to the first.
        **kwargs: Other options of timm's VGG. See `HarmonicResNet` for arguments that are not listed, and for errors.
    """

    def __init__(
        self,
        cfg: list[Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        levels: StageLevels = None,
        harmonic_stem: bool = True,
        harmonic_blocks: bool = True,
        normalization: str = 'l1',
        smoothness: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_channels(num_classes, in_chans)
        self.levels = levels_of_stages(levels, cfg.count('M'))
        super().__init__(cfg, num_classes=num_classes, in_chans=in_chans, **kwargs)
        for layer in (self.pre_logits.fc1, self.pre_logits.fc2):
            nn.init.normal_(layer.weight, std=0.01)
        basis = dict(normalization=normalization, smoothness=smoothness)
        make_network_harmonic(self.features, '0', self._level_of, harmonic_stem, harmonic_blocks, basis)

    def _level_of(self, name: str) -> int | None:
        return self.levels[sum(end < int(name) for end in self.feature_ends[:-1])]


_ARCHITECTURES: dict[str, dict[str, Any]] = {
    f'harm_vgg{depth}': dict(cfg=cfgs[f'vgg{depth}']) for depth in (11, 13, 16, 19)
}
_ARCHITECTURES |= {f'{name}_bn': dict(args, norm_layer=nn.BatchNorm2d) for name, args in _ARCHITECTURES.items()}
_ARCHITECTURES['harm1_vgg16_bn'] = dict(_ARCHITECTURES['harm_vgg16_bn'], harmonic_blocks=False)

KEY_NAMES = {
    r'^classifier\.0\.': 'pre_logits.fc1.',
    r'^classifier\.3\.': 'pre_logits.fc2.',
    r'^classifier\.6\.': 'head.fc.',
}
checkpoint_filter_fn = partial(convert_state_dict, names=KEY_NAMES, norms=['features.1'])

default_cfgs = generate_default_cfgs(
    {name: paper_cfg(first_conv='features.0', classifier='head.fc') for name in _ARCHITECTURES}
)

register(HarmonicVGG, _ARCHITECTURES, checkpoint_filter_fn, lambda args: 6, flatten_sequential=True)
