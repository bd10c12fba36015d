"""truncate(per='channel'): elimination against brute force, budgets, fall-back, and what is saved."""

import copy
import itertools
import json
import re

import numpy as np
import pytest
import reference
import timm
import torch
from matplotlib.axes import Axes
from PIL import Image
from timm.models import reparameterize_model, save_for_hf
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, deploy, harmonic_report, harmonize, truncate
from timm_harmonic.common import InputError
from timm_harmonic.conversion import timing
from timm_harmonic.conversion import truncate as module
from timm_harmonic.conversion.channels import eliminate, sizes_of
from timm_harmonic.conversion.costs import count_macs
from timm_harmonic.conversion.refit import Moments, estimate_statistics, output_error
from timm_harmonic.conversion.report import draw_truncation
from timm_harmonic.conversion.running import read_images
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.models.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(num_classes=10, layers=(1, 1, 1, 1), channels=(16, 32, 32, 48))


@pytest.fixture(scope='module')
def images():
    return reference.smooth_images(64, 48)


@pytest.fixture(scope='module')
def network(images):
    """A network whose statistics are those of the images."""
    torch.manual_seed(0)
    model = harmonize(reference.randomize_batch_norm(timm.create_model('resnet18', **SMALL)).eval())
    estimate_statistics(model, [images])
    return model


def moments_of(features, outputs):
    size = features.shape[1] + outputs.shape[1] + 1
    moments = Moments(features.shape[1], torch.zeros(1, size, size, dtype=torch.float64))
    moments.add(features[None], outputs[None])
    return moments


def shares_left(features, outputs, places):
    """By numpy: the share of each output's variance that least squares on some features leaves over, summed."""
    x, y = (v.numpy() - v.numpy().mean(0) for v in (features[:, list(places)], outputs))
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float((left**2).sum(0) @ (1 / (y**2).sum(0)))


