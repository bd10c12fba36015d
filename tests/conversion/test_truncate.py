"""truncate: levels, energy, budgets over all layers, and weighing by images."""

import copy

import numpy as np
import pytest
import reference
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from timm.models import get_model_args
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, harmonic_report, harmonize, truncate
from timm_harmonic.conversion.convolutions import harmonic_layers
from timm_harmonic.conversion.energy import energy_kept
from timm_harmonic.conversion.losses import losses_by_filters, losses_by_images
from timm_harmonic.conversion.truncate import choose_levels, parameters_at
from timm_harmonic.layers.dct import dct_frequencies, full_level

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def network():
    """A plain network whose filters are smooth, as trained ones are: the energy is in the low frequencies."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(timm.create_model('resnet18', num_classes=10))
    with torch.no_grad():
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
        for i, conv in enumerate(convs):
            mean = conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight)
            conv.weight.lerp_(mean, (i % 7) / 6 * 0.99)
    return harmonize(model.eval())


def levels(model):
    return {name: layer.level for name, layer in harmonic_layers(model).items()}


def count(model):
    return sum(p.numel() for p in model.parameters())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_level(network):
    low = truncate(network, level=3, levels={'layer4.*': 2})
    assert set(levels(low).values()) == {3, 2}
    assert levels(low)['layer4.1.conv2'] == 2
    for name, layer in harmonic_layers(low).items():
        source = harmonic_layers(network)[name]
        kept = [
            dct_frequencies(source.kernel_size[0]).index(f)
            for f in dct_frequencies(*layer.kernel_size[:1], layer.level)
        ]
        assert torch.equal(layer.weight, source.weight[:, :, kept])
        assert layer.weight.is_leaf
        assert layer.weight.requires_grad
    assert levels(network)['conv1'] == 13
    assert truncate(low, level=2, inplace=True) is low
    assert set(levels(low).values()) == {2}


def test_full_level_drops_nothing(network):
    for again in (truncate(network, level=13), truncate(network, energy=1.0), truncate(network, ratio=1.0)):
        assert same(again, network)
        assert again is not network


def test_in_steps_or_at_once(network):
    at_once = truncate(network, level=2)
    assert same(truncate(truncate(network, level=4), level=2), at_once)
    assert same(truncate(at_once, level=4), at_once)
    assert same(harmonize(network, level=2), at_once)


@pytest.mark.parametrize('normalization', ['l1', 'ortho'])
@pytest.mark.parametrize('energy', [0.5, 0.9, 0.99])
def test_energy(network, energy, normalization):
    """The lowest level that keeps the share, measured on the filters themselves."""
    plain = timm.models.reparameterize_model(network)
    low = truncate(harmonize(plain, normalization=normalization), energy=energy)
    assert 0 < count(low) < count(network)
    for name, layer in harmonic_layers(low).items():
        filters = plain.get_submodule(name).weight.detach()
        share = layer.filters().detach().square().sum() / filters.square().sum()
        assert share >= energy - 1e-6
        assert energy_kept(layer) == pytest.approx(float(share), rel=1e-5)
        if (level := layer.level) > 1:
            lower = HarmonicConv2d.from_conv2d(plain.get_submodule(name), level=level - 1)
            assert lower.filters().detach().square().sum() < energy * filters.square().sum()
    assert levels(low) == levels(truncate(network, energy=energy))


def test_budget_is_kept(network):
    present = count(network)
    for ratio in (0.95, 0.75, 0.5, 0.2):
        low = truncate(network, ratio=ratio)
        assert count(low) <= ratio * present
        chosen, layers = levels(low), harmonic_layers(network)
        raises = [parameters_at(layers[n], lv + 1) - parameters_at(layers[n], lv) for n, lv in chosen.items() if lv < 5]
        assert count(low) + min(raises) > ratio * present  # nothing more fits
        assert harmonic_report(low).parameters == count(low)
    low = truncate(network, max_params=5_000_000)
    assert 4_900_000 < count(low) <= 5_000_000
    assert same(truncate(low, max_params=5_000_000), low)
    assert same(truncate(network, max_params=10**9), network)


def test_layers_with_little_high_frequency_pay_first(network):
    losses = losses_by_filters(network)
    low = levels(truncate(network, ratio=0.6))
    wide = {name: losses[name][3] for name in low if name.startswith('layer3') and 'downsample' not in name}
    order = [low[name] for name in sorted(wide, key=wide.get)]
    assert order == sorted(order)
    assert len(set(order)) > 1


def total(losses, chosen):
    """What the levels minimise: the shares that layers keep multiply."""
    return sum(-np.log1p(-losses[name][level]) for name, level in chosen.items())


def exact(sizes, losses, budget):
    """The least total by integer programming: one level for each layer."""
    cost, size, owner = [], [], []
    for place, name in enumerate(losses):
        for level, lost in losses[name].items():
            cost.append(-np.log1p(-lost))
            size.append(sizes[name][level])
            owner.append(place)
    one = np.array([[float(o == place) for o in owner] for place in range(len(losses))])
    found = milp(
        cost,
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(np.array([size], dtype=float), 0, budget)],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(cost)),
    )
    assert found.success
    return found.fun


@pytest.mark.parametrize('ratio', [0.9, 0.7, 0.5, 0.3, 0.2])
def test_greedy_is_near_the_optimum(network, ratio):
    losses, layers = losses_by_filters(network), harmonic_layers(network)
    sizes = {name: {level: parameters_at(layers[name], level) for level in of} for name, of in losses.items()}
    others = count(network) - sum(layer.weight.numel() for layer in layers.values())
    budget = int(ratio * count(network))
    chosen = choose_levels(network, losses, budget)
    assert others + sum(sizes[name][level] for name, level in chosen.items()) <= budget
    found = total(losses, chosen)
    best = exact(sizes, losses, budget - others)
    assert best - 1e-6 <= found <= 1.05 * best + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_greedy_is_optimal_for_the_number_that_a_step_arrives_at(data):
    """Along the hull: no other choice with as few parameters as a step arrives at loses less."""
    model = harmonize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 2)))
    layers = harmonic_layers(model)
    losses = {}
    for name, layer in layers.items():
        top = full_level(layer.kernel_size[0])
        drops = data.draw(st.lists(st.floats(0.001, 1), min_size=top - 1, max_size=top - 1))
        lost = [0.0, *(np.cumsum(drops) / (1 + np.sum(drops)))]
        losses[name] = {top - i: value for i, value in enumerate(lost)}
    sizes = {name: {level: parameters_at(layers[name], level) for level in of} for name, of in losses.items()}
    others = count(model) - sum(layer.weight.numel() for layer in layers.values())
    start = choose_levels(model, losses, data.draw(st.integers(others + 60, count(model))))
    budget = sum(sizes[name][level] for name, level in start.items())
    chosen = choose_levels(model, losses, budget + others)
    found = total(losses, chosen)
    assert sum(sizes[name][level] for name, level in chosen.items()) <= budget
    assert found >= exact(sizes, losses, budget) - 1e-6


def smooth(batches=2, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        yield nn.functional.avg_pool2d(torch.randn(4, channels, size + 6, size + 6, generator=generator), 7, 1)


def test_losses_by_images_are_errors_of_the_output():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, dtype=torch.float64)
    model = harmonize(nn.Sequential(conv, nn.ReLU()))
    batches = [batch.double() for batch in smooth()]
    losses = losses_by_images(model, ((batch, torch.zeros(4)) for batch in batches))['0']
    with torch.no_grad():
        x = torch.cat(batches)
        whole = conv(x)
        for level in range(1, 5):
            error = whole - HarmonicConv2d.from_conv2d(conv, level=level)(x)
            ratio = (error.square().mean((0, 2, 3)) / whole.var((0, 2, 3), correction=0)).mean()
            assert losses[level] == pytest.approx(float(ratio / (1 + ratio)))
    assert losses[5] == 0
    by_filters = losses_by_filters(model)['0']
    assert losses[3] < by_filters[3]  # smooth images: the high frequencies of the filters add little


def test_scales_do_not_matter(network):
    """Of a layer and, by images, of a channel: normalisation after the layer takes the scale away."""
    scaled = copy.deepcopy(network)
    with torch.no_grad():
        for i, layer in enumerate(harmonic_layers(scaled).values()):
            layer.weight *= 10.0 ** (i % 5 - 2)
    assert levels(truncate(scaled, ratio=0.5)) == levels(truncate(network, ratio=0.5))
    conv = nn.Conv2d(3, 8, 3)
    loud = copy.deepcopy(conv)
    with torch.no_grad():
        loud.weight[2] *= 1000
        loud.bias += 5
    of = [losses_by_images(harmonize(nn.Sequential(layer)), smooth())['0'] for layer in (conv, loud)]
    assert list(of[0].values()) == pytest.approx(list(of[1].values()), rel=1e-3)


def test_levels_chosen_by_images(network):
    by_data, losses = truncate(network, energy=0.95, data=smooth()), losses_by_images(network, smooth())
    for name, level in levels(by_data).items():
        assert losses[name][level] <= 0.05
        assert level == 1 or min(losses[name][lower] for lower in range(1, level)) > 0.05
    low = truncate(network, ratio=0.5, data=[(batch, None) for batch in smooth()])
    assert count(low) <= 0.5 * count(network)
    assert levels(low) != levels(truncate(network, ratio=0.5))


def test_losses_by_images_leave_no_trace(network):
    model = copy.deepcopy(network).train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    losses_by_images(model, smooth())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_hooks for layer in harmonic_layers(model).values())
    with pytest.raises(RuntimeError):
        losses_by_images(model, [torch.zeros(1, 5, 8, 8)])
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_hooks for layer in harmonic_layers(model).values())


def test_a_layer_that_no_image_reaches_is_judged_by_its_filters():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.b(x) if self.training else self.a(x)

    model = harmonize(Forked())
    losses = losses_by_images(model, smooth())
    assert losses['b'] == losses_by_filters(model)['b']
    assert losses['a'] != losses_by_filters(model)['a']


def test_block_with_normalised_responses():
    """Dropping a frequency of the stem drops its response, with its mean."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(
        timm.create_model('harm_resnet18', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_pool='max').double()
    ).eval()
    low = truncate(model, level=3)
    stem, source = low.conv1, model.conv1
    assert isinstance(stem, HarmonicBlock2d)
    assert stem.weight.shape == (64, 3, 6, 1)
    assert stem.bn.num_features == 18 == len(stem.bn.running_mean)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    kept = [dct_frequencies(7).index(pair) for pair in dct_frequencies(7, 3)]
    explicit = source.bn(source.responses(x)).unflatten(1, (3, 49))[:, :, kept]
    expected = torch.einsum('ocp,bcphw->bohw', source.weight[:, :, kept, 0], explicit)
    torch.testing.assert_close(stem(x), expected)
    torch.testing.assert_close(stem.fuse()(x), expected)
    share = stem.filters().square().sum() / source.filters().square().sum()
    assert energy_kept(stem) == pytest.approx(share.item())
    low.train()(x).square().mean().backward()
    assert low.conv1.bn.num_batches_tracked == source.bn.num_batches_tracked + 1
    assert stem.bn.running_var.shape == (18,)
    again = timm.create_model('harmonized', **get_model_args(low)).double()
    again.load_state_dict(low.state_dict())
    torch.testing.assert_close(again.eval()(x), low.eval()(x))


