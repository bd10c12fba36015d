"""Harmonic VGG (Ulicny, Krylov, Dahyot, arXiv:2001.06570)."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vgg import VGG, cfgs
from torch import nn

from .checkpoints import convert_state_dict
from .pretrained import build_model, paper_cfg
from .swap import Levels, check_channels, expand_levels, make_harmonic

__all__ = ['HarmonicVGG', 'checkpoint_filter_fn']


class HarmonicVGG(VGG):
    """timm's VGG with harmonic layers in place of its 3 x 3 convolutions.

    The root is a `HarmonicBlock2d` (normalised responses), every other one a `HarmonicConv2d`. The classifier's
    layers, which timm writes as convolutions, stay plain and start as the authors' linear layers do.

    Args:
        cfg: Widths and 'M' for pooling, as in timm's VGG.
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the images.
        levels: The paper's lambda for the five resolutions: None (all frequencies), an integer for all, or five
            entries. The root belongs to the first.
        harmonic_stem: Whether the root is harmonic.
        harmonic_blocks: Whether the other convolutions are.
        normalization: Of the DCT functions, 'l1' (the authors') or 'ortho'.
        **kwargs: Whatever timm's VGG takes.

    Raises:
        ValueError: If an option is out of range, naming it.
        TypeError: If levels has another type, or a keyword is unknown.
    """

    def __init__(
        self,
        cfg: list[Any],
        num_classes: int = 1000,
        in_chans: int = 3,
        levels: Levels = None,
        harmonic_stem: bool = True,
        harmonic_blocks: bool = True,
        normalization: str = 'l1',
        **kwargs: Any,
    ) -> None:
        check_channels(num_classes, in_chans)
        resolution_levels = expand_levels(levels, cfg.count('M'))
        super().__init__(cfg, num_classes=num_classes, in_chans=in_chans, **kwargs)
        for layer in (self.pre_logits.fc1, self.pre_logits.fc2):
            nn.init.normal_(layer.weight, std=0.01)
        self.levels = resolution_levels

        def level_of(name: str) -> int | None:
            index = int(name.split('.')[1])
            return resolution_levels[sum(end < index for end in self.feature_ends[:-1])]

        make_harmonic(
            self,
            'features.0',
            level_of,
            within='features.',
            harmonic_stem=harmonic_stem,
            harmonic_blocks=harmonic_blocks,
            normalization=normalization,
        )


# The authors' names of parameters, as regular expressions, and ours.
KEY_NAMES = {
    r'^classifier\.0\.': 'pre_logits.fc1.',
    r'^classifier\.3\.': 'pre_logits.fc2.',
    r'^classifier\.6\.': 'head.fc.',
}
checkpoint_filter_fn = partial(convert_state_dict, names=KEY_NAMES, norm='features.1')


def _create(variant: str, pretrained: bool, **kwargs: Any) -> HarmonicVGG:
    base = variant.split('_')[1]
    if variant.endswith('_bn'):
        kwargs.setdefault('norm_layer', nn.BatchNorm2d)
    return build_model(
        HarmonicVGG,
        variant,
        pretrained,
        model_cfg=cfgs[base],
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5)),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        name: paper_cfg(first_conv='features.0', classifier='head.fc')
        for name in (
            'harm_vgg11',
            'harm_vgg11_bn',
            'harm_vgg13',
            'harm_vgg13_bn',
            'harm_vgg16',
            'harm_vgg16_bn',
            'harm1_vgg16_bn',
            'harm_vgg19',
            'harm_vgg19_bn',
        )
    }
)


@register_model
def harm_vgg11(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-11."""
    return _create('harm_vgg11', pretrained, **kwargs)


@register_model
def harm_vgg11_bn(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-11 with batch normalisation."""
    return _create('harm_vgg11_bn', pretrained, **kwargs)


@register_model
def harm_vgg13(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-13."""
    return _create('harm_vgg13', pretrained, **kwargs)


@register_model
def harm_vgg13_bn(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-13 with batch normalisation."""
    return _create('harm_vgg13_bn', pretrained, **kwargs)


@register_model
def harm_vgg16(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-16."""
    return _create('harm_vgg16', pretrained, **kwargs)


@register_model
def harm_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harm-VGG16-BN of the paper."""
    return _create('harm_vgg16_bn', pretrained, **kwargs)


@register_model
def harm1_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """VGG-16 with batch normalisation and only the first layer harmonic."""
    return _create('harm1_vgg16_bn', pretrained, **dict(dict(harmonic_blocks=False), **kwargs))


@register_model
def harm_vgg19(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-19."""
    return _create('harm_vgg19', pretrained, **kwargs)


@register_model
def harm_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> HarmonicVGG:
    """Harmonic VGG-19 with batch normalisation."""
    return _create('harm_vgg19_bn', pretrained, **kwargs)
