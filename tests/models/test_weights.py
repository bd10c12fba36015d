"""Where pretrained weights come from, by the real clients and stand-ins for the Hub and the release page."""

import contextlib
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import timm
import tiny_models
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from tiny_models import CHECKPOINT, FILE, ID, NAME, PINNED, WEIGHTS, create, same

import timm_harmonic
from timm_harmonic.models.checkpoints import CheckpointError
from timm_harmonic.models.weights import pinned_sha256, released_cfg, sha256_of

TESTS = Path(__file__).resolve().parents[1]
# The Hub's client leaves sockets of failed requests to the garbage collector.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
REPO = 'someone/else'  # without a pin
RESOLVED = r'/resolve/main/model\.safetensors'
OFFER = r'pretrained_cfg_overlay=dict\(file=PATH\)'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp('source') / FILE
    path.write_bytes(CHECKPOINT)
    return create(pretrained_cfg_overlay=dict(file=str(path)))


@pytest.fixture
def repository(hub, source, tmp_path):
    """The files of a user's repository on the Hub."""
    save_for_hf(source, str(tmp_path / 'saved'), safe_serialization=True)
    hub.add(REPO, {path.name: path.read_bytes() for path in (tmp_path / 'saved').iterdir()})
    return hub.repositories[REPO]


@pytest.fixture
def published(hub):
    hub.add(ID, {'model.safetensors': WEIGHTS})
    return hub.repositories[ID]


def cached(tmp_path):
    """Files in the two caches that a later load could take for weights, whole or not."""
    found = [path for place in ('hub-cache', 'torch-home') for path in (tmp_path / place).rglob('*') if path.is_file()]
    return [p.name for p in found if p.name != 'CACHEDIR.TAG' and p.suffix != '.lock' and 'refs' not in p.parts]


def pin(digest):
    return dict(pretrained_cfg_overlay=dict(notes=(f'sha256:{digest}',)))


