"""Running images through a network and watching its harmonic layers, without leaving a trace."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..common import InputError
from .swap import harmonic_layers

P = ParamSpec('P')
R = TypeVar('R')
Watch = Callable[[str, Any, Tensor, Tensor], None]  # is told a module's name, the module, its input and its output


def trainable(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function make tensors that can be trained, when it is called in inference mode as well."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        gradients = torch.is_grad_enabled()  # leaving inference mode would switch them on
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            return function(*args, **kwargs)

    return call


def check_changeable(model: nn.Module) -> None:
    """Raises ValueError if a network cannot be changed in place: its tensors were made in inference mode."""
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise InputError('the network was made in inference mode, and cannot be changed in place: leave inplace out.')


class Use(NamedTuple):
    """One use of a layer: what its input is like, and how many positions its output has, over the batch."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    positions: int

    def draw(self) -> Tensor:
        """Random values like the input, in its memory format."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.copy_(torch.randn(self.shape, device=self.device))


def images_in(data: Iterable[Any], like: Tensor, batches: int | None = None) -> Iterator[Tensor]:
    """The images (B, C, H, W) of each batch, on the device and in the dtype of `like`.

    A batch is a tensor of images, or has it first in a tuple or list. `batches` is how many are read at most. Raises
    ValueError if there are none, or one has no images or values that are not finite, naming it; TypeError if data are
    no batches.
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
        raise InputError('data have no batches: give at least one batch of images.')


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation, and each of its modules back into training afterwards if it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watching(model: nn.Module, watch: Watch, names: Iterable[str] | None = None) -> Iterator[None]:
    """Has modules of a network tell what they compute, for as long as this lasts: by default the harmonic layers."""

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            watch(name, layer, inputs[0], output)

        return hook

    names = harmonic_layers(model) if names is None else names
    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def uses_of(model: nn.Module, images: Tensor) -> dict[str, list[Use]]:
    """How a network, in evaluation, uses each harmonic layer for a batch of images: once, not at all, or repeatedly.

    Layers are in the order of their first use. Raises TypeError if images are no tensor, ValueError if there are none,
    or they are on another device than the network.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f'images must be an example batch (B, C, H, W), got {type(images).__name__}.')
    if not images.numel():
        raise InputError(f'images have shape {tuple(images.shape)}: give at least one image.')
    parameter = next(model.parameters())
    if images.device != parameter.device:
        raise InputError(f'images are on {images.device}, the network is on {parameter.device}: put them together.')
    found: dict[str, list[Use]] = {}

    def note(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        # Strides as of a copy: an expanded input has places that share memory.
        stride = torch.empty_like(x, device='meta').stride()
        found.setdefault(name, []).append(Use(x.shape, stride, x.dtype, x.device, output[:, 0].numel()))

    with evaluating(model), watching(model, note), torch.no_grad():
        model(images)
    return found | {name: [] for name in harmonic_layers(model) if name not in found}
