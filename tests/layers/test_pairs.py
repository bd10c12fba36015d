"""Layers in which every input channel keeps its own functions, against plain convolutions with zeros elsewhere."""

import copy
import pickle

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from timm_harmonic import HarmonicConv2d, dct_basis
from timm_harmonic.common import InputError
from timm_harmonic.layers import HarmonicConv2dSame, dct_frequencies
from timm_harmonic.layers.dct import NORMALIZATIONS

arguments = st.fixed_dictionaries(
    dict(
        kernel_size=st.integers(2, 7),
        stride=st.sampled_from([1, 2, (2, 1)]),
        padding=st.sampled_from([0, 1, 2, (1, 0), 'same', 'valid']),
        dilation=st.sampled_from([1, 1, 2]),
        bias=st.booleans(),
        padding_mode=st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']),
        level=st.sampled_from([1, 2, 3, None, None]),
        dc=st.sampled_from([True, True, False]),
        normalization=st.sampled_from(NORMALIZATIONS),
        smoothness=st.sampled_from([None, 0.0, 1.5]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
)


def some(layer, seed):
    """Random pairs of a layer, at least one."""
    of = torch.rand(layer.in_channels, len(layer.basis), generator=torch.Generator().manual_seed(seed))
    return of >= of.flatten().kthvalue(1 + seed % of.numel()).values


def made(seed=0, kind=HarmonicConv2d, width=4, memory_format=torch.contiguous_format, **options):
    torch.manual_seed(seed)
    layer = kind(width, 6, **(dict(kernel_size=3) | options)).to(memory_format=memory_format)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.at_pairs(some(layer, seed))


def dense_of(layer, kept, filters):
    """The plain convolution whose DCT coefficients outside the set are zero, by the mathematics of orthogonality."""
    basis = dct_basis(layer.kernel_size[0], layer.level, layer.dc, 'ortho', dtype=torch.float64)
    coefficients = torch.einsum('oixy,nxy->oin', filters.double(), basis) * kept
    return torch.einsum('oin,nxy->oixy', coefficients, basis)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize('examples', [25, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('kind', [HarmonicConv2d, HarmonicConv2dSame])
def test_equals_a_convolution_without_the_other_coefficients(kind, last, examples):
    """Outputs and gradients in both forms, and fused."""

    @settings(max_examples=examples, deadline=None)
    @given(arguments, st.integers(0, 1000))
    def check(options, seed):
        torch.manual_seed(seed)
        if kind is HarmonicConv2dSame:
            options |= dict(padding=0, padding_mode='zeros')
        assume(not (options['padding'] == 'same' and options['stride'] != 1))
        assume(options['dc'] or options['level'] != 1)
        memory_format = torch.channels_last if last else torch.contiguous_format
        whole = kind(4, 6, **options).to(memory_format=memory_format)
        if options['bias']:
            nn.init.normal_(whole.bias)
        kept = some(whole, seed)
        plain = whole.fuse()
        with torch.no_grad():
            plain.weight.copy_(dense_of(whole, kept, whole.filters()))
        layer = whole.at_pairs(kept)
        assert layer.weight.shape == (6, kept.sum(), 1, 1)
        tolerance = 1e-12 if options['dtype'] is torch.float64 else 2e-5
        x = torch.randn(2, 4, 16, 15, dtype=options['dtype']).to(memory_format=memory_format)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = plain(theirs)
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        # The gradient of a coefficient is that of its function in the filter.
        of_filters = torch.einsum('oixy,nxy->oin', plain.weight.grad.double(), whole.basis.double())
        pairs = kept.t().nonzero()
        for form in ('dense', 'separable'):
            layer.form, ours.grad, layer.weight.grad = form, None, None
            output = layer(ours)
            assert options['padding_mode'] != 'zeros' or output.is_contiguous(memory_format=memory_format)
            assert reference.relative_error(output, expected) < tolerance
            assert reference.relative_error(layer.fuse()(x), expected) < tolerance
            (output * weights).sum().backward()
            assert reference.relative_error(ours.grad, theirs.grad) < 10 * tolerance
            found = layer.weight.grad[:, :, 0, 0].to(torch.float64)
            assert reference.relative_error(found, of_filters[:, pairs[:, 1], pairs[:, 0]]) < 10 * tolerance

    check()


@pytest.mark.slow
@pytest.mark.parametrize('form', ['dense', 'separable'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning')
def test_script_trace_compile_export(form, memory_format, tmp_path):
    layer = made(width=8, memory_format=memory_format, padding=1).eval()
    layer.form, x = form, torch.randn(2, 8, 9, 9).to(memory_format=memory_format)
    reference.check_every_way(layer, x, tmp_path / 'layer.onnx')


def by_meta(layer):
    empty = copy.deepcopy(layer).to('meta')
    assert empty(torch.empty(1, 4, 8, 8, device='meta')).shape[1] == 6
    empty.to_empty(device='cpu').load_state_dict(layer.state_dict())
    return empty


def other(layer, mask):
    return HarmonicConv2d(4, 6, 3).at_pairs(mask)


def loaded(layer, change=lambda value: value, assign=False):
    """Into a layer with as many other pairs."""
    new = other(layer, layer.kept[0, :, :, 0].flip(0))
    new.load_state_dict({key: change(value) for key, value in layer.state_dict().items()}, assign=assign)
    return new


def averaged(layer, kind):
    """Integers would come out one less."""
    averages = kind(layer, decay=0.9998)
    for _ in range(20):
        averages.update(layer)
    return averages.module


WAYS = dict(
    deepcopy=copy.deepcopy,
    pickle=lambda layer: pickle.loads(pickle.dumps(layer)),
    bfloat16=lambda layer: copy.deepcopy(layer).bfloat16().float(),
    meta=by_meta,
    load=loaded,
    assign=lambda layer: loaded(layer, assign=True),
    cast=lambda layer: loaded(layer, torch.Tensor.bfloat16),
    cast_and_assign=lambda layer: loaded(layer, torch.Tensor.bfloat16, assign=True),
    ema=lambda layer: averaged(layer, ModelEmaV2),
    ema_3=lambda layer: averaged(layer, ModelEmaV3),
    format=lambda layer: copy.deepcopy(layer).to(memory_format=torch.channels_last),
)


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS)
def test_what_keeps_the_pairs(way):
    layer = made(seed=20)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
        layer.bias.copy_(layer.bias.bfloat16())
    new = way(layer)
    assert torch.equal(new.kept, layer.kept)
    assert torch.equal(new.pairs, layer.pairs)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(new.float()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_only_fitting_states_are_loaded():
    layer = made(seed=20)
    state, kept = layer.state_dict(), layer.kept[0, :, :, 0]
    for error, wrong in [
        ('pairs in kept', dict(state, kept=torch.ones_like(layer.kept))),
        ('size mismatch', dict(state, kept=layer.kept[:, :3])),
        ('Missing key.*kept', {key: value for key, value in state.items() if key != 'kept'}),
        ('size mismatch', HarmonicConv2d(4, 6, 3).state_dict()),
        ('size mismatch', nn.Conv2d(4, 6, 3).state_dict()),
    ]:
        new = other(layer, kept.flip(0))
        with pytest.raises(RuntimeError, match=error):
            new.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*kept'):
        HarmonicConv2d(4, 6, 3).load_state_dict(state)


def test_pairs_within_levels_and_within_pairs():
    """A level is the set that is the same for all channels. The energy kept is the product."""
    torch.manual_seed(0)
    whole = HarmonicConv2d(4, 6, 3, smoothness=1.0).requires_grad_(False)
    kept = some(whole, 17)
    low = torch.tensor([i + j < 3 for i, j in dct_frequencies(3)])
    by_level = whole.at_level(3)
    torch.testing.assert_close(whole.at_pairs(low.expand(4, -1)).filters(), by_level.filters())
    first, second = whole.at_pairs(kept).at_level(3), by_level.at_pairs(kept[:, low])
    torch.testing.assert_close(first.filters(), second.filters())
    assert torch.equal(first.pairs, second.pairs)
    assert first.energy_kept == pytest.approx(second.energy_kept)
    assert first.energy_kept == pytest.approx(float(first.filters().square().sum() / whole.filters().square().sum()))
    fewer = first.at_pairs(5)
    assert fewer.weight.shape[1] == 5
    assert not (fewer.kept & ~first.kept).any()
    assert float(fewer.energies().sum()) == pytest.approx(float(first.energies().flatten().topk(5).values.sum()))
    lowest = min(first.levels())
    assert first.at_level(lowest).weight.shape[1] == len(first.columns_at(lowest)) > 0
    assert repr(first).endswith(f', level=3, smoothness=1.0, pairs={first.weight.shape[1]})')


@pytest.mark.parametrize(
    ('options', 'kept', 'words'),
    [
        ({}, torch.zeros(4, 9, dtype=torch.bool), 'some of them True, or a number from 1 to 36'),
        ({}, torch.ones(3, 9, dtype=torch.bool), r'booleans \(4, 9\)'),
        ({}, torch.ones(4, 9), 'booleans'),
        ({}, 0, 'from 1 to 36'),
        (dict(level=2), 13, 'from 1 to 12'),
        ({}, True, 'booleans'),
        ({}, '7', 'booleans'),
        (dict(groups=2), 4, 'groups.*lower its level'),
    ],
)
def test_wrong_pairs(options, kept, words):
    with pytest.raises(InputError, match=words):
        HarmonicConv2d(4, 6, 3, **options).at_pairs(kept)


def test_levels_that_leave_no_pairs():
    layer = HarmonicConv2d(4, 6, 3).at_pairs(torch.arange(9).expand(4, 9) == 8)
    with pytest.raises(InputError, match=r'level 4 leaves no pairs of HarmonicConv2d\(4, 6, .*pairs=4\): choose'):
        layer.at_level(4)
    with pytest.raises(InputError, match='on meta: its state dict says which pairs'):
        copy.deepcopy(layer).to('meta').at_level(4)


@pytest.mark.parametrize('form', ['dense', 'separable'])
def test_half_precision(form):
    layer = made(width=32, padding=1)
    layer.form, x = form, torch.randn(2, 32, 12, 12)
    with torch.autocast('cpu', torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert reference.relative_error(found.float(), layer(x)) < 0.05
    assert reference.relative_error(copy.deepcopy(layer).bfloat16()(x.bfloat16()).float(), layer(x)) < 0.05


def test_what_a_fused_layer_takes_over():
    layer = made(width=8, memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    dense = layer.fuse()
    layer.form = 'separable'
    gather, respond, mix = plain = layer.fuse()
    assert dense.weight.is_contiguous(memory_format=torch.channels_last)
    assert [type(module).__name__ for module in plain] == ['Gather', 'Conv2d', 'Conv2d']
    assert torch.equal(gather.places, layer.pairs[0])
    assert respond.groups == respond.out_channels == mix.in_channels == layer.weight.shape[1]
    assert not any(p.requires_grad for p in (dense.weight, respond.weight, mix.weight))
    assert mix.bias.requires_grad
