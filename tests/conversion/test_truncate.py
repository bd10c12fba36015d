"""truncate: levels, energy, budgets over all layers, and weighing by images."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import reference
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import reparameterize_model
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, harmonic_report, harmonize, truncate
from timm_harmonic.conversion import timing
from timm_harmonic.conversion.channels import Choices
from timm_harmonic.conversion.costs import Cost, Costs, costs_of, count_macs
from timm_harmonic.conversion.refit import losses_by_images
from timm_harmonic.conversion.running import read_images
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.conversion.truncate import choose_levels, losses_by_filters
from timm_harmonic.layers.dct import NORMALIZATIONS, dct_frequencies

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def network():
    """A plain network whose filters are smooth, as trained ones are: the energy is in the low frequencies."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=10, channels=(16, 32, 64, 128))
    reference.randomize_batch_norm(model)
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
        side = layer.kernel_size[0]
        kept = [dct_frequencies(side).index(pair) for pair in dct_frequencies(side, layer.level)]
        assert torch.equal(layer.weight, harmonic_layers(network)[name].weight[:, :, kept])
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


@pytest.mark.parametrize('normalization', NORMALIZATIONS)
@pytest.mark.parametrize('energy', [0.5, 0.9])
def test_energy(network, energy, normalization):
    """The lowest level that keeps the share, measured on the filters themselves."""
    plain = timm.models.reparameterize_model(network)
    low = truncate(harmonize(plain, normalization=normalization), energy=energy)
    assert 0 < count(low) < count(network)
    for name, layer in harmonic_layers(low).items():
        filters = plain.get_submodule(name).weight.detach()
        share = layer.filters().detach().square().sum() / filters.square().sum()
        assert share >= energy - 1e-6
        assert layer.energy_kept == pytest.approx(float(share), rel=1e-5)
        if (level := layer.level) > 1:
            lower = HarmonicConv2d.from_conv2d(plain.get_submodule(name), level=level - 1)
            assert lower.filters().detach().square().sum() < energy * filters.square().sum()
    assert levels(low) == levels(truncate(network, energy=energy))


def test_budget_is_kept(network):
    present = count(network)
    for ratio in (0.95, 0.75, 0.5, 0.2):
        low = truncate(network, ratio=ratio)
        assert count(low) <= ratio * present
        chosen, of = levels(low), costs_of(network, 'parameters', None).of
        raises = [of[n][lv + 1].cost - of[n][lv].cost for n, lv in chosen.items() if lv < 5]
        assert count(low) + min(raises) > ratio * present  # nothing more fits
        assert harmonic_report(low).parameters == count(low)


def harms_of(losses):
    """What levels are to make small: the shares that layers keep multiply."""
    return {name: {lv: float(-np.log1p(-lost)) for lv, lost in of.items()} for name, of in losses.items()}


def total(harms, chosen):
    return sum(harms[name][level] for name, level in chosen.items())


def exact(harms, costs, budget):
    """The least harm within a budget, by dynamic programming over whole units of cost."""
    unit = np.gcd.reduce([round(of.cost) for by_level in costs.of.values() for of in by_level.values()])
    room = int((budget - costs.rest) / unit + 1e-9)
    best = np.zeros(room + 1)
    for name, of in harms.items():
        longer = np.full(room + 1, np.inf)
        for level, harm in of.items():
            cost = round(costs.of[name][level].cost) // unit
            longer[cost:] = np.minimum(longer[cost:], best[: max(0, room + 1 - cost)] + harm)
        best = longer
    return best[-1]


def check_choice(losses, costs, budget):
    harms, chosen = harms_of(losses), choose_levels(losses, costs, budget)
    assert costs.total(chosen) <= budget * (1 + 1e-12)
    assert total(harms, chosen) <= 1.001 * exact(harms, costs, budget) + 1e-9
    assert choose_levels(losses, costs, budget) == chosen


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_the_choice_is_near_the_best_of_a_network(name):
    torch.manual_seed(0)
    model = harmonize(timm.create_model(name), inplace=True)
    costs, losses = costs_of(model, 'parameters', None), losses_by_filters(model)
    for ratio in (0.9, 0.7, 0.5, 0.25):
        check_choice(losses, costs, max(ratio * costs.present, costs.least))


