"""The harmonic layers, and the DCT basis that their filters are composed of."""

from .base import COMPUTED, HarmonicLayer, computes_weight, conv_args, owns_weight
from .block import HarmonicBlock2d
from .conv import HarmonicConv2d, HarmonicConv2dSame
from .dct import check_level, dct_frequencies, full_level, name_of_basis, options_of_basis
from .separable import FORMS, Gather, RepeatChannels, check_form
