"""Networks on few images that fit into memory: their names, the recipe, one training, and evaluation."""

import copy
import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
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

from ..common import InputError, explained, parse_option
from ..conversion.refit import estimate_statistics
from ..conversion.swap import harmonic_layers
from .tasks import Images

AUGMENTATIONS = ('shift', 'zoom', 'none', 'strong')
ZOOM = (0.4, 1.0)  # share of an image's area that a crop has
# Of 'strong': largest change of light, probability of a cutout, parameter of mixup, label smoothing.
LIGHT, CUTOUT, MIXUP, SMOOTHING = 0.4, 0.5, 0.2, 0.1
_EVALUATED = 64  # images at a time
_PASSES, _SETTLED = 8, 1000  # statistics are estimated on so many passes or images, whichever are fewer
SMOOTHNESS = (0.5, 1, 0)  # what smoothness=auto tries

# A ResNet with 0.3 million parameters, for a few hundred images of 32 to 96 pixels.
_SMALL: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), stem_pool='max')
NAMED: dict[str, dict[str, Any]] = {
    'harm0': dict(_SMALL, harmonic_stem=False, harmonic_blocks=False),
    'harm1': dict(_SMALL, harmonic_blocks=False),
    'harm': _SMALL,
    'smooth': dict(_SMALL, smoothness=0.5),
    'auto': dict(_SMALL, smoothness='auto'),
}
MEANINGS = dict(
    harm0='nothing harmonic',
    harm1='stem harmonic',
    harm='all harmonic',
    smooth='all harmonic, smoothness 0.5',
    auto='all harmonic, smoothness 0, 0.5 or 1 by the search',
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, under the name that the user gave. The search chooses the smoothness where it is 'auto'."""

    name: str
    model: str  # timm's name
    options: dict[str, Any]

    @property
    def auto(self) -> bool:
        """Whether the search chooses the smoothness."""
        return self.options.get('smoothness') == 'auto'

    def at(self, place: float) -> 'Network':
        """The network with the smoothness at a place, from 0 to below 1, among those that are tried if it is 'auto'."""
        value = dict(smoothness=SMOOTHNESS[int(place * len(SMOOTHNESS))]) if self.auto else {}
        return dataclasses.replace(self, options=self.options | value)

    def build(self, num_classes: int, in_chans: int, seed: int) -> nn.Module:
        """Builds a new network. The seed determines its initial weights."""
        random_seed(seed)
        return timm.create_model(self.model, num_classes=num_classes, in_chans=in_chans, **self.options)


def network(text: str) -> Network:
    """The network of a name in NAMED or of timm, with options as in `harm_resnet18:smoothness=1,levels=3`.

    Raises InputError if timm has no such model, or an option is not NAME=VALUE.
    """
    model, _, options = text.partition(':')
    given = dict(map(parse_option, re.split(r',(?=\w+=)', options))) if options else {}  # commas are in values too
    if model in NAMED:
        return Network(text, 'harm_resnet18', {**NAMED[model], **given})
    if not timm.is_model(model):
        raise InputError(f'{model!r} is neither one of {", ".join(NAMED)} nor a model of timm.')
    return Network(text, model, given)


def baseline(networks: Sequence[Network], num_classes: int, in_chans: int, size: int) -> str:
    """Runs all networks on a blank image, and names the one to compare with: the first plain one, or else the first."""
    plain = []
    for net in networks:
        with explained(f'{net.name} cannot be used on images of {size} x {size} pixels', Exception):
            model = net.at(0).build(num_classes, in_chans, 0).eval()
            with torch.no_grad():
                output = model(torch.zeros(1, in_chans, size, size))
            if getattr(output, 'shape', None) != (1, num_classes):
                raise TypeError('it does not return logits of the classes')
        if not harmonic_layers(model):
            plain.append(net.name)
    return (plain or [networks[0].name])[0]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. Compared networks differ only in what the search chooses."""

    epochs: int = 30
    batch_size: int = 32
    opt: str = 'adamw'
    lr: float = 5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.1  # of all updates, before the cosine
    augment: str = 'shift'  # one of AUGMENTATIONS
    flip: bool = True  # mirror left and right, at random
    interpolation: str = 'bicubic'  # for zooming crops; bilinear blurs more


def augmentation(augment: str, flip: bool, size: int, interpolation: str = 'bicubic') -> v2.Transform:
    """The augmentation of images (C, H, W) with `size` pixels a side.

    'shift' moves an image by up to an eighth of its side, with reflected borders. 'zoom' crops 40 to 100 % of its area,
    with an aspect ratio from 3 / 4 to 4 / 3, and resizes the crop. 'none' does neither. 'strong' does both, changes
    brightness and contrast, and cuts out a rectangle; `batches` adds mixup, `fit` label smoothing.
    """
    if augment not in AUGMENTATIONS:
        raise InputError(f'augment must be one of {AUGMENTATIONS}, got {augment!r}.')
    steps: list[nn.Module] = [v2.RandomHorizontalFlip(0.5 if flip else 0.0)]
    if augment in ('shift', 'strong'):
        steps.append(v2.RandomCrop(size, padding=size // 8, padding_mode='reflect'))
    if augment in ('zoom', 'strong'):
        steps.append(v2.RandomResizedCrop(size, scale=ZOOM, interpolation=InterpolationMode(interpolation)))
    if augment == 'strong':
        steps += [v2.Lambda(_light), v2.RandomErasing(CUTOUT)]
    return v2.Compose(steps)


def _light(image: Tensor) -> Tensor:
    """Changes brightness and contrast at random. torchvision's versions take values from 0 to 1, of 1 or 3 channels."""
    brightness, contrast = torch.empty(2).uniform_(-LIGHT, LIGHT).tolist()
    return image.mean().lerp(image, 1 + contrast) + brightness


def batches(
    train: Images, recipe: Recipe, seed: int, epoch: int, mixed: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of an epoch: pixels and labels. Seed and epoch alone determine order and augmentation.

    An incomplete last batch is dropped. Fewer images than a batch form one batch. 'strong' mixes the images of a batch
    by mixup, so that labels are (N, classes), unless `mixed` is False.
    """
    size = min(recipe.batch_size, len(train))
    augment = augmentation(recipe.augment, recipe.flip, train.pixels.shape[-1], recipe.interpolation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        order = torch.randperm(len(train))[: len(train) // size * size]
        pixels = torch.stack([augment(train.pixels[i]) for i in order])
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        parts = list(zip(pixels.split(size), train.labels[order].split(size), strict=True))
        if mixed and recipe.augment == 'strong':
            mix = v2.MixUp(alpha=MIXUP, num_classes=int(train.labels.max()) + 1)
            parts = [mix(*part) for part in parts]
    yield from parts


def fit(
    model: nn.Module, train: Images, recipe: Recipe, seed: int, after_epoch: Callable[[], object] = lambda: None
) -> None:
    """Trains a network in place. The seed determines order, augmentation and dropout."""
    options: dict[str, Any] = dict(opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.9)
    optimizer = create_optimizer_v2(model, **options, fused=True)  # a tenth less time on a CPU
    warmup = dict(warmup_epochs=recipe.warmup_share * recipe.epochs, warmup_lr=0.0)
    steps = dict(step_on_epochs=False, updates_per_epoch=max(1, len(train) // recipe.batch_size))
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=recipe.epochs, **warmup, **steps)
    smoothing = SMOOTHING if recipe.augment == 'strong' else 0.0
    random_seed(seed)  # again, as each network has drawn a different number of initial weights
    updates = 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for pixels, labels in batches(train, recipe, seed, epoch):
            scheduler.step_update(updates)
            loss = F.cross_entropy(model(pixels), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        after_epoch()


def settled(model: nn.Module, train: Images, recipe: Recipe, seed: int) -> nn.Module:
    """Returns a copy of a network whose batch-norm statistics, stems included, are re-estimated on training images.

    After few updates the running ones have not arrived: they start at 0 and 1. Images are augmented as in the epochs
    that would follow, but not mixed; they are eight times all, or about 1,000 if those are fewer.
    """
    copied, epochs = copy.deepcopy(model), range(recipe.epochs + 1, recipe.epochs + 1 + _PASSES)
    parts = (pixels for epoch in epochs for pixels, _ in batches(train, recipe, seed, epoch, mixed=False))
    size = min(recipe.batch_size, len(train))
    estimate_statistics(copied, islice(parts, math.ceil(_SETTLED / size)), blocks=True)
    return copied


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float, Tensor]:
    """Sets a network to evaluation. Returns its accuracy in percent, its mean cross-entropy, and which are right."""
    model.eval()
    pixels = images.pixels.contiguous(memory_format=torch.channels_last)
    logits = torch.cat([model(part) for part in pixels.split(_EVALUATED)])
    right = logits.argmax(1) == images.labels
    return 100 * right.float().mean().item(), F.cross_entropy(logits, images.labels).item(), right


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, so that results do not depend on the number of cores. Restores all global state."""
    before, state, np_state = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        random.setstate(state)
        np.random.set_state(np_state)
