"""What is measured: interleaved runs of several networks in one process, as ratios to the plain twin, and memory."""

import argparse
import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import nn

from .original import check, original

__all__ = ['Setting', 'compare', 'evaluation', 'fresh_processes', 'growth', 'measure', 'train_steps', 'usable']

PLAIN = dict(harmonic_stem=False, harmonic_blocks=False)
_AUTOCAST = dict(bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(frozen=True)
class Setting:
    """How networks are run: device, 'fp32' or 'bf16' or 'fp16' (autocast), memory format, and whether compiled."""

    device: str
    precision: str = 'fp32'
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        words = [self.precision, 'channels_last' if self.channels_last else 'contiguous']
        return ', '.join([*words, 'compiled' if self.compiled else 'eager'])

    def place(self, model: nn.Module) -> nn.Module:
        """The network where and how it is run."""
        model = model.to(self.device)
        for parameter in model.parameters():  # not by .to(memory_format=...), which the original's 5-D ones refuse
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.format)
        if self.compiled:
            torch._dynamo.config.cache_size_limit = 64
            model.compile()
        return model

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def images(self, batch: int, size: int) -> torch.Tensor:
        return torch.randn(batch, 3, size, size, device=self.device).contiguous(memory_format=self.format)

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device, dtype) if dtype else contextlib.nullcontext()


def fresh_processes(threads: int) -> Pool:
    """Runs one thing at a time, each in a new process with so many threads: nothing is left of what ran before."""
    return get_context('spawn').Pool(1, maxtasksperchild=1, initializer=torch.set_num_threads, initargs=(threads,))


def usable(device: str) -> str:
    """A device, as an argument of a command. An error of its parser if torch finds none."""
    if device == 'cuda' and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError('cuda, but torch finds none')
    return device


def synchronize(device: str) -> None:
    if device != 'cpu':
        torch.cuda.synchronize()


def evaluation(model: nn.Module, setting: Setting, batch: int, size: int) -> Callable[[], Any]:
    """A forward pass in evaluation."""
    x = setting.images(batch, size)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        model.eval()
        with setting.autocast():
            return model(x)

    return run


def training(model: nn.Module, setting: Setting, batch: int, size: int) -> Callable[[], Any]:
    """A step of SGD with momentum: forward, backward, update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)
    x, labels = setting.images(batch, size), torch.randint(model.num_classes, (batch,), device=setting.device)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()

    return run


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory in use while something runs, above what is in use before.

    On a GPU what torch has allocated; on a CPU under Linux the resident set of the process.
    """
    run()
    gc.collect()
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets the peak of the resident set (proc(5))
    before = _resident('VmRSS')
    run()
    return _resident('VmHWM') - before


def _resident(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def compare(
    candidates: dict[str, Callable[[], Any]], device: str, budget: float, least: int = 5
) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, and its ratio to the first one of the same round.

    Args:
        candidates: Name -> what to run.
        device: To wait for.
        budget: Seconds that all rounds may take together; there are 31 rounds at most.
        least: Rounds that there are even so.

    Returns:
        Name -> median seconds, median and quartiles of the ratio, and the number of rounds.
    """

    def clock(run: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    for run in candidates.values():
        run()
    seconds = {name: [clock(run)] for name, run in candidates.items()}
    rounds = int(min(31, max(least, budget / sum(map(sum, seconds.values())))))
    for _ in range(rounds - 1):
        for name, run in candidates.items():
            seconds[name].append(clock(run))
    return as_ratios(seconds)


def as_ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What `compare` returns, from the seconds of each round."""
    result = {}
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratios = [ours / other for ours, other in zip(times, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = dict(seconds=statistics.median(times), ratio=middle, low=low, high=high, rounds=len(times))
    return result


def networks(name: str, setting: Setting) -> dict[str, nn.Module]:
    """Plain twice, ours, ours fused, and the original formulation (unless compiled), in the same setting."""
    torch.manual_seed(0)
    if setting.device == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True  # as timm's scripts do
    ours, plain, again = (timm.create_model(name, **kwargs) for kwargs in ({}, PLAIN, PLAIN))
    theirs = original(ours)
    check(ours, theirs, 64)
    models = {
        'plain': plain,
        'plain again': again,
        'fused': reparameterize_model(ours.eval()),
        'harmonic': ours,
    }
    if not setting.compiled:  # it would take most of the time
        models['original'] = theirs
    return {key: setting.place(model) for key, model in models.items()}


def measure(
    name: str, setting: Setting, evals: list[int], trains: list[int], size: int, budget: float
) -> list[dict[str, Any]]:
    """All rows of one network in one setting."""
    rows = []
    about = dict(model=name, size=size, **asdict(setting))
    models = networks(name, setting)
    for batch in evals:
        candidates = {key: evaluation(model, setting, batch, size) for key, model in models.items()}
        rows.append(dict(about, mode='eval', batch=batch, runs=compare(candidates, setting.device, budget)))
    models.pop('fused')
    for batch in trains:
        rows.append(dict(about, mode='train', batch=batch, runs=train_steps(models, setting, batch, size, budget)))
    torch.compiler.reset()
    return rows


def train_steps(
    models: dict[str, nn.Module], setting: Setting, batch: int, size: int, budget: float
) -> dict[str, dict[str, float]]:
    """What `compare` finds for a training step of every network, and the most memory that it uses, in bytes."""
    candidates = {key: training(model, setting, batch, size) for key, model in models.items()}
    runs = compare(candidates, setting.device, budget)
    for key, run in candidates.items():
        trained = [p for p in models[key].parameters() if p.requires_grad]
        kept = 2 * sum(p.nbytes for p in trained)  # the parameters and their momentum
        for parameter in trained:
            parameter.grad = None
        runs[key]['peak_bytes'] = kept + peak_bytes(run, setting.device)
    return runs


def growth(name: str, setting: Setting, points: list[tuple[str, int, int]], budget: float) -> list[dict[str, Any]]:
    """How cost grows: rows for (mode, batch, size), without the fused network in training."""
    rows = []
    models = networks(name, setting)
    models.pop('plain again')
    for mode, batch, size in points:
        of_mode = {k: m for k, m in models.items() if mode == 'eval' or k != 'fused'}
        make = evaluation if mode == 'eval' else training
        candidates = {key: make(model, setting, batch, size) for key, model in of_mode.items()}
        runs = compare(candidates, setting.device, budget, least=3)
        rows.append(dict(model=name, mode=mode, batch=batch, size=size, **asdict(setting), runs=runs))
    return rows
