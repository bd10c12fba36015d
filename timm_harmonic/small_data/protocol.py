"""How networks are compared: the same search for each, then the same number of seeds. All results go into a file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..common import InputError, explained
from ..common.files import write_text, write_whole
from .tasks import Images, stratified
from .training import Network, Recipe, evaluate, fit, settled

# By timm's name of the optimizer: the usual learning rate and weight decay, and their ranges, searched in logarithms.
# The ends are meant to be bad: too slow or divergent, no decay or one that shrinks the weights more than once a run.
USUAL: dict[str, Any] = {'adamw': dict(lr=5e-3, weight_decay=0.05), 'momentum': dict(lr=0.05, weight_decay=5e-4)}
Ranges = dict[str, tuple[float, float]]
RANGES: dict[str, Ranges] = {
    'adamw': dict(lr=(2e-4, 5e-2), weight_decay=(5e-3, 50.0)),
    'momentum': dict(lr=(2e-3, 5e-1), weight_decay=(5e-5, 5e-1)),
}
INNER_SPLITS = 2  # a setting is judged by its mean over these, or by one for each seed
INNER_SHARE = 0.25  # share of the training images that judges

Draw = Callable[[int], tuple[Images, Images]]  # training and test images of a seed


class Store:
    """Results by key, in a JSON file with the settings that they depend on. Without a path they stay in memory.

    The file also has the networks, by name: those of earlier comparisons, then new ones. Raises InputError if the file
    has other settings or another network of the same name, or cannot be written.
    """

    def __init__(self, path: Path | None = None, settings: Any = None, networks: Sequence[Network] = ()) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings or {}))
        self.results: dict[str, Any] = {}
        self.networks = json.loads(json.dumps({net.name: [net.model, net.options] for net in networks}))
        if path is None or not path.exists():
            return
        with explained(f'{path} is not a file of runs: choose another --out, or delete it', Exception):
            held = json.loads(path.read_text(encoding='utf-8'))
            self.results, before, known = (dict(held[key]) for key in ('results', 'settings', 'networks'))
        changed = [key for key in self.settings if before.get(key) != self.settings[key]]
        changed += [name for name, of in self.networks.items() if known.get(name, of) != of]
        if changed:
            raise InputError(f'{path} has other settings ({", ".join(changed)}): choose another --out, or delete it.')
        self.networks = {**known, **self.networks}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of a key; made and stored unless it exists."""
        if key not in self.results:
            # The round trip gives what a resumed comparison will read.
            self.results[key] = json.loads(json.dumps(make()))
            if self.path is not None:
                if self.path.exists():  # another comparison may have added to it
                    held = json.loads(self.path.read_text(encoding='utf-8'))
                    self.results, self.networks = ({**held[k], **getattr(self, k)} for k in ('results', 'networks'))
                text = json.dumps(dict(settings=self.settings, networks=self.networks, results=self.results))
                write_whole(self.path, lambda path: write_text(path, text))
        return self.results[key]


def fingerprint(images: Images) -> str:
    """Digits that tell one set of images from another."""
    content = (tensor.numpy().tobytes() for tensor in (images.pixels, images.labels))
    return hashlib.sha256(b''.join(content)).hexdigest()[:16]


