"""Runs of a comparison: one training of one network, and the file that remembers those that are done."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import reparameterize_model
from torch import nn

from .networks import Network
from .training import Images, Recipe, evaluate, fit

_POINTS = 15  # of a learning curve
_START = '{"settings":'  # of a file of runs


class CompareError(RuntimeError):
    """A comparison cannot be made or go on; the message says why and what to do."""


def curve_epochs(epochs: int) -> list[int]:
    """Epochs after which accuracy is measured, the last one included."""
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
) -> tuple[dict[str, Any], nn.Module]:
    """Trains a new network, and measures it on the test images. Returns what was measured, and the network.

    Accuracies are percentages of the test images. Without `curve` they are measured at the end only. Everything random
    follows from the seed.
    """
    model = network.build(num_classes, train.pixels.shape[1], seed)
    model = model.to(device).to(memory_format=torch.channels_last)  # on a CPU, twice as fast
    train, test = train.to(device), test.to(device)
    points: list[float] = []
    wanted = curve_epochs(recipe.epochs) if curve else []

    def after(epoch: int) -> None:
        if epoch in wanted[:-1]:
            points.append(evaluate(model, test)[0])
        after_epoch(epoch)

    seconds = fit(model, train, recipe, seed, after)
    accuracy, loss = evaluate(model, test)
    points += [accuracy] if curve else []
    fused = reparameterize_model(model)
    measured = dict(
        accuracy=accuracy,
        loss=loss,
        fused_accuracy=evaluate(fused, test)[0],
        curve=points,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
    )
    return measured, fused


class Store:
    """Results by key, in a file of one JSON object a line. It is complete up to the last line after an interruption.

    The first line holds the settings that the results depend on. Raises CompareError if the file is of others.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
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
            raise CompareError(f'{path} is no file of runs: name another --out, or delete it.') from error
        if lines[-1]:  # the line that was being written
            path.write_text(text[: len(text) - len(lines[-1])])
        if changed and self.results.keys() - {'probe'}:
            raise CompareError(
                f'{path} has runs with other settings ({", ".join(changed)}): name another --out, or delete it.'
            )
        if changed:  # and nothing was trained
            path.unlink()
            self.results = {}
            self._append(dict(settings=settings))

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of a key, made and kept if it is not there."""
        if key not in self.results:
            # As it will be read again, so that a resumed comparison gives the same.
            self.results[key] = json.loads(json.dumps(make()))
            self._append(dict(key=key, result=self.results[key]))
        return self.results[key]

    def _append(self, line: dict[str, Any]) -> None:
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
