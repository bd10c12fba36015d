"""Layers that filter mixtures of their input channels, against a 1 x 1 convolution before the same layer."""

import copy
import pickle

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from timm_harmonic import HarmonicConv2d
from timm_harmonic.common import InputError
from timm_harmonic.layers import HarmonicConv2dSame
from timm_harmonic.layers.dct import NORMALIZATIONS

arguments = st.fixed_dictionaries(
    dict(
        kernel_size=st.integers(2, 5),
        stride=st.sampled_from([1, 2, (2, 1)]),
        padding=st.sampled_from([0, 1, 2, (1, 0), 'same', 'valid']),
        dilation=st.sampled_from([1, 1, 2]),
        bias=st.booleans(),
        padding_mode=st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']),
        level=st.sampled_from([1, 2, 3, None, None]),
        normalization=st.sampled_from(NORMALIZATIONS),
        smoothness=st.sampled_from([None, 1.5]),
    )
)


def made(seed=0, pairs=11, kind=HarmonicConv2d, **options):
    torch.manual_seed(seed)
    layer = kind(6, 8, **(dict(kernel_size=3) | options)).at_mixtures(torch.randn(4, 6))
    return layer.at_pairs(pairs) if pairs else layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('kind', [HarmonicConv2d, HarmonicConv2dSame])
def test_equals_two_convolutions(kind, last):
    """Outputs and gradients in both forms, fused, and by the filters of the whole; features are what is mixed last."""

    @settings(max_examples=25, deadline=None)
    @given(arguments, st.integers(0, 20))
    def check(options, pairs):
        if kind is HarmonicConv2dSame:
            options |= dict(padding=0, padding_mode='zeros')
        assume(not (options['padding'] == 'same' and options['stride'] != 1))
        memory_format = torch.channels_last if last else torch.contiguous_format
        torch.manual_seed(pairs)
        whole = kind(6, 8, dtype=torch.float64, **options).to(memory_format=memory_format)
        mixtures, back = torch.randn(2, 4, 6, dtype=torch.float64)
        layer = whole.at_mixtures(mixtures, back)
        behind = kind(4, 8, dtype=torch.float64, **options).to(memory_format=memory_format)
        with torch.no_grad():
            behind.weight.copy_(torch.einsum('ocnz,mc->omnz', whole.weight, back))
            if options['bias']:
                behind.bias.copy_(whole.bias)
        if 0 < pairs <= layer.weight[0].numel():
            layer, behind = layer.at_pairs(pairs), behind.at_pairs(pairs)
        x = torch.randn(2, 6, 16, 15, dtype=torch.float64).to(memory_format=memory_format)
        first = mixtures[:, :, None, None].clone().requires_grad_()
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = behind(F.conv2d(theirs, first))
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        once = whole._to_conv2d(layer.filters(), layer.bias)
        assert reference.relative_error(once(x), expected) < 1e-12
        of_features = torch.einsum('of,bfxy->boxy', layer.weight.flatten(1), layer.features(x))
        of_features = of_features if layer.bias is None else of_features + layer.bias[:, None, None]
        assert reference.relative_error(of_features, expected) < 1e-12
        for form in ('dense', 'separable'):
            layer.form, ours.grad = form, None
            layer.zero_grad()
            assert reference.relative_error(layer.fuse()(x), expected) < 1e-12
            output = layer(ours)
            assert reference.relative_error(output, expected) < 1e-12
            (output * weights).sum().backward()
            for mine, other in ((ours, theirs), (layer.mixtures, first), (layer.weight, behind.weight)):
                assert reference.relative_error(mine.grad, other.grad) < 1e-11

    check()