@pytest.mark.parametrize('seed', range(8))
def test_elimination_is_near_brute_force(seed):
    """Correlated features: the sets of two to five are nearly the best of all sets of that size, and better by far
    than those of the largest weights."""
    torch.manual_seed(seed)
    features = torch.randn(400, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    features *= 10.0 ** torch.randint(-2, 3, (8,))  # scales do not matter
    weight = torch.randn(8, 3, dtype=torch.float64) / features.std(0)[:, None]
    outputs = features @ weight + 0.1 * torch.randn(400, 3, dtype=torch.float64) + 5
    sizes = [8, 7, 6, 5, 4, 3, 2]
    found = eliminate(moments_of(features, outputs), sizes)
    assert torch.equal(found[8], torch.arange(8))
    for size in sizes[3:]:
        left = [shares_left(features, outputs, of) for of in itertools.combinations(range(8), size)]
        ours = shares_left(features, outputs, found[size].tolist())
        assert ours <= 2 * min(left) + 0.1
        assert ours <= np.quantile(left, 0.15)
        assert set(found[size].tolist()) <= set(found[size + 1].tolist())


def test_elimination_of_features_and_outputs_that_are_constant():
    torch.manual_seed(0)
    features = torch.randn(200, 6, dtype=torch.float64)
    features[:, 2], features[:, 4] = 0, 3
    outputs = torch.cat([features[:, [0, 5]], torch.zeros(200, 1)], 1)
    found = eliminate(moments_of(features, outputs), [4, 2])
    assert {2, 4}.isdisjoint(found[4].tolist())
    assert found[2].tolist() == [0, 5]


def sizes(model):
    return {name: layer.weight.shape[1] for name, layer in harmonic_layers(model).items() if layer.kept is not None}


@pytest.mark.parametrize('cost', ['parameters', 'macs'])
def test_budget_is_kept(network, images, cost):
    ratio = dict(parameters=0.5, macs=0.85)[cost]  # the stem has most of the multiply-adds
    options = dict(ratio=ratio, exclude='conv1', cost=cost, data=[images], refit=True)
    options |= {} if cost == 'parameters' else dict(images=images[:1])
    small = truncate(network, per='channel', **options)
    if cost == 'parameters':
        before, after = (sum(p.numel() for p in model.parameters()) for model in (network, small))
    else:
        before, after = (count_macs(reparameterize_model(model), images[:1]) for model in (network, small))
    assert 0.9 * ratio * before < after <= ratio * before
    assert sizes(small)
    assert all(size % 16 == 0 for size in sizes(small).values())
    assert small.conv1.kept is None  # timm adapts its input channels
    parts = read_images([images], images)
    assert output_error(network, small, parts) < output_error(network, truncate(network, **options), parts)
    report = harmonic_report(small, images[:1])
    assert {conv.name: conv.kept for conv in report.convolutions if conv.name in sizes(small)} == {
        name: pytest.approx(size / harmonic_layers(small)[name].in_channels) for name, size in sizes(small).items()
    }
    assert report.parameters_before == sum(p.numel() for p in network.parameters())
    for form in ('auto', 'separable'):
        plain = deploy(small, form=form)
        torch.testing.assert_close(plain(images), small(images), rtol=1e-3, atol=1e-4)
        assert not harmonic_layers(plain)


def test_a_budget_of_time(network, images, monkeypatch):
    """By times that are made up: those of a size are its share of the dense one's."""

    def times(runs, x):
        sizes = {name: float((re.findall(r'number=(\d+)', name) or [0])[0]) / 1000 for name in runs}
        dense = {'dense': 1.0, 'dense 0': 1.0, 'network': 20.0}
        return {name: [dense.get(name, sizes[name])] * 9 for name in runs}

    monkeypatch.setattr(timing, 'times_of', times)
    small = truncate(network, ratio=0.8, per='channel', include='layer*', cost='time', images=images[:1])
    chosen = {name: layer for name, layer in harmonic_layers(small).items() if layer.kept is not None}
    assert chosen
    for layer in chosen.values():
        assert layer.milliseconds == dict(dense=1.0, separable=layer.weight.shape[1] / 1000)
        assert layer.form == 'separable'


def test_never_further_than_levels(network, images, monkeypatch):
    """Levels are taken if they come nearer, and a warning says so."""
    errors = iter([0.4, 0.2])
    monkeypatch.setattr(module, 'output_error', lambda *_: next(errors))
    with pytest.warns(UserWarning, match='levels come nearer'):
        small = truncate(network, ratio=0.6, per='channel', data=[images], refit=True)
    assert not sizes(small)
    assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(p.numel() for p in network.parameters())


def test_what_need_not_be_dropped_stays(network, images):
    unchanged = truncate(network, ratio=1, per='channel', data=[images], refit=True)
    assert not sizes(unchanged)
    assert torch.equal(unchanged(images), network(images))


def test_channels_within_levels_and_selections(network, images):
    """A level by hand first, then channels of some layers within it; in place."""
    low = truncate(network, level=2)
    chosen = dict(include=['layer*'], exclude='layer1.*', per='channel', energy=0.7)
    small = truncate(low, **chosen, data=[images])
    changed = {name for name, layer in harmonic_layers(small).items() if layer.kept is not None}
    assert changed
    assert all(name.startswith('layer') and not name.startswith('layer1.') for name in changed)
    for name, layer in harmonic_layers(small).items():
        assert layer.level <= 2
        assert name in changed or torch.equal(layer.weight, low.get_submodule(name).weight)
    # Without images, those of most energy.
    by_filters, own = truncate(low, **chosen), copy.deepcopy(low)
    name = next(iter(sizes(by_filters)))
    expected = low.get_submodule(name).at_pairs(sizes(by_filters)[name])
    assert torch.equal(by_filters.get_submodule(name).weight, expected.weight)
    assert truncate(own, **chosen, inplace=True) is own
    assert torch.equal(own(images), by_filters(images))
    # Levels and channels go further from there.
    again = truncate(by_filters, ratio=0.8, data=[images], refit=True)
    assert sum(p.numel() for p in again.parameters()) <= 0.8 * sum(p.numel() for p in by_filters.parameters())


def test_report_and_picture(network, tmp_path, monkeypatch):
    """Functions by number of channels, and the share of the channels that keeps each function."""
    kept = torch.zeros(16, 9, dtype=torch.bool)
    kept[:, 0] = kept[0] = kept[:4, 5] = True
    kept[12:] = False
    own = network.get_submodule('layer1.0.conv2').at_pairs(kept)
    small = copy.deepcopy(network)
    small.set_submodule('layer1.0.conv2', own)
    small.set_submodule('layer1.0.conv1', network.get_submodule('layer1.0.conv1').at_level(2))
    report = harmonic_report(small)
    row = next(conv for conv in report.to_dict()['convolutions'] if conv['name'] == 'layer1.0.conv2')
    assert (row['kept'], row['channels']) == (23 / 16, [4, 8, 3, 0, 0, 0, 0, 0, 0, 1])
    words = 'functions of their own keep 1.44 on average: 4 keep 0, 8 keep 1, 3 keep 2, 1 keep 9.'
    assert all(words in text for text in (report.summary(), report.to_markdown(), str(report)))
    assert 'on average' not in harmonic_report(network).summary()
    assert 'on average' not in harmonic_report(copy.deepcopy(small).to('meta')).summary()
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, 'imshow', lambda axes, of, **style: shown.append(of) or imshow(axes, of, **style))
    draw_truncation(tmp_path / 'drawn.png', small)
    with Image.open(tmp_path / 'drawn.png') as picture:
        assert picture.width == 1040
    by_name = dict(zip(harmonic_layers(small), shown, strict=True))
    assert by_name['conv1'].shape == (7, 7)
    assert (by_name['conv1'] == 100).all()
    assert by_name['layer1.0.conv1'].tolist() == [[100, 100, 0], [100, 0, 0], [0, 0, 0]]
    assert (by_name['layer1.0.conv2'] * 16 / 100).tolist() == [[12, 1, 1], [1, 1, 4], [1, 1, 1]]


