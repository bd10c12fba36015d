"""refit: least squares against a plain formula, and truncated networks that come nearer to the complete ones."""

import copy
import itertools
import threading
import warnings

import pytest
import reference
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, harmonic_report, harmonize, refit, truncate
from timm_harmonic.conversion.channels import Choices
from timm_harmonic.conversion.costs import costs_of
from timm_harmonic.conversion.refit import (
    Moments,
    Samples,
    by_group,
    estimate_statistics,
    losses_by_images,
    norms_behind,
    output_error,
    refitted,
)
from timm_harmonic.conversion.running import read_images, watching
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.conversion.truncate import choose_levels, losses_by_filters

pytestmark = pytest.mark.usefixtures('one_thread')


def smooth(count=24, channels=3, size=32, seed=0):
    """Images with most of their energy at low frequencies, as photographs have."""
    noise = torch.randn(count, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 5, 1) * 5


def tiny():
    """A small network of blocks with smooth filters, as trained ones are, and images enough for it."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=10, zero_init_last=False, **SMALL)
    with torch.no_grad():
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.lerp_(conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight), 0.8).mul_(2)
    estimate_statistics(model, [smooth(seed=1)])
    return harmonize(model.eval()), smooth(64)


def simple():
    """Two harmonic layers in a row."""
    torch.manual_seed(0)
    return harmonize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval())


def nearer(model, better, small, images):
    """Whether the outputs of the first truncated network are nearer to the complete one's than the other's."""
    parts = read_images([images], next(model.parameters()))
    return output_error(model, better, parts) < output_error(model, small, parts)


def weakened(small):
    """A truncated network whose coefficients are too small, so that refitting has something to do."""
    small = copy.deepcopy(small)
    with torch.no_grad():
        for layer in harmonic_layers(small).values():
            layer.weight.mul_(0.7)
    return small


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize('intercept', [True, False])
@pytest.mark.parametrize('ridge', [1e-4, 1.0, 1e9])
@pytest.mark.parametrize('groups', [1, 3])
def test_least_squares(groups, ridge, intercept):
    """Against the formula on the rows themselves, added in two parts. Some features have little energy."""
    torch.manual_seed(0)
    rows, features, outputs = 40, 5, 2
    x = (torch.randn(groups, rows, features, dtype=torch.float64) + 1) * torch.tensor([1.0, 0.1, 2.0, 0.01, 1.0])
    y = torch.randn(groups, rows, outputs, dtype=torch.float64) + x.sum(2, keepdim=True)
    start = torch.randn(groups, features, outputs, dtype=torch.float64)
    size = features + outputs + 1
    moments = Moments(features, torch.zeros(groups, size, size, dtype=torch.float64))
    for part in (slice(0, 25), slice(25, None)):
        moments.add(x[:, part], y[:, part])
    weight, bias = moments.solve(start, ridge, intercept)
    for group in range(groups):
        a, b = x[group], y[group]
        a, b = (a - a.mean(0), b - b.mean(0)) if intercept else (a, b)
        energy = a.square().sum(0)
        penalty = (ridge * energy.maximum(energy.mean())).sqrt().diag()
        stacked = torch.linalg.lstsq(torch.cat([a, penalty]), torch.cat([b, penalty @ start[group]])).solution
        torch.testing.assert_close(weight[group], stacked, rtol=1e-6, atol=1e-6)
        offset = (y[group] - x[group] @ weight[group]).mean(0) if intercept else torch.zeros(outputs)
        torch.testing.assert_close(bias[group], offset.double(), rtol=1e-9, atol=1e-9)
    errors = (y - x @ weight - bias[:, None]).square().mean(1)
    torch.testing.assert_close(moments.error(weight, bias), errors, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moments.variance(), y.var(1, correction=0))


def test_depthwise_layers_of_large_images_are_refitted(monkeypatch):
    """Few features and many positions: a small share of them must do."""
    monkeypatch.setattr('timm_harmonic.conversion.refit.FEWEST', 1)
    torch.manual_seed(0)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3)).eval())
    small = weakened(truncate(model, level=1))
    images = smooth(8, size=100)
    assert nearer(model, refit(model, small, [images]), small, images)


# The first is of the other families' layers, but depth-wise and grouped ones. The work grows with the square of the
# channels.
SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 16))
NETWORKS = dict(
    resnet18=SMALL, mobilenetv3_small_050={}, regnety_002={}, convnext_atto={}, densenet121=dict(block_config=[2] * 4)
)
# The same layers in smaller networks: the work grows with the square of the channels.


@pytest.mark.parametrize(
    'name', [*list(NETWORKS)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(NETWORKS)[2:])]
)
def test_refitted_networks_are_never_further_from_the_complete_ones(name):
    """On images that include those held out. Nothing else changes."""
    torch.manual_seed(0)
    model, data = timm.create_model(name, num_classes=10, **NETWORKS[name]), smooth()
    estimate_statistics(model, [smooth(seed=1)])
    model = harmonize(model.eval())
    small = truncate(model, level=2, levels={next(iter(harmonic_layers(model))): 3})
    before = [copy.deepcopy(network.state_dict()) for network in (model, small)]
    better = refit(model, small, [data])
    parts = read_images([data], data)
    assert output_error(model, better, parts) <= output_error(model, small, parts)
    for network, state in zip((model, small), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert str(better) == str(small)
    for network in (model, small, better):
        assert not any(module.training for module in network.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize('level', [1, 3])
def test_refitted_networks_are_nearer_to_the_complete_ones(level):
    """On images that nothing has seen, clearly."""
    model, data = tiny()
    small = truncate(model, level=level)
    better = refit(model, small, [data])
    counted = copy.deepcopy(small)
    estimate_statistics(counted, read_images([data], data))
    errors = [output_error(model, network, [smooth(64, seed=2)]) for network in (better, counted, small)]
    assert errors[0] < 0.9 * min(errors[1:])


@pytest.mark.parametrize('counted', [False, True])
def test_statistics_of_other_images_are_kept(counted):
    """Those that the network was trained on. Only with them the layers' outputs mean what they did."""
    model, data = tiny()
    data = 3 * data + 1
    small = truncate(model, level=2)
    if counted:  # refitting goes back to the complete network's
        estimate_statistics(small, read_images([data], data))
    better = refit(model, small, [data])
    for name, buffer in model.named_buffers():
        if name.endswith('running_var'):
            assert torch.equal(better.get_buffer(name), buffer)
    estimated = copy.deepcopy(better)
    estimate_statistics(estimated, read_images([data], data))
    new = [3 * smooth(64, seed=2) + 1]
    assert output_error(model, better, new) < 0.5 * output_error(model, estimated, new)


