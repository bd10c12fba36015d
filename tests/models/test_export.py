"""Export of whole networks, fused and unfused: torch.export, ONNX, TorchScript, AOTInductor, and int8 after fusing."""

import functools
import io
import shutil
from typing import NamedTuple

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from timm.models import reparameterize_model
from torch import nn

from timm_harmonic import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.small_data.tasks import cut, draw_patches, load_photographs
from timm_harmonic.small_data.training import NAMED, Recipe

TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
TINY_VGG = dict(mlp_ratio=0.02)
CASES = {
    'resnet_stride_4': ('harm_resnet50', TINY),
    'resnet_avg': ('harm_resnet50', dict(TINY, stem_pool='avg')),
    'resnet_max': ('harm_resnet50', dict(TINY, stem_pool='max')),
    'resnet_levels': ('harm_resnet50', dict(TINY, levels=(None, None, 3, 2), smoothness=0.5)),
    'resnext': ('harm_resnext50_32x4d', TINY),
    'seresnext': ('harm_seresnext50_32x4d', TINY),
    'vgg': ('harm_vgg11', TINY_VGG),
    'vgg_bn': ('harm_vgg11_bn', TINY_VGG),
}
BATCHES = (1, 5)
FEW_CASES = ('resnet_levels', 'vgg_bn')


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
ANY_SIZE = Export((256, 288), (33, 1), ((224, 224), (160, 224), (75, 101)))
# timm's pooled shortcuts round sizes up, and torch.export has to know whether they do.
MULTIPLES_OF_4 = Export((256, 288), (36, 4), ((224, 224), (160, 224), (76, 100)))
# timm's VGG pools to 7 x 7 if the features are smaller, and 224 leaves a side of 1 after its 7 x 7 convolution.
FROM_256 = Export((256, 288), (256, 1), ((257, 300),))
if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13):
    # The export of older versions cannot tell how pooling rounds other sizes, in fused networks either.
    ANY_SIZE = MULTIPLES_OF_4 = Export((256, 288), (64, 32), ((224, 224), (160, 224), (96, 128)))
    FROM_256 = Export((256, 288), (256, 32), ((288, 320),))
FIXED_SQUARE = Export((224, 224), None, ((224, 224),))
FIXED_SMALLER = Export((96, 160), None, ((96, 160),))


def exports_of(case):
    """Exports by name."""
    if case == 'vgg':
        return dict(square=FIXED_SQUARE, smaller=FIXED_SMALLER)
    if case == 'vgg_bn':
        return dict(from_256=FROM_256, square=FIXED_SQUARE, smaller=FIXED_SMALLER)
    return dict(multiples_of_4=MULTIPLES_OF_4) if case == 'seresnext' else dict(any_size=ANY_SIZE)


each_form = pytest.mark.parametrize('form', ['unfused', 'fused'])
each_case = pytest.mark.parametrize('case', CASES)
each_export = pytest.mark.parametrize(
    ('case', 'way'), [pytest.param(case, way, id=f'{case}-{way}') for case in CASES for way in exports_of(case)]
)


@pytest.fixture(autouse=True, scope='module')
def _caches(one_thread):
    yield
    for cached in (network, images, expected, exported, onnx_model):
        cached.cache_clear()


@functools.cache
def network(case, form):
    if form == 'fused':
        return reparameterize_model(network(case, 'unfused'))
    torch.manual_seed(0)
    name, kwargs = CASES[case]
    model = reference.randomize_batch_norm(timm.create_model(name, num_classes=10, **kwargs))
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
    model = network(case, 'unfused')
    with torch.inference_mode():
        return model(images(batch, size))


def compare(run, case, sizes):
    for size in sizes:
        for batch in BATCHES:
            with torch.inference_mode():
                found = run(images(batch, size))
            assert found.shape == (batch, 10)
            assert reference.relative_error(found, expected(case, batch, size)) < 1e-4, (batch, size)


@functools.cache
def exported(case, form, way, strict=False):
    export = exports_of(case)[way]
    x = images(2, export.example)
    return torch.export.export(network(case, form), (x,), dynamic_shapes=export.dynamic_shapes(), strict=strict)


def saved_and_loaded(save, load, what):
    """The same after a file, which must also hold the tensors that are in no state dict."""
    file = io.BytesIO()
    save(what, file)
    file.seek(0)
    return load(file)


@each_case
def test_outputs_tell_images_apart(case):
    """Otherwise the comparisons of this file could not fail."""
    found = expected(case, 5, (224, 224))
    assert (found - found.mean(0)).abs().max() > 0.02 * found.abs().max()


@each_form
@each_export
def test_torch_export(case, way, form):
    """One program for every batch and, where the network allows it, every size."""
    compare(exported(case, form, way).module(), case, exports_of(case)[way].sizes)


