"""timmx, an exporter for timm's models, reads our folders without knowing about us, and exports the fast form."""

import subprocess
import sys

import pytest
import reference
import timm
import torch
from timm.models import reparameterize_model

from timm_harmonic import harmonize, truncate
from timm_harmonic.layers import RepeatChannels

pytest.importorskip('timmx', reason='timmx is not installed; it needs Python 3.11')
onnx = pytest.importorskip('onnx', reason='onnx is not installed')
onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')


@pytest.mark.slow
def test_onnx_of_a_compressed_folder(tmp_path):
    torch.manual_seed(0)
    options = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=3)
    model = harmonize(reference.randomize_batch_norm(timm.create_model('resnet18', **options)).eval())
    model = truncate(model, levels={'layer1.*': 1, 'layer2.*': 2, '*': 3})
    fast = ('layer1.0.conv1', 'layer1.0.conv2', 'layer2.0.conv2')
    model = harmonize(model, form=dict.fromkeys(fast, 'separable'))
    timm.models.save_for_hf(model, tmp_path / 'folder')

    arguments = ['export', 'onnx', f'local-dir:{tmp_path / "folder"}', '--pretrained', '--no-slim']
    sizes = ['--input-size', '3', '64', '64', '--output', str(tmp_path / 'model.onnx')]
    command = [sys.executable, '-m', 'timmx', *arguments, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    graph = onnx.load(tmp_path / 'model.onnx').graph
    stored = {tensor.name for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == 'Conv']
    assert all(node.input[1] in stored for node in convolutions)
    plain = reparameterize_model(model)
    assert len(convolutions) == sum(isinstance(module, torch.nn.Conv2d) for module in plain.modules())
    repeated = [node for node in graph.node if node.op_type == 'Concat']
    assert len(repeated) == sum(isinstance(module, RepeatChannels) for module in plain.modules()) == 1

    x = torch.randn(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        assert reference.relative_error(torch.from_numpy(found), model(x)) < 1e-4