def test_images_held_out_take_no_part_in_what_they_judge(monkeypatch):
    """Other held-out images lead to the same four networks; the best one is then fitted to them as well."""
    judged = []

    def note(model, network, parts):
        judged[-1].append(copy.deepcopy(network))
        return output_error(model, network, parts)

    monkeypatch.setattr('timm_harmonic.conversion.refit.output_error', note)
    monkeypatch.setattr('timm_harmonic.conversion.refit._RIDGES', (1e-2,))
    torch.manual_seed(0)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).eval())
    part = smooth(32)
    estimate_statistics(model, [part])
    small = weakened(truncate(model, level=2))
    other = torch.where(torch.arange(32)[:, None, None, None] % 4 == 3, smooth(32, seed=1), part)
    results = []
    for images in (part, other):
        judged.append([])
        results.append(refitted(model, small, [images]))
    for first, second in zip(*judged, strict=True):
        assert same(first, second)
    assert not same(*results)
    assert not same(results[0], judged[0][2])


def test_a_layer_makes_up_for_the_one_before():
    """Two layers in a row: the second is fitted to the input that it has."""
    torch.manual_seed(0)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).double()).eval()
    data = [smooth(32, size=12).double()]
    small = truncate(model, levels={'0': 2, '2': 3})
    better = refit(model, small, data)
    apart = copy.deepcopy(small)
    for name, inputs in (('0', data[0]), ('2', model[1](model[0](data[0])).detach())):
        layer = refit(nn.Sequential(model.get_submodule(name)), nn.Sequential(small.get_submodule(name)), [inputs])[0]
        apart.set_submodule(name, layer)
    parts = read_images(data, data[0])
    errors = [output_error(model, network, parts) for network in (better, apart, small)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('layers', [[], [nn.BatchNorm2d(8)], [nn.ReLU(), nn.BatchNorm2d(8)]])
def test_where_the_constant_goes(layers, bias):
    """Into the bias, into the running mean behind a layer, or nowhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), *layers)
    model = harmonize(reference.randomize_batch_norm(model).eval())
    assert list(norms_behind(model, torch.randn(2, 3, 8, 8)).values()) == ['1'] * (len(layers) == 1)
    small = truncate(model, level=1)
    better = refit(model, small, [smooth()])
    assert nearer(model, better, small, smooth()) or same(better, small)
    assert (better[0].bias is None) == (not bias)
    if bias:
        with torch.no_grad():
            small[0].bias.add_(1)
        torch.testing.assert_close(refit(model, small, [smooth()])[0].bias, model[0].bias, rtol=0, atol=0.2)


def test_the_running_mean_takes_the_constant_up():
    """Frozen statistics behind a second layer whose input is off by a constant."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)]
    model = freeze_batch_norm_2d(reference.randomize_batch_norm(nn.Sequential(*layers).eval()))
    model = harmonize(model).double()
    small = truncate(model, level=4)
    with torch.no_grad():
        small[0].bias.add_(2)
    data = smooth().double()
    better = refit(model, small, [data])
    parts = read_images([data], data)
    assert not torch.equal(better[2].running_mean, small[2].running_mean)
    assert output_error(model, better, parts) < 0.1 * output_error(model, small, parts)


def each_norm(change):
    def freeze(model):
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)
        return model

    return freeze


