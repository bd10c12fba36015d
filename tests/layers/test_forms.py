"""Both forms of a layer compute the same, in evaluation and in training, and are plain modules when fused."""

import copy
import pickle

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.layers import HarmonicConv2dSame
from timm_harmonic.layers.dct import NORMALIZATIONS
from timm_harmonic.layers.separable import RepeatChannels

LAYERS = [HarmonicConv2d, HarmonicConv2dSame, HarmonicBlock2d]

arguments = st.fixed_dictionaries(
    dict(
        kernel_size=st.sampled_from([2, 3, 4, 5, 7]),
        stride=st.sampled_from([1, 2, (2, 1)]),
        padding=st.sampled_from([0, 1, 2, (1, 0), 'same', 'valid']),
        dilation=st.sampled_from([1, 1, 2]),
        groups=st.sampled_from([1, 2, 4]),
        bias=st.booleans(),
        padding_mode=st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']),
        level=st.sampled_from([1, 1, 2, 3, None]),
        dc=st.sampled_from([True, True, False]),
        normalization=st.sampled_from(NORMALIZATIONS),
        smoothness=st.sampled_from([None, 0.0, 1.5]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
)


def made(kind, seed, **options):
    """A layer with random coefficients and statistics, in evaluation."""
    torch.manual_seed(seed)
    if kind is HarmonicConv2dSame:
        options |= dict(padding=0, padding_mode='zeros')
    assume(not (options['padding'] == 'same' and options['stride'] != 1))
    assume(options['dc'] or options['level'] != 1)
    layer = kind(4, 8, **options)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return reference.randomize_batch_norm(layer, seed).eval()


def other_form(layer):
    other = copy.deepcopy(layer)
    other.form = 'separable'
    return other


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize('examples', [25, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', LAYERS)
def test_forms_are_equal(kind, examples):
    """Outputs as they are and fused, and gradients."""

    @settings(max_examples=examples, deadline=None)
    @given(arguments, st.integers(0, 1000))
    def check(options, seed):
        dense = made(kind, seed, **options)
        separable = other_form(dense)
        tolerance = 1e-12 if options['dtype'] is torch.float64 else 2e-5
        x = torch.randn(2, 4, 15, 14, dtype=options['dtype'])
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(images) for layer, images in zip((dense, separable), inputs, strict=True)]
        assert reference.relative_error(outputs[1], outputs[0]) < tolerance
        for layer in (dense, separable):
            assert reference.relative_error(layer.fuse()(x), outputs[0]) < tolerance
        weights = torch.randn_like(outputs[0])
        for output in outputs:
            (output * weights).sum().backward()
        assert reference.relative_error(inputs[1].grad, inputs[0].grad) < 10 * tolerance
        for ours, theirs in zip(separable.parameters(), dense.parameters(), strict=True):
            assert reference.relative_error(ours.grad, theirs.grad) < 10 * tolerance

    check()


@pytest.mark.parametrize('options', [dict(), dict(smoothness=1)])
@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('kind', LAYERS)
def test_forms_are_equal_in_every_basis(kind, normalization, options):
    torch.manual_seed(0)
    for level in (1, 2):
        dense = kind(4, 8, 3, level=level, normalization=normalization, dtype=torch.float64, **options).eval()
        x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(other_form(dense)(x), dense(x))
        torch.testing.assert_close(other_form(dense).fuse()(x), dense(x))


@pytest.mark.parametrize('kind', [HarmonicConv2d, HarmonicConv2dSame])
@pytest.mark.parametrize(('level', 'groups', 'names'), [(1, 1, 'rm'), (2, 1, 'xrm'), (2, 2, 'rm')])
def test_fused_into_plain_modules(kind, level, groups, names):
    """What is fixed stays so, and there are no other parameters. Dynamic padding stays dynamic."""
    layer = kind(4, 8, 3, 2, level=level, groups=groups, form='separable')
    plain = layer.fuse()
    fixed = Conv2dSame if kind is HarmonicConv2dSame else nn.Conv2d
    assert [type(module) for module in plain] == [dict(x=RepeatChannels, r=fixed, m=nn.Conv2d)[name] for name in names]
    assert plain.mix.kernel_size == (1, 1)
    assert not plain.respond.weight.requires_grad
    assert sum(p.numel() for p in plain.mix.parameters()) == sum(p.numel() for p in layer.parameters())
    for side in (8, 9, 15):
        x = torch.randn(1, 4, side, side)
        torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_every_filter_has_one_output(groups):
    """Without groups: then blocked kernels and those of 8 bits are fast. It survives pickling, and keeps the format."""
    layer = HarmonicConv2d(4, 8, 3, level=2, groups=groups, form='separable')
    plain = pickle.loads(pickle.dumps(layer.fuse()))
    assert (plain.respond.groups == plain.respond.out_channels) == (groups == 1)
    for x in (torch.randn(4, 9, 8), torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(plain(x), layer(x))
        assert x.ndim == 3 or groups > 1 or plain.repeat(x).is_contiguous(memory_format=torch.channels_last)


def test_what_a_fused_layer_takes_over():
    layer = HarmonicConv2d(4, 8, 3, level=2, form='separable', dtype=torch.float64)
    layer.to(memory_format=torch.channels_last).weight.requires_grad_(False)
    plain = layer.eval().fuse()
    assert not any(module.training for module in plain.modules())
    assert not plain.mix.weight.requires_grad
    assert plain.mix.bias.requires_grad
    assert plain.respond.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.respond.weight.dtype == torch.float64
    assert layer.at_level(1).form == 'separable'
    HarmonicConv2d(4, 8, 3, level=2, dtype=torch.float64).load_state_dict(layer.state_dict())  # which holds no form


@pytest.mark.slow
@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('level', [1, 2])
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
def test_script_trace_compile_export(kind, level):
    torch.compiler.reset()  # all layers share a limit of compilations
    layer = kind(4, 8, 3, 2, level=level, form='separable').eval()
    x = torch.randn(2, 4, 16, 16)
    ways = [
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
        torch.fx.symbolic_trace(layer),
        torch.export.export(layer, (x,)).module(),
        torch.compile(layer, fullgraph=True, backend='eager'),
    ]
    for way in ways:
        torch.testing.assert_close(way(x), layer(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """As near to float32 as the dense form is, within a factor."""
    torch.manual_seed(0)
    exact = HarmonicConv2d(32, 32, 3, padding=1, level=2)
    x = torch.randn(2, 32, 12, 12)
    expected = exact(x)
    errors = []
    for form in ('dense', 'separable'):
        layer = copy.deepcopy(exact).to(dtype)
        layer.form = form
        errors.append(reference.relative_error(layer(x.to(dtype)).float(), expected))
    assert errors[1] < 4 * errors[0]
    with torch.autocast('cpu', torch.bfloat16):
        exact.form = 'separable'
        assert exact(x).dtype == torch.bfloat16
        assert reference.relative_error(exact(x).float(), expected) < 0.05
