"""Timing in ONNX Runtime: what is timed, and that nothing disturbs it."""

import weakref

import onnxruntime
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import create_model

from timm_harmonic import HarmonicConv2d, deploy, harmonize
from timm_harmonic.common.onnx import onnx_session
from timm_harmonic.conversion import timing
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.conversion.timing import layer_in_onnx, times_of
from timm_harmonic.layers import FORMS, HarmonicConv2dSame, RepeatChannels

arguments = dict(
    kernel_size=st.sampled_from([2, 3, 5]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1, (1, 0), 'same', 'valid']),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    level=st.sampled_from([1, 2, 3]),
    form=st.sampled_from(FORMS),
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize('kind', [HarmonicConv2d, HarmonicConv2dSame])
@settings(max_examples=40, deadline=None)
@given(options=st.fixed_dictionaries(arguments), pairs=st.booleans())
def test_what_is_timed_is_the_layer(kind, options, pairs):
    if kind is HarmonicConv2dSame or options['padding'] == 'same':
        options |= dict(stride=1) if kind is HarmonicConv2d else dict(padding=0)
    torch.manual_seed(0)
    layer, x = kind(4, 8, **options).eval(), torch.randn(2, 4, 15, 14)
    layer = layer.at_pairs(3) if pairs and layer.groups == 1 else layer
    with onnx_session(layer_in_onnx(layer.fuse(), x)) as run, torch.inference_mode():
        assert reference.relative_error(run(x), layer(x)) < 1e-5


def test_no_two_sessions_are_alive(monkeypatch):
    """Idle ones spin, and take the time of those that run."""
    alive, most, started = weakref.WeakSet(), [], onnxruntime.InferenceSession

    def start(*args, **kwargs):
        session = started(*args, **kwargs)
        alive.add(session)
        most.append(len(alive))
        return session

    monkeypatch.setattr(onnxruntime, 'InferenceSession', start)
    monkeypatch.setattr(timing, '_ROUND', 1e-4)
    x = torch.randn(1, 4, 8, 8)
    files = {form: layer_in_onnx(HarmonicConv2d(4, 4, 3, level=2, form=form).fuse(), x) for form in FORMS}
    found = times_of(files, x)
    assert {name: min(times) > 0 for name, times in found.items()} == dict.fromkeys(FORMS, True)
    assert set(most) == {1}
    assert not alive


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forms_are_those_of_the_runtime(dtype, monkeypatch):
    """Timed there, on the input that a layer gets. ONNX Runtime has float32 in the contiguous format."""
    seen = []

    def times(runs, x):
        seen.append((x.dtype, x.is_contiguous()))
        files = all(isinstance(run, bytes) for run in runs.values())
        return {name: [2.0 if name == 'dense' and files else 1.0] * 9 for name in runs}

    monkeypatch.setattr(timing, 'times_of', times)
    network = harmonize(create_model('resnet18', layers=(1, 1, 1, 1), num_classes=3).eval(), level=2)
    network = network.to(dtype=dtype, memory_format=torch.channels_last)
    images = torch.randn(1, 3, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
    repeats = [
        sum(isinstance(module, RepeatChannels) for module in deploy(network, images, runtime=runtime).modules())
        for runtime in ('torch', 'onnxruntime')
    ]
    assert repeats == [0, len(harmonic_layers(network))]
    assert set(seen[len(seen) // 2 :]) == {(torch.float32, True)}


def test_errors(monkeypatch):
    network = HarmonicConv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"runtime must be one of .*, got 'tensorrt'"):
        deploy(network, runtime='tensorrt')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install onnx onnxruntime onnxscript'):
        deploy(network, runtime='onnxruntime')
