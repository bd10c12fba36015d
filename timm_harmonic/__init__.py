"""Harmonic networks for timm: importing this package registers the models."""

from importlib.metadata import version as _version

from .common import TimmHarmonicError as TimmHarmonicError
from .conversion.deploy import deploy as deploy
from .conversion.harmonize import harmonize as harmonize
from .conversion.refit import refit as refit
from .conversion.report import harmonic_report as harmonic_report
from .conversion.truncate import truncate as truncate
from .export.onnx import export_onnx as export_onnx
from .layers.block import HarmonicBlock2d as HarmonicBlock2d
from .layers.conv import HarmonicConv2d as HarmonicConv2d
from .layers.dct import dct_basis as dct_basis
from .models import harm_resnet as harm_resnet
from .models import harm_vgg as harm_vgg
from .models import harm_wrn as harm_wrn
from .models import harmonized as harmonized
from .models.harm_resnet import HarmonicResNet as HarmonicResNet
from .models.harm_vgg import HarmonicVGG as HarmonicVGG
from .models.harm_wrn import HarmonicWRN as HarmonicWRN

__version__ = _version('timm-harmonic')
