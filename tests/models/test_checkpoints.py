"""Weights from the authors' files: every wrapping, other channels and classes, and files that hold no weights."""

import copy
import functools
import hashlib
import http.server
import pickle
import threading
from pathlib import Path

import pytest
import reference
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, load_checkpoint
from torch import nn

import timm_harmonic
from timm_harmonic.models.checkpoints import CheckpointError, read_checkpoint

# Small networks load quickly.
TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
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
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
@pytest.mark.parametrize('source', ['file', 'state_dict'])
def test_wrappings(tmp_path, wrapping, source):
    model, state = trained()
    content = WRAPPINGS[wrapping](state)
    overlay = dict(file=saved(tmp_path, content)) if source == 'file' else dict(state_dict=content)
    loaded = create(pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert same(loaded, model)


@pytest.mark.parametrize('name', ORIGINAL)
def test_every_family(tmp_path, name):
    model, state = trained(name)
    assert same(load(saved(tmp_path, state), name), model)


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn'])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
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
    with pytest.raises(CheckpointError, match=r'layer2\.0\.conv2\.dct .* is another basis .*level=5'):
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


@pytest.mark.parametrize('kwargs', [dict(num_classes=7), dict(num_classes=0), dict(features_only=True)])
@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_vgg11_bn'])
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


@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_seresnext50_32x4d', 'harm_vgg11', 'harm_vgg11_bn'])
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


@pytest.mark.parametrize('channels', [2, 4, 6, 13])
@pytest.mark.parametrize('name', ['harm_resnet50', 'harm_vgg11'])
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
    broken = dict(state, **{'fc.weight': torch.zeros(10, 512), 'fc.bias': torch.zeros(10)})
    with pytest.raises(RuntimeError, match=r'size mismatch for fc\.weight'):
        load(saved(tmp_path, broken))


@pytest.mark.parametrize('other', ['harm_resnet18', 'harm0_resnet50', 'harm_vgg11'])
def test_another_architecture(tmp_path, other):
    torch.manual_seed(0)
    path = saved(tmp_path, create(other).state_dict())
    with pytest.raises(CheckpointError, match='does not fit the model, nothing was loaded'):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at .*nowhere\.pth'):
        load(str(tmp_path / 'nowhere.pth'))


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('keep', [0.9, 0.3, 0.0])
def test_truncated_file(tmp_path, legacy, keep):
    """In both of torch's formats. The released files of 2020 are in the older one."""
    path = Path(tmp_path / 'weights.pth')
    torch.save(trained()[1], path, _use_new_zipfile_serialization=not legacy)
    assert same(load(str(path)), trained()[0])
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r'weights\.pth.*truncated or damaged'):
        load(str(path))


def test_truncated_safetensors(tmp_path):
    path = tmp_path / 'weights.safetensors'
    safetensors.torch.save_file(trained()[0].state_dict(), str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        load(str(path))


def test_web_page(tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_text('\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>')
    with pytest.raises(CheckpointError, match='is a web page, not a checkpoint'):
        load(str(path))


@pytest.mark.parametrize('content', [b'{"message": "Not Found"}', b'version https://git-lfs.github.com/spec/v1\n'])
def test_other_text(tmp_path, content):
    """Other things that a failed download leaves: an error in JSON, a pointer to the file."""
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'was not loaded: it is no checkpoint'):
        load(str(path))


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


def test_not_a_state_dict(tmp_path):
    with pytest.raises(CheckpointError, match='holds a list, not a state dict'):
        load(saved(tmp_path, [torch.zeros(3)]))
    assert read_checkpoint(saved(tmp_path, {'a': torch.zeros(3)})).keys() == {'a'}


@pytest.fixture
def server(tmp_path):
    """A release page on the loopback: serves a folder and lists the requests."""
    folder = tmp_path / 'release'
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        httpd.folder, httpd.asked, httpd.url = folder, asked, f'http://127.0.0.1:{httpd.server_port}'
        yield httpd
        httpd.shutdown()


def released(server, right_hash=True):
    """The checkpoint on the server, under a name with the start of its SHA-256 as the authors' have it."""
    _, state = trained()
    path = server.folder / 'new.pth'
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8] if right_hash else 'deadbeef'
    path.rename(server.folder / f'harm_resnet50-{digest}.pth')
    return f'{server.url}/harm_resnet50-{digest}.pth'