@pytest.mark.parametrize(
    'freeze',
    [
        freeze_batch_norm_2d,
        each_norm(lambda norm: norm.eval()),
        each_norm(lambda norm: setattr(norm, 'momentum', 0.0)),
        each_norm(lambda norm: setattr(norm, 'track_running_stats', False)),
    ],
)
def test_frozen_statistics_stay(freeze, monkeypatch):
    """In the result, and in all networks that are judged for it."""
    judged = []

    def note(model, network, parts):
        judged.append(copy.deepcopy(network))
        return output_error(model, network, parts)

    monkeypatch.setattr('timm_harmonic.conversion.refit.output_error', note)
    model, data = tiny()
    frozen = freeze(copy.deepcopy(model))
    small = weakened(truncate(frozen, level=2))
    better = refit(frozen, small, [data])
    assert nearer(frozen, better, small, data)
    for old, new in zip(small.modules(), better.modules(), strict=True):
        for flag in ('training', 'momentum', 'track_running_stats'):
            assert getattr(old, flag, None) == getattr(new, flag, None)
    assert len(judged) == 4
    for network in (better, *judged):
        for name, module in network.named_modules():
            if hasattr(module, 'running_var') and name:
                assert torch.equal(module.running_var, small.get_submodule(name).running_var)


def test_the_stem_of_a_network_in_training_keeps_its_statistics():
    torch.manual_seed(0)
    layers = (HarmonicBlock2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), HarmonicConv2d(8, 8, 3))
    model = reference.randomize_batch_norm(nn.Sequential(*layers)).train()
    before = copy.deepcopy(model[0].bn.state_dict())
    small = weakened(truncate(model, levels={'3': 2}))
    better = refit(model, small, [smooth(64)])
    assert not torch.equal(better[3].weight, small[3].weight)
    for network in (model, small, better):
        assert all(torch.equal(before[key], value) for key, value in network[0].bn.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = simple().to(dtype)
    small = weakened(truncate(model, level=2))
    better = refit(model, small, [smooth()])
    assert {p.dtype for p in better.parameters()} == {dtype}
    assert nearer(model, better, small, smooth())


def test_smooth_networks_and_stems_of_our_own():
    torch.manual_seed(0)
    model = timm.create_model('harm_resnet18', num_classes=10, smoothness=1.0, stem_pool='max', **SMALL)
    model.conv1.train()(smooth(seed=1))
    estimate_statistics(model.eval(), [smooth()])
    small = weakened(truncate(model, level=3))
    better = refit(model, small, [smooth(64)])
    assert nearer(model, better, small, smooth(64))
    assert torch.equal(better.conv1.bn.running_var, small.conv1.bn.running_var)


def test_plain_and_complete():
    """The complete network may be the plain one. A network that is complete itself keeps its coefficients."""
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', num_classes=10, **SMALL).eval()
    model = harmonize(plain)
    small = weakened(truncate(model, level=2))
    a, b = (refit(complete, small, [smooth()]) for complete in (plain, model))
    assert reference.relative_error(a.layer1[0].conv1.weight, b.layer1[0].conv1.weight) < 1e-3
    untouched = refit(model, model, [smooth()])
    assert torch.equal(untouched.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


def test_inplace_and_training_flags():
    model = simple()
    small = weakened(truncate(model, level=2)).train()
    small[0].eval()
    small[2].form, small[2].milliseconds = 'separable', dict(dense=2.0, separable=1.0)
    better = refit(model, small, [smooth()])
    assert refit(model, small, [smooth()], inplace=True) is small
    assert same(small, better)
    assert harmonic_report(small) == harmonic_report(better)
    assert 0 < small[0].energy_kept < 1
    for network in (small, better):
        assert [module.training for module in network.modules()] == [True, False, True, True]


@pytest.mark.parametrize(
    'data',
    [
        list(smooth().split(5)),
        (part for part in smooth().split(7)),
        DataLoader(TensorDataset(smooth(), torch.zeros(24)), 8),
        [(smooth(), 'labels')],
        [[smooth()]],
    ],
)
def test_any_iterable(data):
    model = simple()
    small = weakened(truncate(model, level=2))
    if isinstance(data, DataLoader):
        assert truncate(model, level=2, data=data, refit=True)[0].level == 2
    torch.testing.assert_close(refit(model, small, data)[0].weight, refit(model, small, [smooth()])[0].weight)


def test_data_without_an_end(monkeypatch):
    monkeypatch.setattr('timm_harmonic.conversion.running._BYTES', 2**20)
    model = simple()
    small = weakened(truncate(model, level=2))
    endless = itertools.repeat(smooth(8))
    assert not same(refit(model, small, endless, batches=2), small)
    with pytest.raises(ValueError, match='GiB of images, which stay in memory'):
        refit(model, small, endless)


@pytest.mark.parametrize(
    ('data', 'error', 'words'),
    [
        ([], ValueError, 'data hold no batches'),
        ([smooth(), torch.zeros(0, 3, 32, 32)], ValueError, r'batch 1 of data must be images .*, got \(0, 3, 32, 32\)'),
        ([smooth(), smooth() * float('nan')], ValueError, 'batch 1 of data has values that are not finite'),
        ([smooth()[0]], ValueError, r'batch 0 of data must be images \(B, C, H, W\), got \(3, 32, 32\)'),
        (['images'], ValueError, 'batch 0 of data must be images .* got str'),
        ([smooth(7)], ValueError, 'data hold 7 images: at least 8'),
        ([torch.zeros(8, 5, 32, 32)], RuntimeError, 'channels'),
    ],
)
def test_bad_data_change_nothing(data, error, words):
    model = simple()
    small = truncate(model, level=2).train()
    small[0].eval()
    before = copy.deepcopy(small)
    with pytest.raises(error, match=words):
        refit(model, small, data, inplace=True)
    with pytest.raises(error, match=words):
        truncate(small, level=1, data=data, refit=True, inplace=True)
    assert same(small, before)
    assert [module.training for module in small.modules()] == [module.training for module in before.modules()]
    assert not any(module._forward_hooks for module in (*model.modules(), *small.modules()))


def test_networks_that_do_not_fit():
    model = simple()
    small = truncate(model, level=2)
    wider = nn.Sequential(model, nn.Conv2d(4, 8, 1))
    part = truncate(harmonize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3))), level=2)
    computed = copy.deepcopy(small)
    nn.utils.parametrizations.weight_norm(computed[0])
    for complete, truncated, error, words in (
        (model, nn.Sequential(nn.Conv2d(3, 4, 1)), ValueError, 'has no harmonic layers'),
        (model, part, ValueError, '1 of the truncated network has no equal'),
        (copy.deepcopy(model).to('meta'), small, ValueError, 'on one device and of one dtype'),
        (copy.deepcopy(model).double(), small, ValueError, 'on one device and of one dtype'),
        (small, model, ValueError, 'keeps less in the complete network'),
        (wider, truncate(nn.Sequential(model), level=2), ValueError, r'shapes, got \[\(24, 8, 28.*and \[\(24, 4, 28'),
        ('resnet18', small, TypeError, 'expected a network'),
        (model, computed, ValueError, 'cannot refit 0: its weight is computed'),
    ):
        with pytest.raises(error, match=words):
            refit(complete, truncated, [smooth()])


