"""The two layers against filtering by every DCT function and mixing the responses, and their fused form."""

import copy
import pickle

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.layers.dct import NORMALIZATIONS

LAYERS = [HarmonicConv2d, HarmonicBlock2d]
# torch warns of this once in a process, for nn.Conv2d as well.
EVEN_SAME = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
EXAMPLES = [25, pytest.param(100, marks=pytest.mark.slow)]


@st.composite
def layer_arguments(draw):
    """Arguments that nn.Conv2d and the DCT both accept."""
    k = draw(st.integers(1, 7))
    level = draw(st.none() | st.integers(1, 2 * k - 1))
    dc = draw(st.booleans()) or k == 1 or level == 1
    groups = draw(st.sampled_from([1, 2, 3]))
    stride = draw(st.integers(1, 4))
    padding = draw(st.integers(0, 3) | st.sampled_from(['valid', 'same'] if stride == 1 else ['valid']))
    return dict(
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=k,
        stride=stride,
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])),
        level=level,
        dc=dc,
        normalization=draw(st.sampled_from(['l1', 'ortho'])),
        smoothness=draw(st.none() | st.sampled_from([0, 0.5, 1, 2, 3.5])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def filled(cls, args, seed):
    torch.manual_seed(seed)
    layer = reference.randomize_batch_norm(cls(**args), seed)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def oracle(layer, x, weight, bias):
    """Filter by each DCT function, normalise and scale if the layer does, mix 1 x 1."""
    kept, smoothness = (layer.kernel_size[0], layer.level, layer.dc), layer.smoothness
    if isinstance(layer, HarmonicBlock2d) and smoothness is not None:
        functions = reference.dct_functions(*kept, 'ortho')
    else:
        functions = reference.dct_functions(*kept, layer.normalization, smoothness)
    padding = layer.padding if isinstance(layer.padding, str) else layer.padding[0]
    y = reference.responses(x, functions, layer.stride, padding, layer.dilation[0], layer.padding_mode)
    if isinstance(layer, HarmonicBlock2d):
        mean, var = layer.bn.running_mean, layer.bn.running_var
        if layer.training:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        y = (y - mean[:, None, None]) / torch.sqrt(var[:, None, None] + layer.bn.eps)
        y = y * reference.spectrum(*kept, smoothness).to(y).repeat(layer.in_channels)[:, None, None]
    return reference.mix(y, weight, bias, layer.groups)


def gradients(output, weights, inputs):
    """Gradients of a weighted sum of the output; None where an input does not matter."""
    return torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)


@EVEN_SAME
@pytest.mark.parametrize('examples', EXAMPLES)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('cls', LAYERS)
def test_layer_is_filtering_and_mixing(cls, training, examples):
    @settings(max_examples=examples, deadline=None)
    @given(args=layer_arguments(), seed=st.integers(0, 2**16))
    def check(args, seed):
        layer = filled(cls, args, seed).train(training)
        tolerance = TOLERANCE[args['dtype']]
        x = torch.randn(2, args['in_channels'], 13, 15, dtype=args['dtype'], requires_grad=True)
        inputs = [x, *layer.parameters()]
        expected = oracle(layer, x, layer.weight, layer.bias)
        actual = layer(x)
        assert actual.shape == expected.shape
        assert reference.relative_error(actual, expected) < tolerance
        weights = torch.randn_like(expected)
        for ours, theirs in zip(gradients(actual, weights, inputs), gradients(expected, weights, inputs), strict=True):
            # Batch statistics cancel a constant: a gradient may be zero, and is compared on the scale of the weights.
            assert (ours - theirs).abs().max() < tolerance * max(1.0, theirs.abs().max())

    check()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('cls', LAYERS)
def test_fuse_keeps_flags_and_consumes_no_randomness(cls, training):
    layer = cls(3, 8, 3, bias=training).to(torch.bfloat16).train(training).requires_grad_(training)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    conv = layer.fuse()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(conv) is nn.Conv2d
    assert conv.training is training
    assert all(p.dtype == torch.bfloat16 and p.requires_grad is training and p.is_leaf for p in conv.parameters())
    assert conv.weight.data_ptr() != layer.weight.data_ptr()
    assert (conv.bias is not None) is (training or cls is HarmonicBlock2d)
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert layer.to('meta').fuse().weight.is_meta


