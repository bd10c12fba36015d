"""Training a network on few images that fit into memory: the recipe, and one run by it."""

import ast
import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from ..common import InputError, first_line

AUGMENTATIONS = ('shift', 'zoom', 'none')
ZOOM = (0.4, 1.0)  # share of an image's area that a crop has
_EVALUATED = 64  # images at a time


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in memory: pixels (N, C, H, W), normalised, and their labels (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> 'Images':
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str) -> 'Images':
        """The images on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. It is the same for all networks that are compared, but for what is searched."""

    epochs: int = 30
    batch_size: int = 32
    opt: str = 'adamw'
    lr: float = 5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.1  # of all updates; then the learning rate falls as a cosine
    augment: str = 'shift'  # one of AUGMENTATIONS
    flip: bool = True  # left and right, at random
    interpolation: str = 'bicubic'  # of zooming crops; bilinear blurs them more


def augmentation(augment: str, flip: bool, size: int, interpolation: str = 'bicubic') -> v2.Transform:
    """What training does to each image (C, H, W) of `size` pixels.

    'shift' moves it by up to an eighth of its side, with reflected borders. 'zoom' cuts 40 to 100 % of its area, with a
    ratio of sides from 3 / 4 to 4 / 3, and resizes the cut. 'none' does neither. Raises ValueError for another name.
    """
    if augment not in AUGMENTATIONS:
        raise InputError(f'augment must be one of {AUGMENTATIONS}, got {augment!r}.')
    steps: list[nn.Module] = [v2.RandomHorizontalFlip(0.5 if flip else 0.0)]
    if augment == 'shift':
        steps.append(v2.RandomCrop(size, padding=size // 8, padding_mode='reflect'))
    elif augment == 'zoom':
        steps.append(v2.RandomResizedCrop(size, scale=ZOOM, interpolation=InterpolationMode(interpolation)))
    return v2.Compose(steps)


def batches(train: Images, recipe: Recipe, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch: pixels and labels. Order and augmentation follow from seed and epoch alone.

    A last batch that is not full is dropped. Fewer images than a batch are one batch.
    """
    size = min(recipe.batch_size, len(train))
    augment = augmentation(recipe.augment, recipe.flip, train.pixels.shape[-1], recipe.interpolation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        order = torch.randperm(len(train))[: len(train) // size * size]
        pixels = torch.stack([augment(train.pixels[i]) for i in order])
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    yield from zip(pixels.split(size), train.labels[order].split(size), strict=True)


def fit(
    model: nn.Module,
    train: Images,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> float:
    """Trains a network by a recipe, in place. Returns the seconds that it took, without those of after_epoch.

    `after_epoch` is called with the number of each epoch, from 1. The seed is that of order, augmentation and dropout.
    """
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.9)
    updates_per_epoch = max(1, len(train) // recipe.batch_size)
    warmup = dict(warmup_epochs=recipe.warmup_share * recipe.epochs, warmup_lr=0.0)
    steps = dict(num_epochs=recipe.epochs, step_on_epochs=False, updates_per_epoch=updates_per_epoch)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', **warmup, **steps)
    random_seed(seed)  # again: models draw different numbers of initial weights
    seconds, updates = 0.0, 0
    for epoch in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        model.train()
        for pixels, labels in batches(train, recipe, seed, epoch):
            scheduler.step_update(updates)
            loss = F.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        seconds += time.perf_counter() - start
        after_epoch(epoch)
    return seconds


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Percentage of images whose label a network, set to evaluation, predicts, and its mean cross-entropy."""
    model.eval()
    pixels = images.pixels.contiguous(memory_format=torch.channels_last)
    logits = torch.cat([model(part) for part in pixels.split(_EVALUATED)])
    accuracy = 100 * (logits.argmax(1) == images.labels).float().mean().item()
    return accuracy, F.cross_entropy(logits, images.labels).item()


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch use one thread, so that results do not depend on the number of cores. Restores all global state.

    So small a network gains little from more, and slows down when other programs need the cores.
    """
    before, state, np_state = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        random.setstate(state)
        np.random.set_state(np_state)


# A ResNet for a few hundred images of 32 to 96 pixels, of 0.3 million parameters.
_SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), stem_pool='max')
NAMED: dict[str, dict[str, Any]] = {
    'harm0': dict(_SMALL, harmonic_stem=False, harmonic_blocks=False),
    'harm1': dict(_SMALL, harmonic_blocks=False),
    'harm': _SMALL,
    'smooth': dict(_SMALL, smoothness=1),
}
MEANINGS = dict(
    harm0='nothing harmonic', harm1='stem harmonic', harm='all harmonic', smooth='all harmonic, smoothness 1'
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network by the name that the user gave it."""

    name: str
    model: str  # timm's name
    options: dict[str, Any]

    def build(self, num_classes: int, in_chans: int, seed: int) -> nn.Module:
        """A new network. Its initial weights follow from the seed."""
        random_seed(seed)
        return timm.create_model(self.model, num_classes=num_classes, in_chans=in_chans, **self.options)

    def check(self, num_classes: int, in_chans: int, size: int) -> None:
        """Raises ValueError if the network cannot be built, or cannot run on images of this size."""
        try:
            model = self.build(num_classes, in_chans, 0).eval()
            with torch.no_grad():
                output = model(torch.zeros(1, in_chans, size, size))
            if getattr(output, 'shape', None) != (1, num_classes):
                raise TypeError('it gives no logits of the classes')
        except Exception as error:  # any network of timm, with any options
            problem = f'{type(error).__name__}: {first_line(error)}'
            raise InputError(f'{self.name} cannot be used on images of {size} x {size} pixels: {problem}') from error


def network(text: str) -> Network:
    """The network of a name: one of NAMED or timm's, with options as `harm_resnet18:smoothness=1,levels=3`.

    Raises ValueError if timm has no such model, or an option is no NAME=VALUE.
    """
    model, _, options = text.partition(':')
    given = dict(map(option, _split(options))) if options else {}
    if model in NAMED:
        return Network(text, 'harm_resnet18', {**NAMED[model], **given})
    if not timm.is_model(model):
        raise InputError(f'{model!r} is neither one of {", ".join(NAMED)} nor a model of timm.')
    return Network(text, model, given)


def _split(options: str) -> list[str]:
    """Options between the commas that are not in brackets."""
    parts, depth = [''], 0
    for letter in options:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE as name and value, a literal of Python or a text. Raises ValueError if it is something else."""
    key, equals, value = text.strip().partition('=')
    if not key.isidentifier() or not equals:
        raise InputError(f'must be NAME=VALUE, got {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
