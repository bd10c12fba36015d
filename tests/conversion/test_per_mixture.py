"""truncate(per='mixture'): mixtures against principal components, budgets, what is saved, reports and timing."""

import re

import pytest
import reference
import timm
import torch
from timm.models import reparameterize_model, save_for_hf
from torch import nn

from timm_harmonic import HarmonicConv2d, deploy, harmonic_report, harmonize, refit, truncate
from timm_harmonic.common import InputError
from timm_harmonic.conversion import timing
from timm_harmonic.conversion.channels import Choices, mixtures_of, sizes_of
from timm_harmonic.conversion.costs import Pairs, costs_of, count_macs
from timm_harmonic.conversion.refit import Moments, estimate_statistics, losses_by_images, output_error
from timm_harmonic.conversion.report import draw_truncation
from timm_harmonic.conversion.running import read_images
from timm_harmonic.conversion.swap import harmonic_layers

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = dict(num_classes=10, layers=(1, 1, 1, 1), channels=(32, 32, 48, 64))


@pytest.fixture(scope='module')
def images():
    return reference.smooth_images(64, 48)


@pytest.fixture(scope='module')
def network(images):
    """A network whose statistics are those of the images, and whose channels are alike, as trained ones are."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(timm.create_model('resnet18', **SMALL)).eval()
    for conv in (
        module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ):
        u, s, v = torch.linalg.svd(conv.weight.detach().transpose(0, 1).flatten(1), full_matrices=False)
        few = u * (s * 0.8 ** torch.arange(len(s))) @ v
        conv.weight.data = few.unflatten(1, (-1, 3, 3)).transpose(0, 1).contiguous()
    model = harmonize(model, normalization='ortho')
    estimate_statistics(model, [images])
    return model


@pytest.fixture(scope='module')
def small(network, images):
    """Cut to a share of the multiply-adds outside the stem."""
    options = dict(ratio=0.6, cost='macs', images=images[:1], data=[images], refit=True, exclude='conv1')
    return truncate(network, per='mixture', **options)


def moments_of(layer, x):
    features = layer.features(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
    outputs = layer(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
    size = features.shape[1] + outputs.shape[1] + 1
    moments = Moments(features.shape[1], torch.zeros(1, size, size, dtype=torch.float64))
    moments.add(features[None], outputs[None])
    return moments


@torch.no_grad()
def test_moments_of_mixtures():
    """They are those of a layer with these mixtures, whose outputs stay those of the complete one."""
    torch.manual_seed(0)
    layer, x = HarmonicConv2d(6, 4, 3, dtype=torch.float64), torch.randn(3, 6, 12, 12, dtype=torch.float64)
    mixtures = torch.randn(4, 6, dtype=torch.float64)
    whole, mixed = moments_of(layer, x), moments_of(layer.at_mixtures(mixtures), x)
    found = whole.mixed(mixtures)
    assert found.features == mixed.features == 36
    torch.testing.assert_close(found.sums[:, :36, :36], mixed.sums[:, :36, :36])
    outputs = slice(36, None), slice(-5, None)
    torch.testing.assert_close(found.sums[:, outputs[0], outputs[0]], whole.sums[:, outputs[1], outputs[1]])


@torch.no_grad()
def test_mixtures_are_principal_components():
    """For white inputs, those of the filters; correlated inputs change them, and no other mixtures are better then."""
    torch.manual_seed(0)
    layer = HarmonicConv2d(8, 6, 3, normalization='ortho', bias=False, dtype=torch.float64)
    layer.weight *= 0.5 ** torch.arange(8).view(1, 8, 1, 1)
    layer.weight /= layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt()  # outputs of one variance
    white = torch.randn(4000, 8, 3, 3, dtype=torch.float64)
    both = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q * 2.0 ** -torch.arange(8)
    for x, exact in ((white, True), (torch.einsum('dc,bcxy->bdxy', both, white), False)):
        moments = moments_of(layer, x)
        mixtures, back = mixtures_of(moments, layer, True)
        torch.testing.assert_close(mixtures @ back.t(), torch.eye(8, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        assert float(mixtures.norm(dim=1).mean()) == pytest.approx(1)  # whatever the number of images

        def lost(these, moments=moments):
            mixed = moments.mixed(these)
            solution = mixed.solve(torch.zeros(1, mixed.features, 6).double(), 1e-9, True)
            return float((mixed.error(*solution) / mixed.variance()).sum())

        ours = lost(mixtures[:3])
        by_filters = lost(torch.linalg.svd(layer.filters().transpose(0, 1).flatten(1)).U.t()[:3])
        assert ours < 1.05 * by_filters if exact else ours < 0.9 * by_filters
        assert all(ours < lost(torch.randn(3, 8, dtype=torch.float64)) for _ in range(20))
        assert lost(mixtures[:5]) < ours


def test_dead_channels_and_few_images():
    """Directions without variance do not count, however their rounding errors look."""
    torch.manual_seed(0)
    layer = HarmonicConv2d(32, 16, 3, normalization='ortho').requires_grad_(False)
    x = torch.randn(8, 32, 5, 5)
    x[:, 8:] = x[:, :8].repeat(1, 3, 1, 1)
    x[:, 30:] = 0
    model = nn.Sequential(layer)
    choices = Choices({'0': layer}, ['0'], 'mixture')
    (losses,) = losses_by_images(model, [x], [choices.weighed], True)
    assert losses['0'][Pairs(288)] == 0
    assert losses['0'][Pairs(144, 16)] < 0.05
    small = choices.lowered({'0': Pairs(144, 16)})['0']
    assert reference.relative_error(small(x), layer(x)) < 1e-3


def test_a_budget_is_kept(network, small, images):
    """Less is lost than by functions of each channel, and all counts agree with torch's on the deployed network."""
    share = costs_of(network, 'macs', images[:1])
    before, after = (count_macs(reparameterize_model(model), images[:1]) for model in (network, small))
    assert 0.55 * before < after <= 0.6 * before
    mixed = {name: layer for name, layer in harmonic_layers(small).items() if layer.mixtures is not None}
    assert mixed
    assert all(layer.channels % 16 == 0 for layer in mixed.values())
    assert small.conv1.is_complete()
    options = dict(ratio=0.6, cost='macs', images=images[:1], data=[images], refit=True, exclude='conv1')
    parts = read_images([images], images)
    assert output_error(network, small, parts) < output_error(
        network, truncate(network, per='channel', **options), parts
    )
    report = harmonic_report(small, images[:1])
    assert sum(conv.macs or 0 for conv in report.convolutions) + share.rest == pytest.approx(after)
    assert report.parameters_before == sum(p.numel() for p in network.parameters())
    assert {conv.name: conv.mixtures for conv in report.convolutions if conv.mixtures} == {
        name: layer.channels for name, layer in mixed.items()
    }
    assert 'mixtures' in str(report)
    for form in ('auto', 'dense', 'separable'):
        plain = deploy(small, form=form)
        torch.testing.assert_close(plain(images), small(images), rtol=1e-3, atol=1e-4)
        assert not harmonic_layers(plain)


