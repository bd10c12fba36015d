"""Smoothness: what it does at the start and in training, and that coefficients keep to their basis."""

import copy

import pytest
import reference
import torch
from timm.layers import Conv2dSame
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.layers.conv import HarmonicConv2dSame
from timm_harmonic.layers.dct import NORMALIZATIONS, options_of_code

pytestmark = pytest.mark.usefixtures('one_thread')
SMOOTHNESS = [0, 0.5, 2]
LAYERS = [HarmonicConv2d, HarmonicConv2dSame, HarmonicBlock2d]


@pytest.mark.parametrize(('level', 'channels'), [(None, 3), (4, 1)])
@pytest.mark.parametrize('blurred', [False, True])
@pytest.mark.parametrize('smoothness', SMOOTHNESS)
def test_a_stem_starts_at_the_scale_of_a_plain_convolution(smoothness, blurred, level, channels):
    """On images of mean 0 and deviation 1, with timm's initialisation of a plain stem.

    On blurred images the floor of the variances takes most of their high frequencies away: with little smoothness, and
    those among the functions, outputs start smaller.
    """
    images = torch.randn(8, channels, 48, 48, generator=torch.Generator().manual_seed(0))
    if blurred:
        images = nn.functional.avg_pool2d(images, 5, stride=1)
        images = (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True)
    variances = torch.zeros(2)
    for seed in range(10):
        torch.manual_seed(seed)
        stem = HarmonicBlock2d(channels, 64, 7, 2, level=level, bias=False, smoothness=smoothness)
        conv = nn.Conv2d(channels, 64, 7, 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        with torch.no_grad():
            variances += torch.stack([stem(images).var(), conv(images).var()])
    ratio = (variances[0] / variances[1]).sqrt().item()
    if blurred and smoothness < 1 and level is None:
        assert 0.6 < ratio < 1.05
    else:
        assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('smoothness', SMOOTHNESS)
def test_filters_start_with_the_energy_of_plain_ones_and_its_spectrum(smoothness):
    torch.manual_seed(0)
    layer = HarmonicConv2d(64, 256, 3, smoothness=smoothness)
    plain = nn.init.kaiming_normal_(torch.empty(256, 64, 3, 3), mode='fan_out', nonlinearity='relu')
    assert (layer.filters().square().mean() / plain.square().mean()).item() == pytest.approx(1, rel=0.02)
    energy = layer.energies().sum(0)
    expected = reference.spectrum(3, smoothness=smoothness).square()
    torch.testing.assert_close(energy / energy.mean(), expected, rtol=0.06, atol=0)


def test_weight_decay_on_coefficients_is_a_sobolev_penalty_on_filters():
    layer = HarmonicConv2d(4, 8, 5, smoothness=1.5, dtype=torch.float64)
    functions = reference.dct_functions(5, normalization='ortho')
    spectrum = reference.spectrum(5, smoothness=1.5)
    of_filters = torch.einsum('oixy,nxy->oin', layer.filters(), functions)
    penalty = (of_filters.square() / spectrum.square()).sum()
    torch.testing.assert_close(layer.weight.square().sum(), penalty)
    sums = torch.tensor([i + j for i in range(5) for j in range(5)])
    ratio = (1 + sums) ** 3.0 * spectrum.square()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_gradient_step_is_preconditioned_by_the_spectrum():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, 3, bias=False, dtype=torch.float64)
    layer = HarmonicConv2d.from_conv2d(plain, smoothness=2)
    images, before = torch.randn(2, 4, 9, 9, dtype=torch.float64), plain.weight.detach().clone()
    for conv in (plain, layer):
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.01)
        conv(images).square().sum().backward()
        optimizer.step()
    functions, spectrum = reference.dct_functions(3, normalization='ortho'), reference.spectrum(3, smoothness=2)
    steps = [torch.einsum('oixy,nxy->oin', new - before, functions) for new in (plain.weight, layer.filters())]
    torch.testing.assert_close(steps[1], steps[0] * spectrum.square())