def test_download_once(server, tmp_path):
    url = released(server)
    for _ in range(2):
        model = create(
            pretrained=True, pretrained_cfg_overlay=dict(url=url, hf_hub_id=None), cache_dir=tmp_path / 'cache'
        )
        assert same(model.eval(), trained()[0])
    assert len(server.asked) == 1
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == [url.rpartition('/')[2]]
    assert model.pretrained_cfg['url'] == url


def test_download_goes_to_torch_hubs_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    url = released(server)
    create(pretrained=True, pretrained_cfg_overlay=dict(url=url, hf_hub_id=None))
    assert (tmp_path / 'home' / 'hub' / 'checkpoints' / url.rpartition('/')[2]).is_file()


def test_wrong_hash_is_refused_and_not_cached(server, tmp_path):
    url = released(server, right_hash=False)
    overlay = dict(url=url, hf_hub_id=None)
    with pytest.raises(RuntimeError, match=r'invalid hash value .*deadbeef'):
        create(pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert not list((tmp_path / 'cache').iterdir())


@pytest.mark.parametrize('where', ['/harm_resnet50-00000000.pth', None])
def test_download_that_fails(server, tmp_path, where):
    """A missing file, or no server. The error names the url and the cache, and another way to load."""
    url = f'{server.url}{where}' if where else 'http://127.0.0.1:9/harm_resnet50-00000000.pth'
    overlay = dict(url=url, hf_hub_id=None)
    with pytest.raises(
        RuntimeError, match=r'could not download .*harm_resnet50-00000000\.pth .* not in .*cache.*file='
    ):
        create(pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert not list((tmp_path / 'cache').iterdir())


def test_where_no_weights_exist_the_error_names_others():
    with pytest.raises(
        RuntimeError, match=r'No pretrained weights exist for harm_resnet18.*harm_resnet50\.ulicny_in1k'
    ):
        timm.create_model('harm_resnet18', pretrained=True)


RELEASED = {
    'harm_resnet50': 'harm_resnet50-eec30392.pth',
    'harm_resnet101': 'harm_resnet101-62e185b1.pth',
    'harm0_seresnext101_32x4d': 'se_resnext101_32x4d-3250bf17.pth',
    'harm_seresnext101_32x4d': 'harm_se_resnext101_32x4d-e5b7b14d.pth',
    'harm_seresnext101_64x4d': 'harm_se_resnext101_64x4d-74a0d9f0.pth',
}


def test_released_weights_are_registered():
    assert set(timm.list_pretrained('harm*')) == {f'{name}.ulicny_in1k' for name in RELEASED}
    for name, file in RELEASED.items():
        cfg = get_pretrained_cfg(name)
        assert cfg.url.endswith(f'/releases/download/0.1.0/{file}')
        assert cfg.tag == 'ulicny_in1k'
        assert cfg.license == 'bsd-3-clause'
        assert cfg.paper_ids == 'arXiv:2001.06570'
        assert cfg.notes[0].startswith('paper: top-1 error')
        assert cfg.notes[-1] == 'not re-measured'
        assert cfg.num_classes == 1000
        assert cfg.interpolation == 'bilinear'


def test_the_authors_names_resolve():
    for theirs, ours in (
        ('harm_se_resnext101_32x4d', 'harm_seresnext101_32x4d'),
        ('harm_se_resnext101_64x4d', 'harm_seresnext101_64x4d'),
    ):
        with pytest.warns(UserWarning, match=f'Mapping deprecated model name {theirs} to current {ours}'):
            model = timm.create_model(theirs, device='meta')
        assert model.pretrained_cfg['architecture'] == ours


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


@pytest.mark.parametrize('text', ['error code: 1020', 'hello world', 'Repository not found', ''])
def test_short_texts(tmp_path, text):
    path = tmp_path / 'weights.pth'
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r'or no checkpoint|it is no checkpoint'):
        read_checkpoint(path)


def test_a_header_that_begins_like_a_web_page(tmp_path):
    """The size of a safetensors header is its first bytes: here they read <a."""
    raw = safetensors.torch.save({'w': torch.arange(6.0)})
    size = int.from_bytes(raw[:8], 'little')
    wanted = int.from_bytes(b'<a', 'little')
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(wanted.to_bytes(8, 'little') + raw[8 : 8 + size] + b' ' * (wanted - size) + raw[8 + size :])
    assert torch.equal(read_checkpoint(path)['w'], torch.arange(6.0))


STRANGE = {
    'an integer as a key': (lambda state: {**state, 5: torch.zeros(1)}, 'has a key 5, which is no name'),
    'bytes as keys': (lambda state: {k.encode(): v for k, v in state.items()}, 'which is no name'),
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
        r'fc.weight \(1000000000, 2048\) of the checkpoint repeats fewer numbers',
    ),
    'an expanded basis': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(()).expand(10**6, 9, 3, 3)},
        'dct .* of the checkpoint repeats fewer numbers',
    ),
    'complex coefficients': (
        lambda state: {**state, 'layer1.0.conv2.weight': state['layer1.0.conv2.weight'] * 1j},
        r'no real numbers: layer1\.0\.conv2\.weight in torch\.complex64',
    ),
    'integers': (
        lambda state: {**state, 'layer1.0.bn1.weight': state['layer1.0.bn1.weight'].int()},
        r'no real numbers: layer1\.0\.bn1\.weight in torch\.int32',
    ),
    'a basis of integers': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(1, 9, 3, 3, dtype=torch.int64)},
        r'layer1\.0\.conv2\.dct .* is another basis',
    ),
    'an empty basis': (
        lambda state: {**state, 'layer1.0.conv2.dct': torch.zeros(0)},
        r'layer1\.0\.conv2\.dct .* is another basis',
    ),
}