def offline(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.is_offline_mode', lambda: True)


# The authors' release


def test_without_a_pin_the_release_is_the_only_source(hub, source, tmp_path):
    """Downloaded once, into torch.hub's folder. The Hub is not asked, whatever is there under our name."""
    hub.release[FILE] = CHECKPOINT
    hub.add(f'timm-harmonic/{NAME}.ulicny_in1k', {'model.safetensors': b'of whoever registered the name'})
    for _ in range(2):
        assert same(create(), source)
    assert [path.rpartition('/')[2] for _, path in hub.asked] == [FILE]
    assert (tmp_path / 'torch-home' / 'hub' / 'checkpoints' / FILE).read_bytes() == CHECKPOINT
    assert create().pretrained_cfg['url'].endswith(FILE)


def test_cache_dir_and_offline(hub, source, tmp_path, monkeypatch):
    hub.release[FILE] = CHECKPOINT
    assert same(create(cache_dir=tmp_path / 'mine'), source)
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == [FILE]
    offline(monkeypatch)
    hub.asked.clear()
    assert same(create(cache_dir=tmp_path / 'mine'), source)
    with pytest.raises(CheckpointError, match=f'HF_HUB_OFFLINE is set.*{OFFER}'):
        create()
    assert hub.asked == []


def test_another_hash(hub, source, tmp_path):
    """It is not used, and not kept where it would be taken next time."""
    hub.release[FILE] = CHECKPOINT[:-1] + b'!'
    with pytest.raises(CheckpointError, match=f'could not download .*{FILE} .*invalid hash value'):
        create()
    assert cached(tmp_path) == []
    hub.release[FILE] = CHECKPOINT
    assert same(create(), source)
    path = tmp_path / 'torch-home' / 'hub' / 'checkpoints' / FILE
    path.write_bytes(CHECKPOINT[:2000])  # somebody cuts it in the cache
    with pytest.raises(CheckpointError, match=f'{FILE} does not match the hash in its name: remove it'):
        create()
    assert path.exists()


def text(handler):
    handler.reply(200, b'error code: 1020')


def half(handler):
    handler.send_response(200)
    handler.send_header('Content-Length', str(len(CHECKPOINT)))
    handler.end_headers()
    handler.wfile.write(CHECKPOINT[: len(CHECKPOINT) // 2])
    handler.close_connection = True


FAULTS = {
    'missing': (lambda handler: handler.error(404), 'HTTP Error 404'),
    'text': (text, 'truncated or damaged, or not a checkpoint'),
    'half': (half, 'truncated or damaged|IncompleteRead|incomplete'),
}


@pytest.mark.parametrize('what', FAULTS)
def test_downloads_that_fail(hub, source, tmp_path, what):
    """From a url that the caller names, without a hash: the next attempt succeeds."""
    answer, words = FAULTS[what]
    hub.release['weights.pth'] = CHECKPOINT
    hub.fail('GET', 'weights.pth', answer, times=1)
    overlay = dict(url=f'{hub.url}/releases/download/weights.pth')
    for name in (NAME, PINNED):  # the caller's url replaces what is registered
        if name == NAME:
            with pytest.raises(CheckpointError, match=rf'could not download .*weights\.pth .*({words}).*{OFFER}'):
                create(name, pretrained_cfg_overlay=overlay)
            assert cached(tmp_path) == []
        assert same(create(name, pretrained_cfg_overlay=overlay), source)


def test_files_of_other_programs_stay(tmp_path):
    """torch.hub's folder is everybody's: a file of the same name may be another program's."""
    path = tmp_path / 'checkpoint.pth'
    torch.save({'model': torch.nn.Linear(3, 3)}, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r'checkpoint\.pth.* could run code'):
        create(cache_dir=tmp_path, pretrained_cfg_overlay=dict(url='http://127.0.0.1:9/v2/checkpoint.pth'))
    assert path.read_bytes() == before


def test_where_no_weights_exist_the_error_names_others():
    with pytest.raises(
        CheckpointError, match=rf'No pretrained weights exist for harm_resnet18.*harm_resnet50.*{OFFER}'
    ):
        timm.create_model('harm_resnet18', pretrained=True)


# A pinned file on the Hub


def test_a_pin_moves_the_source_to_the_hub():
    digest = 'ab' * 32
    cfg = released_cfg('a.b', FILE, digest, notes=('paper: 1 %',), first_conv='conv1', classifier='fc')
    assert (cfg['hf_hub_id'], cfg.get('url'), cfg['notes'][0]) == ('timm-harmonic/a.b', None, 'paper: 1 %')
    assert pinned_sha256(cfg['notes']) == digest
    assert pinned_sha256(None) is None
    cfg = released_cfg('a.b', FILE, first_conv='conv1', classifier='fc')
    assert cfg.get('hf_hub_id') is None
    assert cfg['url'].endswith(FILE)


def test_pinned(hub, published, source, tmp_path, monkeypatch):
    """From the Hub, then from its cache, without and with the network. The release is not asked."""
    hub.release[FILE] = CHECKPOINT
    model = create(PINNED)
    assert same(model, source)
    assert model.pretrained_cfg['hf_hub_id'] == ID
    assert not any(FILE in path for _, path in hub.asked)
    assert list((tmp_path / 'hub-cache').glob('models--*/snapshots/*/model.safetensors'))
    assert same(create(PINNED, cache_dir=tmp_path / 'mine'), source)
    assert list((tmp_path / 'mine').glob('models--*/snapshots/*/model.safetensors'))
    hub.fail('HEAD GET', '.', lambda handler: handler.error(503))
    assert same(create(PINNED), source)
    offline(monkeypatch)
    hub.asked.clear()
    assert same(create(PINNED), source)
    with pytest.raises(CheckpointError, match=f'could not download the weights from {ID} .*{OFFER}'):
        create(PINNED, cache_dir=tmp_path / 'elsewhere')
    assert hub.asked == []


@pytest.mark.parametrize(
    'kwargs', [dict(num_classes=10), dict(in_chans=1), dict(num_classes=0), dict(features_only=True)]
)
def test_adapted_from_the_hub(hub, published, source, kwargs, tmp_path):
    loaded = create(PINNED, **kwargs)
    (tmp_path / FILE).write_bytes(CHECKPOINT)
    expected = create(pretrained_cfg_overlay=dict(file=str(tmp_path / FILE)), **kwargs).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items() if 'fc' not in key)
    assert not any('state_dict' in getattr(module, 'pretrained_cfg', {}) for module in loaded.modules())


def test_another_file_is_refused(hub, published, tmp_path):
    """It is not read. It stays, because other programs share the cache: the error says what to remove."""
    published['model.safetensors'] = WEIGHTS[:-1] + b'!'
    with pytest.raises(CheckpointError, match=r'has the SHA-256 .*, but .* is pinned.* remove .*/blobs/') as raised:
        create(PINNED)
    damaged = Path(re.search(r'remove (\S+)\.$', str(raised.value)).group(1))
    damaged.unlink()
    published['model.safetensors'] = WEIGHTS
    create(PINNED)


MISSING = {
    'no repository': ('RepoNotFound', 404),
    'no file': ('EntryNotFound', 404),
    'gated': ('GatedRepo', 403),
    'a wrong token': ('', 401),
    'busy': ('', 503),
}


@pytest.mark.parametrize('what', MISSING)
@pytest.mark.parametrize('named', [False, True])
def test_nothing_stands_in(hub, repository, published, tmp_path, what, named):
    """One error that says why and offers another way. The release is not asked."""
    code, status = MISSING[what]
    hub.release[FILE] = CHECKPOINT
    hub.fail('HEAD GET', '/resolve/main/', lambda handler: handler.error(status, code))
    overlay = dict(hf_hub_id=REPO) if named else {}
    with pytest.raises(CheckpointError, match=f'could not download the weights from {REPO if named else ID} .*{OFFER}'):
        create(NAME if named else PINNED, pretrained_cfg_overlay=overlay)
    assert not any(FILE in path for _, path in hub.asked)
    assert cached(tmp_path) == []


@pytest.mark.parametrize('times', [1, None])
def test_cut_in_the_middle(hub, published, source, tmp_path, times):
    """Once, and the client goes on by itself; each time, and nothing is kept."""
    hub.fail('GET', RESOLVED, half, times=times)
    if times:
        assert same(create(PINNED), source)
    else:
        with pytest.raises(CheckpointError, match='could not download'):
            create(PINNED)
        assert cached(tmp_path) == []


def test_disk_full(hub, published, tmp_path):
    hub.release[FILE] = CHECKPOINT
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WEIGHTS) // 2, limits[1]))
    try:
        for name in (NAME, PINNED):
            with pytest.raises(CheckpointError, match=r'could not download .*(large|space)'):
                create(name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached(tmp_path) == []


def test_another_revision(hub, repository):
    with pytest.raises(CheckpointError, match='could not download'):
        create(pretrained_cfg_overlay=dict(hf_hub_id=f'{REPO}@v2'))
    assert hub.asked[0][1] == f'/{REPO}/resolve/v2/model.safetensors'


# Repositories and folders of users


def test_a_repository(hub, repository, source):
    for model in (create(f'hf-hub:{REPO}'), create(pretrained_cfg_overlay=dict(hf_hub_id=REPO))):
        assert same(model, source)
    assert create(f'hf-hub:{REPO}').pretrained_cfg['source'] == 'hf-hub'
    # The registered pin is for the registered repository, not for another one of the same architecture.
    assert same(create(PINNED, pretrained_cfg_overlay=dict(hf_hub_id=REPO)), source)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin', 'best.pth'])
def test_a_folder(tmp_path, source, name):
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    if name != 'model.safetensors':
        (tmp_path / 'model.safetensors').unlink()
        torch.save(source.state_dict(), tmp_path / name)
    assert same(create(f'local-dir:{tmp_path}'), source)
    with pytest.raises(CheckpointError, match='is pinned'):
        create(f'local-dir:{tmp_path}', **pin('0' * 64))
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match='contains no weights'):
        create(f'local-dir:{tmp_path}')


class Trap:
    def __reduce__(self):
        return (os.system, ('touch trapped',))


def test_pickles_of_others_are_data(hub, repository, source, tmp_path, monkeypatch):
    """Old uploads of timm have pickles: tensors are read, code is not run."""
    monkeypatch.chdir(tmp_path)
    torch.save(source.state_dict(), 'weights.bin')
    torch.save(Trap(), 'trap.bin')
    files = {'config.json': repository['config.json'], 'pytorch_model.bin': Path('weights.bin').read_bytes()}
    hub.add('someone/old', files)
    assert same(create('hf-hub:someone/old'), source)
    hub.add('someone/evil', dict(files, **{'pytorch_model.bin': Path('trap.bin').read_bytes()}))
    with pytest.raises(CheckpointError, match='could run code'):
        create('hf-hub:someone/evil')
    assert not Path('trapped').exists()


@pytest.mark.parametrize('key', ['file', 'state_dict', 'url', 'notes'])
def test_a_config_names_no_other_source(hub, repository, source, tmp_path, key):
    """Not a file of the reader's, no state dict and no pin of its own. The caller's pin holds whatever it says."""
    private = tmp_path / 'private.pth'
    private.write_bytes(b'not what was asked for')
    named = dict(file=str(private), state_dict={'a': 1}, url='http://127.0.0.1:9/x.pth', notes=[f'sha256:{"1" * 64}'])
    config = json.loads(repository['config.json'])
    config['pretrained_cfg'][key] = named[key]
    repository['config.json'] = json.dumps(config).encode()
    assert same(create(f'hf-hub:{REPO}'), source)
    with pytest.raises(CheckpointError, match=f'but {"0" * 64} is pinned'):
        create(f'hf-hub:{REPO}', **pin('0' * 64))


def test_the_caller_may_name_a_file(hub, repository, tmp_path):
    torch.manual_seed(5)
    mine = timm.create_model(NAME).eval()
    torch.save(mine.state_dict(), tmp_path / 'mine.pth')
    for overlay in (dict(file=str(tmp_path / 'mine.pth')), dict(state_dict=mine.state_dict())):
        for name in (NAME, PINNED, f'hf-hub:{REPO}'):
            assert same(create(name, pretrained_cfg_overlay=overlay), mine)


def test_pins_of_the_caller(hub, repository, source):
    right = hashlib.sha256(repository['model.safetensors']).hexdigest()
    assert same(create(f'hf-hub:{REPO}', **pin(right)), source)


@pytest.mark.parametrize(
    'note',
    ['sha256:{AB}', 'SHA256:{ab}', 'sha256: {ab}', 'sha256:{short}', 'sha256={ab}', 'sha256:00{ab}', 'sha-256: {ab}'],
)
def test_what_resembles_a_pin(note):
    wrong = 'ab' * 32
    with pytest.raises(CheckpointError, match=r'invalid pin [sS]'):
        pinned_sha256(('paper: nothing', note.format(AB=wrong.upper(), ab=wrong, short=wrong[:-1])))
    with pytest.raises(CheckpointError, match=r'invalid pin .* and .*: expected one'):
        pinned_sha256((f'sha256:{wrong}', f'sha256:{"cd" * 32}'))


def test_another_architecture(hub, repository, monkeypatch):
    import safetensors.torch

    repository['model.safetensors'] = safetensors.torch.save(timm.create_model('resnet18').state_dict())
    loaded = []
    monkeypatch.setattr(torch.nn.Module, 'load_state_dict', lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(CheckpointError, match=r'does not fit the model, nothing was loaded\. .*wrong shape: conv1'):
        create(f'hf-hub:{REPO}')
    assert loaded == []


# Fresh processes


def run(code, tmp_path, **env):
    """A process with the stand-in Hub, the small model and an empty cache. It cannot look up other names."""
    preamble = f"""
        import os, socket, sys
        sys.path[:0] = [{str(TESTS)!r}]
        look_up = socket.getaddrinfo
        def guarded(host, *args, **kwargs):
            if host != '127.0.0.1':
                raise socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution')
            return look_up(host, *args, **kwargs)
        socket.getaddrinfo = guarded
    """
    env = dict(os.environ, HF_HOME=str(tmp_path / 'home'), TORCH_HOME=str(tmp_path / 'torch-home'), **env)
    command = [sys.executable, '-c', textwrap.dedent(preamble) + textwrap.dedent(code)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_no_network_and_an_empty_cache(tmp_path):
    """With the client's own waiting: one clear error, and no files."""
    code = f"""
        import timm, tiny_models
        for name in ('harm_resnet50', '{PINNED}'):
            try:
                timm.create_model(name, pretrained=True)
            except RuntimeError as error:
                print(error)
    """
    process = run(code, tmp_path, HF_ENDPOINT='https://huggingface.co')
    printed, _ = process.communicate(timeout=120)
    assert len(re.findall(f'could not download the weights from .*{OFFER}', printed)) == 2, printed
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.suffix in ('.pth', '.safetensors')]


@pytest.mark.slow
def test_two_processes_at_once(hub, published, source, tmp_path):
    code = f"""
        import torch
        from tiny_models import PINNED, create, images
        release = create(pretrained_cfg_overlay=dict(url='{hub.url}/releases/download/{FILE}'))
        torch.save([release(images()), create(PINNED)(images())], {str(tmp_path)!r} + f'/{{os.getpid()}}.pt')
    """
    hub.release[FILE] = CHECKPOINT
    both = threading.Barrier(2, timeout=60)

    def together(handler):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()
        return False

    hub.faults.append(lambda handler: handler.command == 'HEAD' and together(handler))
    processes = [run(code, tmp_path) for _ in range(2)]
    for process in processes:
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    expected = source(tiny_models.images())
    outputs = [output for path in tmp_path.glob('*.pt') for output in torch.load(path, weights_only=True)]
    assert len(outputs) == 4
    assert all(torch.equal(output, expected) for output in outputs)
    (blob,) = (path for path in (tmp_path / 'home').rglob('blobs/*') if path.is_file())
    assert sha256_of(blob) == blob.name


# The registered weights


def test_pickles_are_read_as_data_everywhere():
    package = Path(timm_harmonic.__file__).parent
    folders = (package, package.parent / 'timm_harmonic_cli')
    files = [path for folder in folders for path in folder.rglob('*.py')]
    source = '\n'.join(path.read_text() for path in [*files, package.parent / 'timm_harmonic_autoload.py'])
    loads = re.findall(r'torch\.load\([^)]*\)', source)
    assert loads
    assert all('weights_only=True' in load for load in loads)
    assert not re.search(r'weights_only=False|pickle\.loads?\(|load_state_dict_from_url|trust_remote_code', source)


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
        assert cfg.hf_hub_id is None  # not before its file is pinned
        assert (cfg.tag, cfg.license, cfg.num_classes) == ('ulicny_in1k', 'bsd-3-clause', 1000)
        assert (cfg.paper_ids, cfg.interpolation) == ('arXiv:2001.06570', 'bilinear')
        assert cfg.notes[0].startswith('paper: top-1 error')
        assert cfg.notes[-1] == 'not re-measured'


def test_the_authors_names_resolve():
    for theirs, ours in (
        ('harm_se_resnext101_32x4d', 'harm_seresnext101_32x4d'),
        ('harm_se_resnext101_64x4d', 'harm_seresnext101_64x4d'),
    ):
        with pytest.warns(UserWarning, match=f'Mapping deprecated model name {theirs} to current {ours}'):
            model = timm.create_model(theirs, device='meta')
        assert model.pretrained_cfg['architecture'] == ours
