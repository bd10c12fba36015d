"""How long modules take: side by side, round after round, with the input that they have in a network."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .convolutions import harmonic_layers
from .losses import evaluating

_ROUNDS, _ROUND = 9, 3e-3  # rounds, and the least seconds of one


class Input(NamedTuple):
    """What a layer's input is like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def draw(self) -> Tensor:
        """Random values in this shape and memory format."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.copy_(torch.randn(self.shape, dtype=torch.float32, device=self.device))


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Input]:
    """What the input of each harmonic layer that images reach is like, in evaluation.

    A layer that a network uses more than once counts with its first input. Raises ValueError if the images are on
    another device than the network, or in another dtype outside autocast.
    """
    parameter = next(model.parameters())
    if images.device != parameter.device:
        raise ValueError(f'images are on {images.device}, the network is on {parameter.device}: put them together.')
    found: dict[str, Input] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            found.setdefault(name, Input(x.shape, x.stride(), x.dtype, x.device))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in harmonic_layers(model).items()]
    try:
        with evaluating(model), torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def times_of(modules: Mapping[str, nn.Module], like: Input) -> dict[str, list[float]]:
    """Milliseconds of each module, one entry a round, all of them in turn in each round."""
    x, threads = like.draw(), torch.get_num_threads()
    timers = {
        name: Timer('module(x)', globals=dict(module=module, x=x), num_threads=threads)
        for name, module in modules.items()
    }
    found: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        number = {name: max(1, round(_ROUND / timer.timeit(3).mean)) for name, timer in timers.items()}
        for _ in range(_ROUNDS):
            for name, timer in timers.items():
                found[name].append(1e3 * timer.timeit(number[name]).mean)
    return found


def faster(one: list[float], other: list[float]) -> bool:
    """Whether the first times are shorter than the others of the same rounds by more than the noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.quantiles(ratios, n=4)[2] < 1
