"""Export of whole networks, fused and unfused: torch.export, ONNX, TorchScript, AOTInductor."""

import copy
import functools
import io
import shutil
from typing import NamedTuple

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import small
from timm.models import reparameterize_model
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d

pytestmark = pytest.mark.slow

BATCHES = (1, 5)
FEW_CASES = ('resnet_levels', 'vgg_bn', 'pairs')


class Export(NamedTuple):
    """One way to export a network.

    Attributes:
        example: Height and width that it is exported with.
        dims: The smallest height and width, and what they are multiples of; None for those of the example alone.
        sizes: Heights and widths that it is tried with.
    """

    example: tuple[int, int]
    dims: tuple[int, int] | None
    sizes: tuple[tuple[int, int], ...]

    def dynamic_shapes(self):
        shapes = {0: torch.export.Dim('batch')}
        if self.dims is not None:
            smallest, step = self.dims
            for axis, name in ((2, 'height'), (3, 'width')):
                shapes[axis] = step * torch.export.Dim(name, min=-(-smallest // step))
        return (shapes,)


# The smallest size that torch.export accepts: it treats a side of 1 apart, so the last features need 2 x 2.
ANY_SIZE = Export((128, 160), (33, 1), ((96, 128), (75, 101)))
# timm's pooled shortcuts round sizes up, and torch.export has to know whether they do.
MULTIPLES_OF_4 = Export((128, 160), (36, 4), ((96, 128), (76, 100)))
if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13):
    # The export of older versions cannot tell how pooling rounds other sizes, in fused networks either.
    ANY_SIZE = MULTIPLES_OF_4 = Export((128, 160), (64, 32), ((96, 128),))
# timm's VGG pools to 7 x 7 if the features are smaller, which no program can leave open.
FIXED = Export((96, 160), None, ((96, 160),))
SEPARABLE = {'layer3.0.conv1': 'separable'}
CASES = {
    'resnet_stride_4': ('harm_resnet18', {}, ANY_SIZE),
    'resnet_levels': ('harm_resnet50_avgpool', dict(levels=(None, None, 3, 2), smoothness=0.5), ANY_SIZE),
    'seresnext': ('harm_seresnext50_32x4d', {}, MULTIPLES_OF_4),
    'vgg_bn': ('harm_vgg11_bn', {}, FIXED),
    'pairs': ('harmonized', dict(pairs={'layer1.0.conv2': 50, 'layer3.0.conv1': 100}, form=SEPARABLE), ANY_SIZE),
    'wrn': ('harm_wrn16_8', {}, ANY_SIZE),
}
each_form = pytest.mark.parametrize('form', ['unfused', 'fused'])
each_case = pytest.mark.parametrize('case', CASES)


@pytest.fixture(autouse=True, scope='module')
def _caches(one_thread):
    yield
    for cached in (network, images, expected, exported, onnx_model):
        cached.cache_clear()


@functools.cache
def network(case, form):
    if form == 'fused':
        return reparameterize_model(network(case, 'unfused'))
    name, kwargs, _ = CASES[case]
    model = small(name, num_classes=10, **kwargs)
    # Random statistics are too large for the small responses of a new network, which would hide the image.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(8, (64, 64)))
    return model.eval()


@functools.cache
def images(batch, size):
    """Smooth images: after global pooling all images of noise look alike."""
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.randn(batch, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size, mode='bilinear') + 0.3 * torch.randn(batch, 3, *size, generator=generator)


@functools.cache
def expected(case, batch, size):
    """Output of the network itself, unfused."""
    with torch.inference_mode():
        found = network(case, 'unfused')(images(batch, size))
    # It tells images apart, else no comparison could fail.
    assert batch == 1 or (found - found.mean(0)).abs().max() > 0.02 * found.abs().max()
    return found


def compare(run, case):
    for size in CASES[case][-1].sizes:
        for batch in BATCHES:
            with torch.inference_mode():
                found = run(images(batch, size))
            assert found.shape == (batch, 10)
            assert reference.relative_error(found, expected(case, batch, size)) < 1e-4, (batch, size)


@functools.cache
def exported(case, form, strict=False):
    export = CASES[case][-1]
    x = images(2, export.example)
    return torch.export.export(network(case, form), (x,), dynamic_shapes=export.dynamic_shapes(), strict=strict)


def saved_and_loaded(save, load, what):
    """The same after a file, which must also hold the tensors that are in no state dict."""
    file = io.BytesIO()
    save(what, file)
    file.seek(0)
    return load(file)


@each_form
@each_case
def test_torch_export(case, form):
    """One program for every batch and, where the network allows it, every size."""
    compare(exported(case, form).module(), case)


@pytest.mark.parametrize('case', FEW_CASES)
def test_torch_export_strict_from_a_file(case):
    """By TorchDynamo, which reads the Python code of our layers."""
    program = saved_and_loaded(torch.export.save, torch.export.load, exported(case, 'unfused', strict=True))
    compare(program.module(), case)


@pytest.mark.parametrize('strict', [False, True])
def test_torch_export_in_training(strict):
    """One program for every batch, which updates the running statistics."""
    model = small('harm_resnet18', dict(num_classes=10)).train()
    shapes = ({0: torch.export.Dim('batch')},)
    run = torch.export.export(
        copy.deepcopy(model), (images(4, (64, 64)),), dynamic_shapes=shapes, strict=strict
    ).module()
    for batch in (3, 40):
        x = images(batch, (64, 64))
        assert reference.relative_error(run(x), model(x)) < 1e-5
    torch.testing.assert_close(dict(run.state_dict()), dict(model.state_dict()))


class Graph(NamedTuple):
    """What matters of an exported graph.

    Attributes:
        convolutions: How many it has.
        computed: Those whose weight is the result of an operation.
        products: How many matrix products it has.
    """

    convolutions: int
    computed: list[str]
    products: int


PRODUCTS = {'addbmm', 'addmm', 'addmv', 'baddbmm', 'bmm', 'dot', 'einsum', 'inner', 'linear', 'matmul', 'mm', 'mv'}
ONNX_PRODUCTS = {'Einsum', 'Gemm', 'MatMul', 'MatMulInteger'}


def graph_of_program(program):
    """Reads an exported program."""
    signature = program.graph_signature
    tensors = signature.inputs_to_parameters | signature.inputs_to_buffers
    tensors |= signature.inputs_to_lifted_tensor_constants
    nodes = [node for node in program.graph.nodes if node.op == 'call_function']
    # No graphs within the graph.
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in nodes)

    def operation(node):
        return getattr(node.target, '_opname', '')

    convolutions = [node for node in nodes if 'conv' in operation(node)]
    return Graph(
        convolutions=len(convolutions),
        computed=[node.name for node in convolutions if node.args[1].name not in tensors],
        products=sum(operation(node) in PRODUCTS for node in nodes),
    )