@pytest.mark.parametrize('what', STRANGE)
def test_strange_checkpoints(tmp_path, what):
    """An error that names the key, before anything is allocated."""
    change, words = STRANGE[what]
    with pytest.raises(CheckpointError, match=words):
        load(saved(tmp_path, change(trained()[0].state_dict())))


def test_a_text_in_place_of_a_release(server, tmp_path):
    """It is not kept, so that the next attempt succeeds."""
    torch.save(trained()[1], tmp_path / 'whole.pth')
    (server.folder / 'weights.pth').write_text('error code: 1020')
    options = dict(pretrained_cfg_overlay=dict(url=f'{server.url}/weights.pth', hf_hub_id=None))
    with pytest.raises(
        CheckpointError,
        match=r'weights\.pth was refused and is not cached: it is truncated or damaged, or no checkpoint',
    ):
        create(pretrained=True, cache_dir=tmp_path / 'cache', **options)
    assert list((tmp_path / 'cache').iterdir()) == []
    (server.folder / 'weights.pth').write_bytes((tmp_path / 'whole.pth').read_bytes())
    assert same(create(pretrained=True, cache_dir=tmp_path / 'cache', **options).eval(), trained()[0])


def test_files_of_other_programs_stay(tmp_path):
    """torch.hub's folder is everybody's: a file of the same name may be another program's."""
    path = tmp_path / 'checkpoint.pth'
    torch.save({'model': nn.Linear(3, 3)}, path)
    before = path.read_bytes()
    overlay = dict(url='http://127.0.0.1:9/v2/checkpoint.pth', hf_hub_id=None)
    with pytest.raises(CheckpointError, match=r'was there before, in place of http.*remove it if no other program'):
        create(pretrained=True, cache_dir=tmp_path, pretrained_cfg_overlay=overlay)
    assert path.read_bytes() == before