def test_block_with_another_normalisation_is_refused_whole():
    model = timm.create_model('harm_resnet18', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    model.conv1.bn = nn.GroupNorm(3, 147)
    before = levels(model)
    with pytest.raises(ValueError, match='GroupNorm'):
        truncate(model, level=3, inplace=True)
    with pytest.raises(ValueError, match='GroupNorm has no running statistics'):
        truncate(model, energy=0.9, inplace=True)
    assert levels(model) == before
    model.conv1.bn = nn.SyncBatchNorm(147)
    assert truncate(model, level=3).conv1.bn.num_features == 18


def test_without_dc():
    layer = HarmonicConv2d(2, 2, 3, dc=False)
    assert truncate(nn.Sequential(layer), level=2)[0].weight.shape[2] == 2
    with pytest.raises(ValueError, match='no function is left'):
        truncate(nn.Sequential(layer), level=1)
    assert min(losses_by_filters(nn.Sequential(layer))['0']) == 2


def test_memory_format_frozen_and_mode():
    layer = HarmonicConv2d(4, 4, 3).to(memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    low = truncate(nn.Sequential(layer), level=3)[0]
    assert low.weight.is_contiguous(memory_format=torch.channels_last)
    assert not low.weight.requires_grad
    assert not low.training


def test_layer_of_zeros_is_kept():
    """A layer without energy cannot be judged, as the last one of a residual branch that starts at zero."""
    model = harmonize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)))
    nn.init.zeros_(model[1].weight)
    assert levels(truncate(model, energy=0.5))['1'] == 5
    low = truncate(model, max_params=count(model) - 9)
    assert levels(low)['1'] == 5
    assert energy_kept(truncate(model, level=2)[1]) == 1


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(), ValueError, 'got none'),
        (dict(level=2, energy=0.9), ValueError, 'got level and energy'),
        (dict(ratio=0.5, max_params=10), ValueError, 'got max_params and ratio'),
        (dict(level=0), ValueError, 'from 1 to 13'),
        (dict(level=14), ValueError, 'from 1 to 13'),
        (dict(level=1.5), TypeError, 'integer'),
        (dict(levels={'layer7.*': 2}), ValueError, 'matches none'),
        (dict(levels={'fc': 2}), ValueError, 'matches none'),
        (dict(ratio=1.5), ValueError, 'ratio must be above 0 and at most 1, got 1.5'),
        (dict(ratio=0), ValueError, 'ratio must be'),
        (dict(energy=1.01), ValueError, 'energy must be'),
        (dict(energy=float('nan')), ValueError, 'energy must be'),
        (dict(max_params=0.5), TypeError, 'max_params must be an integer'),
        (dict(max_params=1000), ValueError, r'max_params=1,000 is too few: .*, and 1,\d+,\d+ with every'),
        (dict(ratio=0.01), ValueError, 'is too few'),
        (dict(level=2, data=[]), ValueError, 'data is for energy, max_params and ratio'),
        (dict(ratio=0.5, data=[]), ValueError, 'data have no batches'),
    ],
)
def test_bad_options_change_nothing(network, options, error, words):
    before = levels(network)
    with pytest.raises(error, match=words):
        truncate(network, inplace=True, **options)
    assert levels(network) == before


def test_the_error_names_the_least_number_of_parameters(network):
    with pytest.raises(ValueError, match='is too few') as error:
        truncate(network, max_params=1)
    least = int(str(error.value).split(', and ')[1].split()[0].replace(',', ''))
    assert count(truncate(network, max_params=least)) == least
    assert count(truncate(network, level=1)) == least


def test_nothing_harmonic():
    with pytest.raises(ValueError, match='harmonize it first'):
        truncate(timm.create_model('resnet18'), level=2)


def test_weights_that_are_not_finite(network):
    broken = copy.deepcopy(network)
    nn.init.constant_(broken.layer1[0].conv1.weight, float('nan'))
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1 has weights'):
        truncate(broken, energy=0.9)
    with pytest.raises(ValueError, match='not finite'):
        truncate(broken, energy=0.9, data=smooth())
