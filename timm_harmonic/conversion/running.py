"""Running images through a network and watching its harmonic layers, without leaving a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .convolutions import harmonic_layers

Watch = Callable[[str, Any, Tensor, Tensor], None]  # is told a layer's name, the layer, its input and its output


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
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Has every harmonic layer of a network tell what it computes, for as long as this lasts."""

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            watch(name, layer, inputs[0], output)

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in harmonic_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def uses_of(model: nn.Module, images: Tensor) -> dict[str, list[Use]]:
    """How a network, in evaluation, uses each harmonic layer for a batch of images: once, not at all, or repeatedly.

    Raises ValueError if the images are on another device than the network.
    """
    parameter = next(model.parameters())
    if images.device != parameter.device:
        raise ValueError(f'images are on {images.device}, the network is on {parameter.device}: put them together.')
    found: dict[str, list[Use]] = {name: [] for name in harmonic_layers(model)}

    def note(name: str, layer: nn.Module, x: Tensor, output: Tensor) -> None:
        found[name].append(Use(x.shape, x.stride(), x.dtype, x.device, output[:, 0].numel()))

    with evaluating(model), watching(model, note), torch.no_grad():
        model(images)
    return found
