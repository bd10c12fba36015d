"""Weights from the authors' files: every wrapping, other channels and classes, and files that hold no weights."""

import copy
import functools
import pickle
from pathlib import Path

import pytest
import reference
import safetensors.torch
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import freeze, unfreeze
from torch import nn
from torch.nn.utils import parametrizations, prune

import timm_harmonic
from timm_harmonic.models.checkpoints import CheckpointError, fit_keys, read_checkpoint

# Small networks load quickly.
TINY = dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16))
TINY_VGG = dict(mlp_ratio=0.02)
ORIGINAL = {  # our names and the authors', by parameter prefix
    'harm_resnet18': [('conv1.', 'harm1.'), ('.conv1.', '.harm1.'), ('.conv2.', '.harm2.')],
    'harm_resnet50': [('conv1.', 'harm1.'), ('.conv2.', '.harm2.')],
    'harm_seresnext50_32x4d': [],
    'harm_vgg11': [('pre_logits.fc1', 'classifier.0'), ('pre_logits.fc2', 'classifier.3'), ('head.fc', 'classifier.6')],
}
ORIGINAL['harm_vgg11_bn'] = ORIGINAL['harm_vgg11']


def create(name='harm_resnet50', **kwargs):
    return timm.create_model(name, **dict(TINY if 'resne' in name else TINY_VGG, **kwargs))