def test_layers_that_stay_with_levels():
    assert not sizes_of(HarmonicConv2d(64, 64, 3, groups=2))
    assert not sizes_of(HarmonicBlock2d(64, 64, 3))
    assert not sizes_of(HarmonicConv2d(3, 64, 7))
    found = sizes_of(HarmonicConv2d(512, 8, 3))
    assert len(found) == 13
    assert found[0] == (4608, 0)
    assert all(0.76 < small / large < 0.81 for (large, _), (small, _) in itertools.pairwise(found))


class Mixed(nn.Module):
    """A frozen layer that is used twice, one with groups, one that no image reaches, and one whose inputs are zeros."""

    def __init__(self):
        super().__init__()
        self.stem = HarmonicConv2d(3, 16, 3)
        self.twice = self.again = HarmonicConv2d(16, 16, 3, padding=1, bias=False).requires_grad_(False)
        self.grouped, self.unused = HarmonicConv2d(16, 16, 3, groups=4), HarmonicConv2d(16, 16, 3)
        self.dead, self.point = HarmonicConv2d(16, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.grouped(self.again(self.twice(self.stem(x)).relu()).relu())
        return self.point(x[..., 2:, 2:] + self.dead(x.clamp_max(0).relu()))


def test_unusual_layers(images):
    torch.manual_seed(0)
    model = Mixed().eval()
    small = truncate(model, ratio=0.4, per='channel', data=[images[..., :16, :16]], refit=True)
    assert small.twice is small.again
    assert small.twice.kept is not None
    assert not small.twice.weight.requires_grad
    assert small.dead.weight.requires_grad
    assert small.stem.kept is small.grouped.kept is None
    assert small.unused.kept is not None
    unused = next(
        conv for conv in harmonic_report(small, images[:1, :, :16, :16]).convolutions if conv.name == 'unused'
    )
    assert (unused.macs_before, unused.macs) == (0, 0)
    assert output_error(model, small, [images[..., :16, :16]]) < 0.5
    for form in ('dense', 'separable'):
        torch.testing.assert_close(deploy(small, form=form)(images), small(images), rtol=1e-4, atol=1e-4)


def saved(model, folder):
    save_for_hf(model, str(folder), safe_serialization=True)
    return json.loads((folder / 'config.json').read_text())['model_args']


def test_saved_by_timm_and_loaded(network, images, tmp_path, hub):
    small = truncate(network, ratio=0.5, per='channel', data=[images], refit=True)
    options = saved(small, tmp_path)
    assert options['pairs'] == sizes(small)
    hub.add('org/small', {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    for name in (f'local-dir:{tmp_path}', 'hf-hub:org/small'):
        model = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(model(images), small(images))
    # Another number of pairs, none, and a plain checkpoint do not fit.
    name, number = next(iter(options['pairs'].items()))
    state, filters = small.state_dict(), deploy(small, form='dense').state_dict()
    for pairs, weights in [({name: number - 16}, state), ({}, state), (options['pairs'], filters)]:
        changed = {key: value for key, value in options.items() if key != 'pairs'} | dict(pairs=pairs)
        overlay = dict(state_dict=weights, num_classes=10)
        with pytest.raises((CheckpointError, RuntimeError), match=r'keep other functions|missing: .*kept'):
            timm.create_model('harmonized', pretrained=True, pretrained_cfg_overlay=overlay, **changed)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(per='filter', ratio=0.5), "per must be one of.*'filter'"),
        (dict(per='channel', level=2), "'channel' with energy or ratio"),
        (dict(per='channel', ratio=0.01), 'is the least'),
        (dict(ratio=0.5, include='head.*'), 'matches none'),
        (dict(ratio=0.5, exclude='*'), 'leave none'),
        (dict(per='channel', ratio=0.5, data=[torch.full((8, 3, 48, 48), float('nan'))]), 'not finite'),
        (dict(per='channel', ratio=0.5, data=[torch.zeros(0, 3, 48, 48)]), 'must be images'),
        (dict(per='channel', ratio=0.5, data=[torch.zeros(4, 3, 48, 48)]), 'at least 8'),
    ],
)
def test_bad_options_change_nothing(network, options, words):
    before = copy.deepcopy(network)
    with pytest.raises(InputError, match=words):
        truncate(network, inplace=True, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.state_dict().values(), strict=True)
    )
    for name in ('conv2', 'fc'):
        with pytest.raises(InputError, match=f"pairs: '{name}'"):
            harmonize(network, pairs={name: 16})
    for wrong in (16.0, '16', [16, 0], [16, 16, 3], []):
        with pytest.raises(InputError, match='needs how many pairs, or this and how many mixtures'):
            harmonize(network, pairs={'layer1.0.conv2': wrong})
