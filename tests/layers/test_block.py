"""The stem in training: when it takes one dense convolution, and that this gives what the three steps give."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwad
from reference import relative_error
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from torch import nn

from timm_harmonic import HarmonicBlock2d
from timm_harmonic.layers import block

GEOMETRY = {
    'stride 4': dict(kernel_size=7, stride=4, padding=3),
    'stride 2': dict(kernel_size=7, stride=2, padding=3, bias=False),
    'reflect': dict(kernel_size=7, stride=2, padding=3, padding_mode='reflect'),
    'same, level': dict(kernel_size=5, stride=1, padding='same', level=4),
    'groups': dict(kernel_size=3, stride=2, padding=1, groups=3),
    'dilation, no dc, ortho': dict(kernel_size=3, stride=1, dilation=2, dc=False, normalization='ortho'),
    'smooth': dict(kernel_size=7, stride=2, padding=3, smoothness=1),
    'smooth, level, groups': dict(kernel_size=5, stride=2, padding=2, level=4, groups=3, smoothness=2.5),
}


def pair(dtype=torch.float64, channels=3, out=6, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(GEOMETRY['stride 4'], **kwargs)
    dense = HarmonicBlock2d(channels, out, dtype=dtype, **kwargs)
    return dense, copy.deepcopy(dense)


def images(dtype=torch.float64, channels=3, batch=4, smooth=False):
    x = torch.randn(batch, channels, 33, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if smooth:  # as photographs are: nearly no energy in the high frequencies, and a mean
        x = nn.functional.avg_pool2d(x, 9, stride=1, padding=4).cumsum(-1).cumsum(-2) / 10 + 3
    return x.to(dtype)


def explicit(layer, x):
    """The three steps one by one, as for an input that needs a gradient."""
    return layer(x.clone().requires_grad_())


def count_responses(layer, monkeypatch):
    """Calls of the method by which the explicit form computes its responses."""
    calls = []
    responses = layer.responses
    monkeypatch.setattr(layer, 'responses', lambda x: calls.append(x.shape) or responses(x))
    return calls


def same_training(dense, other, x, tolerance):
    """Outputs, gradients and running statistics of two steps."""
    for _ in range(2):
        y, expected = dense(x), explicit(other, x)
        assert y.dtype == expected.dtype
        assert relative_error(y, expected) < tolerance
        gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
        y.backward(gradient)
        expected.backward(gradient)
        for ours, theirs in zip(dense.parameters(), other.parameters(), strict=True):
            assert relative_error(ours.grad, theirs.grad) < tolerance
            ours.grad = theirs.grad = None
    torch.testing.assert_close(dense.bn.state_dict(), other.bn.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('geometry', GEOMETRY)
@pytest.mark.parametrize('channels', [3, 6])
def test_equal(dtype, geometry, channels):
    dense, other = pair(dtype, channels, **GEOMETRY[geometry])
    same_training(dense, other, images(dtype, channels), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    'options', [dict(momentum=None), dict(momentum=0.0), dict(track_running_stats=False), dict(affine=True)]
)
def test_equal_for_every_batch_norm(options):
    dense, other = pair()
    for layer in (dense, other):
        torch.manual_seed(3)
        bn = nn.BatchNorm2d(3 * 49, dtype=torch.float64, **dict(dict(affine=False), **options))
        if bn.affine:
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
        layer.bn = bn
    same_training(dense, other, images(), 1e-12)


def test_equal_in_pieces(monkeypatch):
    """Also where only a few responses are computed at a time."""
    dense, other = pair()
    monkeypatch.setattr(block, '_PIECE_CPU', 1)
    same_training(dense, other, images(), 1e-12)


def test_equal_in_channels_last():
    dense, other = pair()
    dense.to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    assert dense(x).is_contiguous(memory_format=torch.channels_last)
    dense.bn.reset_running_stats()
    same_training(dense, other, x, 1e-12)


def test_smooth_images_lose_nothing():
    """Where the variances of the responses differ by orders of magnitude, both forms are equally near to float64."""
    dense, other = pair(torch.float32)
    exact = copy.deepcopy(dense).double()
    x = images(smooth=True)
    expected = explicit(exact, x)
    ours, theirs = dense(x.float()), explicit(other, x.float())
    error, bound = relative_error(ours, expected), relative_error(theirs, expected)
    assert error < 2 * bound + 1e-6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('smooth', [False, True])
def test_half_precision(dtype, smooth):
    """Under autocast, and in bfloat16 throughout: no further from float64 than the explicit form."""
    x = images(smooth=smooth)
    exact, _ = pair()
    expected = explicit(exact, x)
    dense, other = pair(torch.float32)
    with torch.autocast('cpu', dtype):
        ours, theirs = dense(x.float()), explicit(other, x.float())
    assert ours.dtype == theirs.dtype == dtype
    assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected)
    torch.testing.assert_close(dense.bn.running_mean.double(), exact.bn.running_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dense.bn.running_var.double(), exact.bn.running_var, rtol=1e-4, atol=1e-6)
    if dtype == torch.bfloat16:
        dense, other = pair(dtype)
        ours, theirs = dense(x.to(dtype)), explicit(other, x.to(dtype))
        assert ours.dtype == dtype
        assert relative_error(ours, expected) < 1.5 * relative_error(theirs, expected)


def test_which_form_is_taken(monkeypatch):
    layer, _ = pair()
    calls = count_responses(layer, monkeypatch)
    x = images()
    layer(x)
    with torch.no_grad():
        layer(x.clone().requires_grad_(False))
    layer.eval()(x.clone().requires_grad_())
    assert not calls
    layer.train()(x.clone().requires_grad_())
    assert len(calls) == 1


REPLACED = {
    'SyncBatchNorm': nn.SyncBatchNorm.convert_sync_batchnorm,
    'split': lambda layer: convert_splitbn_model(layer, 2),
    'group': lambda layer: setattr(layer, 'bn', nn.GroupNorm(3, 147, affine=False, dtype=torch.float64)) or layer,
    'instance': lambda layer: setattr(layer, 'bn', nn.InstanceNorm2d(147)) or layer,
    'subclass': lambda layer: (
        setattr(layer, 'bn', type('Own', (nn.BatchNorm2d,), {})(147, affine=False).double()) or layer
    ),
}


@pytest.mark.parametrize('what', REPLACED)
def test_another_normalisation_is_asked(monkeypatch, what):
    """The responses go through whatever replaces the batch-norm."""
    layer, other = pair()
    layer = REPLACED[what](layer)
    calls = count_responses(layer, monkeypatch)
    x = images()
    if what == 'SyncBatchNorm':  # its own forward needs a GPU: only the call is tested
        monkeypatch.setattr(
            nn.SyncBatchNorm, 'forward', lambda self, r: nn.functional.batch_norm(r, None, None, training=True)
        )
    y = layer(x)
    assert len(calls) == 1
    if what in ('SyncBatchNorm', 'subclass'):
        assert relative_error(y, other(x)) < 1e-12
    if what == 'split':  # each half of the batch by itself
        halves = [pair()[0](half) for half in x.chunk(2)]
        assert relative_error(y, torch.cat(halves)) < 1e-12
        layer.eval()
        assert y.shape == layer(x).shape


def test_frozen_batch_norm_is_fused(monkeypatch):
    layer, other = pair()
    layer(images())
    other.load_state_dict(layer.state_dict())
    frozen = freeze_batch_norm_2d(layer)
    assert type(frozen.bn).__name__ == 'FrozenBatchNorm2d'
    calls = count_responses(frozen, monkeypatch)
    y = frozen.train()(images())
    assert relative_error(y, other.eval()(images())) < 1e-12
    assert len(calls) <= 1


def test_batch_norm_in_evaluation_within_training(monkeypatch):
    """As when only the statistics are frozen: `.bn.eval()` in a layer that trains."""
    layer, other = pair()
    layer(images())
    other.load_state_dict(layer.state_dict())
    layer.bn.eval()
    before = copy.deepcopy(layer.bn.state_dict())
    assert torch.equal(layer(images()), other.eval()(images()))
    torch.testing.assert_close(layer.bn.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('size', [(1, 1), (3, 3), (2, 40)])
def test_images_smaller_than_the_stride(size):
    dense, other = pair()
    same_training(dense, other, torch.randn(4, 3, *size, dtype=torch.float64), 1e-10)


def test_input_without_statistics_takes_the_explicit_form():
    """An empty batch gives an empty output. torch refuses an image without a batch dimension."""
    layer, _ = pair()
    assert layer(torch.randn(0, 3, 16, 16, dtype=torch.float64)).shape == (0, 6, 4, 4)
    with pytest.raises(RuntimeError, match='rank 4'):
        layer(torch.randn(3, 16, 16, dtype=torch.float64))


def test_one_response_is_too_few():
    layer, _ = pair(stride=1, padding=0)
    with pytest.raises(ValueError, match='more than 1'):
        layer(torch.randn(1, 3, 7, 7, dtype=torch.float64))
    assert layer.bn.num_batches_tracked == 0


def test_gradients_of_gradients():
    """Of both forms: gradient penalties work."""
    layer, _ = pair(channels=1, out=2, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 1, 5, 6, dtype=torch.float64)

    def of_weights(weight, bias):
        return torch.func.functional_call(layer, dict(weight=weight, bias=bias), (x,))

    assert torch.autograd.gradgradcheck(of_weights, (layer.weight, layer.bias))
    assert torch.autograd.gradcheck(lambda x: layer(x), (x.requires_grad_(),))


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated:FutureWarning')  # torch's own, in these
def test_forward_derivatives():
    """With respect to the image. Tangents do not set requires_grad, and still they are right."""
    layer, _ = pair(channels=1, out=2, kernel_size=3, stride=2, padding=1)
    x, tangent = torch.randn(2, 2, 1, 5, 6, dtype=torch.float64)
    with fwad.dual_level():
        derivative = fwad.unpack_dual(layer(fwad.make_dual(x, tangent))).tangent
        assert fwad.unpack_dual(layer.bn.running_mean).tangent is None
    step = 1e-6
    numeric = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    assert relative_error(derivative, numeric) < 1e-6


@pytest.mark.parametrize('needs_gradient', [False, True])
def test_compiles_without_a_break(needs_gradient):
    torch.compiler.reset()  # earlier tests count towards a limit of variants
    layer, other = pair()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = images().requires_grad_(needs_gradient)
    y, expected = compiled(x), other(x)
    assert relative_error(y, expected) < 1e-12
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(layer.weight.grad, other.weight.grad) < 1e-10
    torch.testing.assert_close(layer.bn.state_dict(), other.bn.state_dict())
    torch.compiler.reset()


def test_recalibration_by_torch():
    """torch.optim.swa_utils.update_bn: cumulative statistics of several batches."""
    dense, other = pair()
    batches = list(images(batch=12).split(4))
    torch.optim.swa_utils.update_bn(batches, dense)
    torch.optim.swa_utils.update_bn([batch.requires_grad_() for batch in batches], other)
    torch.testing.assert_close(dense.bn.state_dict(), other.bn.state_dict())


def test_memory_that_is_kept(monkeypatch):
    """The backward pass keeps what a plain convolution keeps: the image and the filters, and a few small tensors."""
    layer, other = pair(torch.float32, out=64)
    x = torch.randn(8, 3, 64, 64)

    def kept(run):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            y = run()
        del y
        return sum(seen.values())

    plain = nn.Conv2d(3, 64, 7, stride=4, padding=3)
    responses = 8 * 147 * 16 * 16 * 4
    assert kept(lambda: layer(x)) < kept(lambda: plain(x)) + 6 * layer.weight.nbytes
    assert kept(lambda: explicit(other, x)) > responses


def test_what_does_not_fit_changes_no_statistics():
    block = HarmonicBlock2d(3, 4, 3)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    for images in (torch.randn(2, 3, 8, 8).double(), torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 8, 8).byte()):
        with pytest.raises(RuntimeError):
            block(images)
        assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