def test_as_many_mixtures_as_channels_lose_nothing():
    """Fewer stand for the nearest filters."""
    torch.manual_seed(0)
    whole, x = HarmonicConv2d(6, 8, 3, dtype=torch.float64), torch.randn(2, 6, 9, 9, dtype=torch.float64)
    whole.requires_grad_(False)
    torch.testing.assert_close(whole.at_mixtures(torch.randn(6, 6))(x), whole(x))
    for number in (1, 3, 5):
        layer = whole.at_mixtures(torch.eye(number, 6))
        assert layer.mixtures.shape == (number, 6, 1, 1)
        assert layer.weight.shape == (8, number, 9, 1)
        torch.testing.assert_close(layer.filters()[:, :number], whole.filters()[:, :number])
        assert not layer.filters()[:, number:].any()
    mixtures = torch.randn(3, 6, dtype=torch.float64)
    nearest = whole.filters().transpose(1, 3) @ torch.linalg.pinv(mixtures) @ mixtures
    torch.testing.assert_close(whole.at_mixtures(mixtures).filters(), nearest.transpose(1, 3))
    assert not layer.is_complete()
    assert layer.energy_kept is None
    assert layer.at_level(2).weight.shape == (8, 5, 3, 1)
    assert repr(layer.at_pairs(9)).endswith(', pairs=9, mixtures=5)')


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'separable'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
@pytest.mark.parametrize('pairs', [0, 11])
def test_script_trace_compile_export(form, memory_format, pairs, tmp_path):
    layer = made(pairs=pairs, padding=1).to(memory_format=memory_format).eval()
    layer.form, x = form, torch.randn(2, 6, 9, 9).to(memory_format=memory_format)
    reference.check_every_way(layer, x, tmp_path / 'layer.onnx')


def by_meta(layer):
    empty = copy.deepcopy(layer).to('meta')
    assert empty(torch.empty(1, 6, 8, 8, device='meta')).shape[1] == 8
    empty.to_empty(device='cpu').load_state_dict(layer.state_dict())
    return empty


def loaded(layer, assign=False):
    new = made(seed=1)
    new.load_state_dict(layer.state_dict(), assign=assign)
    return new


def averaged(layer, kind):
    averages = kind(layer, decay=0.9998)
    averages.update(layer)
    return averages.module


WAYS = dict(
    deepcopy=copy.deepcopy,
    pickle=lambda layer: pickle.loads(pickle.dumps(layer)),
    meta=by_meta,
    load=loaded,
    assign=lambda layer: loaded(layer, assign=True),
    ema=lambda layer: averaged(layer, ModelEmaV2),
    ema_3=lambda layer: averaged(layer, ModelEmaV3),
    format=lambda layer: copy.deepcopy(layer).to(memory_format=torch.channels_last),
)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_what_keeps_the_mixtures(way):
    layer, x = made(seed=20), torch.randn(2, 6, 9, 9)
    new = way(layer)
    torch.testing.assert_close(new.mixtures, layer.mixtures)
    torch.testing.assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('state', [HarmonicConv2d(6, 8, 3), HarmonicConv2d(4, 8, 3), nn.Conv2d(6, 8, 3)])
def test_only_fitting_states_are_loaded(state):
    with pytest.raises(RuntimeError, match=r'size mismatch|Missing key.*mixtures'):
        made(pairs=0).load_state_dict(state.state_dict())
    with pytest.raises(RuntimeError, match=r'size mismatch|Unexpected key'):
        HarmonicConv2d(6, 8, 3).load_state_dict(made().state_dict())


def test_frozen_layers_and_half_precision():
    layer = HarmonicConv2d(6, 8, 3).requires_grad_(False).at_mixtures(torch.randn(4, 6))
    assert not any(parameter.requires_grad for parameter in (*layer.parameters(), *layer.fuse().parameters()))
    half, x = copy.deepcopy(layer).bfloat16(), torch.randn(2, 6, 9, 9)
    assert half(x.bfloat16()).dtype == half.fuse()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert reference.relative_error(layer(x), layer.fuse()(x)) < 0.02
    assert reference.relative_error(half(x.bfloat16()), layer(x)) < 0.05


@pytest.mark.parametrize(
    ('layer', 'shape', 'words'),
    [
        (HarmonicConv2d(6, 8, 3), (4, 5), r'weights \(M, 6\), got \[\(4, 5\)\]'),
        (HarmonicConv2d(6, 8, 3), (6,), r'got \[\(6,\)\]'),
        (HarmonicConv2d(6, 8, 3), (0, 6), r'got \[\(0, 6\)\]'),
        (HarmonicConv2d(6, 8, 3, groups=2), (2, 6), 'it has groups'),
        (HarmonicConv2d(6, 8, 3).at_pairs(9), (2, 6), 'it has groups, pairs'),
        (HarmonicConv2d(6, 8, 3).at_mixtures(torch.ones(3, 6)), (2, 6), 'pairs, mixtures'),
    ],
)
def test_wrong_mixtures(layer, shape, words):
    with pytest.raises(InputError, match=words):
        layer.at_mixtures(torch.ones(shape))


def test_both_ways_must_fit():
    with pytest.raises(InputError, match=r'got \[\(3, 6\), \(4, 6\)\]'):
        HarmonicConv2d(6, 8, 3).at_mixtures(torch.ones(4, 6), torch.ones(3, 6))