@functools.cache
def trained(name='harm_resnet50'):
    """A network with random weights and statistics, and its state dict in the authors' layout."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(create(name)).eval()
    return model, original_layout(model, name)


def original_layout(model, name='harm_resnet50'):
    state = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, 'basis')}
    for key, value in model.state_dict().items():
        layer_name, _, attribute = key.rpartition('.')
        layer = layers.get(layer_name)
        if layer is not None and attribute == 'weight':
            if hasattr(layer, 'bn'):
                dct = layer.basis.repeat(layer.in_channels, 1, 1).unsqueeze(1)
                value = value.flatten(1)[..., None, None]
            else:
                dct, value = layer.basis.unsqueeze(0), value.unsqueeze(-1)
            state[renamed(f'{layer_name}.dct', name)] = dct
        if attribute == 'weight' and layer_name.startswith('pre_logits'):
            value = value.flatten(1)
        state[renamed(key, name)] = value
    return state


def renamed(key, name):
    if '.downsample.' in key:
        return key
    for ours, theirs in ORIGINAL[name]:
        if key.startswith(ours) or ('.' + ours.lstrip('.') in key and ours.startswith('.')):
            return key.replace(ours, theirs, 1)
    return key


def saved(tmp_path, content, name='weights.pth'):
    path = tmp_path / name
    torch.save(content, path)
    return str(path)


def load(path, name='harm_resnet50', **kwargs):
    return create(name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs).eval()


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def same(first, second, x=None):
    x = images() if x is None else x
    with torch.inference_mode():
        return torch.equal(first(x), second(x))


def test_names_are_the_authors():
    """The layout that these tests build is the one that the golden data lists."""
    model = timm.create_model('harm_resnet50')
    ours = {key: tuple(value.shape) for key, value in original_layout(model).items()}
    golden = {key: tuple(value.shape) for key, value in reference.generated_state_dict('harm_resnet50').items()}
    assert ours == golden


WRAPPINGS = {
    'bare': lambda s: s,
    'module': lambda s: {f'module.{k}': v for k, v in s.items()},
    'without basis': lambda s: {k: v for k, v in s.items() if not k.endswith('.dct')},
    'main.py': lambda s: dict(epoch=100, arch='resnet50', state_dict=s, best_acc1=torch.tensor(76.9), optimizer={}),
    'main.py, module': lambda s: dict(epoch=1, state_dict={f'module.{k}': v for k, v in s.items()}),
    'timm': lambda s: dict(epoch=1, arch='harm_resnet50', state_dict={}, state_dict_ema=s),
    'compiled': lambda s: {f'_orig_mod.{k}': v for k, v in s.items()},
    'compiled blocks': lambda s: {k.replace('layer1.0.', 'layer1.0._orig_mod.'): v for k, v in s.items()},
    'sharded': lambda s: {k.replace('layer1.', '_fsdp_wrapped_module.layer1.'): v for k, v in s.items()},
    'Lightning': lambda s: dict(state_dict=prefixed('model.', s), loops={'fit_loop': {}}, callbacks={}),
    'Lightning, compiled, DDP': lambda s: dict(state_dict=prefixed('module.net._orig_mod.module.', s)),
    'transformers': lambda s: prefixed('timm_model.', s),
    'distillation': lambda s: dict(student=prefixed('module.backbone.', s), epoch=3, loss={}),
    'fastai': lambda s: dict(model=s, opt=dict(state=[{}], hypers=[{}])),
    'torchvision': lambda s: dict(model={}, model_ema=dict(n_averaged=torch.tensor(4), **prefixed('module.', s))),
    'a tutorial': lambda s: dict(model_state_dict=s, optimizer_state_dict=dict(state={0: {}}), loss=torch.tensor(0.3)),
    'a name of their own': lambda s: dict(classifier_sd=s, epoch=3, best=torch.tensor(0.9), rng=b'123'),
}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_wrappings(wrapping):
    model, state = trained()
    overlay = dict(state_dict=WRAPPINGS[wrapping](state))
    assert same(create(pretrained=True, pretrained_cfg_overlay=overlay).eval(), model)


AMBIGUOUS = {
    'two networks': (lambda s: dict(student=s, teacher=s), 'several state dicts: save student or teacher alone'),
    'two names': (lambda s: dict(model=s, net=s), 'several state dicts: save model or net alone'),
    'a loss': (
        lambda s: dict(state_dict={'loss.weight': torch.ones(3), **prefixed('model.', s)}),
        r"The missing keys have the prefix 'model\.': save the state dict of that module alone",
    ),
    'two modules': (lambda s: prefixed('student.', s) | prefixed('teacher.', s), "prefix 'student.' or 'teacher.'"),
}


@pytest.mark.parametrize('what', AMBIGUOUS)
def test_weights_that_are_not_alone(what):
    model, _ = trained()
    make, words = AMBIGUOUS[what]
    with pytest.raises(CheckpointError, match=words):
        create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=make(model.state_dict())))


def test_a_network_with_a_module_named_like_a_prefix():
    model = nn.ModuleDict(dict(model=nn.ModuleDict(dict(net=nn.Linear(2, 3)))))
    state = dict(model.state_dict())
    for given in (state, prefixed('net.', state), prefixed('model.', state)):
        assert fit_keys(given, model, {}) == state
    other = {'model.conv.weight': torch.ones(1)}
    assert fit_keys(other, model, {}) == other  # an error that names its keys follows


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_resnet50', 'harm_seresnext50_32x4d', 'harm_vgg11_bn'])
def test_every_family(tmp_path, name):
    model, state = trained(name)
    assert same(load(saved(tmp_path, state), name), model)


@pytest.mark.parametrize(('name', 'suffix'), [('harm_resnet18', 'safetensors'), ('harm_vgg11_bn', 'pth')])
def test_own_layout_is_idempotent(tmp_path, name, suffix):
    model, _ = trained(name)
    path = tmp_path / f'own.{suffix}'
    (safetensors.torch.save_file if suffix == 'safetensors' else torch.save)(model.state_dict(), str(path))
    loaded = load(str(path), name)
    assert same(loaded, model)
    family = timm_harmonic.harm_vgg if 'vgg' in name else timm_harmonic.harm_resnet
    again = family.checkpoint_filter_fn(family.checkpoint_filter_fn(model.state_dict(), loaded), loaded)
    torch.testing.assert_close(again, dict(model.state_dict()), rtol=0, atol=0)


def test_compressed_layout(tmp_path):
    """Levels: the authors' `.dct` and weights have fewer functions."""
    model = reference.randomize_batch_norm(create('harm_resnet50', levels=[None, 4, 3, 2])).eval()
    path = saved(tmp_path, original_layout(model))
    assert same(load(path, levels=[None, 4, 3, 2]), model)
    with pytest.raises(CheckpointError, match=r"layer2\.0\.conv2\.dct .* is not the model's basis .*level=5"):
        load(path)


def test_nothing_but_the_weights_stays(tmp_path):
    """The config keeps the name of the file, as with timm, and no tensors."""
    _, state = trained()
    path = saved(tmp_path, state)
    for kwargs in ({}, dict(features_only=True), dict(features_only=True, feature_cls='getter')):
        model = create(pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs)
        assert not any('state_dict' in getattr(module, 'pretrained_cfg', {}) for module in model.modules())
        assert model.pretrained_cfg['file'] == path
        assert model.default_cfg is model.pretrained_cfg


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('harm_resnet50', dict(num_classes=0)),
        ('harm_resnet50', dict(features_only=True)),
        ('harm_vgg11_bn', dict(num_classes=7)),
    ],
)
def test_other_classifier(tmp_path, name, kwargs):
    """Another number of classes resets the classifier alone."""
    model, state = trained(name)
    loaded = load(saved(tmp_path, state), name, **kwargs)
    if 'features_only' in kwargs:
        expected = model.forward_intermediates(images(), intermediates_only=True)
        torch.testing.assert_close(list(loaded(images())), expected)
        return
    head = model.pretrained_cfg['classifier']
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert {k for k in theirs if k not in ours} <= {f'{head}.weight', f'{head}.bias'}
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) or key.startswith(head), key


