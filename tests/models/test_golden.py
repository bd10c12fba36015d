"""The numbers that the authors' implementation computed (see tests/data/README.md)."""

import json

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d

# The authors' network and ours.
NETWORKS = {
    'harm1_resnet50': 'harm1_resnet50',
    'harm_resnet50': 'harm_resnet50',
    'harm_resnet50_avgpool': 'harm_resnet50_avgpool',
    'harm_resnet50_avgpool_levels_NN32': 'harm_resnet50_progressive',
    'harm_resnet101': 'harm_resnet101',
    'harm_se_resnext101_32x4d': 'harm_seresnext101_32x4d',
    'harm_se_resnext101_64x4d': 'harm_seresnext101_64x4d',
    'harm_vgg11': 'harm_vgg11',
    'harm_vgg16_bn': 'harm_vgg16_bn',
    'resnet50_nopool': 'harm0_resnet50',
    'resnet101_maxpool': 'resnet101',
    'se_resnext101_32x4d': 'harm0_seresnext101_32x4d',
}
# The authors' wide residual networks for small images, and our options of harm_wrn16_8.
WIDE = {
    'harm_wrn16_8': {},
    'harm_wrn16_8_level3': dict(levels=3),
    'harm1_wrn16_8': dict(harmonic_blocks=False),
    'harm_wrn16_8_stl': dict(stem_stride=2),
}
# What runs in the fast tests.
FAST = ('harm1_resnet50', 'harm_resnet50_avgpool_levels_NN32', 'harm_wrn16_8')
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
LAYERS = json.loads((reference.DATA / 'layers.json').read_text())


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (*NETWORKS, *WIDE)]
)
def test_network(name, tmp_path):
    """Loaded as the authors' checkpoint would be; a wide network from a file as their training saves it."""
    spec = json.loads((reference.DATA / f'{name}.json').read_text())
    expected = torch.from_numpy(np.load(reference.DATA / f'{name}.npz')['logits'])
    state = reference.generated_state_dict(name)
    if name in WIDE:
        torch.save(dict(params=state, epoch=7, optimizer=dict(state={})), tmp_path / 'model.pt7')
        architecture, kwargs = 'harm_wrn16_8', dict(num_classes=spec['num_classes'], **WIDE[name])
        overlay = dict(file=str(tmp_path / 'model.pt7'), num_classes=spec['num_classes'])
    else:
        architecture, kwargs, overlay = NETWORKS[name], {}, dict(state_dict=state)
    model = timm.create_model(architecture, True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    assert sum(p.numel() for p in model.parameters()) == spec['trainable_parameters']
    x = reference.generated_images(spec['seed'], spec['input_shape'])
    with torch.inference_mode():
        for dtype, tolerance in TOLERANCE.items():
            error = reference.relative_error(model.to(dtype)(x.to(dtype)), expected)
            assert error < tolerance, f'{dtype}: {error}'


@pytest.mark.parametrize('case', LAYERS, ids=lambda case: case['name'])
def test_layer(case, dtype):
    args, tolerance = case['args'], TOLERANCE[dtype]
    with np.load(reference.DATA / 'layers.npz') as file:
        golden = {
            key.partition('/')[2]: torch.from_numpy(file[key]) for key in file.files if key.startswith(case['name'])
        }
    layer = (HarmonicBlock2d if args.get('use_bn') else HarmonicConv2d)(
        args['ni'],
        args['no'],
        args['kernel_size'],
        level=args.get('level'),
        dc=args.get('DC', True),
        dtype=dtype,
        **{key: args[key] for key in ('stride', 'padding', 'dilation', 'groups', 'bias') if key in args},
    )
    with torch.no_grad():
        layer.weight.copy_(golden['weight'].reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(golden['bias'])
        if args.get('use_bn'):
            layer.bn.running_mean.copy_(golden['running_mean_before'])
            layer.bn.running_var.copy_(golden['running_var_before'])
    layer.train(case['training'])
    x = golden['x'].to(dtype).requires_grad_()
    y = layer(x)
    y.backward(golden['grad_y'].to(dtype))
    found = {'y': y, 'grad_x': x.grad, 'grad_weight': layer.weight.grad.reshape(golden['grad_weight'].shape)}
    if layer.bias is not None:
        found['grad_bias'] = layer.bias.grad
    if args.get('use_bn'):
        found['running_mean_after'] = layer.bn.running_mean
        found['running_var_after'] = layer.bn.running_var
    assert set(golden) <= {*found, 'x', 'weight', 'bias', 'grad_y', 'running_mean_before', 'running_var_before'}
    for key, value in found.items():
        assert reference.relative_error(value, golden[key]) < tolerance, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'model_name', 'kwargs'),
    [
        ('harm_resnet50_avgpool', 'harm_resnet50_avgpool', {}),
        ('harm_resnet50_levels_NN32', 'harm_resnet50', dict(levels=(None, None, 3, 2))),
    ],
)
def test_four_training_steps(name, model_name, kwargs):
    """SGD in float64 (train-mode batch-norm over few samples amplifies rounding): losses, logits, the stem."""
    spec = json.loads((reference.DATA / f'train_{name}.json').read_text())
    golden = {key: torch.from_numpy(value) for key, value in np.load(reference.DATA / f'train_{name}.npz').items()}
    layout = 'harm_resnet50_avgpool_levels_NN32' if 'levels' in name else name
    state = reference.generated_state_dict(layout, seed=spec['seed'])
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state), **kwargs)
    model = model.double().train()
    x = reference.generated_images(spec['seed'], spec['input_shape']).double()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=spec['lr'], momentum=spec['momentum'], weight_decay=spec['weight_decay']
    )
    losses = []
    for _ in range(spec['steps']):
        loss = F.cross_entropy(model(x), golden['labels'])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, golden['losses'], rtol=1e-6)
    np.testing.assert_allclose(losses, spec['losses'], rtol=1e-6)
    with torch.no_grad():
        assert reference.relative_error(model.eval()(x), golden['final_logits']) < 1e-6
    stem = model.conv1
    assert reference.relative_error(stem.weight.reshape(64, 147, 1, 1), golden['stem_weight']) < 1e-6
    assert reference.relative_error(stem.bn.running_mean, golden['stem_running_mean']) < 1e-6
    assert reference.relative_error(stem.bn.running_var, golden['stem_running_var']) < 1e-6