def test_refitted_again_and_cut_again(network, small, images):
    """A layer keeps its mixtures; its pairs may go on falling."""
    again = refit(network, small, [images])
    lower = truncate(small, ratio=0.8, per='mixture', data=[images], refit=True)
    for name, layer in harmonic_layers(small).items():
        for other in (again.get_submodule(name), lower.get_submodule(name)):
            if layer.mixtures is not None:
                torch.testing.assert_close(other.mixtures, layer.mixtures)
    assert sum(p.numel() for p in lower.parameters()) <= 0.8 * sum(p.numel() for p in small.parameters())


def test_saved_by_timm_and_loaded(small, images, tmp_path):
    save_for_hf(small, str(tmp_path), safe_serialization=True)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(model(images), small(images))
    fewer = timm.create_model(f'local-dir:{tmp_path}', num_classes=3)
    assert fewer(images[:2]).shape == (2, 3)


def test_times_are_of_the_same_mixtures(network, monkeypatch):
    """By times that are made up: pairs as many microseconds, dense forms ten for each mixture or channel."""
    seen = {}

    def times(runs, x):
        seen[x.shape[1:]] = dict(runs)
        found = {}
        for name in runs:
            pairs, *_ = [*map(int, re.findall(r'\d+', name)), 0, 0]
            dense = 10 * (pairs or x.shape[1])  # the number in its name is that of its mixtures
            found[name] = dict(separable=pairs, dense=dense, network=20000)[name.partition(' ')[0]] / 1000
        return {name: [of] * 9 for name, of in found.items()}

    monkeypatch.setattr(timing, 'times_of', times)
    layers = harmonic_layers(network)
    sizes = sizes_of(layers['layer2.0.conv2'], 'mixture')
    assert [of for of in sizes if of.mixtures == 16] == [
        Pairs(144, 16),
        Pairs(112, 16),
        Pairs(80, 16),
        Pairs(64, 16),
        Pairs(48, 16),
    ]
    of = costs_of(
        network,
        'time',
        torch.randn(1, 3, 48, 48),
        'torch',
        {**{n: [x.level] for n, x in layers.items()}, 'layer2.0.conv2': sizes},
    )
    found = of.of['layer2.0.conv2']
    assert found[Pairs(144, 16)] == (0.16, 'dense', dict(dense=0.16))
    assert found[Pairs(64, 16)] == (0.064, 'separable', dict(dense=0.16, separable=0.064))
    assert found[Pairs(288)] == (0.32, 'dense', dict(dense=0.32))
    layer = layers['layer2.0.conv2'].at_mixtures(torch.eye(16, 32))
    layer.milliseconds = dict(dense=0.16)
    (conv,) = (conv for conv in harmonic_report(nn.Sequential(layer)).convolutions)
    assert (conv.ms, conv.ms_before) == (0.16, None)


def test_blocks_that_fuse_themselves():
    """They add up filters, so there the mixtures are part of these."""
    model = reference.randomize_batch_norm(timm.create_model('repvgg_a0', num_classes=5)).eval()
    names = list(harmonic_layers(harmonize(model)))[1:4]
    mixed, x = harmonize(model, pairs={names[0]: [80, 16], names[1]: [16 * 9, 16]}), torch.randn(2, 3, 64, 64)
    for plain in (deploy(mixed), reparameterize_model(mixed)):
        assert reference.relative_error(plain(x), mixed(x)) < 1e-4
        assert sum(isinstance(module, nn.Conv2d) for module in plain.modules()) == 22


def test_picture(small, tmp_path):
    draw_truncation(tmp_path / 'kept.png', small)
    assert (tmp_path / 'kept.png').stat().st_size > 10000


@pytest.mark.parametrize('options', [dict(ratio=0.5), dict(energy=0.9, data=[torch.randn(8, 3, 48, 48)])])
def test_what_mixtures_need(network, options):
    with pytest.raises(InputError, match="'mixture' with ratio and data"):
        truncate(network, per='mixture', **options)
