"""How networks are compared: the same search for each, then the same number of seeds. All results go into a file."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import reparameterize_model

from ..common import InputError, explained
from .tasks import Images, stratified
from .training import Network, Recipe, evaluate, fit

# Log-uniform ranges of learning rate and weight decay, by timm's name of the optimizer.
RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    'adamw': ((5e-4, 2e-2), (1e-3, 1.0)),
    'momentum': ((3e-3, 3e-1), (1e-5, 1e-2)),
}
INNER_SPLITS = 2  # a setting is judged by its mean over these
INNER_SHARE = 0.25  # share of the training images that judges
_SAFETY = 0.85  # share of a time limit that is planned
_POINTS = 15  # of a learning curve
_START = '{"settings":'  # of a file of runs

Draw = Callable[[int], tuple[Images, Images]]  # training and test images of a seed


class Store:
    """Results by key, in a file with one JSON object per line. After an interruption all complete lines count.

    The first line holds the settings that the results depend on. Without a path results stay in memory. Raises
    InputError if the file has other settings, or cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        with explained(f'cannot use {path}', OSError):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append(dict(settings=settings))
                return
            text = path.read_text(errors='replace')
        lines = text.split('\n')
        try:
            if not text.startswith(_START[: len(text)]):
                raise ValueError
            before, *rest = [json.loads(line) for line in lines[:-1]] or [dict(settings={})]
            self.results = {line['key']: line['result'] for line in rest}
            changed = [key for key in settings if before['settings'].get(key) != settings[key]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f'{path} is not a file of runs: name another --out, or delete it.') from error
        if changed and self.results.keys() - {'probe'}:
            raise InputError(
                f'{path} has runs with other settings ({", ".join(changed)}): name another --out, or delete it.'
            )
        with explained(f'cannot use {path}', OSError):
            if lines[-1]:  # an interruption cut this line
                path.write_text(text[: len(text) - len(lines[-1])])
            if changed:  # nothing has been trained yet
                path.unlink()
                self.results = {}
                self._append(dict(settings=settings))

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of a key; made and stored unless it exists."""
        if key not in self.results:
            # The round trip gives what a resumed comparison will read.
            self.results[key] = json.loads(json.dumps(make()))
            with explained(f'cannot write {self.path}', OSError):
                self._append(dict(key=key, result=self.results[key]))
        return self.results[key]

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        with open(self.path, 'a') as file:
            file.write(json.dumps(line) + '\n')
            file.flush()
            os.fsync(file.fileno())


def fingerprint(images: Images) -> str:
    """Digits that tell one set of images from another."""
    digest = hashlib.sha256()
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def curve_epochs(epochs: int) -> list[int]:
    """Epochs at whose end accuracy is measured, the last one included."""
    return sorted({max(1, round(epochs * i / _POINTS)) for i in range(1, _POINTS + 1)})


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
    model = network.build(num_classes, train.pixels.shape[1], seed)
    model = model.to(device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    train, test = train.to(device), test.to(device)
    points: list[float] = []
    wanted = curve_epochs(recipe.epochs) if curve else []

    def after(epoch: int) -> None:
        if epoch in wanted[:-1]:
            points.append(evaluate(model, test)[0])
        after_epoch(epoch)

    seconds = fit(model, train, recipe, seed, after)
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
    deadline: float | None = None  # by time.monotonic(), set by fit_into
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
        done = sum(key.startswith(('search', 'final')) for key in self.store.results)
        runs = len(self.networks) * (self.trials * self.splits + self.seeds)
        return max(0, runs - done) * self.recipe.epochs

    def trial(self, network: Network, trial: int) -> tuple[float, float]:
        """Mean accuracy of a setting on the inner splits, and its negated mean cross-entropy."""
        found = []
        for split in range(self.splits):
            self.describe(f'search {trial + 1}/{self.trials} {network.name}')
            key = f'search {network.name} {trial} {split}'
            found.append(self.store.get(key, partial(self._judge, network, trial, split)))
        return tuple(np.mean(found, 0).tolist())

    def _judge(self, network: Network, trial: int, split: int) -> tuple[float, float]:
        measured = self._run(network, *self.inner(split), setting(self.recipe, trial), split, curve=False)
        return measured['accuracy'], -measured['loss']

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
        best = self.best(network)
        self.describe(f'seed {seed + 1}/{self.seeds} {network.name}')
        return self.store.get(
            f'final {network.name} {best} {seed}',
            lambda: self._run(network, *self.draw(seed), setting(self.recipe, best), seed, self.curves),
        )

    def run_all(self) -> dict[str, list[dict[str, Any]]]:
        """Searches, then trains with the best settings. Returns the runs of each network, one per seed.

        Stops before a round that would end after the deadline, but not before one trial and two seeds; `trials` and
        `seeds` become what was done.
        """
        for trial in range(self.trials):
            started = time.monotonic()
            for network in self.networks:
                self.trial(network, trial)
            if self._late(2 * (time.monotonic() - started)):
                self.trials = trial + 1
                break
        runs: dict[str, list[dict[str, Any]]] = {network.name: [] for network in self.networks}
        for seed in range(self.seeds):
            started = time.monotonic()
            for network in self.networks:
                runs[network.name].append(self.final(network, seed))
            if seed > 0 and self._late(time.monotonic() - started):
                self.seeds = seed + 1
                break
        return runs

    def _late(self, ahead: float) -> bool:
        """Whether fewer seconds than `ahead` are left."""
        return self.deadline is not None and time.monotonic() + ahead > self.deadline

    def _time(self, network: Network) -> tuple[float, float]:
        """Seconds for an epoch of training, and for measuring the test accuracy."""
        train, test = (images.to(self.device) for images in self.draw(0))
        model = network.build(len(self.classes), train.pixels.shape[1], 0).to(self.device)
        model = model.to(memory_format=torch.channels_last)
        fit(model, train, dataclasses.replace(self.recipe, epochs=1), 0)  # the first epoch is slower than the others
        epoch = fit(model, train, dataclasses.replace(self.recipe, epochs=2), 0) / 2
        started = time.monotonic()
        evaluate(model, test)
        return epoch, time.monotonic() - started

    def fit_into(self, seconds: float) -> None:
        """Times an epoch of each network, and lowers trials and seeds so that the comparison takes about this long.

        Raises InputError if one trial and two seeds already take longer.
        """
        started = time.monotonic()
        self.deadline = started + seconds

        def measure() -> list[float]:
            times = [self._time(network) for network in self.networks]
            return [sum(column) for column in zip(*times, strict=True)] + [time.monotonic() - started]

        epoch, test, spent = self.store.get('probe', measure)
        searched = epoch * self.recipe.epochs
        trial = searched * (1 if self.validation is not None else INNER_SPLITS * (1 - INNER_SHARE))
        final = searched + test * (2 + (len(curve_epochs(self.recipe.epochs)) if self.curves else 0))
        budget = seconds * _SAFETY - spent
        least = (spent + min(1, self.trials) * trial + min(2, self.seeds) * final) / _SAFETY
        if least > seconds:
            raise InputError(
                f'one trial and two seeds of {len(self.networks)} networks take about {least / 60:.1f} minutes: raise '
                '--time-limit, or lower --epochs, --img-size or the number of --models.'
            )
        share = min(1.0, budget / (self.trials * trial + self.seeds * final))
        self.seeds = max(min(2, self.seeds), int(self.seeds * share))
        left = budget - self.seeds * final
        self.trials = max(min(1, self.trials), min(self.trials, int(left / trial)))
