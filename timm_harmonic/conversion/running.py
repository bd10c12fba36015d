"""Running images through a network and watching its harmonic layers, without leaving a trace."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from contextvars import copy_context
from functools import partial, wraps
from itertools import accumulate, islice
from numbers import Integral
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..common import InputError
from .swap import harmonic_layers

HELD_OUT = 4  # one image in this many is held out
_BYTES = 2**31  # of images kept in memory
_BATCH = 32  # images that run through a network together
_SUSPENDED = 2**28  # bytes of images whose runs stay suspended, 4 MiB at least for each part
_AUTOCAST = ('cpu', 'cuda', 'mps', 'xpu')

P = ParamSpec('P')
R = TypeVar('R')
T = TypeVar('T')
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


class _Ended(BaseException):
    """Ends a function that waits in `in_turns`. No Exception, which a network may catch."""


def _in_thread(work: Callable[[], object]) -> threading.Thread:
    """Makes a thread in which a function computes as it would here: torch keeps its modes by thread."""
    modes: list[Callable[[], Any]] = [
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    for kind in filter(torch.is_autocast_enabled, _AUTOCAST):
        cache = torch.is_autocast_cache_enabled()
        modes.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=cache))
    if torch.cuda.is_initialized():
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    if (device := torch.get_default_device()).type != 'cpu':
        modes.append(lambda: device)

    def run() -> None:
        torch.get_num_threads()  # without this call, OpenMP would not know the number
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            work()

    return threading.Thread(target=copy_context().run, args=(run,), daemon=True)


def in_turns(work: Callable[[Callable[[T], None]], object]) -> Iterator[T]:
    """Yields what a function reports. Until the next value is wanted, it waits in a thread of its own.

    Caller and thread take turns, so nothing depends on timing. The function's errors are raised here. Closing the
    iterator ends the thread.
    """
    ours, theirs = threading.Semaphore(0), threading.Semaphore(0)
    reported: list[T] = []
    errors: list[BaseException] = []
    ended = False

    def report(value: T) -> None:
        reported.append(value)
        ours.release()
        theirs.acquire()
        if ended:
            raise _Ended

    def run() -> None:
        try:
            work(report)
        except _Ended:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            ours.release()

    thread = _in_thread(run)
    try:
        thread.start()
        ours.acquire()
        while reported:
            yield reported.pop()
            theirs.release()
            ours.acquire()
        if errors:
            raise errors.pop()
    finally:
        ended = True
        theirs.release()
        if thread.ident is not None:
            thread.join()


class Run:
    """Images on their way through a network, suspended at one after another of the modules `names`.

    With `before`, it stops before a module computes, otherwise behind it.
    """

    def __init__(self, model: nn.Module, images: Tensor, names: Iterable[str], before: bool, stay: bool) -> None:
        self.model, self.images, self.before, self.stay = model, images, before, stay
        self.ahead = set(names)
        self._uses: Any = None

    def to(self, name: str, uses: int) -> list[tuple[Tensor, ...]]:
        """Goes on to the last of the next uses of a module; fewer if the run ends first. Call it once for each module.

        Returns the module's input and, unless it stops before, its output for each use. If the module then changes, a
        run that stopped before it takes that into account. Where other uses of modules that are ahead were passed, the
        next call starts from the images again.
        """
        found: list[tuple[Tensor, ...]] = []
        passed = 0
        self._uses = self._uses or in_turns(self._report)
        for key, values in self._uses:
            passed += 1
            if key == name:
                # The network may go on in place.
                found.append(tuple(value.clone() for value in values) if uses > 1 else values)
            if len(found) == uses:
                break
        self.ahead.remove(name)
        if not (passed == len(found) == uses == 1 and self.stay):
            self.close()
        return found

    def close(self) -> None:
        """Ends the run where it is."""
        if self._uses is not None:
            self._uses.close()
            self._uses = None

    def _report(self, report: Callable[[tuple[str, tuple[Tensor, ...]]], None]) -> None:
        thread = threading.get_ident()

        def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], *outputs: Tensor) -> None:
            # Other runs have hooks at the same modules.
            if threading.get_ident() == thread and name in self.ahead:
                report((name, (inputs[0], *outputs)))

        kind = 'register_forward_pre_hook' if self.before else 'register_forward_hook'
        with ExitStack() as stack:
            for name in self.ahead:
                stack.callback(getattr(self.model.get_submodule(name), kind)(partial(hook, name)).remove)
            self.model(self.images)


@contextmanager
def suspended(
    model: nn.Module, parts: Sequence[Tensor], names: Iterable[str], before: bool = False
) -> Iterator[list[Run]]:
    """Runs parts of images through a network, each suspended at modules, see `Run`, while the context lasts.

    Live activations of up to 256 MiB of images are in memory. Runs of further images start again for each module.
    """
    sizes = accumulate(max(part.nbytes, 2**22) for part in parts)
    with ExitStack() as stack:
        runs = [Run(model, part, names, before, size <= _SUSPENDED) for part, size in zip(parts, sizes, strict=True)]
        for run in runs:
            stack.enter_context(closing(run))
        yield runs


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