@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_vgg11', 'harm_vgg11_bn'])
def test_one_channel_is_gray_in_all_three(tmp_path, name):
    """In evaluation: exactly what three equal channels give, statistics of the responses included."""
    model, state = trained(name)
    loaded = load(saved(tmp_path, state), name, in_chans=1)
    gray = images(1)
    x64, model64 = gray.double(), copy.deepcopy(model).double()
    with torch.inference_mode():
        expected = model64(x64.expand(-1, 3, -1, -1))
        assert reference.relative_error(loaded(gray), expected) < 1e-5
        assert reference.relative_error(loaded.double()(x64), expected) < 1e-6


@pytest.mark.parametrize(('name', 'channels'), [('harm_resnet50', 2), ('harm_resnet50', 6), ('harm_vgg11', 13)])
def test_more_channels_repeat_with_their_statistics(tmp_path, name, channels):
    """As timm does for a plain convolution: channel c starts as channel c % 3, scaled by 3 / channels."""
    model, state = trained(name)
    loaded = load(saved(tmp_path, state), name, in_chans=channels)
    stem = model.get_submodule(model.pretrained_cfg['first_conv'])
    adapted = loaded.get_submodule(model.pretrained_cfg['first_conv'])
    source = [c % 3 for c in range(channels)]
    torch.testing.assert_close(adapted.weight, stem.weight[:, source] * 3 / channels)
    for key in ('running_mean', 'running_var'):
        ours, theirs = getattr(adapted.bn, key), getattr(stem.bn, key)
        assert torch.equal(ours.view(channels, -1), theirs.view(3, -1)[source])
    if channels == 6:
        x = images()
        torch.testing.assert_close(loaded(x.repeat(1, 2, 1, 1)), model(x), rtol=1e-4, atol=1e-4)