def test_values_beyond_the_precision_are_refused():
    """They would make every level look alike, and any fit."""

    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    for amount in (dict(ratio=0.5), dict(level=2)):
        with pytest.raises(ValueError, match='not finite'):
            truncate(tiny()[0], data=[torch.full((16, 3, 32, 32), 3e38)], refit=True, **amount)
    model, data = nn.Sequential(simple(), Exponential()).eval(), smooth(64)
    data[torch.randperm(64, generator=torch.Generator().manual_seed(0))[32:]] *= 1e6  # in the second part of them
    with pytest.raises(ValueError, match='not finite'):
        truncate(model, level=2, data=[data], refit=True)


@pytest.mark.parametrize('output', [None, 'text', torch.arange(3)])
def test_outputs_that_are_no_numbers_are_left_out(output):
    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = simple()

        def forward(self, x):
            return self.network(x), output

    model = More().eval()
    small = weakened(truncate(model, level=2))
    assert nearer(model, refit(model, small, [smooth()]), small, smooth())
    model.network.forward = lambda x: None
    if not isinstance(output, torch.Tensor):
        with pytest.raises(ValueError, match='must return tensors'):
            refit(model, small, [smooth()])


def test_batches_of_several_sizes():
    model = simple()
    sizes = [smooth(1, size=size) for size in (32, 40, 32, 40, 32, 40, 32, 40)]
    parts = read_images(sizes, next(model.parameters()))
    assert [tuple(part.shape) for part in parts] == [(4, 3, 32, 32), (4, 3, 40, 40)]
    assert isinstance(truncate(model, level=2, data=sizes, refit=True), type(model))
    with pytest.raises(ValueError, match=r'a single image of size \(3, 48, 48\)'):
        truncate(model, level=2, data=[*sizes, smooth(1, size=48)], refit=True)


