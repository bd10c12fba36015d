"""Harmonic networks for timm: importing this package registers the models."""

from importlib.metadata import version

from . import harm_resnet, harm_vgg, harmonized
from .block import HarmonicBlock2d
from .conv import HarmonicConv2d
from .convert import harmonize
from .dct import dct_basis
from .harm_resnet import HarmonicResNet
from .harm_vgg import HarmonicVGG
from .report import harmonic_report
from .truncation import truncate

__version__ = version('timm-harmonic')
__all__ = [
    'HarmonicBlock2d',
    'HarmonicConv2d',
    'HarmonicResNet',
    'HarmonicVGG',
    'dct_basis',
    'harm_resnet',
    'harm_vgg',
    'harmonic_report',
    'harmonize',
    'harmonized',
    'truncate',
]
