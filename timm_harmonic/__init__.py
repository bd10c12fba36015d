"""Harmonic networks for timm: importing this package registers the models."""

from importlib.metadata import version

from .common import TimmHarmonicError
from .conversion.deploy import deploy
from .conversion.harmonize import harmonize
from .conversion.refit import refit
from .conversion.report import harmonic_report
from .conversion.truncate import truncate
from .export.onnx import export_onnx
from .layers.block import HarmonicBlock2d
from .layers.conv import HarmonicConv2d
from .layers.dct import dct_basis
from .models import harm_resnet, harm_vgg, harm_wrn, harmonized
from .models.harm_resnet import HarmonicResNet
from .models.harm_vgg import HarmonicVGG
from .models.harm_wrn import HarmonicWRN

__version__ = version('timm-harmonic')
__all__ = [
    'HarmonicBlock2d',
    'HarmonicConv2d',
    'HarmonicResNet',
    'HarmonicVGG',
    'HarmonicWRN',
    'TimmHarmonicError',
    'dct_basis',
    'deploy',
    'export_onnx',
    'harm_resnet',
    'harm_vgg',
    'harm_wrn',
    'harmonic_report',
    'harmonize',
    'harmonized',
    'refit',
    'truncate',
]
