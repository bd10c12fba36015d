"""What holds on the CPU holds on every device: on the first GPU where there is one, or on the one of --device.

The CPU in float64 says what is right. python -m pytest tests/test_devices.py -m slow
"""

import copy
import warnings

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from reference import RESNET, small
from timm.models import reparameterize_model
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d, deploy, harmonize, refit, truncate
from timm_harmonic.conversion.swap import harmonic_layers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

LAYERS = {
    'conv': lambda **kwargs: HarmonicConv2d(32, 24, 3, padding=1, **kwargs),
    'level': lambda **kwargs: HarmonicConv2d(32, 24, 3, padding=1, level=2, **kwargs),
    'smooth': lambda **kwargs: HarmonicConv2d(32, 24, 5, stride=2, padding=2, smoothness=1, **kwargs),
    'grouped': lambda **kwargs: HarmonicConv2d(32, 24, 3, padding=1, groups=8, bias=False, **kwargs),
    'depth-wise': lambda **kwargs: HarmonicConv2d(32, 32, 5, padding='same', groups=32, **kwargs),
    'stem': lambda **kwargs: HarmonicBlock2d(4, 24, 7, stride=4, padding=3, **kwargs),
    'smooth stem': lambda **kwargs: HarmonicBlock2d(4, 24, 3, padding=1, smoothness=0.5, **kwargs),
}


@pytest.fixture(scope='module')
def device(request):
    name = request.config.getoption('--device') or ('cuda' if torch.cuda.is_available() else 'cpu')
    return torch.device(name)


@pytest.fixture
def tensor_float32(device):
    """Rounded products, as timm's scripts allow them, and as convolutions have them by default."""
    if device.type != 'cuda':
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def no_waiting(device):
    """On a GPU, an error if the program waits for it."""
    if device.type != 'cuda':
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it is a prototype
        torch.cuda.set_sync_debug_mode('error')
    yield
    torch.cuda.set_sync_debug_mode('default')


