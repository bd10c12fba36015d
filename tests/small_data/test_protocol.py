"""How networks are compared: augmentation, statistics, the search, and intervals."""

import numpy as np
import pytest
import torch

from timm_harmonic.small_data.protocol import RANGES, USUAL, Protocol, Store, place, run, setting
from timm_harmonic.small_data.results import at_edge, difference, over_images
from timm_harmonic.small_data.tasks import Images, stratified
from timm_harmonic.small_data.training import AUGMENTATIONS, Recipe, augmentation, batches, evaluate, network

pytestmark = pytest.mark.usefixtures('one_thread')


def test_stratified_keeps_every_class_on_both_sides():
    labels = torch.tensor([0] * 9 + [1] * 2 + [2] * 40)
    kept, out = stratified(labels, 0.25, 0, 'abc')
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(len(labels)))
    assert torch.bincount(labels[out]).tolist() == [2, 1, 10]
    assert not torch.equal(out, stratified(labels, 0.25, 1, 'abc')[1])


@pytest.mark.parametrize('augment', AUGMENTATIONS)
@pytest.mark.parametrize('channels', [1, 13])
def test_augmentation_follows_seed_and_epoch_alone(augment, channels):
    images = Images(torch.randn(20, channels, 24, 24), torch.arange(20))
    recipe = Recipe(batch_size=8, augment=augment)
    first = list(batches(images, recipe, 3, 5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = list(batches(images, recipe, 3, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert [pixels.shape for pixels, _ in first] == [(8, channels, 24, 24)] * 2
    for (pixels, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(pixels, others)
        assert torch.equal(labels, other_labels)
    assert not torch.equal(first[0][1], next(batches(images, recipe, 3, 6))[1])


def test_augmentation_does_what_it_says():
    image = torch.arange(24.0).expand(1, 24, 24)
    assert torch.equal(augmentation('none', False, 24)(image), image)
    torch.manual_seed(0)
    shifts = {int((augmentation('shift', False, 24)(image)[0, 0, 12] - 12).item()) for _ in range(200)}
    assert shifts == set(range(-3, 4))
    widths = [augmentation('zoom', False, 24)(image)[0, 0].diff().mean().item() for _ in range(200)]
    assert 0.5 < min(widths) < 0.7
    assert 0.95 < max(widths) < 1.05
    assert torch.equal(augmentation('none', True, 24)(image).sort().values, image)
    with pytest.raises(ValueError, match='augment must be one of'):
        augmentation('blur', True, 24)


def test_strong_mixes_images_for_training_alone():
    """Each with the one before it in the batch, and their labels in the same shares."""
    images, recipe = Images(torch.randn(16, 13, 24, 24), torch.arange(16)), Recipe(batch_size=8, augment='strong')
    apart = list(batches(images, recipe, 0, 1, mixed=False))
    for (mixed, shares), (pixels, labels) in zip(batches(images, recipe, 0, 1), apart, strict=True):
        share = shares[0, labels[0]]
        torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.roll(1, 0))
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
    holes = [(pixels == 0).all(1).flatten(1).any(1) for pixels, _ in apart]
    assert 0 < torch.cat(holes).sum() < 16  # cutouts


def test_trials_are_the_same_for_all_and_in_the_stated_range():
    recipe = Recipe()
    assert setting(recipe, 0) == recipe
    found = [setting(recipe, trial) for trial in range(1, 8)]
    assert found == [setting(recipe, trial) for trial in range(1, 8)]
    for name, (low, high) in RANGES['adamw'].items():
        places = [np.log(getattr(of, name) / low) / np.log(high / low) for of in found]
        assert sorted(places) == pytest.approx(np.arange(1, 8) / 8)
    for opt, usual in USUAL.items():
        assert not any(at_edge(usual[key], bounds) for key, bounds in RANGES[opt].items())


def test_the_search_can_choose_the_smoothness():
    """All three values, within as many trials as other networks have; other networks stay as they are."""
    auto, smooth = network('auto'), network('resnet18:smoothness=1')
    tried = [auto.at(place(trial)[2]).options['smoothness'] for trial in range(8)]
    assert [tried.count(value) for value in (0, 0.5, 1)] == [2, 3, 3]
    assert tried[0] == 0.5
    assert all(smooth.at(place(trial)[2]) == smooth for trial in range(8))
    assert network('harm_resnet34:smoothness=auto').auto


def test_the_best_setting_is_used(tmp_path, monkeypatch):
    images = Images(torch.randn(12, 1, 24, 24), torch.arange(12) % 2)
    seen = []

    def fake(net, train, test, num_classes, recipe, seed, *args):
        seen.append((len(train), len(test), recipe.lr))
        return dict(accuracy=50 + recipe.lr, loss=1.0)

    monkeypatch.setattr('timm_harmonic.small_data.protocol.run', fake)
    store = Store(tmp_path / 'runs.json', {})
    protocol = Protocol(lambda seed: (images, images), [network('harm0')], 'ab', Recipe(), 5, 2, store)
    protocol.final(protocol.networks[0], 1)
    *search, last = seen
    assert len(search) == 10
    assert {(train, test) for train, test, _ in search} == {(8, 4)}
    assert last == (12, 12, max(lr for *_, lr in search))


def test_statistics_are_re_estimated_before_every_test(monkeypatch):
    """Those of stems too, on unmixed images, in a copy."""
    images = Images(torch.randn(40, 1, 24, 24) * 3, torch.arange(40) % 2)
    recipe = Recipe(epochs=2, batch_size=16, augment='strong')
    measured = []

    def note(model, test):
        measured.append(model)
        return evaluate(model, test)

    monkeypatch.setattr('timm_harmonic.small_data.protocol.evaluate', note)
    found = run(network('harm'), images, images, 2, recipe, 0)
    as_trained, final = measured
    assert as_trained is not final
    assert found['accuracy'] == evaluate(final, images)[0]
    assert found['accuracy_as_trained'] == evaluate(as_trained, images)[0]
    assert found['correct'].count('1') == pytest.approx(0.4 * found['accuracy'])
    parts = [pixels for epoch in range(3, 11) for pixels, labels in batches(images, recipe, 0, epoch, mixed=False)]
    assert len(parts) == 16  # eight passes of two batches
    responses = [final.conv1.responses(part).var((0, 2, 3)) for part in parts]
    torch.testing.assert_close(final.conv1.bn.running_var, torch.stack(responses).mean(0))
    assert torch.equal(final.conv1.weight, as_trained.conv1.weight)
    assert not torch.equal(final.conv1.bn.running_var, as_trained.conv1.bn.running_var)


def test_overlapping_splits_widen_the_interval():
    """Nadeau and Bengio: the variance of the differences times 1 / J + tests / trainings."""
    found = difference([3.0, 5.0, 7.0], [1.0, 1.0, 1.0], overlap=6 / 18)
    half = 4.302652729911275 * (4 * (1 / 3 + 6 / 18)) ** 0.5
    assert (found['low'], found['high']) == pytest.approx((4 - half, 4 + half))


def test_interval_over_images():
    """Of a difference in a single image of 100, and of networks that are right about the same ones."""
    zeros, one = '0' * 100, '1' + '0' * 99
    assert over_images([zeros, one], [zeros, one]) == [0, 0]
    low, high = over_images([one, one], [zeros, zeros])
    assert (low, high) == (0, 3)  # Poisson: so often is an image drawn
    assert over_images([one, zeros], [zeros, zeros]) == [0, 1.5]


def test_interval_is_students():
    found = difference([3.0, 5.0, 7.0], [1.0, 1.0, 1.0])
    assert found['pairs'] == [2, 4, 6]
    assert found['mean'] == 4
    half = 4.302652729911275 * 2 / 3**0.5  # quantile 0.975 with two degrees of freedom
    assert (found['low'], found['high']) == pytest.approx((4 - half, 4 + half))
    assert difference([1.0], [0.0])['low'] is None