@pytest.mark.parametrize('case', FEW_CASES)
def test_torch_export_from_a_file(case):
    way, export = next(iter(exports_of(case).items()))
    program = saved_and_loaded(torch.export.save, torch.export.load, exported(case, 'unfused', way))
    compare(program.module(), case, export.sizes)


@pytest.mark.parametrize('case', FEW_CASES)
def test_torch_export_strict(case):
    """By TorchDynamo, which reads the Python code of our layers."""
    way, export = next(iter(exports_of(case).items()))
    compare(exported(case, 'unfused', way, strict=True).module(), case, export.sizes)


class Graph(NamedTuple):
    """What matters of an exported graph.

    Attributes:
        convolutions: How many it has.
        computed: Those whose weight is the result of an operation.
        products: Of each matrix product, the stored tensors that it takes.
    """

    convolutions: int
    computed: list[str]
    products: list[set[str]]


PRODUCTS = {'addbmm', 'addmm', 'addmv', 'baddbmm', 'bmm', 'dot', 'einsum', 'inner', 'linear', 'matmul', 'mm', 'mv'}
ONNX_PRODUCTS = {'Einsum', 'Gemm', 'MatMul', 'MatMulInteger'}


def graph_of_program(program):
    """Reads an exported program, with or without decompositions."""
    signature = program.graph_signature
    tensors = signature.inputs_to_parameters | signature.inputs_to_buffers
    tensors |= signature.inputs_to_lifted_tensor_constants
    nodes = [node for node in program.graph.nodes if node.op == 'call_function']
    # No graphs within the graph.
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in nodes)

    def operation(node):
        return getattr(node.target, '_opname', '')

    def stored(node):
        while operation(node) in ('permute', 't', 'transpose'):  # of a linear layer's weight
            node = node.args[0]
        return tensors.get(node.name)

    convolutions = [node for node in nodes if 'conv' in operation(node)]
    products = [node for node in nodes if operation(node) in PRODUCTS]
    return Graph(
        convolutions=len(convolutions),
        computed=[node.name for node in convolutions if node.args[1].name not in tensors],
        products=[set(filter(None, map(stored, node.all_input_nodes))) for node in products],
    )


def graph_of_onnx(model):
    """Reads an ONNX model, where stored tensors have the names of the parameters."""
    graph = model.graph
    tensors = {tensor.name for tensor in graph.initializer}
    tensors |= {output for node in graph.node if node.op_type == 'Constant' for output in node.output}
    assert not model.functions
    convolutions = [node for node in graph.node if 'Conv' in node.op_type]
    products = [node for node in graph.node if node.op_type in ONNX_PRODUCTS]
    return Graph(
        convolutions=len(convolutions),
        computed=[node.name for node in convolutions if node.input[1] not in tensors],
        products=[tensors.intersection(node.input) for node in products],
    )


def convolutions_of(model):
    return sum(isinstance(m, (nn.Conv2d, HarmonicBlock2d, HarmonicConv2d)) for m in model.modules())


def harmonic_layers_of(model):
    return sum(isinstance(m, (HarmonicBlock2d, HarmonicConv2d)) for m in model.modules())


def classifier_of(model):
    """Name of the classifier's weight."""
    return f'{model.pretrained_cfg["classifier"]}.weight'


@pytest.mark.parametrize(
    ('case', 'decomposed'),
    [
        *(pytest.param(case, False, id=f'{case}-exported') for case in CASES),
        *(pytest.param(case, True, id=f'{case}-decomposed') for case in FEW_CASES),
    ],
)
def test_program_computes_weights_only_unfused(case, decomposed):
    """After fusing every weight is stored. Before, each harmonic layer composes its own: the check can fail."""
    for form in ('fused', 'unfused'):
        model = network(case, form)
        program = exported(case, form, next(iter(exports_of(case))))
        graph = graph_of_program(program.run_decompositions() if decomposed else program)
        layers = harmonic_layers_of(model)
        assert (layers > 0) is (form == 'unfused')
        assert graph.convolutions == convolutions_of(model)
        assert len(graph.computed) == layers
        assert sum(classifier_of(model) in product for product in graph.products) == 1
        assert len(graph.products) == 1 + layers


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
def onnx_model(case, form, way):
    return torch.onnx.export(exported(case, form, way), dynamo=True, verbose=False).model_proto


@each_form
@each_export
def test_onnx(case, way, form, runtime):
    run = session(runtime, onnx_model(case, form, way).SerializeToString())
    compare(run, case, exports_of(case)[way].sizes)


