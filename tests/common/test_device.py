"""Devices are asked whether they compute in float64."""

import pytest
import torch

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.common.device import dot_products, float64_device
from timm_harmonic.layers import base


def test_devices_that_have_float64():
    for name in ('cpu', 'meta', *(['cuda'] if torch.cuda.is_available() else [])):
        assert float64_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize('error', [RuntimeError, TypeError, NotImplementedError, AssertionError, ValueError])
def test_devices_that_refuse_float64(error, monkeypatch):
    """Each in its own words: the CPU steps in, and the device is asked once."""
    asked = []

    def refuse(*size, dtype=None, device=None):
        asked.append(device)
        raise error('no such type here')

    monkeypatch.setattr(torch, 'ones', refuse)
    device = torch.device('xpu', 7)
    float64_device.cache_clear()
    assert float64_device(device) == float64_device(device) == torch.device('cpu')
    assert asked == [device]
    float64_device.cache_clear()


@pytest.mark.parametrize('cls', [HarmonicConv2d, HarmonicBlock2d])
def test_a_layer_without_float64(cls, monkeypatch):
    torch.manual_seed(0)
    expected = cls(3, 8, 3).eval()
    monkeypatch.setattr(base, 'float64_device', lambda device: torch.device('meta'))
    layer = cls(3, 8, 3).eval()
    layer.load_state_dict(expected.state_dict())
    assert {buffer.dtype for buffer in layer.buffers()} <= {torch.float32, torch.int64}
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(layer(x), expected(x))
    torch.testing.assert_close(layer.energies(), expected.energies())


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('flags\t: fpu avx2 avx512_vnni', True),
        ('flags\t: fpu avx2 avx512f', False),
        ('Features\t: fp asimd asimddp', True),
        ('Features\t: fp asimd', False),
        ('processor\t: 0', None),
        (None, None),
    ],
)
def test_processors_that_have_dot_products(text, expected, monkeypatch):
    def read(path, encoding):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr('pathlib.Path.read_text', read)
    assert dot_products() is expected
