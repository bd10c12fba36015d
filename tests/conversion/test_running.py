"""Suspended runs: one thread at a time, in the modes of the caller, and nothing of them is left."""

import copy
import signal
import threading

import pytest
import torch
from torch import nn

from timm_harmonic import HarmonicConv2d, refit, truncate
from timm_harmonic.conversion.channels import Choices
from timm_harmonic.conversion.refit import losses_by_images
from timm_harmonic.conversion.running import in_turns, read_images
from timm_harmonic.conversion.swap import harmonic_layers

pytestmark = pytest.mark.usefixtures('one_thread')


def threads():
    return [thread for thread in threading.enumerate() if type(thread) is threading.Thread]  # tqdm's is another


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threads()
    yield
    assert threads() == before


class Chain(nn.Module):
    """Layers in a row, repeated. All chains note the places of the layers that they call, and fail at one call."""

    calls, fail, last = [], None, 0

    def __init__(self, depth, repeats=1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(HarmonicConv2d(3, 3, 3, padding=1) for _ in range(depth))
        self.repeats = repeats

    def forward(self, x):
        for place, layer in [*enumerate(self.layers)] * self.repeats:
            self.calls.append(place)
            if len(self.calls) == self.last:
                self.fail()
            x = layer(x).relu_()
        return x


def chains(*args):
    """A complete network, the truncated one, and images in three parts. Nothing has been called."""
    model = Chain(*args).eval()
    Chain.calls.clear()
    return model, truncate(model, level=2), torch.rand(80, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def calls(function, depth, repeats):
    """How often a function calls the first layer of networks of this depth."""
    model, small, images = chains(depth, repeats)
    if function is refit:
        refit(model, small, [images])
    else:
        layers = harmonic_layers(model)
        losses_by_images(model, read_images([images], images), [Choices(layers, list(layers), 'layer').weighed], True)
    return Chain.calls.count(0)


@pytest.mark.parametrize(('function', 'networks'), [(refit, 2), (losses_by_images, 1)])
def test_calls_do_not_grow_with_depth(function, networks, monkeypatch):
    """Runs start again behind a layer that is used repeatedly, and where memory is short."""
    assert calls(function, 9, 1) == calls(function, 3, 1)
    assert calls(function, 9, 2) - calls(function, 3, 2) == 6 * 3 * networks * 2
    monkeypatch.setattr('timm_harmonic.conversion.running._SUSPENDED', 0)
    assert calls(function, 9, 1) - calls(function, 3, 1) == 6 * 3 * networks


def interrupt():
    signal.raise_signal(signal.SIGINT)


def error():
    raise RuntimeError('of the network')


def exit_():
    raise SystemExit('of the network')


@pytest.mark.parametrize(('fail', 'kind'), [(interrupt, KeyboardInterrupt), (error, RuntimeError), (exit_, SystemExit)])
@pytest.mark.parametrize('last', [1, 17, 25, 32, 60])
def test_failures_change_nothing(fail, kind, last, monkeypatch, request):
    """Before, during and after the suspended runs."""
    # A shell lets what it runs in the background ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    model, small, images = chains(3)
    model.train().layers[0].eval()
    before = copy.deepcopy(small)
    for name, value in (('fail', staticmethod(fail)), ('last', last)):
        monkeypatch.setattr(Chain, name, value)
    with pytest.raises(kind):
        refit(model, small, [images], inplace=True)
    assert len(Chain.calls) >= last
    untouched(model, small, before)


def untouched(model, small, before):
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), before.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize('kind', [KeyboardInterrupt, ValueError])
def test_failures_between_the_runs_change_nothing(kind, monkeypatch):
    model, small, images = chains(3)
    model.train().layers[0].eval()
    before = copy.deepcopy(small)

    def fail(*args):
        assert len(threads()) >= 6
        raise kind

    monkeypatch.setattr('timm_harmonic.conversion.refit.solve_layer', fail)
    with pytest.raises(kind):
        refit(model, small, [images], inplace=True)
    untouched(model, small, before)


def modes():
    autocast = torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu'), torch.is_autocast_cache_enabled()
    gradients = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *autocast, *gradients, torch.get_default_device(), torch.get_num_threads()


@pytest.mark.parametrize(
    'mode',
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast('cpu', torch.float16, cache_enabled=False),
        lambda: torch.device('meta'),
    ],
)
def test_modes_are_those_of_the_caller(mode):
    """Those that the function changes are its own."""

    def work(report):
        report(modes())
        with torch.enable_grad(), torch.autocast('cpu', enabled=False), torch.device('cpu'):
            report(modes())

    with mode():
        before = modes()
        turns = in_turns(work)
        assert next(turns) == before != next(turns)
        assert modes() == before
        turns.close()


def test_turns():
    """Values in order, then the error; nothing runs ahead; and a function that catches errors ends as well."""
    done = []

    def work(report):
        for i in range(3):
            report(i)
            done.append(i)
        raise ValueError('at the end')

    turns = in_turns(work)
    assert not done
    assert [next(turns), next(turns)] == [0, 1]
    assert done == [0]
    with pytest.raises(ValueError, match='at the end'):
        assert list(turns) == [2]
    assert done == [0, 1, 2]

    def stubborn(report):
        while True:
            try:
                report(0)
            except Exception:
                done.append('caught')

    turns = in_turns(stubborn)
    assert next(turns) == next(turns) == 0
    turns.close()
    assert 'caught' not in done
