"""The harmonic layers, and the DCT basis that their filters are composed of."""

from .base import HarmonicLayer, conv_args
from .block import HarmonicBlock2d
from .compose import compose, format_of
from .conv import HarmonicConv2d, HarmonicConv2dSame
from .dct import check_level, dct_basis, dct_frequencies, full_level, project