def test_statistics_that_no_image_reaches_stay():
    """Of a head that only training uses; and frozen ones."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm, self.extra, self.frozen = (nn.BatchNorm2d(8) for _ in range(3))
            self.frozen.momentum = 0.0

        def forward(self, x):
            x = self.conv(x)
            return self.frozen(self.norm(x)), self.extra(x) if self.training else None

    model = Net()
    estimate_statistics(model, [smooth()])
    with torch.no_grad():
        model.extra.running_var.fill_(3.0)
    model = harmonize(model.eval())
    counted = copy.deepcopy(model)
    estimate_statistics(counted, [smooth(seed=2)])
    assert not torch.equal(counted.norm.running_var, model.norm.running_var)
    for norm in ('extra', 'frozen'):
        before, after = (network.get_submodule(norm).state_dict() for network in (model, counted))
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_repeated_layer_before_work_in_place():
    """It is fitted to all its uses at once, by the inputs that it had, not what became of them."""

    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.first, self.conv, self.inplace = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), inplace

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                y = self.conv(x)
                x = x.add_(y).relu_() if self.inplace else (x + y).relu()
            return x

    weights = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = harmonize(Net(inplace).eval())
        small = weakened(truncate(model, level=2))
        better = refit(model, small, [smooth()])
        assert nearer(model, better, small, smooth(seed=3))
        weights.append(better.conv.weight)
    torch.testing.assert_close(*weights)


class Winding(nn.Module):
    """Layers in another order than registered, one used twice with another between, and one for small images alone.

    What it keeps in an attribute is that of its last input.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.twice, self.rare, self.first = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norm, self.between = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        small = x.shape[-1] < 10
        self.kept = x = self.norm(self.first(x))
        for layer in (self.twice, self.rare, self.between) if small else (self.between, self.twice):
            x = x + layer(x)
        return self.last(self.twice(x + self.kept).relu_())