# pools compute no weights
@pytest.mark.parametrize('case', [case for case in CASES if case not in ('resnet_avg', 'resnet_max')])
def test_onnx_computes_weights_only_unfused(case, runtime):
    """As in torch's programs; the exporter may compute small weights beforehand, but not all."""
    way = next(iter(exports_of(case)))
    model = network(case, 'fused')
    graph = graph_of_onnx(onnx_model(case, 'fused', way))
    assert graph.convolutions == convolutions_of(model)
    assert graph.computed == []
    (product,) = graph.products
    assert classifier_of(model) in product
    graph = graph_of_onnx(onnx_model(case, 'unfused', way))
    assert graph.convolutions == convolutions_of(model)
    assert graph.computed
    assert len(graph.products) > 1


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # torch's own, timm scripts still
@each_form
@each_case
def test_torchscript_script(case, form):
    """One script for every size, also for VGG: a script keeps the branches."""
    scripted = saved_and_loaded(torch.jit.save, torch.jit.load, torch.jit.script(network(case, form)))
    compare(scripted, case, sorted({size for export in exports_of(case).values() for size in export.sizes}))


@pytest.mark.filterwarnings('ignore:`torch.jit.*` is deprecated:FutureWarning')  # as above
# timm's, of the size of VGG's features
@pytest.mark.filterwarnings('ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning:timm.models.vgg')
@each_form
@each_export
def test_torchscript_trace(case, way, form):
    export = exports_of(case)[way]
    traced = torch.jit.trace(network(case, form), images(2, export.example), check_trace=False)
    compare(saved_and_loaded(torch.jit.save, torch.jit.load, traced), case, export.sizes)


@pytest.mark.skipif(shutil.which('g++') is None and shutil.which('c++') is None, reason='needs a C++ compiler')
@each_form
def test_aot_inductor(form, tmp_path):
    """One compiled package for every batch and size."""
    program = exported('resnet_levels', form, 'any_size')
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
    compare(torch._inductor.aoti_load_package(path), 'resnet_levels', ANY_SIZE.sizes)


def patches(photographs, split, per_class):
    """Patches (B, 1, 48, 48) of the photographs, normalised, and their classes."""
    corners = draw_patches(photographs, split, per_class)
    stack = [torch.from_numpy(cut(photographs[name], corner).copy()) for name in corners for corner in corners[name]]
    x = (torch.stack(stack).unsqueeze(1) / 255 - 0.449) / 0.226
    return x, torch.arange(len(corners)).repeat_interleave(per_class)


def train(x, labels, epochs=30):
    """The quickstart's network after a few epochs on patches, fused."""
    torch.manual_seed(0)
    model = timm.create_model('harm_resnet18', num_classes=int(labels.max()) + 1, in_chans=1, **NAMED['harm'])
    size = Recipe.batch_size
    batches = len(x) // size
    optimizer = torch.optim.AdamW(model.parameters(), lr=Recipe.lr, weight_decay=Recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, Recipe.lr, total_steps=epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: batches * size].split(size):
            mirrored = x[index].flip(-1) if torch.rand(()) < 0.5 else x[index]
            loss = F.cross_entropy(model(mirrored), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return reparameterize_model(model.eval())


def test_int8(runtime, tmp_path):
    """Static quantisation of a trained and fused network: int8 filters, and nearly always the same answer."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    photographs = load_photographs()
    x, labels = patches(photographs, 'train', 24)
    test_x, test_labels = patches(photographs, 'validation', 24)
    fused = train(x, labels)
    with torch.inference_mode():
        answers = fused(test_x).argmax(1)
    accuracy = (answers == test_labels).float().mean().item()
    assert accuracy > 0.4  # of 17 classes: constant answers would agree too

    shapes = ({0: torch.export.Dim('batch')},)
    model = torch.onnx.export(fused, (x[:2],), dynamic_shapes=shapes, dynamo=True, verbose=False).model_proto

    class Patches(CalibrationDataReader):
        batches = iter(x[torch.randperm(len(x))].split(32))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {model.graph.input[0].name: batch.numpy()}

    path = str(tmp_path / 'int8.onnx')
    quantize_static(
        model,
        path,
        Patches(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    quantized = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in quantized.graph.initializer}
    makers = {output: node for node in quantized.graph.node for output in node.output}
    convolutions = [node for node in quantized.graph.node if node.op_type == 'Conv']
    assert len(convolutions) == convolutions_of(fused)
    for node in convolutions:
        weight = makers[node.input[1]]
        assert weight.op_type == 'DequantizeLinear'
        filters, scale = (tensors[name] for name in weight.input[:2])
        assert filters.data_type == onnx.TensorProto.INT8
        assert list(scale.dims) == [filters.dims[0]]  # one for each channel

    quantized_answers = session(runtime, path)(test_x).argmax(1)
    agreement = (quantized_answers == answers).float().mean().item()
    quantized_accuracy = (quantized_answers == test_labels).float().mean().item()
    print(f'int8 agrees in {agreement:.4f}; accuracy {accuracy:.4f}, int8 {quantized_accuracy:.4f}')
    assert agreement >= 0.9
    assert quantized_accuracy > accuracy - 0.05