def graph_of_onnx(model):
    """Reads an ONNX model, where stored tensors have the names of the parameters."""
    graph = model.graph
    tensors = {tensor.name for tensor in graph.initializer}
    tensors |= {output for node in graph.node if node.op_type == 'Constant' for output in node.output}
    assert not model.functions
    convolutions = [node for node in graph.node if 'Conv' in node.op_type]
    return Graph(
        convolutions=len(convolutions),
        computed=[node.name for node in convolutions if node.input[1] not in tensors],
        products=sum(node.op_type in ONNX_PRODUCTS for node in graph.node),
    )


def convolutions_of(model):
    found = [m for m in model.modules() if isinstance(m, (nn.Conv2d, HarmonicBlock2d, HarmonicConv2d))]
    return len(found) + separable_of(model)


def separable_of(model):
    """How many layers respond and mix by a convolution each, instead of composing filters."""
    return sum(getattr(m, 'form', 'dense') == 'separable' for m in model.modules())


def linear_layers_of(model):
    return sum(isinstance(m, nn.Linear) for m in model.modules())


@each_case
def test_program_computes_weights_only_unfused(case):
    """After fusing every weight is stored. Before, each harmonic layer composes its own: the check can fail."""
    for form in ('fused', 'unfused'):
        model = network(case, form)
        graph = graph_of_program(exported(case, form))
        layers = sum(isinstance(m, (HarmonicBlock2d, HarmonicConv2d)) for m in model.modules())
        assert (layers > 0) is (form == 'unfused')
        assert graph.convolutions == convolutions_of(model)
        assert len(graph.computed) == layers
        assert graph.products == layers - separable_of(model) + linear_layers_of(model)


@pytest.fixture(scope='module')
def runtime():
    """onnxruntime, or a skip where it or what torch's exporter needs is not installed."""
    pytest.importorskip('onnx', reason='onnx is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript, which the exporter of torch needs, is not installed')
    return pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')


def session(runtime, model):
    """A function of images that runs an ONNX model, given as its bytes."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    running = runtime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    (name,) = (given.name for given in running.get_inputs())
    return lambda x: torch.from_numpy(running.run(None, {name: x.numpy()})[0])


@functools.cache
def onnx_model(case, form):
    return torch.onnx.export(exported(case, form), dynamo=True, verbose=False).model_proto


@each_form
@each_case
def test_onnx(case, form, runtime):
    compare(session(runtime, onnx_model(case, form).SerializeToString()), case)


@each_case
def test_onnx_computes_weights_only_unfused(case, runtime):
    """As in torch's programs; the exporter may compute small weights beforehand, but not all."""
    model = network(case, 'fused')
    graph = graph_of_onnx(onnx_model(case, 'fused'))
    assert graph.convolutions == convolutions_of(model)
    assert graph.computed == []
    assert graph.products == linear_layers_of(model)
    graph = graph_of_onnx(onnx_model(case, 'unfused'))
    assert graph.convolutions == convolutions_of(model)
    assert graph.computed
    assert graph.products > linear_layers_of(model)


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # torch's own, timm scripts still
@each_form
@each_case
def test_torchscript_script(case, form):
    """One script for every size, also for VGG: a script keeps the branches."""
    scripted = saved_and_loaded(torch.jit.save, torch.jit.load, torch.jit.script(network(case, form)))
    compare(scripted, case)


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # as above
# timm's, of the size of VGG's features
@pytest.mark.filterwarnings('ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning:timm.models.vgg')
@pytest.mark.parametrize('case', FEW_CASES)
def test_torchscript_trace(case):
    example = images(2, CASES[case][-1].example)
    traced = torch.jit.trace(network(case, 'unfused'), example, check_trace=False)
    compare(saved_and_loaded(torch.jit.save, torch.jit.load, traced), case)


@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='needs a C++ compiler')
@pytest.mark.parametrize('case', ['resnet_levels', 'pairs'])
def test_aot_inductor(case, tmp_path):
    """One compiled package for every batch and size."""
    program = exported(case, 'unfused')
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
    compare(torch._inductor.aoti_load_package(path), case)
