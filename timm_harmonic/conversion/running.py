"""Running images through a network and watching its harmonic layers, without leaving a trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..common import InputError
from .swap import harmonic_layers

HELD_OUT = 4  # one image in this many is held out
_BYTES = 2**31  # of images kept in memory
_BATCH = 32  # images that run through a network together

P = ParamSpec('P')
R = TypeVar('R')
Watch = Callable[[str, Any, Tensor, Tensor], None]  # gets a module's name, the module, its input and its output


def trainable(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function create trainable tensors even when it is called in inference mode."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients = torch.is_grad_enabled()  # leaving inference mode would switch gradients on
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            return function(*args, **kwargs)

    return call


def check_changeable(model: nn.Module) -> None:
    """Raises InputError if a network cannot change in place because its tensors were made in inference mode."""
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise InputError('a network made in inference mode cannot change in place: leave inplace out.')


class Use(NamedTuple):
    """One use of a layer: the properties of its input, and the number of positions of its output over the batch."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    positions: int

    def draw(self) -> Tensor:
        """Draws random values like the input, in its memory format."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.copy_(torch.randn(self.shape, device=self.device))


def images_in(data: Iterable[Any], like: Tensor, batches: int | None = None) -> Iterator[Tensor]:
    """Yields the images (B, C, H, W) of each batch, on the device and in the dtype of `like`.

    A batch is a tensor of images, alone or first in a tuple or list. At most `batches` are read. Raises InputError if
    there are none, or if one is empty or not finite, naming it; TypeError if `data` are not batches.
    """
    if isinstance(data, (Tensor, str)):
        given = f'images {tuple(data.shape)}: pass [images]' if isinstance(data, Tensor) else repr(data)
        raise TypeError(f'data must be batches of images, a loader or a list, got {given}.')
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, Integral) or batches < 1):
        raise InputError(f'batches must be an integer of at least 1, got {batches!r}.')
    number = -1
    for number, batch in enumerate(islice(data, batches)):
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel():
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f'batch {number} of data must be images (B, C, H, W), got {found}.')
        if not images.isfinite().all():
            raise InputError(f'batch {number} of data has values that are not finite.')
        yield images.detach().to(like)
    if number < 0:
        raise InputError('data hold no batches: pass at least one batch of images.')


def read_images(data: Iterable[Any], like: Tensor, batches: int | None = None) -> list[Tensor]:
    """Reads all images of `data`, see `images_in`, into parts of about 32 images of one size.

    Raises InputError if they are fewer than eight, more than 2 GiB, or a single one of its size.
    """
    read: list[Tensor] = []
    total = 0
    for images in images_in(data, like, batches):
        read.append(images)
        total += images.nbytes
        if total > _BYTES:
            raise InputError(
                f'data hold more than {_BYTES / 2**30:g} GiB of images, which stay in memory: limit batches.'
            )
    if (count := sum(map(len, read))) < 2 * HELD_OUT:
        raise InputError(f'data hold {count} images: at least {2 * HELD_OUT} are needed.')
    parts: list[Tensor] = []
    for size in dict.fromkeys(images.shape[1:] for images in read):
        alike = torch.cat([images for images in read if images.shape[1:] == size])
        if len(alike) == 1:
            raise InputError(f'data hold a single image of size {tuple(size)}: two or more of each size are needed.')
        # Shuffled, always in the same way: folders come class by class, and every batch should resemble all images.
        order = torch.randperm(len(alike), generator=torch.Generator().manual_seed(0))
        parts += alike[order.to(alike.device)].tensor_split(-(-len(alike) // _BATCH))
    return parts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation, and afterwards each of its modules back into the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watching(model: nn.Module, watch: Watch, names: Iterable[str] | None = None) -> Iterator[None]:
    """Reports what modules of a network compute, by default the harmonic layers, while the context lasts."""

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watch(name, module, inputs[0], output)

    names = harmonic_layers(model) if names is None else names
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def uses_of(model: nn.Module, images: Tensor) -> dict[str, list[Use]]:
    """Records how a network in evaluation uses each harmonic layer for a batch of images: once, never, or repeatedly.

    Layers come in the order of their first use. Raises TypeError if images are not a tensor, InputError if they are
    empty or on another device than the network.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f'images must be an example batch (B, C, H, W), got {type(images).__name__}.')
    if not images.numel():
        raise InputError(f'images have shape {tuple(images.shape)}: pass at least one image.')
    parameter = next(model.parameters())
    if images.device != parameter.device:
        raise InputError(f'images are on {images.device}, the network is on {parameter.device}: move one of them.')
    found: dict[str, list[Use]] = {}

    def note(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        # The strides of a copy: elements of an expanded input share memory.
        stride = torch.empty_like(x, device='meta').stride()
        found.setdefault(name, []).append(Use(x.shape, stride, x.dtype, x.device, output[:, 0].numel()))

    with evaluating(model), watching(model, note), torch.no_grad():
        model(images)
    return found | {name: [] for name in harmonic_layers(model) if name not in found}