@pytest.mark.parametrize('suspended', [0, 2**22, 2**28])
def test_the_fit_is_that_of_one_layer_after_another(suspended, monkeypatch):
    """Whatever the order of their uses, and however many runs stay suspended."""
    monkeypatch.setattr('timm_harmonic.conversion.running._SUSPENDED', suspended)
    monkeypatch.setattr('timm_harmonic.conversion.refit._RIDGES', (1e-2,))
    judged = []
    monkeypatch.setattr('timm_harmonic.conversion.refit.output_error', lambda *args: judged.append(args[1]) or 1.0)
    model = harmonize(Winding().eval())
    small = weakened(truncate(model, level=2))
    parts = read_images([smooth(24, size=8), smooth(40, size=12)], smooth())
    refitted(model, small, parts)

    def visits(network, name, part):
        seen = []
        layers = {name: network.get_submodule(name)}
        with watching(layers, lambda name, _, inputs, output: seen.append((inputs[0].clone(), output.clone()))):
            network(part)
        return seen

    by_hand = copy.deepcopy(small)
    with torch.no_grad():
        for name in ('first', 'twice', 'rare', 'between', 'last'):
            layer, place = by_hand.get_submodule(name), 0
            samples = Samples(layer, 1.0)
            for part in parts:
                held_out = torch.arange(place, place + len(part)) % 4 == 3
                place += len(part)
                for (_, wanted), (x, _) in zip(visits(model, name, part), visits(by_hand, name, part), strict=True):
                    samples.add(x, wanted, held_out)
            weight, bias = samples.fit.solve(by_group(layer.weight, 1), 1e-2, True)
            layer.weight.copy_(weight.transpose(1, 2).reshape(layer.weight.shape))
            layer.bias.copy_(bias[0])
    for ours, theirs in zip(judged[2].parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def lost(model, parts):
    """What refitting leaves over at every level."""
    layers = harmonic_layers(model)
    (losses,) = losses_by_images(model, parts, [Choices(layers, list(layers), 'layer').weighed], True)
    return losses


def test_losses_are_what_refitting_leaves_over():
    """At every level of a layer, from one run; those of refitting the layer alone."""
    torch.manual_seed(0)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 5, groups=2)).eval())
    data = smooth(64, size=16)
    parts = read_images([data], data)
    losses = lost(model, parts)
    assert {name: list(of) for name, of in losses.items()} == {'0': [5, 4, 3, 2, 1], '1': [9, 8, 7, 6, 5, 4, 3, 2, 1]}
    for of in losses.values():
        assert of[max(of)] == 0
        assert list(of.values()) == sorted(of.values())
        assert 0 < of[1] <= 1
    for level in (3, 1):
        layer = nn.Sequential(model[0].at_level(level))
        error = output_error(nn.Sequential(model[0]), refit(nn.Sequential(model[0]), layer, [data]), parts)
        assert losses['0'][level] == pytest.approx(error, rel=0.5, abs=1e-4)


