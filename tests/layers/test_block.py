"""The stem in training: when it takes one dense convolution, and that this gives what the three steps give."""

import copy

import pytest
import reference
import timm
import torch
import torch.autograd.forward_ad as fwad
from reference import relative_error
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, convert_splitbn_model
from timm.utils import freeze
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
    dense = HarmonicBlock2d(channels, out, dtype=dtype, **dict(GEOMETRY['stride 4'], **kwargs))
    return dense, copy.deepcopy(dense)


def images(dtype=torch.float64, channels=3):
    x = torch.randn(4, channels, 33, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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
def test_equal(dtype, geometry):
    channels = 6 if 'groups' in geometry else 3
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


@pytest.mark.parametrize('size', [(33, 40), (1, 1), (3, 3), (2, 40)])
def test_equal_in_pieces(size, monkeypatch):
    """Where only a few responses are computed at a time, also of images smaller than the stride."""
    monkeypatch.setattr(block, '_PIECE_CPU', 1)
    same_training(*pair(), torch.randn(4, 3, *size, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_statistics_are_not_rounded_by_autocast(dtype):
    exact, dense = pair()[0], pair(torch.float32)[0]
    exact(images())
    with torch.autocast('cpu', dtype):
        assert dense(images().float()).dtype == dtype
    torch.testing.assert_close(dense.bn.state_dict(), exact.float().bn.state_dict(), rtol=1e-4, atol=1e-6)


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
    'subclass': lambda layer: (
        setattr(layer, 'bn', type('Own', (nn.BatchNorm2d,), {})(147, affine=False).double()) or layer
    ),
}


@pytest.mark.parametrize('what', REPLACED)
def test_another_normalisation_is_asked(monkeypatch, what):
    """The responses go through whatever replaces the batch-norm."""
    # Its own forward needs a GPU: only the call is tested.
    normalise = lambda self, r: nn.functional.batch_norm(r, None, None, training=True)  # noqa: E731
    monkeypatch.setattr(nn.SyncBatchNorm, 'forward', normalise)
    layer, other = pair()
    layer = REPLACED[what](layer)
    calls = count_responses(layer, monkeypatch)
    y = layer(images())
    assert len(calls) == 1
    # Split, each half of the batch is normalised by itself.
    parts = [pair()[0](half) for half in images().chunk(2)] if what == 'split' else [other(images())]
    assert relative_error(y, torch.cat(parts)) < 1e-12


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


@pytest.mark.slow
@pytest.mark.parametrize('needs_gradient', [False, True])
def test_compiles_without_a_break(needs_gradient):
    torch.compiler.reset()  # earlier tests count towards a limit of variants
    layer, other = pair()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = images().requires_grad_(needs_gradient)
    y, expected = compiled(x), other(x)
    assert relative_error(y, expected) < 1e-12
    y.square().sum().backward()  # the sum of normalised responses is 0, whatever the weight
    expected.square().sum().backward()
    assert relative_error(layer.weight.grad, other.weight.grad) < 1e-10
    torch.testing.assert_close(layer.bn.state_dict(), other.bn.state_dict())
    torch.compiler.reset()


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('dim', [torch.export.Dim.DYNAMIC, torch.export.Dim('batch')], ids=['dynamic', 'named'])
def test_exported_for_every_batch(dim, strict):
    """In training, where the statistics are those of the batch, however many pieces they take."""
    layer, other = pair()
    program = torch.export.export(layer, (images(),), dynamic_shapes=({0: dim},), strict=strict).module()
    for batch in (2, 70):
        x = torch.randn(batch, 3, 33, 40, dtype=torch.float64)
        assert relative_error(program(x), other(x)) < 1e-12
    torch.testing.assert_close(program.state_dict()['bn.running_var'], other.bn.running_var)


def test_memory_that_is_kept():
    """The backward pass keeps what a plain convolution keeps: the image and the filters, and a few small tensors."""
    layer, other = pair(torch.float32, out=64)
    x = torch.randn(8, 3, 64, 64)

    def kept(run):
        seen = {}
        hooks = lambda t: seen.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            run()
        return sum(seen.values())

    plain = nn.Conv2d(3, 64, 7, stride=4, padding=3)
    responses = 8 * 147 * 16 * 16 * 4
    assert kept(lambda: layer(x)) < kept(lambda: plain(x)) + 6 * layer.weight.nbytes
    assert kept(lambda: explicit(other, x)) > responses


@pytest.mark.parametrize(
    ('x', 'words'),
    [
        (torch.randn(2, 3, 8, 8).double(), None),
        (torch.randn(2, 4, 8, 8), None),
        (torch.zeros(2, 3, 8, 8).byte(), None),
        (torch.randn(3, 8, 8), 'rank 4'),
        (torch.randn(1, 3, 3, 3), 'more than 1'),
    ],
)
def test_what_does_not_fit_changes_no_statistics(x, words):
    layer = HarmonicBlock2d(3, 4, 3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=words):
        layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer(torch.randn(0, 3, 8, 8)).shape == (0, 4, 6, 6)


def set_to(**attributes):
    return lambda layer: [setattr(layer.bn, name, value) for name, value in attributes.items()]


def replaced_by(kind, **options):
    def replace(layer):
        bn = kind(147, **options)
        bn.running_mean, bn.running_var = layer.bn.running_mean, layer.bn.running_var
        layer.bn = bn.double()

    return replace


FROZEN = {
    'eval': lambda layer: layer.bn.eval(),
    'not tracked': set_to(track_running_stats=False),
    'not tracked, eval': lambda layer: set_to(track_running_stats=False)(layer) and layer.bn.eval(),
    'Lightning': lambda layer: set_to(track_running_stats=False)(layer) and layer.requires_grad_(False),
    'momentum 0': set_to(momentum=0.0),
    'timm': lambda layer: freeze(nn.Sequential(layer), ['0.bn']),
    'activation': replaced_by(FrozenBatchNormAct2d),
    'trained activation': replaced_by(BatchNormAct2d, affine=False),
    'average of all': set_to(momentum=None),
    'average of many': lambda layer: set_to(momentum=None)(layer) and layer.bn.num_batches_tracked.fill_(9),
}


@pytest.mark.parametrize('how', FROZEN)
def test_frozen_as_batch_norm_is(how):
    """The same as filtering, the module in `bn` and mixing, in training and then in evaluation; also from a file."""
    layer, other = pair()
    generator = torch.Generator().manual_seed(4)
    layer.bn.running_mean.normal_(generator=generator)
    layer.bn.running_var.uniform_(0.5, 1.5, generator=generator)
    other.load_state_dict(layer.state_dict())
    FROZEN[how](layer)
    bn = copy.deepcopy(layer.bn)
    images = [torch.randn(4, 3, 33, 40, generator=generator, dtype=torch.float64) for _ in range(4)]
    functions = reference.dct_functions(7)

    def check(x):
        normalised = bn(reference.responses(x, functions, 4, 3))
        assert relative_error(layer(x), reference.mix(normalised, other.weight, other.bias, 1)) < 1e-12
        torch.testing.assert_close(layer.bn.state_dict(), bn.state_dict(), rtol=1e-14, atol=1e-14)

    for x in images[:3]:
        check(x)
    layer.eval()
    bn.eval()
    check(images[3])
    if 'activation' in how:
        with pytest.raises(ValueError, match=r'cannot fuse: .* has no running statistics, or an activation'):
            layer.fuse()
        return
    assert relative_error(layer.fuse()(images[3]), layer(images[3])) < 1e-12
    lower = layer.at_level(3)
    assert relative_error(lower.fuse()(images[3]), lower(images[3])) < 1e-12


@pytest.mark.parametrize('metadata', [True, False])
def test_files_of_frozen_stems(metadata):
    """Into frozen and other stems, strictly, as nn.BatchNorm2d and FrozenBatchNorm2d take each other's files."""
    for written in FROZEN:
        for read in FROZEN:
            if 'activation' in written + read and written != read:
                continue
            source, target = pair()[0], HarmonicBlock2d(3, 6, 7, 4, 3, dtype=torch.float64)
            source(images())
            FROZEN[written](source)
            FROZEN[read](target)
            state = source.state_dict()
            no_count = 'num_batches_tracked' not in ''.join(state)
            if read in ('not tracked', 'not tracked, eval', 'Lightning') and no_count:
                continue  # nn.BatchNorm2d itself asks for the count there
            target.load_state_dict(state if metadata else dict(state))
            assert torch.equal(target.eval()(images()), source.eval()(images())), (written, read)


@pytest.mark.parametrize('way', ['checkpoint_path', 'pretrained'])
def test_files_of_frozen_networks(way, tmp_path):
    options = dict(num_classes=3, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    model = reference.small('harm_resnet18', options)
    frozen = copy.deepcopy(model)
    freeze(frozen)
    save_file(frozen.state_dict(), path := str(tmp_path / 'frozen.safetensors'))
    file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=3))
    loaded = timm.create_model('harm_resnet18', **options, **(file if way == 'pretrained' else {way: path}))
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(loaded.eval()(x), model(x)) < 1e-5


@pytest.mark.parametrize(('name', 'value'), [('weight', 2.0), ('bias', 0.5)])
def test_scales_of_a_normalisation_are_never_dropped(name, value):
    """A stem without scales refuses those of a file, unless they change nothing."""
    source, target = pair()
    FROZEN['timm'](source)
    getattr(source.bn, name)[5] = value
    with pytest.raises(RuntimeError, match=f'Unexpected.*bn.{name}'):
        target.load_state_dict(source.state_dict())
    assert target.load_state_dict(source.state_dict(), strict=False).unexpected_keys == [f'bn.{name}']
