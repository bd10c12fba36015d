"""Running images through a network and watching its modules, without leaving a trace."""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import accumulate, islice, zip_longest
from numbers import Integral
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..common import InputError
from .swap import harmonic_layers

HELD_OUT = 4  # one image in this many is held out
_BYTES = 2**31  # of images kept in memory
_BATCH, _PART = 32, 2**25  # images that run through a network together, and their bytes, at most
_SUSPENDED = 2**26  # bytes of images whose runs stay suspended, 4 MiB at least for each part

P = ParamSpec('P')
T = TypeVar('T')
Visit = list[Tensor]  # the input of a module in each of its uses


def trainable(function: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Makes a function create trainable tensors even when it is called in inference mode."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
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


def read_images(
    data: Iterable[Any], like: Tensor, batches: int | None = None, least: int = 2 * HELD_OUT
) -> list[Tensor]:
    """Reads images (B, C, H, W) into parts of about 32 of one size, on the device and in the dtype of `like`.

    A batch of `data` is a tensor of images, alone or first in a tuple or list. At most `batches` are read. Raises
    TypeError if `data` are not batches. Raises InputError if a batch is empty or not finite, naming it, if images are
    fewer than `least` or more than 2 GiB, or if one is the only one of its size, unless `least` is 1.
    """
    if isinstance(data, (Tensor, str)):
        given = f'images {tuple(data.shape)}: pass [images]' if isinstance(data, Tensor) else repr(data)
        raise TypeError(f'data must be batches of images, a loader or a list, got {given}.')
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, Integral) or batches < 1):
        raise InputError(f'batches must be an integer of at least 1, got {batches!r}.')
    read: list[Tensor] = []
    total = 0
    for number, batch in enumerate(islice(data, batches)):
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.numel():
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f'batch {number} of data must be images (B, C, H, W), got {found}.')
        if not images.isfinite().all():
            raise InputError(f'batch {number} of data has values that are not finite.')
        read.append(images.detach().to(like))
        total += read[-1].nbytes
        if total > _BYTES:
            raise InputError(f'data hold over {_BYTES / 2**30:g} GiB of images, which stay in memory: limit batches.')
    if not read:
        raise InputError('data hold no batches: pass at least one batch of images.')
    if (count := sum(map(len, read))) < least:
        raise InputError(f'data hold {count} images: at least {least} are needed.')
    parts: list[Sequence[Tensor]] = []
    for size in dict.fromkeys(images.shape[1:] for images in read):
        alike = torch.cat([images for images in read if images.shape[1:] == size])
        if len(alike) == 1 < least:
            raise InputError(f'data hold a single image of size {tuple(size)}: two or more of each size are needed.')
        # Shuffled, always in the same way: folders come class by class, and every batch should resemble all images.
        order = torch.randperm(len(alike), generator=torch.Generator().manual_seed(0))
        number = max(-(-len(alike) // _BATCH), min(-(-alike.nbytes // _PART), len(alike) // HELD_OUT))
        parts.append(alike[order.to(alike.device)].tensor_split(number))
    return [part for of in zip_longest(*parts) for part in of if part is not None]  # sizes take turns


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
def watching(modules: Mapping[str, nn.Module], watch: Callable[..., None]) -> Iterator[None]:
    """Tells `watch` of each use of modules in the context: a module's name, the module, its inputs and its output."""
    handles = [module.register_forward_hook(partial(watch, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modes() -> list[Callable[[], Any]]:
    """Returns what enters this thread's modes in another one: torch keeps them by thread."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    modes: list[Any] = [partial(torch.inference_mode, inference), partial(torch.set_grad_enabled, gradients)]
    for kind in filter(torch.is_autocast_enabled, ('cpu', 'cuda', 'mps', 'xpu')):
        cache, dtype = torch.is_autocast_cache_enabled(), torch.get_autocast_dtype(kind)
        modes.append(partial(torch.autocast, kind, dtype, cache_enabled=cache))
    if torch.cuda.is_initialized():
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    if (device := torch.get_default_device()).type != 'cpu':
        modes.append(lambda: device)
    return modes


def in_turns(work: Callable[[Callable[[T], None]], object]) -> Iterator[T]:
    """Yields what a function reports, which waits between reports in a thread of its own, in the caller's modes.

    They take turns, so nothing depends on timing. Its errors are raised here. Closing the iterator ends the thread.
    """
    ours, theirs = threading.Semaphore(0), threading.Semaphore(0)
    reported: list[T] = []
    errors: list[BaseException] = []
    modes, ended = _modes(), False

    def report(value: T) -> None:
        reported.append(value)
        ours.release()
        theirs.acquire()
        if ended:
            raise GeneratorExit  # no Exception, which a network may catch

    def run() -> None:
        try:
            torch.get_num_threads()  # tells OpenMP in this thread
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                work(report)
        except BaseException as error:
            if not ended:
                errors.append(error)
        finally:
            ours.release()

    thread = threading.Thread(target=run, daemon=True)
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
        if thread.ident is not None:  # it has started
            thread.join()


def _visits(model: nn.Module, images: Tensor, uses: Mapping[str, int], stay: bool) -> Iterator[Visit]:
    """Yields what `suspended` yields for one part. Without `stay`, each module gets a run of its own."""
    # A copy with the same tensors: networks may keep values in attributes while they run.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    report: Any = None
    turns: Any = None

    def run(to: Callable[[tuple[str, Tensor]], None]) -> None:
        nonlocal report
        report = to
        model(images)

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        report((name, inputs[0]))

    ahead = {name: model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in uses}

    def visit(name: str, number: int) -> Visit:
        nonlocal turns
        found: Visit = []
        turns, passed = turns or in_turns(run), 0
        for key, x in turns:
            passed += 1
            if key == name:
                found.append(x.clone() if number > 1 else x)  # the network may go on in place
            if len(found) == number:
                break
        ahead.pop(name).remove()
        if not (passed == len(found) == number == 1 and stay and ahead):
            turns = turns.close()
        return found

    try:
        for name, number in uses.items():
            yield visit(name, number)  # which nothing here refers to, for the memory
    finally:
        if turns:
            turns.close()


@contextmanager
def suspended(
    model: nn.Module, parts: Sequence[Tensor], uses: Sequence[Mapping[str, int]]
) -> Iterator[list[Iterator[Visit]]]:
    """Runs parts of images through a network, each suspended before one module after another while the context lasts.

    Each part yields, for each of its modules in `uses`, the input in as many uses, or fewer if there are no more. Then
    it goes on with the module as it is by then. It starts again behind a module that is used repeatedly or out of turn,
    and for each module if more than 64 MiB of images come up to here: the live activations of the others stay in
    memory until the last module of their part.
    """
    sizes = accumulate(max(part.nbytes, 2**22) for part in parts)
    with ExitStack() as stack:
        runs: Any = [_visits(model, part, of, next(sizes) <= _SUSPENDED) for part, of in zip(parts, uses, strict=True)]
        for visits in runs:
            stack.callback(visits.close)
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
    layers = harmonic_layers(model)

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        # The strides of a copy: elements of an expanded input share memory.
        stride = torch.empty_like(x, device='meta').stride()
        found.setdefault(name, []).append(Use(x.shape, stride, x.dtype, x.device, output[:, 0].numel()))

    with evaluating(model), watching(layers, note), torch.no_grad():
        model(images)
    return found | {name: [] for name in layers if name not in found}