def test_truncate_refits(tmp_path):
    """Levels by what refitting leaves over; the function gives the same as both steps."""
    model, data = tiny()[0], [smooth(16)]
    small = truncate(model, ratio=0.5, data=data, refit=True)
    losses = lost(model, read_images(data, data[0]))
    costs = costs_of(model, 'parameters', None)
    levels = choose_levels(losses_by_filters(model) | losses, costs, 0.5 * costs.present)
    by_hand = refit(model, truncate(model, levels=levels), data)
    assert same(small, by_hand)
    assert small._model_args == by_hand._model_args
    given = truncate(model, level=2, data=data, refit=True)
    assert same(given, refit(model, truncate(model, level=2), data))
    changed = copy.deepcopy(model)
    assert truncate(changed, ratio=0.5, data=data, refit=True, inplace=True) is changed
    assert same(changed, small)
    assert harmonic_report(changed) == harmonic_report(small)
    assert 0 < min(layer.energy_kept for layer in harmonic_layers(changed).values()) < 1
    timm.models.save_for_hf(small, tmp_path)
    assert same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), small)
    with pytest.raises(ValueError, match='refit needs data'):
        truncate(model, level=2, refit=True)


@pytest.mark.parametrize('least', [dict(_IMAGES=16), dict(_BYTES=16 * 3072)])
def test_layers_take_as_many_images_as_they_need(least, monkeypatch):
    """Wide ones on small maps take more. What later layers do not take is held in memory no longer."""
    for name, value in dict(FEWEST=1, POSITIONS=24, **least).items():
        monkeypatch.setattr(f'timm_harmonic.conversion.refit.{name}', value)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, stride=4), nn.Upsample(scale_factor=4), nn.Conv2d(16, 8, 3))
    model = harmonize(nn.Sequential(*layers).eval())
    small = weakened(truncate(model, level=2))
    taken, add = {}, Samples.add

    def note(samples, x, outputs, held_out):
        key = samples.layer.out_channels, samples.layer.stride[0]
        images, threads = taken.get(key, (0, 0))
        waiting = [thread for thread in threading.enumerate() if '(run)' in thread.name]
        taken[key] = images + len(x), max(threads, len(waiting))
        return add(samples, x, outputs, held_out)

    monkeypatch.setattr(Samples, 'add', note)
    data = [smooth(60, size=16), smooth(60, size=20)]
    assert [tuple(part.shape) for part in read_images(data, data[0])] == 2 * [(30, 3, 16, 16), (30, 3, 20, 20)]
    better = refit(model, small, data)
    # Images, and the runs of both networks that wait at that time, for the part that has layers ahead.
    assert taken == {(16, 1): (30, 2), (16, 4): (120, 2), (8, 1): (30, 0)}
    assert nearer(model, better, small, smooth(seed=3))


def test_parts_are_small_for_large_images(monkeypatch):
    monkeypatch.setattr('timm_harmonic.conversion.running._PART', 2**16)
    images = smooth(24, size=32)
    assert [len(part) for part in read_images([images], images)] == [5, 5, 5, 5, 4]
    assert [len(part) for part in read_images([smooth(10, size=64)], images)] == [5, 5]
    assert [len(part) for part in read_images([smooth(2, size=64)], images, least=1)] == [2]


def spied(init, seen):
    def note(samples, layer, share):
        seen.append(layer)
        init(samples, layer, share)

    return note


def test_layers_with_too_many_features_stay(monkeypatch):
    """Neither weighing nor fitting allocates their sums."""
    monkeypatch.setattr('timm_harmonic.conversion.refit._SUMS', 200**2)
    torch.manual_seed(0)
    model = harmonize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 5)).eval())
    seen = []
    monkeypatch.setattr(Samples, '__init__', spied(Samples.__init__, seen))
    for per in ('layer', 'channel'):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'levels come nearer')
            small = truncate(model, ratio=0.6, per=per, data=[smooth(64)], refit=True)
        assert not torch.equal(small[1].weight, truncate(model, level=small[1].level)[1].weight)
        assert small[2].weight.numel() < model[2].weight.numel()
    assert {layer.kernel_size for layer in seen} == {(3, 3)}