@pytest.mark.parametrize('seed', range(20))
def test_the_choice_is_near_the_best_of_random_instances(seed):
    random = np.random.default_rng(seed)
    losses, of = {}, {}
    for name in map(str, range(random.integers(5, 30))):
        lost = random.random(4) ** 3
        lost = lost if seed % 3 == 0 else np.sort(lost)  # losses need not grow from level to level
        losses[name] = dict(zip((5, 4, 3, 2, 1), [0.0, *map(float, lost)], strict=True))
        of[name] = {
            level: Cost(float(share * random.integers(1, 100)))
            for level, share in zip(losses[name], (9, 8, 6, 3, 1), strict=True)
        }
    costs = Costs(10.0, of)
    check_choice(losses, costs, costs.least + random.random() * (costs.present - costs.least))


def test_choices_of_equal_time():
    """Times by form are not compared."""
    of = {level: Cost(1.0, 'dense', dict(dense=1.0)) for level in (2, 1)} | {3: Cost(2.0, 'dense', dict(dense=2.0))}
    costs = Costs(0.0, dict(a=of))
    assert choose_levels(dict(a={3: 0.0, 2: 0.1, 1: 0.2}), costs, 1.5) == dict(a=2)


def smooth(batches=2, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        yield nn.functional.avg_pool2d(torch.randn(4, channels, size + 6, size + 6, generator=generator), 7, 1)


def by_images(model, data):
    """What every level loses on images."""
    layers, parts = harmonic_layers(model), read_images(data, next(model.parameters()), least=1)
    (losses,) = losses_by_images(model, parts, [Choices(layers, list(layers), 'layer').weighed], False)
    return losses_by_filters(model) | losses


def test_losses_by_images_are_errors_of_the_output():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, stride=2, dtype=torch.float64)
    model = harmonize(nn.Sequential(conv, nn.ReLU()))
    batches = [batch.double() for batch in smooth()]
    losses = by_images(model, ((batch, torch.zeros(4)) for batch in batches))['0']
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
    of = [by_images(harmonize(nn.Sequential(layer)), smooth())['0'] for layer in (conv, loud)]
    assert list(of[0].values()) == pytest.approx(list(of[1].values()), rel=1e-3)


def test_levels_chosen_by_images(network):
    losses = by_images(network, smooth())
    for name, level in levels(truncate(network, energy=0.95, data=smooth())).items():
        assert losses[name][level] <= 0.05
        assert level == 1 or min(losses[name][lower] for lower in range(1, level)) > 0.05
    low = truncate(network, ratio=0.5, data=[(batch, None) for batch in smooth()])
    assert count(low) <= 0.5 * count(network)
    assert levels(low) != levels(truncate(network, ratio=0.5))


@pytest.mark.parametrize('channels', [3, 5])
def test_losses_by_images_leave_no_trace(network, channels):
    """Nor does a run that fails."""
    model = copy.deepcopy(network).train()
    model.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with nullcontext() if channels == 3 else pytest.raises(RuntimeError):
        by_images(model, smooth(channels=channels))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
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
    losses = by_images(model, smooth())
    assert losses['b'] == losses_by_filters(model)['b']
    assert losses['a'] != losses_by_filters(model)['a']


def test_block_with_normalised_responses():
    """Dropping a frequency of the stem drops its response, with its mean."""
    options = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_pool='max')
    model = reference.small('harm_resnet18', options).double()
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
    share = stem.filters().square().sum() / source.filters().square().sum()
    assert stem.energy_kept == pytest.approx(share.item())
    low.train()(x).square().mean().backward()
    assert stem.bn.num_batches_tracked == source.bn.num_batches_tracked + 1


