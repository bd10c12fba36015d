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
from timm.models import reparameterize_model
from torch import nn

from ..common import InputError, explained
from ..common.files import write_text, write_whole
from .tasks import Images, stratified
from .training import Network, Recipe, evaluate, fit

# Log-uniform ranges of learning rate and weight decay, by timm's name of the optimizer.
RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    'adamw': ((5e-4, 2e-2), (1e-3, 1.0)),
    'momentum': ((3e-3, 3e-1), (1e-5, 1e-2)),
}
INNER_SPLITS = 2  # a setting is judged by its mean over these
INNER_SHARE = 0.25  # share of the training images that judges
_POINTS = 15  # of a learning curve

Draw = Callable[[int], tuple[Images, Images]]  # training and test images of a seed


class Store:
    """Results by key, in a JSON file with the settings that they depend on. Without a path they stay in memory.

    The file also has the networks, by name: those of earlier comparisons, then new ones. Raises InputError if the file
    has other settings or another network of the same name, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], networks: Sequence[Network] = ()) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.results: dict[str, Any] = {}
        self.networks = json.loads(json.dumps({net.name: [net.model, net.options] for net in networks}))
        if path is None or not path.exists():
            return
        with explained(f'{path} is not a file of runs: choose another --out, or delete it', Exception):
            held = json.loads(path.read_text(encoding='utf-8'))
            self.results, before, known = (dict(held[key]) for key in ('results', 'settings', 'networks'))
        if not self.results:
            return
        changed = [key for key in self.settings if before.get(key) != self.settings[key]]
        changed += [name for name, of in self.networks.items() if known.get(name, of) != of]
        if changed:
            raise InputError(
                f'{path} has runs with other settings ({", ".join(changed)}): choose another --out, or delete it.'
            )
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
    digest = hashlib.sha256()
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def curve_epochs(epochs: int) -> list[int]:
    """Epochs at whose end accuracy is measured, the last one included."""
    return sorted({max(1, round(epochs * i / _POINTS)) for i in range(1, _POINTS + 1)})


def trained(
    network: Network,
    train: Images,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int, nn.Module], object],
    device: torch.device | str,
) -> tuple[nn.Module, float]:
    """Builds a network and trains it. Returns it and the seconds. The seed determines everything random."""
    model = network.build(num_classes, train.pixels.shape[1], seed)
    model = model.to(device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    seconds = fit(model, train.to(device), recipe, seed, lambda epoch: after_epoch(epoch, model))
    return model, seconds


def run(
    network: Network,
    train: Images,
    test: Images,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    device: torch.device | str = 'cpu',
    curve: bool = True,
) -> dict[str, Any]:
    """Trains a new network and measures it on the test images; accuracies are in percent.

    Without `curve`, accuracy is measured at the end only. The seed determines everything random.
    """
    test = test.to(device)
    points: list[float] = []
    wanted = curve_epochs(recipe.epochs) if curve else []

    def after(epoch: int, model: nn.Module) -> None:
        if epoch in wanted[:-1]:
            points.append(evaluate(model, test)[0])
        after_epoch(epoch)

    model, seconds = trained(network, train, num_classes, recipe, seed, after, device)
    accuracy, loss = evaluate(model, test)
    return dict(
        accuracy=accuracy,
        loss=loss,
        fused_accuracy=evaluate(reparameterize_model(model), test)[0],
        curve=[*points, accuracy] if curve else [],
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
    )


def setting(recipe: Recipe, trial: int) -> Recipe:
    """The recipe of a trial: the recipe itself in the first, then random learning rates and weight decays.

    They depend on the trial alone, so that all networks try the same settings.
    """
    if trial == 0:
        return recipe
    random = np.random.default_rng([trial, 20])
    (lr, wd) = (float(np.exp(random.uniform(*np.log(bounds)))) for bounds in RANGES[recipe.opt])
    return dataclasses.replace(recipe, lr=lr, weight_decay=wd)


@dataclasses.dataclass
class Protocol:
    """A comparison: every network tries `trials` settings on inner splits, then trains `seeds` times with its best one.

    `draw` gives the training and test images of a seed. The search only sees the training images of seed 0. Finished
    runs are in `store` and never repeated, so that more trials and seeds can follow.
    """

    draw: Draw
    networks: Sequence[Network]
    classes: Sequence[str]
    recipe: Recipe
    trials: int
    seeds: int
    store: Store
    device: torch.device | str = 'cpu'
    curves: bool = True  # whether the final runs measure test accuracy during training
    validation: Images | None = None  # judges settings in place of inner splits
    describe: Callable[[str], None] = lambda text: None
    after_epoch: Callable[[int], object] = lambda epoch: None

    def inner(self, split: int) -> tuple[Images, Images]:
        """Images to train a setting on, and images to judge it by."""
        train, _ = self.draw(0)
        if self.validation is not None:
            return train, self.validation
        kept, out = stratified(train.labels, INNER_SHARE, split, self.classes)
        return train[kept], train[out]

    @property
    def splits(self) -> int:
        """Number of inner splits that judge a setting."""
        return 1 if self.validation is not None else INNER_SPLITS

    @property
    def epochs_left(self) -> int:
        """Epochs still to be trained."""
        runs = len(self.networks) * (self.trials * self.splits + self.seeds)
        return max(0, runs - len(self.store.results)) * self.recipe.epochs

    def trial(self, network: Network, trial: int) -> tuple[float, float]:
        """Mean accuracy of a setting on the inner splits, and its negated mean cross-entropy."""
        found = []
        for split in range(self.splits):
            self.describe(f'search {trial + 1}/{self.trials} {network.name}')
            judge = partial(self._run, network, *self.inner(split), setting(self.recipe, trial), split, curve=False)
            found.append(self.store.get(f'search {network.name} {trial} {split}', judge))
        return tuple(np.mean([(of['accuracy'], -of['loss']) for of in found], 0).tolist())

    def _run(self, network: Network, train: Images, test: Images, recipe: Recipe, seed: int, curve: bool) -> Any:
        return run(network, train, test, len(self.classes), recipe, seed, self.after_epoch, self.device, curve)

    def best(self, network: Network) -> int:
        """The trial with the highest accuracy, or of equal ones the lowest cross-entropy; 0 without a search."""
        return max(range(self.trials), key=lambda trial: self.trial(network, trial), default=0)

    def chosen(self, network: Network) -> dict[str, Any]:
        """The best setting, and all that were tried with their accuracy."""
        best = setting(self.recipe, self.best(network))
        tried = [(setting(self.recipe, trial), self.trial(network, trial)[0]) for trial in range(self.trials)]
        trials = [dict(lr=of.lr, weight_decay=of.weight_decay, accuracy=judged) for of, judged in tried]
        return dict(lr=best.lr, weight_decay=best.weight_decay, trials=trials)

    def final(self, network: Network, seed: int) -> dict[str, Any]:
        """One run with the best setting, on all training images of a seed."""
        recipe = setting(self.recipe, best := self.best(network))
        self.describe(f'seed {seed + 1}/{self.seeds} {network.name}')
        final = partial(self._run, network, *self.draw(seed), recipe, seed, self.curves)
        return self.store.get(f'final {network.name} {best} {seed}', final)

    def winner(self) -> Network:
        """The network whose best setting was judged best. Test images have no part in it."""
        return max(self.networks, key=lambda network: self.trial(network, self.best(network)))

    def keep(self, network: Network) -> nn.Module:
        """Trains a network with its best setting on all training images of seed 0, and returns it for evaluation."""
        self.describe(f'keep {network.name}')
        recipe, (train, _) = setting(self.recipe, self.best(network)), self.draw(0)
        after, classes = (lambda epoch, model: self.after_epoch(epoch)), len(self.classes)
        return trained(network, train, classes, recipe, 0, after, self.device)[0].eval()

    def run_all(self) -> dict[str, list[dict[str, Any]]]:
        """Searches, then trains with the best settings. Returns the runs of each network, one per seed."""
        for trial in range(self.trials):
            for network in self.networks:
                self.trial(network, trial)
        seeds = [[self.final(network, seed) for network in self.networks] for seed in range(self.seeds)]
        return {network.name: list(runs) for network, runs in zip(self.networks, zip(*seeds, strict=True), strict=True)}
