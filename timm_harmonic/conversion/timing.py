"""How long modules take: side by side, round after round, with the input that they have in a network."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_ROUNDS, _ROUND = 9, 3e-3  # rounds, and the least seconds of one

Times = list[float]  # milliseconds, one entry a round


def times_of(modules: Mapping[str, Callable[[Tensor], Any]], x: Tensor) -> dict[str, Times]:
    """Times of modules or functions with an input, all of them in turn in each round."""
    from torch.utils.benchmark import Timer  # here, because it imports torch's compiler of extensions, which prints

    threads = torch.get_num_threads()
    timers = {
        name: Timer('module(x)', globals=dict(module=module, x=x), num_threads=threads)
        for name, module in modules.items()
    }
    found: dict[str, Times] = {name: [] for name in modules}
    with torch.inference_mode():
        number = {name: max(1, round(_ROUND / timer.timeit(3).mean)) for name, timer in timers.items()}
        for _ in range(_ROUNDS):
            for name, timer in timers.items():
                found[name].append(1e3 * timer.timeit(number[name]).mean)
    return found


def faster(one: Times, other: Times) -> bool:
    """Whether the first times are shorter than the others of the same rounds by more than the noise."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.quantiles(ratios, n=4)[2] < 1
