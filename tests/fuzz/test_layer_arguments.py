"""Layers with arguments of any kind: what nn.Conv2d takes with square filters they take, and compute by definition."""

import pytest
import reference
import torch
from hypothesis import strategies as st
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d

pytestmark = pytest.mark.usefixtures('one_thread')

NUMBERS = st.sampled_from([-1, 0, 1, 1, 1, 2, 2, 3])
PAIRS = NUMBERS | st.tuples(NUMBERS, NUMBERS)
ODD = st.sampled_from([None, '3', 1.5, True, float('nan'), (), (1, 2, 3), 10**20, [2]])
ARGUMENTS = dict(
    in_channels=st.sampled_from([0, 1, 2, 4, 6]),
    out_channels=st.sampled_from([0, 2, 4, 6]),
    kernel_size=st.integers(0, 7) | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=PAIRS,
    padding=PAIRS | st.sampled_from(['same', 'valid', 'full']),
    dilation=PAIRS,
    groups=st.sampled_from([-1, 0, 1, 1, 2, 3]),
    bias=st.booleans(),
    padding_mode=st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular', 'symmetric']),
)
OWN = dict(
    level=st.none() | st.integers(-1, 15),
    dc=st.booleans(),
    normalization=st.sampled_from(['l1', 'ortho', 'l2']),
    smoothness=st.none() | st.floats(-1, 11) | st.integers(0, 10),
    form=st.sampled_from(['dense', 'separable', 'fused']),
)
ERRORS = (RuntimeError, TypeError, ValueError)


def runs(make, x):
    """What a layer gives for x, or the error that it or its making raises."""
    try:
        with torch.no_grad():
            return make()(x)
    except ERRORS as error:
        return error


def by_definition(layer, x, options):
    """Every response by the slow functions of tests/reference.py, mixed."""
    k = layer.kernel_size[0]
    functions = reference.dct_functions(k, options['level'], layer.dc, layer.normalization, layer.smoothness)
    pads = layer.padding
    if pads == 'same':
        reach = [d * (k - 1) for d in layer.dilation[::-1]]
        sides = [side for total in reach for side in (total // 2, total - total // 2)]
    else:
        height, width = (0, 0) if pads == 'valid' else pads
        sides = [width, width, height, height]
    x = nn.functional.pad(x, sides, mode='constant' if layer.padding_mode == 'zeros' else layer.padding_mode)
    filtered = reference.responses(x, functions, layer.stride, 0, layer.dilation)
    return reference.mix(filtered, layer.weight, layer.bias, layer.groups)


@pytest.mark.filterwarnings('ignore:Using padding=.same. with even kernel lengths:UserWarning')
@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors is a no-op:UserWarning')
def test_as_nn_conv2d(search):
    """Where nn.Conv2d raises, so do they, and nothing but errors for people. Where not, they compute the definition."""

    def check(options, own, seed, size, dtype):
        torch.manual_seed(seed)
        x = torch.randn(2, max(options['in_channels'], 1), *size, dtype=dtype)
        plain = runs(lambda: nn.Conv2d(**options, dtype=dtype), x)
        layer = None

        def make():
            nonlocal layer
            layer = HarmonicConv2d(**options, **own, dtype=dtype).eval()
            return layer

        y = runs(make, x)
        if isinstance(plain, Exception):
            assert isinstance(y, ERRORS), (plain, options)
            return
        side = options['kernel_size']
        k = side if isinstance(side, int) else side[0]
        possible = (
            (isinstance(side, int) or side[0] == side[1])
            and k > 0
            and options['in_channels'] > 0
            and options['out_channels'] > 0
            and own['level'] in (None, *range(1, 2 * k))
            and (own['dc'] or (own['level'] != 1 and k > 1))
            and own['normalization'] != 'l2'
            and (own['smoothness'] is None or 0 <= own['smoothness'] <= 10)
            and own['form'] != 'fused'
        )
        if not possible:
            assert isinstance(y, (TypeError, ValueError)), (options, own)
            assert len(str(y)) > 10
            return
        assert not isinstance(y, Exception), y
        assert y.shape == plain.shape
        tolerance = 1e-10 if dtype is torch.float64 else 5e-4
        expected = by_definition(layer.double(), x.double(), {**options, **own})
        if y.numel():
            assert reference.relative_error(y, expected) < tolerance
            assert reference.relative_error(layer.to(dtype).fuse()(x), expected) < tolerance

    search(
        check,
        options=st.fixed_dictionaries(ARGUMENTS),
        own=st.fixed_dictionaries(OWN),
        seed=st.integers(0, 1000),
        size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )


@pytest.mark.parametrize('kind', [HarmonicConv2d, HarmonicBlock2d])
def test_arguments_of_other_types(search, kind):
    """One argument is nonsense: an error for people, or a layer that works."""
    defaults = dict(in_channels=4, out_channels=4, kernel_size=3)

    def check(name, value):
        y = runs(lambda: kind(**{**defaults, name: value}).eval(), torch.randn(1, 4, 8, 8))
        assert isinstance(y, (torch.Tensor, *ERRORS))

    names = [*ARGUMENTS, *OWN]
    search(check, name=st.sampled_from(names), value=ODD)