def test_block_with_another_normalisation_is_refused_whole():
    model = timm.create_model('harm_resnet18', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    model.conv1.bn = nn.GroupNorm(3, 147)
    before = levels(model)
    for amount in (dict(level=3), dict(energy=0.9)):
        with pytest.raises(ValueError, match='GroupNorm'):
            truncate(model, inplace=True, **amount)
    assert levels(model) == before
    model.conv1.bn = nn.SyncBatchNorm(147)
    assert truncate(model, level=3).conv1.bn.num_features == 18


def test_without_dc():
    layer = HarmonicConv2d(2, 2, 3, dc=False)
    assert truncate(nn.Sequential(layer), level=2)[0].weight.shape[2] == 2
    with pytest.raises(ValueError, match='leave no function'):
        truncate(nn.Sequential(layer), level=1)
    assert min(losses_by_filters(nn.Sequential(layer))['0']) == 2


def test_layer_of_zeros_is_kept():
    """A layer without energy cannot be judged, as the last one of a residual branch that starts at zero."""
    model = harmonize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)))
    nn.init.zeros_(model[1].weight)
    assert levels(truncate(model, energy=0.5))['1'] == 5
    low = truncate(model, ratio=(count(model) - 9) / count(model))
    assert levels(low)['1'] == 5
    assert truncate(model, level=2)[1].energy_kept == 1