def run(
    network: Network,
    train: Images,
    test: Images,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[], object] = lambda: None,
    device: torch.device | str = 'cpu',
) -> dict[str, Any]:
    """Trains a new network and measures it on the test images; accuracies are in percent.

    Statistics are re-estimated first, see `settled`; `accuracy_as_trained` is without that. `correct` has a digit for
    each test image. The seed determines everything random.
    """
    train, test = train.to(device), test.to(device)
    model = network.build(num_classes, train.pixels.shape[1], seed)
    model = model.to(device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    fit(model, train, recipe, seed, after_epoch)
    as_trained = evaluate(model, test)[0]
    accuracy, loss, right = evaluate(settled(model, train, recipe, seed), test)
    return dict(
        accuracy=accuracy,
        accuracy_as_trained=as_trained,
        correct=''.join(map(str, right.int().tolist())),
        loss=loss,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def place(trial: int) -> tuple[float, float, float]:
    """Where a trial's learning rate, weight decay and smoothness are in what is searched, each from 0 to below 1.

    Sobol's sequence: 8 trials, or any power of two, cover each axis evenly, and their pairs as well. Weight decay is
    mirrored, so that the two do not only trade off against each other: AdamW shrinks weights by their product.
    """
    if trial == 0:
        return 0.0, 1.0, 0.0  # the sequence's first point: the usual setting, and the first smoothness
    from scipy.stats.qmc import Sobol  # here, because it takes long to import

    lr, decay, smoothness = Sobol(3, scramble=False).fast_forward(trial).random()[0].tolist()
    return lr, 1 - decay, smoothness


def setting(recipe: Recipe, trial: int, ranges: Ranges | None = None) -> Recipe:
    """The recipe of a trial: itself first, then fixed learning rates and weight decays, the same for all networks."""
    if trial == 0:
        return recipe
    found = zip(place(trial)[:2], (ranges or RANGES[recipe.opt]).items(), strict=True)
    return dataclasses.replace(recipe, **{key: low * (high / low) ** where for where, (key, (low, high)) in found})


@dataclasses.dataclass
class Protocol:
    """A comparison: every network tries `trials` settings on inner splits, then trains `seeds` times with its best one.

    `draw` gives the training and test images of a seed. Either no seed may have test images among the training images
    of seed 0: then one search sees these alone. Or the seeds split the same images, which is `nested`: then each seed
    has a search of its own, on its own training images. One search for all would have seen test images of other seeds.
    Finished runs are in `store` and never repeated, so that more trials and seeds can follow.
    """

    draw: Draw
    networks: Sequence[Network]
    classes: Sequence[str]
    recipe: Recipe
    trials: int
    seeds: int
    store: Store = dataclasses.field(default_factory=Store)
    device: torch.device | str = 'cpu'
    validation: Images | None = None  # judges settings in place of inner splits
    nested: bool = False
    ranges: Ranges | None = None  # that are searched; RANGES by default
    bar: tqdm = dataclasses.field(default_factory=partial(tqdm, disable=True))  # moves by one after each epoch

    def inner(self, split: int) -> tuple[Images, Images]:
        """Images to train a setting on, and images to judge it by."""
        train, _ = self.draw(split if self.nested else 0)
        if self.validation is not None:
            return train, self.validation
        kept, out = stratified(train.labels, INNER_SHARE, split, self.classes)
        return train[kept], train[out]

    def splits(self, seed: int | None = None) -> Sequence[int]:
        """Inner splits that judge the settings of a seed, or those of all seeds."""
        if self.nested:
            return range(self.seeds) if seed is None else [seed]
        return range(1 if self.validation is not None else INNER_SPLITS)

    @property
    def epochs_left(self) -> int:
        """Epochs still to be trained."""
        runs = len(self.networks) * (self.trials * len(self.splits()) + self.seeds)
        return max(0, runs - len(self.store.results)) * self.recipe.epochs

    def trial(self, network: Network, trial: int, seed: int | None = None) -> tuple[float, float]:
        """Mean accuracy of a setting on the inner splits of a seed or of all, and its negated mean cross-entropy."""
        found = [self._run('search', network, trial, self.inner, split) for split in self.splits(seed)]
        return tuple(np.mean([(of['accuracy'], -of['loss']) for of in found], 0).tolist())

    def _at(self, network: Network, trial: int) -> tuple[Network, Recipe]:
        return network.at(place(trial)[2]), setting(self.recipe, trial, self.ranges)

    def _run(self, stage: str, network: Network, trial: int, draw: Draw, seed: int) -> Any:
        def make() -> dict[str, Any]:
            net, recipe = self._at(network, trial)
            return run(net, *draw(seed), len(self.classes), recipe, seed, self.bar.update, self.device)

        done, total = (trial, self.trials) if stage == 'search' else (seed, self.seeds)
        self.bar.set_description(f'{stage} {done + 1}/{total} {network.name}', refresh=False)
        return self.store.get(f'{stage} {network.name} {trial} {seed}', make)

    def best(self, network: Network, seed: int | None = None) -> int:
        """The trial with the highest accuracy, or of equal ones the lowest cross-entropy; 0 without a search."""
        return max(range(self.trials), key=lambda trial: self.trial(network, trial, seed), default=0)

    def _of_trial(self, network: Network, trial: int) -> dict[str, Any]:
        tried, recipe = self._at(network, trial)
        searched = dict(smoothness=tried.options['smoothness']) if network.auto else {}
        return dict(lr=recipe.lr, weight_decay=recipe.weight_decay, **searched)

    def chosen(self, network: Network) -> dict[str, Any]:
        """The best setting of each search, and all that were tried with their mean accuracy."""
        best = [self.best(network, seed) for seed in range(self.seeds if self.nested else 1)]
        tried = [
            dict(self._of_trial(network, trial), accuracy=self.trial(network, trial)[0]) for trial in range(self.trials)
        ]
        return dict(chosen=[self._of_trial(network, trial) for trial in best], trials=tried)

    def final(self, network: Network, seed: int) -> dict[str, Any]:
        """One run with the best setting, on all training images of a seed."""
        return self._run('final', network, self.best(network, seed), self.draw, seed)

    def keep(self, train: Images) -> tuple[str, nn.Module]:
        """Trains the network that all searches judge best. Returns its name and it. Test images choose nothing."""
        best = max(self.networks, key=lambda network: self.trial(network, self.best(network)))
        self.bar.set_description(f'keep {best.name}', refresh=False)
        network, recipe = self._at(best, self.best(best))
        train, model = train.to(self.device), network.build(len(self.classes), train.pixels.shape[1], 0)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        fit(model, train, recipe, 0, self.bar.update)
        return best.name, settled(model, train, recipe, 0).eval()

    def run_all(self) -> dict[str, list[dict[str, Any]]]:
        """Searches, then trains with the best settings. Returns the runs of each network, one per seed."""
        seeds = [[self.final(network, seed) for network in self.networks] for seed in range(self.seeds)]
        return {network.name: list(runs) for network, runs in zip(self.networks, zip(*seeds, strict=True), strict=True)}
