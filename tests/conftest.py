"""Options and fixtures of several test files. The network is the loopback only."""

import os
import socket
import tempfile

import pytest
from standin_hub import StandinHub

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'  # a process a core, before torch is imported

# huggingface_hub reads these on import. So no test reaches the real Hub, a token or the user's cache.
_HUB = StandinHub()
_HOME = tempfile.TemporaryDirectory(prefix='timm-harmonic-tests-')
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=os.path.join(_HOME.name, 'huggingface'),
    HF_HUB_DISABLE_XET='1',
    TORCH_HOME=os.path.join(_HOME.name, 'torch'),
)
for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE'):
    os.environ.pop(name, None)


def pytest_addoption(parser):
    parser.addoption(
        '--every-model', action='store_true', help="run timm's own tests on every harm* model, not on a selection"
    )
    parser.addoption(
        '--device', metavar='NAME', help='where test_devices.py runs: by default on the first GPU, or else on the CPU'
    )
    parser.addoption(
        '--fuzz', type=float, metavar='MINUTES', help='search for faults so long, by examples that nobody has seen'
    )


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch):
    """Nothing leaves this machine, not even the look-up of a name."""
    look_up = socket.getaddrinfo

    def guarded(host, *args, **kwargs):
        if host not in (None, '127.0.0.1', '::1', 'localhost'):
            raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, 'getaddrinfo', guarded)


@pytest.fixture(scope='module')
def one_thread():
    """For small networks: they gain little from more threads, and lose much when other processes need the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in Hub and release page, empty, with empty caches and no waiting between attempts."""
    import huggingface_hub.utils._http as client
    import torch.hub

    _HUB.reset()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub-cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch-home'))
    monkeypatch.setattr(client.time, 'sleep', lambda seconds: None)

    def github_is_here(request, *args, **kwargs):
        request.full_url = request.full_url.replace('https://github.com', _HUB.url)
        return urlopen(request, *args, **kwargs)

    urlopen = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, 'urlopen', github_is_here)
    yield _HUB
    _HUB.reset()


@pytest.fixture(params=['float32', 'float64'])
def dtype(request):
    import torch

    return getattr(torch, request.param)