def test_block_with_frozen_statistics_trains_exactly():
    """bn.eval() inside a training network: the fused form, differentiable."""
    layer = filled(HarmonicBlock2d, dict(in_channels=3, out_channels=4, kernel_size=3, dtype=torch.float64), 0)
    layer.train().bn.eval()
    before = copy.deepcopy(layer.bn.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    normalised = layer.bn(reference.responses(x, reference.dct_functions(3)))
    expected = reference.mix(normalised, layer.weight, layer.bias, 1)
    torch.testing.assert_close(layer(x), expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(gradients(y, weights, [layer.weight]) for y in (layer(x), expected)))
    torch.testing.assert_close(layer.bn.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, FrozenBatchNorm2d, lambda n: nn.GroupNorm(2, n), nn.InstanceNorm2d])
@pytest.mark.parametrize('training', [False, True])
def test_block_with_another_normalisation(norm, training):
    """With learned scales, frozen, or without running statistics: the layer computes what the module in `bn` does."""
    torch.manual_seed(0)
    layer = HarmonicBlock2d(4, 6, 3, groups=2).train(training)
    layer.bn = norm(36).train(training)
    reference.randomize_batch_norm(layer)
    with torch.no_grad():
        for tensor in (getattr(layer.bn, 'weight', None), getattr(layer.bn, 'running_var', None)):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 9, 9)
    normalised = copy.deepcopy(layer.bn)(reference.responses(x, reference.dct_functions(3)))
    expected = reference.mix(normalised, layer.weight, layer.bias, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    if hasattr(layer.bn, 'running_mean') and layer.bn.running_mean is not None:
        layer.eval()
        torch.testing.assert_close(layer.fuse()(x), layer(x), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=r'cannot fuse: .*Norm.* has no running statistics'):
            layer.fuse()


@pytest.mark.parametrize('cls', LAYERS)
def test_initialisation_is_the_authors(cls):
    """Kaiming over fan-out on the authors' shapes: (O, I, P, 1, 1), or (O, I * P, 1, 1) before normalisation."""
    torch.manual_seed(0)
    layer = cls(64, 256, 3, groups=2)
    shape = (256, 32 * 9, 1, 1) if cls is HarmonicBlock2d else (256, 32, 9, 1, 1)
    torch.manual_seed(0)
    expected = nn.init.kaiming_normal_(torch.empty(shape), mode='fan_out', nonlinearity='relu')
    assert torch.equal(layer.weight.flatten(), expected.flatten())
    std = (2 / 256) ** 0.5 if cls is HarmonicBlock2d else (2 / (256 * 9)) ** 0.5
    assert abs(layer.weight.std().item() / std - 1) < 0.02
    assert not layer.bias.any()


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
def test_from_conv2d_is_exact(normalization, dtype):
    conv = nn.Conv2d(8, 12, 5, stride=2, padding=2, dilation=2, groups=4, padding_mode='reflect', dtype=dtype)
    conv.weight.requires_grad_(False)
    layer = HarmonicConv2d.from_conv2d(conv.eval(), normalization=normalization)
    x = torch.randn(2, 8, 20, 20, dtype=dtype)
    assert reference.relative_error(layer(x), conv(x)) < (1e-13 if dtype == torch.float64 else 2e-6)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    fused = layer.fuse()
    assert reference.relative_error(fused.weight, conv.weight) < (1e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize(('normalization', 'alike'), [('ortho', True), ('l1', False)])
def test_sgd_trains_an_orthonormal_layer_like_a_plain_one(normalization, alike):
    """At full level, with momentum and weight decay.

    Coefficients of an orthonormal basis are the filters in rotated axes, and SGD treats all directions alike. The l1
    functions have different norms, which act as learning rates: there ten steps end elsewhere.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=torch.float64)
    layer = HarmonicConv2d.from_conv2d(conv, normalization=normalization)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for m in (conv, layer)]
    start = conv.weight.detach().clone()
    for _ in range(10):
        x, target = torch.randn(8, 4, 9, 9, dtype=torch.float64), torch.randn(8, 6, 9, 9, dtype=torch.float64)
        for model, optimizer in zip((conv, layer), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).relu(), target).backward()
            optimizer.step()
    moved = (conv.weight - start).abs().max()
    difference = (layer.filters() - conv.weight).abs().max()
    assert moved > 0.05
    assert difference < 1e-14 if alike else difference > 0.1 * moved


@pytest.mark.parametrize('cls', LAYERS)
def test_bfloat16_round_trip_keeps_the_basis(cls):
    """The cast rounds the coefficients. The basis stays the same to the last bit."""
    layer = cls(3, 8, 7)
    basis = layer.basis.clone()
    back = layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(back.basis, basis)
    assert layer.to(torch.float64).basis.dtype == torch.float64
    torch.testing.assert_close(layer.basis, reference.dct_functions(7), rtol=0, atol=1e-15)
    assert torch.equal(layer.half().float().basis, basis)


@pytest.mark.parametrize('cls', LAYERS)
def test_basis_survives_to_empty_and_is_in_no_state_dict(cls):
    layer = cls(3, 8, 3, device='meta')
    assert 'basis' not in layer.state_dict()
    layer = layer.to_empty(device='cpu')
    torch.testing.assert_close(layer.basis, reference.dct_functions(3).to(layer.basis))
    layer.basis.fill_(float('nan'))
    layer.init_non_persistent_buffers()
    torch.testing.assert_close(layer.basis, reference.dct_functions(3).to(layer.basis))
    with torch.device('meta'):
        assert cls(3, 8, 3).basis.device.type == 'meta'


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize(
    ('channels', 'groups', 'expected'), [(3, 1, torch.float64), (32, 2, torch.float64), (32, 1, torch.float32)]
)
def test_filters_over_few_channels_are_composed_in_float64(cls, channels, groups, expected):
    layer = cls(channels, 32, 3, groups=groups)
    for dtype in (torch.float32, torch.bfloat16):
        assert layer.to(dtype).basis.dtype == expected
        assert layer.filters().dtype == dtype
    assert layer.double().basis.dtype == torch.float64


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize('cls', LAYERS)
def test_copies_compute_the_same(cls, copied):
    layer = reference.randomize_batch_norm(cls(3, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    expected, copy_ = layer(x), copied(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(copy_(x), expected)


@pytest.mark.parametrize('cls', LAYERS)
def test_filters_follow_weights_that_change_in_eval(cls):
    """An averaged model is updated in place while it is in eval: nothing may be cached."""
    layer = cls(3, 8, 3)
    x = torch.randn(2, 3, 9, 9)
    ema = ModelEmaV3(layer, decay=0.5).eval()
    ema.module(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    ema.update(layer)
    expected = cls(3, 8, 3).eval()
    expected.load_state_dict(ema.module.state_dict())
    assert torch.equal(ema.module(x), expected(x))
    torch.testing.assert_close(ema.module.weight, layer.weight * 2 / 3)


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize('training', [False, True])
def test_filters_are_composed_outside_autocast(cls, training):
    """Under bfloat16 autocast the filters are those of float32. Only the convolution rounds them."""
    torch.manual_seed(0)
    layer = reference.randomize_batch_norm(cls(16, 32, 3, padding=1)).train(training)
    outside = layer.filters()
    with torch.autocast('cpu', torch.bfloat16):
        inside = layer.filters()
        assert layer(torch.randn(4, 16, 24, 24)).dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize('training', [False, True])
def test_memory_format_is_kept(cls, training):
    """channels_last in, channels_last out. Contiguous in, contiguous out. The numbers are the same."""
    layer = cls(3, 8, 7, stride=2, padding=3).train(training)
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(layer)(x)
    assert expected.is_contiguous()
    layer = layer.to(memory_format=torch.channels_last)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # timm still scripts its models
@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize(('padding', 'padding_mode'), [(1, 'zeros'), ('same', 'reflect')])
def test_script_trace_compile_export(cls, padding, padding_mode):
    """One layer through torch.jit.script, torch.fx, torch.compile (no graph break) and torch.export."""
    torch.compiler.reset()  # all layers share a limit of compilations
    layer = reference.randomize_batch_norm(cls(4, 8, 3, padding=padding, padding_mode=padding_mode)).eval()
    x = torch.randn(2, 4, 9, 11)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    for way in (torch.jit.script(layer), compiled, torch.export.export(layer, (x,)).module()):
        torch.testing.assert_close(way(x), layer(x))
    layer.train()
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(layer))(x), copy.deepcopy(layer)(x))
    with torch.autocast('cpu', torch.bfloat16):
        compiled = torch.compile(copy.deepcopy(layer), backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize('cls', LAYERS)
def test_fx_trace_keeps_the_precision_of_composition(cls):
    layer = reference.randomize_batch_norm(cls(16, 16, 3)).eval()
    traced = torch.fx.symbolic_trace(layer)
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(traced(x), layer(x))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize('cls', LAYERS)
def test_representation_names_what_matters(cls):
    options = dict(level=2, dc=False, normalization='ortho', smoothness=0.5, form='separable')
    text = repr(cls(4, 8, (3, 3), padding=1, bias=False, **options))
    for part in (
        cls.__name__,
        '4, 8, kernel_size=(3, 3)',
        'padding=(1, 1)',
        *(f'{k}={v!r}' for k, v in options.items()),
    ):
        assert part in text
    assert not any(option in repr(cls(4, 8, 3)) for option in (*options, 'dilation'))


@pytest.mark.parametrize('cls', LAYERS)
@pytest.mark.parametrize(
    ('args', 'error', 'words'),
    [
        (dict(level=0), ValueError, 'level must be None or an integer from 1 to 5'),
        (dict(level=1, dc=False), ValueError, 'leave no function'),
        (dict(normalization='max'), ValueError, 'normalization must be one of'),
        (dict(form='sparse'), ValueError, "form must be one of .* got 'sparse'"),
        (dict(kernel_size=(3, 5)), ValueError, r'filters are square, got kernel_size=\(3, 5\)'),
        (dict(padding='same', stride=2), ValueError, 'same.* is not supported for strided'),
        (dict(padding='full'), ValueError, 'Invalid padding string'),
        (dict(groups=3), ValueError, 'divisible by groups'),
        (dict(padding_mode='mirror'), ValueError, 'padding_mode must be one of'),
        (dict(in_channels=0), ValueError, 'in_channels must be at least 1, got 0'),
        (dict(out_channels=-1), ValueError, 'out_channels must be at least 1, got -1'),
        (dict(transposed=True), TypeError, 'transposed'),
    ],
)
def test_bad_arguments(cls, args, error, words):
    with pytest.raises(error, match=words):
        cls(**dict(dict(in_channels=4, out_channels=8, kernel_size=3), **args))


def test_conversions_keep_the_memory_format():
    """From channels_last to channels_last, so that a converted network is as fast as it was."""
    conv = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    layer = HarmonicConv2d.from_conv2d(conv)
    for found in (layer.weight, layer.filters(), layer.fuse().weight, layer.at_level(3).weight):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert not found.is_contiguous()
    assert layer.at_level(3).to(memory_format=torch.contiguous_format).weight.is_contiguous()
    assert not layer.requires_grad_(False).at_level(3).weight.requires_grad
    plain = HarmonicConv2d.from_conv2d(torch.nn.Conv2d(4, 8, 3))
    assert plain.weight.is_contiguous()
    assert plain.fuse().weight.is_contiguous()


@pytest.mark.parametrize('stored', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('own', [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('channels', [4, 32])
def test_filters_are_projected_in_the_better_precision(stored, own, channels):
    """And rounded once, to the layer's precision."""
    torch.manual_seed(0)
    filters = torch.randn(8, channels, 3, 3, dtype=torch.float64).to(stored)
    layer = HarmonicConv2d(channels, 8, 3, bias=False, dtype=own)
    layer.load_state_dict({'weight': filters})
    exact = HarmonicConv2d(channels, 8, 3, bias=False, dtype=torch.float64)
    exact.load_state_dict({'weight': filters.double()})
    assert layer.weight.dtype == own
    error = (layer.weight.double() - exact.weight).abs().max()
    assert error <= 2 * torch.finfo(own).eps * exact.weight.abs().max()
    assigned = HarmonicConv2d(channels, 8, 3, bias=False, dtype=own)
    assigned.load_state_dict({'weight': filters}, assign=True)
    assert assigned.weight.dtype == stored  # as nn.Conv2d


@pytest.mark.parametrize('dtype', [torch.int8, torch.float8_e4m3fn])
def test_filters_that_are_no_numbers_to_project(dtype):
    layer = HarmonicConv2d(3, 8, 3, bias=False)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f'weight: cannot project filters of dtype {dtype}'):
        layer.load_state_dict({'weight': torch.ones(8, 3, 3, 3).to(dtype)})
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.float(),
        lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
    ],
)
def test_training_after_a_change_in_inference_mode(kind, change):
    """Buffers that are made in that mode could not be trained with."""
    layer = kind(20, 8, 3)
    with torch.inference_mode():
        change(layer)
        layer.eval()(torch.randn(2, 20, 9, 9))
    layer.train()(torch.randn(2, 20, 9, 9)).square().mean().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
@pytest.mark.parametrize(
    'wrap',
    [
        lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_computed_weights(wrap):
    """Casts and moves reach the basis, and truncation says what to do."""
    torch.manual_seed(0)
    layer = wrap(HarmonicConv2d(20, 8, 3)).double().eval()
    assert layer.basis.dtype == torch.float64
    x = torch.randn(1, 20, 9, 9, dtype=torch.float64)
    y = layer(x)
    fresh = HarmonicConv2d(20, 8, 3, dtype=torch.float64)
    fresh.load_state_dict({'weight': layer.weight.detach(), 'bias': layer.bias.detach()})
    torch.testing.assert_close(y, fresh(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r'its weight is computed .* make that permanent first'):
        layer.at_level(2)
    assert layer.to('meta').basis.is_meta


def test_a_layer_without_the_constant_function_is_not_complete():
    """It cannot express every filter, at any level."""
    layer = HarmonicConv2d(2, 2, 3, dc=False)
    assert not layer.is_complete()
    assert layer.energy_kept is None
    assert HarmonicConv2d(2, 2, 3).is_complete()