def images(channels=3, size=32, batch=8, seed=1, dtype=torch.float32):
    """Images with most of their energy at low frequencies, on the CPU: every device gets the same."""
    noise = torch.randn(batch, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return 5 * F.avg_pool2d(noise, 5, 1).to(dtype)


def outcome(layer, x):
    """Output and gradients of a layer, on the CPU."""
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape).to(y.device)
    (y * weights).sum().backward()
    found = dict(output=y, **{name: p.grad for name, p in layer.named_parameters()}, **dict(layer.named_buffers()))
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize('form', ['dense', 'separable'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('name', LAYERS)
def test_layers(name, training, form, device):
    """Outputs, gradients and statistics, in both memory formats."""
    torch.manual_seed(0)
    layer = reference.randomize_batch_norm(LAYERS[name](form=form).double()).train(training)
    x = images(layer.in_channels, size=24, batch=2, dtype=torch.float64)
    there = copy.deepcopy(layer).to(device)
    expected = outcome(layer, x)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        moved = copy.deepcopy(there).to(memory_format=memory_format)
        found = outcome(moved, x.to(device).contiguous(memory_format=memory_format))
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f'{key}: {m}')


def test_a_layer_is_made_where_it_is_wanted(device):
    """On the device at once, through the context that torch has for it, and by a move: the same basis, there."""
    made = [HarmonicConv2d(4, 4, 3, device=device), HarmonicConv2d(4, 4, 3).to(device), HarmonicBlock2d(4, 4, 3)]
    with device:
        made.append(HarmonicBlock2d(4, 4, 3))
    made[2].to(device)
    for layer in made:
        assert {t.device.type for t in (layer.weight, layer.basis)} == {device.type}
    assert torch.equal(made[0].basis, made[1].basis)
    there_and_back = copy.deepcopy(made[0]).half().cpu().to(device).float()
    assert torch.equal(there_and_back.basis, made[0].basis)


@pytest.mark.usefixtures('tensor_float32')
@pytest.mark.parametrize('precision', [None, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('name', ['conv', 'grouped', 'stem', 'stem in training', 'network'])
def test_precision(name, precision, device):
    """As near to float64 as the plain convolution with the same filters, where products may be rounded."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        training = name == 'stem in training'
        layer = LAYERS.get('stem' if training else name)
        ours = small('harm_resnet18') if layer is None else reference.randomize_batch_norm(layer()).train(training)
        exact = copy.deepcopy(ours).double()
        x = images(next(m.in_channels for m in ours.modules() if hasattr(m, 'in_channels')), seed=seed)
        with torch.no_grad():
            expected = exact(x.double())
            if training:
                plain = exact._to_conv2d(*exact._fused_by_batch(x.double()))
            else:
                plain = reparameterize_model(nn.Sequential(exact))
            plain.float().to(device)
            errors = []
            for model in (copy.deepcopy(ours).to(device), plain):
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    found = model(x.to(device))
                errors.append((found.cpu().double() - expected).square().mean().sqrt())
        ratios.append(float(errors[0] / errors[1]))
    assert sum(ratios) / len(ratios) <= 1.1, ratios


@pytest.mark.usefixtures('tensor_float32')
def test_conversions_are_exact(device):
    """Where products may be rounded, filters become coefficients and come back to the last bits of float32."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 48, 3, padding=1, bias=False).to(device)
    layer = HarmonicConv2d.from_conv2d(conv)
    assert reference.relative_error(layer.fuse().weight, conv.weight) < 1e-6
    loaded = HarmonicConv2d(64, 48, 3, padding=1, bias=False, device=device)
    loaded.load_state_dict(conv.state_dict())
    assert reference.relative_error(loaded.filters(), conv.weight) < 1e-6
    whole = nn.Sequential(layer)
    half, expected = truncate(whole, level=3), truncate(copy.deepcopy(whole).cpu().double(), level=3)
    assert reference.relative_error(half[0].filters().cpu(), expected[0].filters()) < 1e-6


@pytest.mark.usefixtures('tensor_float32')
@pytest.mark.parametrize('precision', [None, torch.float16, torch.bfloat16], ids=['fp32', 'fp16', 'bf16'])
def test_training(precision, device, request):
    """Some steps: the loss stays finite and falls. A step does not wait for the device."""
    if device.type == 'cpu' and precision == torch.float16:
        pytest.skip('slow on a CPU: tests/layers/test_precision.py trains so there')
    model = small('harm_resnet18').to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    x, labels = images().to(device, memory_format=torch.channels_last), (torch.arange(8) % 5).to(device)

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    losses = [float(step()) for _ in range(30)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.5 * losses[0]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if precision != torch.float16:  # the scaler asks whether gradients are finite
        request.getfixturevalue('no_waiting')
        step()
        with torch.inference_mode():
            model.eval()(x)


def test_harmonize_truncate_refit_deploy(device):
    """The same levels and the same networks as on the CPU, and by time what is measured on the device."""
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', **RESNET)
    plain.train()
    with torch.no_grad():
        for seed in range(20):
            plain(images(seed=seed))
    plain = plain.eval().double()
    data = [images(seed=seed, dtype=torch.float64) for seed in range(3)]

    def small_on(where):
        moved = [batch.to(where) for batch in data]
        whole = harmonize(copy.deepcopy(plain).to(where))
        found = [truncate(whole, energy=0.9), truncate(whole, ratio=0.5, data=moved, refit=True)]
        found.append(refit(whole, truncate(whole, level=2), moved))
        return [whole, *found]

    x = images(seed=9, dtype=torch.float64)
    for ours, expected in zip(small_on(device), small_on('cpu'), strict=True):
        levels = [{name: layer.level for name, layer in harmonic_layers(m).items()} for m in (ours, expected)]
        assert levels[0] == levels[1]
        with torch.no_grad():
            y = expected(x)
            torch.testing.assert_close(ours(x.to(device)).cpu(), y, rtol=1e-6, atol=1e-6)
            for form in ('auto', 'dense', 'separable'):
                torch.testing.assert_close(deploy(ours, form=form)(x.to(device)).cpu(), y, rtol=1e-6, atol=1e-6)
    batch = x.float().to(device)
    quick = truncate(harmonize(plain.float().to(device)), ratio=1.0, cost='time', images=batch)
    assert {p.device.type for p in quick.parameters()} == {device.type}
    with torch.no_grad():
        torch.testing.assert_close(deploy(quick, batch)(batch), quick(batch), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings('ignore:`torch.jit')  # the compiler's own imports
def test_compiled(device):
    """By the compiler's own code generator: evaluation and a step of training, without a graph break."""
    if device.type == 'cpu':
        pytest.skip('takes minutes on a CPU: tests/models/test_export.py compiles for it')
    torch.compiler.reset()
    model = small('harm_resnet18').to(device).double()
    x = images(dtype=torch.float64).to(device)
    for training in (False, True):
        eager = copy.deepcopy(model).train(training)
        compiled = copy.deepcopy(eager)
        compiled.compile(fullgraph=True)
        expected, found = outcome(eager, x), outcome(compiled, x)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-7, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # of torch's own warm-up
def test_captured_in_a_graph(device):
    """A CUDA graph of evaluation and of the forward and backward pass of training."""
    if device.type != 'cuda':
        pytest.skip('CUDA graphs are for CUDA')
    model, x = small('harm_resnet18').to(device), images().to(device)
    with torch.no_grad():
        expected = model.eval()(x)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = model(x)
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    other = copy.deepcopy(model).train()
    captured = torch.cuda.make_graphed_callables(copy.deepcopy(other), (x,))
    # Its warm-up has updated the statistics, which training does not use.
    captured.train()
    captured(x).square().sum().backward()
    other(x).square().sum().backward()
    for ours, theirs in zip(captured.parameters(), other.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 0.01 * theirs.grad.norm() + 1e-4


def test_distributed(device, tmp_path):
    """One process with NCCL, and batch-norms that are synchronised: the gradients are those without."""
    if device.type != 'cuda':
        pytest.skip('tests/models/test_distributed.py has two processes on the CPU')
    import torch.distributed as dist

    model, x = small('harm_resnet18').to(device).double().train(), images(dtype=torch.float64).to(device)
    expected = outcome(copy.deepcopy(model), x)
    dist.init_process_group('nccl', init_method=f'file://{tmp_path}/meeting_point', rank=0, world_size=1)
    try:
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        parallel = nn.parallel.DistributedDataParallel(synchronised, device_ids=[0])
        found = outcome(parallel, x)
    finally:
        dist.destroy_process_group()
    for key, value in expected.items():
        ours = found[key if key == 'output' else f'module.{key}']
        torch.testing.assert_close(ours, value, rtol=1e-7, atol=1e-7, msg=lambda m, key=key: f'{key}: {m}')
