"""Options and fixtures that several test files share, and the loopback instead of the network."""

import os
import socket
import tempfile

import pytest
from standin_hub import StandinHub

# huggingface_hub reads these when it is imported: no test reaches the real Hub, a token or a user's cache.
_HUB = StandinHub()
_HOME = tempfile.TemporaryDirectory(prefix='timm-harmonic-tests-')
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=os.path.join(_HOME.name, 'huggingface'),
    HF_HUB_DISABLE_XET='1',
    TORCH_HOME=os.path.join(_HOME.name, 'torch'),
)
for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'TIMM_HARMONIC_HUB_ORG'):
    os.environ.pop(name, None)


def pytest_addoption(parser):
    parser.addoption(
        '--every-model', action='store_true', help="run timm's own tests on every harm* model, not on a selection"
    )


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch):
    """Whatever a test asks for, nothing leaves this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise ConnectionRefusedError(f'a test tried to reach {address[0]}')
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', guarded)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in Hub, empty, with an empty cache and no waiting between attempts."""
    import huggingface_hub.utils._http as client

    _HUB.reset()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub-cache'))
    monkeypatch.setattr(client.time, 'sleep', lambda seconds: None)
    yield _HUB
    _HUB.reset()


@pytest.fixture(params=['float32', 'float64'])
def dtype(request):
    import torch

    return getattr(torch, request.param)