@pytest.mark.parametrize('smoothness', [0, 1, 10])
@pytest.mark.parametrize(('plain', 'harmonic'), [(nn.Conv2d, HarmonicConv2d), (Conv2dSame, HarmonicConv2dSame)])
def test_conversion_is_exact_both_ways(plain, harmonic, smoothness):
    conv = plain(6, 8, 5, groups=2, dtype=torch.float64)
    layer = harmonic.from_conv2d(conv, smoothness=smoothness)
    assert layer.smoothness == smoothness
    torch.testing.assert_close(layer.fuse().weight, conv.weight, rtol=1e-12, atol=1e-14)
    for device in ('cpu', 'meta'):
        empty = harmonic(6, 8, 5, groups=2, dtype=torch.float64, smoothness=smoothness, device=device)
        empty.load_state_dict(conv.state_dict(), assign=device == 'meta')
        torch.testing.assert_close(empty.filters(), conv.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('smoothness', [None, 0.5, 10])
@pytest.mark.parametrize('cls', LAYERS)
def test_lower_levels_do_not_depend_on_the_way_there(cls, smoothness):
    """A level changes the scale of the spectrum. The filters that are kept stay as they are."""
    torch.manual_seed(0)
    layer = reference.randomize_batch_norm(cls(3, 8, 5, smoothness=smoothness, dtype=torch.float64)).eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    low = layer.at_level(3)
    torch.testing.assert_close(layer.at_level(7).at_level(3)(images), low(images))
    kept = reference.dct_functions(5, 3, normalization='ortho')
    of_filters = torch.einsum('oixy,nxy->oin', layer.filters(), kept)
    torch.testing.assert_close(low.filters(), torch.einsum('oin,nxy->oixy', of_filters, kept))
    assert low.energy_kept == pytest.approx((low.filters().square().sum() / layer.filters().square().sum()).item())
    assert low.energies().sum().item() == pytest.approx(low.filters().square().sum().item())


BASES = [dict(normalization=name) for name in NORMALIZATIONS]
BASES += [dict(options, smoothness=value) for options in BASES for value in (0, 0.5, 1)]


@pytest.mark.parametrize('cls', LAYERS)
def test_coefficients_load_into_layers_of_the_same_basis_only(cls):
    """Whatever the functions are: layers whose bases differ have different codes, and refuse each other's files."""
    layers = [cls(3, 4, 3, **options) for options in BASES]
    for source in layers:
        state = source.state_dict()
        assert ('basis_code' in state) == (source.normalization != 'l1' or source.smoothness is not None)
        assert torch.equal(cls(3, 4, 3, **options_of_code(source.basis_code)).basis, source.basis)
        for target in layers:
            if source.named_basis() == target.named_basis():
                assert torch.equal(source.basis, target.basis)
                target.load_state_dict(state)
                continue
            before = copy.deepcopy(target.state_dict())
            for strict in (True, False):
                with pytest.raises(RuntimeError, match=f"the basis '{source.named_basis()}', those of the layer to '"):
                    target.load_state_dict(state, strict=strict)
            torch.testing.assert_close(dict(target.state_dict()), dict(before), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='names no basis of this version'):
        layers[0].load_state_dict(dict(layers[0].state_dict(), basis_code=torch.ones(32, dtype=torch.bool)))


@pytest.mark.parametrize('cls', LAYERS)
def test_the_code_survives_casts_averages_and_the_meta_device(cls):
    layer = cls(3, 4, 3, smoothness=1)
    code = layer.basis_code.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(layer.to(dtype).basis_code, code)
    layer.float()
    averaged = {key: (value.double() + value.double()) / 2 for key, value in layer.state_dict().items()}
    layer.load_state_dict({key: value.float() for key, value in averaged.items()})  # timm's avg_checkpoints.py
    assert torch.equal(layer.basis_code, code)
    ema = ModelEmaV3(layer, decay=0.5)
    ema.update(layer)
    assert torch.equal(ema.module.basis_code, code)
    empty = cls(3, 4, 3, smoothness=1, device='meta').to_empty(device='cpu')
    assert torch.equal(empty.basis_code, code)
    empty.load_state_dict(layer.state_dict())
    with torch.device('meta'):
        assigned = cls(3, 4, 3, smoothness=1)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(assigned.basis_code, code)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(assigned.eval()(images), layer.eval()(images))


@pytest.mark.parametrize('options', [dict(smoothness=1), dict(normalization='ortho')])
def test_averaged_weights_can_be_loaded(options):
    model = torch.nn.Sequential(HarmonicConv2d(2, 3, 3, **options))
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.992), use_buffers=True)
    for average in (ModelEmaV2(model, decay=0.992), averaged):
        for _ in range(4):
            (average.update_parameters if average is averaged else average.update)(model)
        model.load_state_dict(average.module.state_dict())


@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d])
@pytest.mark.parametrize(
    'compute',
    [lambda layer: prune.l1_unstructured(layer, 'weight', 0.3), torch.nn.utils.parametrizations.weight_norm],
)
def test_computed_weights_refer_to_a_basis_too(cls, compute):
    ours = compute(cls(3, 4, 3, smoothness=1))
    for theirs in (compute(cls(3, 4, 3, smoothness=3)), compute(cls(3, 4, 3))):
        with pytest.raises(RuntimeError, match='its coefficients refer to the basis'):
            ours.load_state_dict(theirs.state_dict(), strict=False)
    ours.load_state_dict(ours.state_dict())


@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('dtypes', [('float32', 'float16'), ('float16', 'float32')])
def test_coefficients_that_overflow_are_refused(dtypes, assign):
    """In the dtype in which they end: the layer's or, assigned, that of the filters."""
    stored, own = (getattr(torch, name) for name in dtypes)
    layer = HarmonicConv2d(2, 2, 7, bias=False, smoothness=10, dtype=own)
    filters = dict(weight=torch.randn(2, 2, 7, 7).to(stored))
    if (stored if assign else own) == torch.float16:
        with pytest.raises(RuntimeError, match=r'overflow torch.float16: lower the smoothness'):
            layer.load_state_dict(filters, assign=assign)
    else:
        layer.load_state_dict(filters, assign=assign)
        assert layer.weight.isfinite().all()
