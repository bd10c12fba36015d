"""Training a small network on an image folder of patches: the recipe of the quickstart."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomCrop

from .photographs import PATCH_SIZE

NETWORK: dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), stem_pool='max', in_chans=1)
# One recipe for all models, tuned for the plain network and not for the harmonic ones. Augmentation matters: of those
# tried, shifts gave the plain network its best accuracy. With crops that zoom, which resample the training patches and
# not the test patches, the plain network was ahead of the harmonic ones.
RECIPE: dict[str, Any] = dict(
    batch_size=32,
    opt='adamw',
    lr=5e-3,
    weight_decay=0.05,
    sched='cosine',
    warmup_share=0.1,  # of all updates
    smoothing=0.0,
    shift=4,  # pixels, each way
    crop_scale=(1.0, 1.0),  # share of the patch's area
    crop_ratio=(1.0, 1.0),
    hflip=0.5,
    mean=(0.449,),
    std=(0.226,),
)
_THREADS = 1  # so small a network gains little from more, and slows down when other programs need the cores


@contextmanager
def reasonable_threads() -> Iterator[int]:
    """Fixes torch's threads, so that results do not depend on the number of cores. Restores all global state."""
    threads, state, np_state = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(_THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            yield _THREADS
    finally:
        torch.set_num_threads(threads)
        random.setstate(state)
        np.random.set_state(np_state)


def loader(folder: str, split: str) -> Any:
    """timm's loader of one split, 'train' or 'validation'. All of RECIPE that concerns images is used here."""
    training = split == 'train'
    dataset = create_dataset('', folder, split=split, is_training=training, input_img_mode='L')
    # Training drops a last batch that is not full: with few patches, one batch holds them all.
    batch_size = min(RECIPE['batch_size'], len(dataset)) if training else len(dataset)
    images = dict(hflip=RECIPE['hflip'], color_jitter=None, mean=RECIPE['mean'], std=RECIPE['std'], crop_pct=1.0)
    crops = dict(scale=RECIPE['crop_scale'], ratio=RECIPE['crop_ratio'])
    here = dict(num_workers=0, device=torch.device('cpu'), use_prefetcher=False, persistent_workers=False)
    size = (1, PATCH_SIZE, PATCH_SIZE)
    patches = create_loader(dataset, size, batch_size, is_training=training, **images, **crops, **here)
    if training:
        shift = RandomCrop(PATCH_SIZE, padding=RECIPE['shift'], padding_mode='reflect')
        dataset.transform = Compose([shift, dataset.transform])
    return patches


def fit(
    model: nn.Module,
    train: Any,
    seed: int,
    epochs: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    lr: float = RECIPE['lr'],
) -> float:
    """Trains a network by the recipe, in place. Returns the seconds that it took, without those of after_epoch.

    `after_epoch` is called with the number of each epoch, from 1. The seed is that of order and augmentation.
    """
    optimizer = create_optimizer_v2(model, opt=RECIPE['opt'], lr=lr, weight_decay=RECIPE['weight_decay'], momentum=0.9)
    warmup = dict(warmup_epochs=RECIPE['warmup_share'] * epochs, warmup_lr=0.0)
    steps = dict(num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(train))
    scheduler, _ = create_scheduler_v2(optimizer, sched=RECIPE['sched'], **warmup, **steps)
    random_seed(seed)  # again: models draw different numbers of initial weights
    seconds, updates = 0.0, 0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        for images, labels in train:
            scheduler.step_update(updates)
            loss = F.cross_entropy(model(images), labels, label_smoothing=RECIPE['smoothing'])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
        seconds += time.perf_counter() - start
        after_epoch(epoch)
    return seconds


@torch.inference_mode()
def accuracy_on(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percentage of images (B, C, H, W) for which a network, set to evaluation, predicts the label (B,)."""
    predictions = model.eval()(images).argmax(1)
    return 100 * (predictions == labels).float().mean().item()