def test_adapting_warns_of_nothing(tmp_path, caplog):
    _, state = trained()
    load(saved(tmp_path, state), in_chans=4)
    assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_timm_adapts_a_plain_stem(tmp_path):
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(create('harm0_resnet50')).eval()
    loaded = load(saved(tmp_path, model.state_dict()), 'harm0_resnet50', in_chans=1)
    gray = images(1)
    torch.testing.assert_close(loaded(gray), model(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_source_of_four_channels(tmp_path):
    """A checkpoint of 4 channels loads into 4 as it is, and into others once its channels are declared."""
    model = reference.randomize_batch_norm(create(in_chans=4)).eval()
    path = saved(tmp_path, model.state_dict())
    assert same(load(path, in_chans=4), model, images(4))
    with pytest.raises(CheckpointError, match=r'has 4 input channels, but the config says 3.*input_size=\(4'):
        load(path, in_chans=1)
    overlay = dict(file=path, input_size=(4, 224, 224))
    loaded = create(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1).eval()
    gray = images(1)
    torch.testing.assert_close(loaded(gray), model(gray.expand(-1, 4, -1, -1)), rtol=1e-4, atol=1e-4)


def test_missing_and_unexpected_keys_are_named(tmp_path):
    _, state = trained()
    missing = {k: v for k, v in state.items() if k != 'layer2.0.bn1.bias'}
    with pytest.raises(CheckpointError, match=r'nothing was loaded.*missing: layer2\.0\.bn1\.bias\.'):
        load(saved(tmp_path, missing))
    with pytest.raises(CheckpointError, match=r'unexpected: layer9\.0\.bn1\.bias\.'):
        load(saved(tmp_path, dict(state, **{'layer9.0.bn1.bias': torch.zeros(3)})))
    # Another number of classes makes timm load non-strictly: the check must not depend on it.
    with pytest.raises(CheckpointError, match=r'missing: layer2\.0\.bn1\.bias\.'):
        load(saved(tmp_path, missing), num_classes=5)


def test_not_a_tensor_is_named(tmp_path):
    _, state = trained()
    with pytest.raises(CheckpointError, match=r'layer1\.0\.harm2\.weight of the checkpoint is a int, not a tensor'):
        load(saved(tmp_path, dict(state, **{'layer1.0.harm2.weight': 3})))


def test_wrong_shape_is_named(tmp_path):
    _, state = trained()
    key = 'layer1.0.bn2.weight'
    with pytest.raises(CheckpointError, match=rf'wrong shape: {key} \(3,\) for \(16,\)'):
        load(saved(tmp_path, dict(state, **{key: torch.zeros(3)})))
    key = 'layer1.0.harm2.weight'
    with pytest.raises(CheckpointError, match=r'wrong shape: layer1\.0\.conv2\.weight'):
        load(saved(tmp_path, dict(state, **{key: torch.zeros(16, 16, 4, 1, 1)})))


def test_another_classifier_shape_is_an_error(tmp_path):
    """The network has 1000 classes and the config promises them: a classifier of 10 is an error, not left out."""
    _, state = trained()
    broken = dict(state, **{'fc.weight': torch.zeros(10, 64), 'fc.bias': torch.zeros(10)})
    with pytest.raises(RuntimeError, match=r'size mismatch for fc\.weight'):
        load(saved(tmp_path, broken))


@pytest.mark.parametrize('other', ['harm_resnet18', 'harm0_resnet50'])
def test_another_architecture(tmp_path, other):
    torch.manual_seed(0)
    path = saved(tmp_path, create(other).state_dict())
    with pytest.raises(CheckpointError, match='does not fit the model, nothing was loaded'):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r'no checkpoint at .*nowhere\.pth'):
        load(str(tmp_path / 'nowhere.pth'))


@pytest.mark.parametrize('legacy', [False, True])
def test_truncated_file(tmp_path, legacy):
    """In both of torch's formats. The released files of 2020 are in the older one."""
    path = Path(tmp_path / 'weights.pth')
    torch.save(trained()[1], path, _use_new_zipfile_serialization=not legacy)
    assert same(load(str(path)), trained()[0])
    content = path.read_bytes()
    for keep in (0.9, 0.3, 0.0):
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(CheckpointError, match=r'weights\.pth.*truncated or damaged'):
            read_checkpoint(path)


NOT_CHECKPOINTS = {
    '\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>': 'is a web page, not a checkpoint',
    '{"message": "Not Found"}': 'was not loaded: it is not a checkpoint',
    'version https://git-lfs.github.com/spec/v1\n': 'was not loaded: it is not a checkpoint',
    'error code: 1020': 'not a checkpoint',
    'Repository not found': 'not a checkpoint',
    '': 'not a checkpoint',
}


@pytest.mark.parametrize('text', NOT_CHECKPOINTS)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_what_failed_downloads_leave(tmp_path, text, suffix):
    path = tmp_path / f'weights.{suffix}'
    path.write_text(text)
    words = NOT_CHECKPOINTS[text] if suffix == 'pth' or '<' in text else 'truncated or damaged'
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)


def test_a_damaged_file_behind_a_link(tmp_path):
    """The Hub's cache has links: the error names the file to remove."""
    (tmp_path / 'blob').write_bytes(b'0' * 100)
    (tmp_path / 'model.safetensors').symlink_to('blob')
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is truncated or damaged.* remove .*/blob,"):
        read_checkpoint(tmp_path / 'model.safetensors')


class Trap:
    ran = False

    def __reduce__(self):
        return (setattr, (Trap, 'ran', True))