@pytest.mark.parametrize('name', ['pit_ti_224', 'coat_tiny', 'deit_tiny_patch16_224'])
def test_multiply_adds_of_attention(name):
    """Modules that get parameters as their input, and fused attention, count as what they are composed of."""
    model = timm.create_model(name).train()
    images = torch.randn(1, *model.pretrained_cfg['input_size'])
    before = [*model.parameters()]
    set_fused_attn(False)
    try:
        composed = timm.create_model(name)
    finally:
        set_fused_attn(True)
    assert count_macs(model, images) == count_macs(composed, images)
    assert model.training
    assert all(a is b and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_multiply_adds_of_recurrent_layers():
    """torch's fused kernel of an LSTM has no formula."""
    assert count_macs(nn.LSTM(8, 16), torch.randn(1, 1, 8)) == 4 * 16 * (8 + 16)


def test_a_network_that_cannot_be_counted():
    class Asking(nn.Module):
        def forward(self, x):
            return x * x.mean().item()

    with pytest.raises(ValueError, match=r'the multiply-adds of Asking cannot be counted: .*meta'):
        count_macs(Asking(), torch.randn(1, 3, 8, 8))


def test_multiply_adds_are_counted(network):
    """Those of torch's counter on the network that deploy makes."""
    images = torch.randn(2, 3, 64, 64)
    costs = costs_of(network, 'macs', images)
    for level in (3, 2, 1):
        low = truncate(network, level=level)
        chosen = levels(low)
        for name, layer in harmonic_layers(low).items():
            layer.form = costs.of[name][chosen[name]].form
        assert costs.total(chosen) == pytest.approx(count_macs(reparameterize_model(low), images), rel=1e-6)
    assert costs.total(levels(network)) < costs_of(network, 'macs', torch.randn(1, 3, 80, 80)).total(levels(network))


@pytest.mark.parametrize('ratio', [0.8, 0.5])
def test_a_budget_of_multiply_adds(network, ratio):
    images = torch.randn(1, 3, 64, 64)
    costs = costs_of(network, 'macs', images)
    low = truncate(network, ratio=ratio, cost='macs', images=images)
    assert costs.total(levels(low)) <= ratio * costs.total(levels(network))
    assert {n: layer.form for n, layer in harmonic_layers(low).items()} == {
        name: costs.of[name][level].form for name, level in levels(low).items()
    }
    report = harmonic_report(low, images)
    assert sum(conv.macs or 0 for conv in report.convolutions) + costs.rest == pytest.approx(costs.total(levels(low)))
    assert all(conv.macs <= conv.macs_before for conv in report.convolutions if conv.macs)


@pytest.mark.parametrize('runtime', ['torch', 'onnxruntime'])
def test_a_budget_of_time(network, monkeypatch, runtime):
    """By times that are made up: what is measured here depends on the machine."""

    def times(runs, x):
        assert all(isinstance(run, nn.Module) == (runtime == 'torch') for run in runs.values())
        return {name: [dict(dense=1.0, network=20.0).get(name, 0.25)] * 9 for name in runs}

    monkeypatch.setattr(timing, 'times_of', times)
    monkeypatch.setattr(timing, 'write_onnx', lambda network, images, path: None)  # takes seconds
    images = torch.randn(1, 3, 64, 64)
    costs = costs_of(network, 'time', images, runtime)
    assert costs.rest == 20 - 17
    found = {level: of.cost for level, of in costs.of['layer2.1.conv1'].items()}
    assert found == {5: 1.0, 4: 1.0, 3: 0.25, 2: 0.25, 1: 0.25}  # at 4 it saves nothing
    low = truncate(network, ratio=0.7, cost='time', images=images, runtime=runtime)
    assert costs.total(levels(low)) <= 14
    lowered = [layer for layer in harmonic_layers(low).values() if layer.form == 'separable']
    assert len(lowered) == 8
    assert all(layer.milliseconds == dict(dense=1.0, separable=0.25) for layer in lowered)
    row = next(conv for conv in harmonic_report(low).convolutions if conv.form == 'separable')
    assert (row.ms, row.ms_before) == (0.25, 1.0)
    with pytest.raises(ValueError, match=r'ratio=0.01 is too small: [\d.]+ is the least, with every layer'):
        truncate(network, ratio=0.01, cost='time', images=images, runtime=runtime)


def test_time_is_measured(network, monkeypatch):
    monkeypatch.setattr(timing, '_ROUND', 1e-4)
    costs = costs_of(network, 'time', torch.randn(1, 3, 32, 32))
    assert costs.rest >= 0
    assert all(0 < of[level].cost <= of[max(of)].cost for of in costs.of.values() for level in of)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ('options', 'error', 'words'),
    [
        (dict(ratio=0.5, cost='flops'), ValueError, "cost must be one of .*, got 'flops'"),
        (dict(ratio=0.5, cost='time'), ValueError, "cost='time' needs images"),
        (dict(level=2, cost='macs'), ValueError, "cost='macs' needs ratio"),
        (dict(level=2, runtime='onnx'), ValueError, "runtime must be one of .*, got 'onnx'"),
        (dict(level=2, runtime='onnxruntime'), ValueError, "runtime='onnxruntime' is for cost='time'"),
        (dict(ratio=0.5, images=torch.zeros(1, 3, 8, 8)), ValueError, "images are for cost='macs'"),
        (dict(ratio=0.5, cost='macs', images=torch.zeros(1, 3, 8, 8, device='meta')), ValueError, 'images are on meta'),
        (dict(), ValueError, 'got none'),
        (dict(ratio=0.5, energy=0.9), ValueError, 'got energy and ratio'),
        (dict(level=14), ValueError, 'from 1 to 13'),
        (dict(level=1.5), TypeError, 'integer'),
        (dict(levels={'fc': 2}), ValueError, 'matches none'),
        (dict(ratio=1.5), ValueError, 'ratio must be above 0 and at most 1, got 1.5'),
        (dict(ratio=True), TypeError, 'ratio must be a number'),
        (dict(ratio=0.5, data=[torch.zeros(1, 3, 8, 8)], batches=-1), ValueError, 'batches must be an integer'),
        (dict(ratio=0.5, cost='time', images=torch.zeros(0, 3, 8, 8)), ValueError, 'pass at least one image'),
        (dict(energy=float('nan')), ValueError, 'energy must be'),
        (dict(level=2, data=[]), ValueError, 'pass refit=True or no data'),
        (dict(ratio=0.5, data=[]), ValueError, 'data hold no batches'),
    ],
)
def test_bad_options_change_nothing(network, options, error, words):
    before = levels(network)
    with pytest.raises(error, match=words):
        truncate(network, inplace=True, **options)
    assert levels(network) == before


def test_the_error_names_the_least_ratio(network):
    with pytest.raises(ValueError, match='is too small') as error:
        truncate(network, ratio=1e-3)
    least = float(str(error.value).split('too small: ')[1].split()[0])
    assert count(truncate(network, level=1)) <= count(truncate(network, ratio=least)) <= least * count(network)


@pytest.mark.parametrize('data', [None, [torch.zeros(4, 3, 32, 32)]])
def test_weights_that_are_not_finite(network, data):
    broken = copy.deepcopy(network)
    nn.init.constant_(broken.layer1[0].conv1.weight, float('nan'))
    with pytest.raises(ValueError, match=r'layer1\.0\.conv1 has weights|not finite'):
        truncate(broken, energy=0.9, data=data)
