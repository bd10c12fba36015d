"""Harmonic networks for timm: importing this package registers the models."""

from importlib.metadata import version

from . import harm_resnet, harm_vgg
from .block import HarmonicBlock2d
from .conv import HarmonicConv2d
from .dct import dct_basis
from .harm_resnet import HarmonicResNet
from .harm_vgg import HarmonicVGG

__version__ = version('timm-harmonic')
__all__ = ['HarmonicBlock2d', 'HarmonicConv2d', 'HarmonicResNet', 'HarmonicVGG', 'dct_basis', 'harm_resnet', 'harm_vgg']