@pytest.mark.parametrize('zipped', [False, True])
def test_pickle_that_would_run_code(tmp_path, zipped):
    path = tmp_path / 'weights.pth'
    if zipped:
        torch.save({'state_dict': Trap()}, path)
    else:
        path.write_bytes(pickle.dumps({'state_dict': Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match=r'was not loaded.*could run code'):
        load(str(path))
    assert not Trap.ran


class Settings(dict):
    """Stands for what Lightning's hyper_parameters may hold."""


def test_a_checkpoint_that_needs_a_class(tmp_path):
    """The error names it, and how to save the weights alone."""
    path = saved(tmp_path, dict(state_dict={'a': torch.zeros(3)}, hyper_parameters=Settings(lr=1)))
    with pytest.raises(CheckpointError, match=r'code \(.*Settings\)\. .* save the state dict alone'):
        read_checkpoint(path)


def test_not_a_state_dict(tmp_path):
    for content, words in (([torch.zeros(3)], 'holds a list, not'), ({}, 'holds nothing, not a state dict')):
        with pytest.raises(CheckpointError, match=words):
            load(saved(tmp_path, content))
    assert read_checkpoint(saved(tmp_path, {'a': torch.zeros(3)})).keys() == {'a'}


def test_timms_load_checkpoint_with_the_filter(tmp_path):
    model, state = trained()
    new = create()
    load_checkpoint(new, saved(tmp_path, state), filter_fn=timm_harmonic.harm_resnet.checkpoint_filter_fn)
    assert same(new.eval(), model)


def test_save_and_load_as_local_dir(tmp_path):
    """timm's own folder format, with our options in config.json."""
    from timm.models import save_for_hf

    model = create(levels=[None, 4, 3, 2], stem_pool='avg', in_chans=4, num_classes=5)
    reference.randomize_batch_norm(model).eval()
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    assert same(loaded, model, images(4))
    assert isinstance(loaded.maxpool, nn.AvgPool2d)


def test_a_header_that_begins_like_a_web_page(tmp_path):
    """The size of a safetensors header is its first bytes: here they read <a."""
    raw = safetensors.torch.save({'w': torch.arange(6.0)})
    size = int.from_bytes(raw[:8], 'little')
    wanted = int.from_bytes(b'<a', 'little')
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(wanted.to_bytes(8, 'little') + raw[8 : 8 + size] + b' ' * (wanted - size) + raw[8 + size :])
    assert torch.equal(read_checkpoint(path)['w'], torch.arange(6.0))


STRANGE = {
    'an integer as a key': (lambda state: {**state, 5: torch.zeros(1)}, 'has the key 5, which is not the name'),
    'bytes as keys': (lambda state: {k.encode(): v for k, v in state.items()}, 'which is not the name'),
    'None': (lambda state: {**state, 'fc.bias': None}, 'fc.bias of the checkpoint is a NoneType'),
    'a list': (lambda state: {**state, 'fc.bias': [1.0]}, 'fc.bias of the checkpoint is a list'),
    'two names': (
        lambda state: {**state, 'layer1.0.harm2.weight': state['layer1.0.conv2.weight']},
        "one parameter under two names, the authors' and ours",
    ),
    'two prefixes': (
        lambda state: {**state, 'module.fc.bias': state['fc.bias']},
        'one parameter under two names, with and without',
    ),
    'expanded': (
        lambda state: {**state, 'fc.weight': torch.zeros(()).expand(10**9, 2048)},
        r'fc.weight \(1000000000, 2048\) of the checkpoint is an expanded tensor',
    ),
    'an expanded basis': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(()).expand(10**6, 9, 3, 3)},
        'dct .* of the checkpoint is an expanded tensor',
    ),
    'complex coefficients': (
        lambda state: {**state, 'layer1.0.conv2.weight': state['layer1.0.conv2.weight'] * 1j},
        r'not real numbers: layer1\.0\.conv2\.weight in torch\.complex64',
    ),
    'integers': (
        lambda state: {**state, 'layer1.0.bn1.weight': state['layer1.0.bn1.weight'].int()},
        r'not real numbers: layer1\.0\.bn1\.weight in torch\.int32',
    ),
    'a basis of integers': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(1, 9, 3, 3, dtype=torch.int64)},
        r"layer1\.0\.conv2\.dct .* is not the model's basis",
    ),
    'an empty basis': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(0)},
        r"layer1\.0\.conv2\.dct .* is not the model's basis",
    ),
}


@pytest.mark.parametrize('what', STRANGE)
def test_strange_checkpoints(tmp_path, what):
    """An error that names the key, before anything is allocated."""
    change, words = STRANGE[what]
    with pytest.raises(CheckpointError, match=words):
        load(saved(tmp_path, change(trained()[0].state_dict())))


def unfrozen(model):
    freeze(model, 'conv1')
    unfreeze(model, 'conv1')
    model.conv1.bn.weight.data.fill_(2)  # as training does


@pytest.mark.parametrize(
    ('spoil', 'words'),
    [
        (lambda model: prune.l1_unstructured(model.layer1[0].conv1, 'weight', 0.5), 'make that permanent before you'),
        (lambda model: parametrizations.weight_norm(model.layer1[0].conv1), 'make that permanent before you save'),
        (unfrozen, "timm's unfreeze gave the stem's"),
    ],
)
def test_keys_tell_what_happened_to_a_network(spoil, words, tmp_path):
    spoiled = create('harm_resnet18')
    spoil(spoiled)
    torch.save(spoiled.state_dict(), tmp_path / 'some.pth')
    with pytest.raises(CheckpointError, match=words):
        create('harm_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'some.pth')))
