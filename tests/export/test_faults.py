"""What can go wrong between a user and the Hub: the messages, and that nothing half-done stays anywhere."""

import contextlib
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import huggingface_hub.utils._http as client
import pytest
import timm
import tiny_models
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from tiny_models import CHECKPOINT, FILE, ID, NAME, create, same

import timm_harmonic
import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.export.folder import convert
from timm_harmonic.export.publish import publish
from timm_harmonic.models import download, weights
from timm_harmonic.models.checkpoints import CheckpointError

TESTS = Path(__file__).resolve().parents[1]
# The Hub's client leaves sockets of failed requests to the garbage collector.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
TOKEN = 'hf_' + 'S3cret' * 6
EXPLICIT = dict(pretrained_cfg_overlay=dict(hf_hub_id=ID))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A converted folder, which no test changes."""
    place = tmp_path_factory.mktemp('converted')
    (place / FILE).write_bytes(CHECKPOINT)
    convert(place / FILE, NAME, place / 'folder')
    return place / 'folder'


@pytest.fixture(scope='module')
def source(folder):
    return create(f'local-dir:{folder}')


@pytest.fixture
def published(hub, folder):
    hub.add(ID, {path.name: path.read_bytes() for path in folder.iterdir()})
    return hub.repositories[ID].branches['main']


@pytest.fixture
def https(monkeypatch):
    """The client takes a bare 401 for a missing repository, but over https only: here, over http too."""
    expected = client.REPO_API_REGEX
    monkeypatch.setattr(client, 'REPO_API_REGEX', re.compile(expected.pattern.replace('https', 'http'), expected.flags))


@pytest.fixture
def release(hub):
    hub.release[FILE] = CHECKPOINT


def cached(tmp_path):
    """Files in the two caches that a later load could take for weights, whole or not."""
    found = [path for place in ('hub-cache', 'torch-home') for path in (tmp_path / place).rglob('*') if path.is_file()]
    return [
        path.name
        for path in found
        if path.name not in ('CACHEDIR.TAG',) and path.suffix != '.lock' and 'refs' not in str(path)
    ]


def error(status, code='', message=''):
    return lambda handler: handler.error(status, code, message)


def drop(handler):
    """Half of the body, and no more."""
    content = handler.hub.repositories[ID].branches['main']['model.safetensors']
    handler.send_response(200)
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def shorter(handler):
    """A whole answer, of another length than announced."""
    handler.reply(200, b'0' * 1000, ETag=f'"{"0" * 64}"')


WEIGHTS = r'/resolve/main/model\.safetensors'
# What the Hub answers, the error for a user who named the repository, and the reason in the warning otherwise.
MISSING = {
    'no repository': (error(404, 'RepoNotFound'), RepositoryNotFoundError, 'no such repository'),
    'no file': (error(404, 'EntryNotFound'), EntryNotFoundError, r'model\.safetensors is not in the repository'),
    '401': (error(401, '', 'Invalid username or password.'), RepositoryNotFoundError, 'no such repository'),
    'gated': (error(403, 'GatedRepo'), GatedRepoError, 'gated: ask for access'),
}


@pytest.mark.parametrize('what', MISSING)
def test_the_release_stands_in(hub, https, published, release, source, what):
    answer, _, words = MISSING[what]
    hub.fail('HEAD GET', WEIGHTS, answer)
    with pytest.warns(UserWarning, match=f'{re.escape(ID)} could not be loaded .*{words}.*{FILE}') as warned:
        model = create()
    assert len(warned) == 1
    assert same(model, source)
    with pytest.warns(UserWarning, match='could not be loaded from the Hugging Face Hub'):
        assert same(create(), source)
    assert len([path for path in hub.paths('GET') if path.endswith(FILE)]) == 1  # from the cache the second time


@pytest.mark.parametrize('what', MISSING)
@pytest.mark.parametrize('how', ['overlay', 'hf-hub'])
def test_nothing_stands_in_for_what_was_named(hub, https, published, release, tmp_path, what, how):
    answer, kind, _ = MISSING[what]
    hub.fail('HEAD GET', WEIGHTS, answer)
    with pytest.raises(kind):
        create(**EXPLICIT) if how == 'overlay' else create(f'hf-hub:{ID}')
    assert not [path for path in hub.paths('GET') if path.endswith(FILE)]
    assert 'model.safetensors' not in cached(tmp_path)


def test_neither_place(hub, tmp_path):
    """One error: both places and their reasons, the caches, and another way to load."""
    with pytest.raises(RuntimeError) as raised:
        create()
    text = str(raised.value)
    assert f'{NAME}.ulicny_in1k are at neither place' in text
    assert f'Hugging Face Hub, {ID}: no such repository' in text
    assert f'not in {tmp_path / "hub-cache"}' in text
    assert f'releases/download/0.1.0/{FILE}: HTTP Error 404: Not Found; not in {tmp_path / "torch-home"}' in text
    assert 'pretrained_cfg_overlay=dict(file=PATH)' in text
    assert cached(tmp_path) == []


def test_a_token_that_is_refused(hub, published, release, tmp_path, monkeypatch):
    """The release does not stand in, because the user has to know that the token is wrong."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.fail('HEAD GET', WEIGHTS, error(401, '', 'Invalid credentials in Authorization header'))
    with pytest.raises(HfHubHTTPError, match='Invalid credentials') as raised:
        create()
    assert TOKEN not in str(raised.value)
    assert cached(tmp_path) == []


@pytest.mark.parametrize('status', [429, 503])
def test_a_busy_hub_is_asked_again(hub, published, source, status):
    hub.fail('HEAD GET', WEIGHTS, error(status), times=3)
    assert same(create(), source)
    assert len([path for path in hub.paths('HEAD') if 'model.safetensors' in path]) >= 3


def test_a_hub_that_is_busy_for_good(hub, published, release, source):
    hub.fail('HEAD GET', WEIGHTS, error(503))
    with pytest.warns(UserWarning, match='could not be loaded from the Hugging Face Hub'):
        assert same(create(), source)


def test_a_hub_that_does_not_answer(hub, published, release, source, monkeypatch):
    over = threading.Event()
    hub.fail('HEAD', WEIGHTS, lambda handler: over.wait(20))
    monkeypatch.setattr(download, '_TIMEOUT', 0.5)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match='cannot be reached .*Timeout'):
        assert same(create(), source)
    assert time.perf_counter() - start < 10
    with pytest.raises(EntryNotFoundError, match=f'{hub.url} cannot be reached'):
        create(**EXPLICIT)
    over.set()


def test_cut_in_the_middle(hub, published, release, tmp_path):
    hub.fail('GET', WEIGHTS, drop)
    with pytest.raises(
        RuntimeError, match=r'model\.safetensors of .* could not be downloaded into .*hub-cache'
    ) as raised:
        create()
    assert 'Nothing was kept; try again' in str(raised.value)
    assert cached(tmp_path) == []


def test_cut_once(hub, published, source):
    """The client goes on by itself."""
    hub.fail('GET', WEIGHTS, drop, times=1)
    assert same(create(), source)


def test_wrong_length(hub, published, tmp_path):
    hub.fail('GET', WEIGHTS, shorter)
    with pytest.raises(RuntimeError, match=r'could not be downloaded .*should be of size'):
        create()
    assert cached(tmp_path) == []


def pin(digest):
    return dict(pretrained_cfg_overlay=dict(notes=(f'sha256:{digest}',)))


@pytest.mark.parametrize('name', [NAME, f'hf-hub:{ID}'])
def test_pinned(hub, published, source, folder, tmp_path, name):
    right = download.sha256_of(folder / 'model.safetensors')
    assert same(create(name, **pin(right)), source)
    with pytest.raises(CheckpointError, match=f'SHA-256 of .* is {right}, but {"0" * 64} is pinned') as raised:
        create(name, **pin('0' * 64))
    assert 'removed from the cache' in str(raised.value)
    assert 'model.safetensors' not in cached(tmp_path)
    assert same(create(name, **pin(right)), source)  # downloaded again


def test_pinned_by_the_registered_config(hub, published, source, folder):
    right = download.sha256_of(folder / 'model.safetensors')
    cfg = weights.released_cfg('a.b', FILE, sha256=right, notes=('paper: 1 %',), first_conv='conv1', classifier='fc')
    assert download.pinned_sha256(cfg['notes']) == right
    assert download.pinned_sha256(None) is None

    with pytest.raises(CheckpointError, match=f'{right}, but {"0" * 64} is pinned'):
        create(f'{NAME}.pinned')
    # The pin is for the registered repository, not for another one of the same architecture.
    hub.add('me/mine', {path.name: path.read_bytes() for path in folder.iterdir()})
    assert same(create(f'{NAME}.pinned', pretrained_cfg_overlay=dict(hf_hub_id='me/mine')), source)


def test_a_repository_does_not_vouch_for_itself(hub, published, source):
    config = json.loads(published['config.json'])
    config['pretrained_cfg']['notes'] = [f'sha256:{"0" * 64}']
    published['config.json'] = json.dumps(config).encode()
    assert same(create(f'hf-hub:{ID}'), source)


def test_wrong_hash_of_the_release(hub, tmp_path):
    hub.release[FILE] = CHECKPOINT[:-1] + b'!'
    with pytest.raises(CheckpointError, match=f'{FILE} was refused and is not cached: invalid hash value'):
        create()
    assert cached(tmp_path) == []


def test_a_cached_release_that_was_damaged(hub, release, source, tmp_path):
    with pytest.warns(UserWarning, match='could not be loaded from the Hugging Face Hub'):
        create()
    path = tmp_path / 'torch-home' / 'hub' / 'checkpoints' / FILE
    path.write_bytes(CHECKPOINT[:2000])
    with pytest.raises(CheckpointError, match=r'has another SHA-256.* It was there before'):
        create()
    path.unlink()
    with pytest.warns(UserWarning, match='could not be loaded from the Hugging Face Hub'):
        assert same(create(), source)


def test_damaged_header(hub, published, source, tmp_path):
    good = published['model.safetensors']
    published['model.safetensors'] = b'\xff' * 16 + good[16:]
    for name in (NAME, f'hf-hub:{ID}'):
        with pytest.raises(
            CheckpointError, match=r'on the Hugging Face Hub: .* is truncated or damaged.* removed from the'
        ):
            create(name)
        assert 'model.safetensors' not in cached(tmp_path)
    published['model.safetensors'] = good
    assert same(create(), source)


def test_another_architecture(hub, published, monkeypatch):
    import safetensors.torch

    published['model.safetensors'] = safetensors.torch.save(timm.create_model('resnet18').state_dict())
    loaded = []
    monkeypatch.setattr(torch.nn.Module, 'load_state_dict', lambda *args, **kwargs: loaded.append(args))
    for name in (NAME, f'hf-hub:{ID}'):
        with pytest.raises(
            CheckpointError, match=r'does not fit the model, nothing was loaded\. .*wrong shape: conv1\.weight'
        ):
            create(name)
    assert loaded == []


@pytest.mark.parametrize('name', ['harm_resnet19', 'timm_harmonic', ''])
def test_unknown_architecture(hub, published, name):
    config = json.loads(published['config.json'])
    published['config.json'] = json.dumps(dict(config, architecture=name)).encode()
    with pytest.raises(RuntimeError, match=rf'Unknown model \({name}\)'):
        create(f'hf-hub:{ID}')


class Trap:
    def __reduce__(self):
        return (os.system, ('touch trapped',))


@pytest.mark.parametrize('how', ['name', 'hf-hub', 'filename'])
def test_no_pickle_from_our_organisation(hub, published, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    del published['model.safetensors']
    torch.save(Trap(), tmp_path / 'trap.bin')
    published['pytorch_model.bin'] = (tmp_path / 'trap.bin').read_bytes()
    name = f'hf-hub:{ID}' if how == 'hf-hub' else NAME
    overlay = dict(hf_hub_id=ID, hf_hub_filename='pytorch_model.bin') if how == 'filename' else {}
    with pytest.raises(
        (EntryNotFoundError, RuntimeError), match=r'pytorch_model\.bin.* was not loaded|model\.safetensors'
    ):
        create(name, pretrained_cfg_overlay=overlay)
    assert not [path for path in hub.paths('GET') + hub.paths('HEAD') if 'pytorch_model.bin' in path]
    assert not Path('trapped').exists()


def test_pickles_of_others_are_data(hub, published, source, tmp_path, monkeypatch):
    """Old uploads of timm have pickles: tensors are read, code is not run."""
    monkeypatch.chdir(tmp_path)
    torch.save(source.state_dict(), 'weights.bin')
    torch.save(Trap(), 'trap.bin')
    files = {'config.json': published['config.json'], 'pytorch_model.bin': Path('weights.bin').read_bytes()}
    hub.add('someone/else', files)
    assert same(create('hf-hub:someone/else'), source)
    hub.add('someone/evil', dict(files, **{'pytorch_model.bin': Path('trap.bin').read_bytes()}))
    with pytest.raises(CheckpointError, match='could run code'):
        create('hf-hub:someone/evil')
    assert not Path('trapped').exists()


def test_offline(hub, published, source, release, monkeypatch, tmp_path):
    """HF_HUB_OFFLINE: from the caches, without a request."""
    create()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.is_offline_mode', lambda: True)
    hub.asked.clear()
    assert same(create(), source)
    with pytest.raises(RuntimeError, match=r'are at neither place(.|\n)*HF_HUB_OFFLINE is set'):
        create(cache_dir=tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere').mkdir(exist_ok=True)
    (tmp_path / 'elsewhere' / FILE).write_bytes(CHECKPOINT)
    with pytest.warns(UserWarning, match='could not be loaded from the Hugging Face Hub'):
        assert same(create(cache_dir=tmp_path / 'elsewhere'), source)
    assert hub.asked == []


def test_cache_dir(hub, published, source, tmp_path):
    assert same(create(cache_dir=tmp_path / 'mine'), source)
    assert list((tmp_path / 'mine').glob('models--*/snapshots/*/model.safetensors'))
    assert not (tmp_path / 'hub-cache').exists()
    hub.fail('HEAD GET', '.', error(503))
    assert same(create(cache_dir=tmp_path / 'mine'), source)  # the Hub is down, the cache is not


def test_disk_full(hub, published, source, tmp_path):
    size = len(published['model.safetensors'])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r'could not be downloaded into .*(large|space).* HF_HOME'):
            create()
        hub.repositories.clear()
        hub.release[FILE] = CHECKPOINT
        with pytest.raises(RuntimeError, match=r'are at neither place(.|\n)*File too large'):
            create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached(tmp_path) == []


def run(code, tmp_path, **options):
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
    env = dict(
        os.environ, HF_HOME=str(tmp_path / 'home'), TORCH_HOME=str(tmp_path / 'torch-home'), **options.pop('env', {})
    )
    command = [sys.executable, '-c', textwrap.dedent(preamble) + textwrap.dedent(code)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_no_network_and_an_empty_cache(tmp_path):
    """With the client's own waiting: an error within a minute that names both places, and no files."""
    start = time.perf_counter()
    code = "import timm; timm.create_model('harm_resnet50', pretrained=True)"
    process = run(code, tmp_path, env=dict(HF_ENDPOINT='https://huggingface.co'))
    _, printed = process.communicate(timeout=60)
    assert time.perf_counter() - start < 60
    assert process.returncode == 1
    assert 'the weights of harm_resnet50.ulicny_in1k are at neither place.' in printed
    assert 'https://huggingface.co cannot be reached' in printed
    assert 'Temporary failure in name resolution' in printed
    assert 'harm_resnet50-eec30392.pth' in printed
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_connection_refused(tmp_path):
    code = "import timm; timm.create_model('harm_resnet50', pretrained=True)"
    process = run(code, tmp_path, env=dict(HF_ENDPOINT='http://127.0.0.1:9'))
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r'http://127\.0\.0\.1:9 cannot be reached \(ConnectError: .*refused', printed), printed


def test_read_only_cache(hub, published, tmp_path):
    """The error names the folder. The superuser may write anywhere, and first gives up that right."""
    (tmp_path / 'home' / 'hub').mkdir(parents=True)
    (tmp_path / 'home' / 'hub').chmod(0o555)
    code = """
        import ctypes
        CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24
        if os.geteuid() == 0:
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
        if '--again' not in sys.argv:  # the bounding set takes effect in the next program
            os.execv(sys.executable, [sys.executable, '-c', PROGRAM, '--again'])
        from tiny_models import create
        create()
    """
    preamble = f'import sys; sys.path[:0] = [{str(TESTS)!r}]\n'
    program = preamble + textwrap.dedent(code[code.index('        from tiny_models') :])
    process = run(code.replace('PROGRAM', repr(program)), tmp_path)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'could not be downloaded into' in printed, printed
    assert 'PermissionError' in printed
    assert 'HF_HOME' in printed
    assert list((tmp_path / 'home' / 'hub').iterdir()) == []


def test_two_processes_at_once(hub, published, source, tmp_path):
    code = f"""
        import torch
        from tiny_models import create, images
        model = create()
        torch.save(model(images()), {str(tmp_path)!r} + f'/{{os.getpid()}}.pt')
    """
    both = threading.Barrier(2, timeout=60)

    def together(handler):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait()
        return False

    hub.faults.append(
        lambda handler: handler.command == 'HEAD' and 'model.safetensors' in handler.path and together(handler)
    )
    processes = [run(code, tmp_path) for _ in range(2)]
    for process in processes:
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    expected = source(tiny_models.images())
    outputs = [torch.load(path, weights_only=True) for path in tmp_path.glob('*.pt')]
    assert len(outputs) == 2
    assert all(torch.equal(output, expected) for output in outputs)
    blobs = [path for path in (tmp_path / 'home').rglob('blobs/*') if path.is_file()]
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in blobs] == [path.name for path in blobs]
    assert len(blobs) == 1


@pytest.fixture
def ctrl_c():
    """Handles the signal as in a terminal. A process in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(handler):
    """Ctrl-C in the middle of an upload: the body has arrived, and no answer is sent."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    handler.close_connection = True


@pytest.mark.parametrize('step', ['/upload/', '/commit/'])
def test_interrupted_upload(hub, folder, ctrl_c, monkeypatch, capsys, step):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.fail('PUT POST', step, interrupt)
    assert cli.main(['publish', str(folder), '--repo', ID]) == 130
    assert 'stopped' in capsys.readouterr().err
    assert hub.repositories == {}


def test_interrupted_upload_to_a_repository_that_was_there(hub, folder, ctrl_c, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    before = dict(hub.add(ID, {}).branches['main'])
    hub.fail('PUT', '/upload/', interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(folder, ID)
    assert hub.repositories[ID].branches['main'] == before
    hub.faults.clear()
    publish(folder, ID)
    assert 'model.safetensors' in hub.repositories[ID].branches['main']


FAILURES = {
    'no token': ('POST', 'repos/create', error(401, '', 'Invalid username or password.')),
    'wrong token': ('GET POST', '/api/', error(401, '', 'Invalid credentials in Authorization header')),
    'not allowed': ('POST', 'repos/create', error(403, '', 'You do not have the rights to create a model')),
    'no answer': ('POST', 'validate-yaml', lambda handler: setattr(handler, 'close_connection', True)),
    'upload fails': ('PUT', '/upload/', error(500)),
    'commit fails': ('POST', '/commit/', error(500)),
    'commit is refused': ('POST', '/commit/', error(403, '', 'Quota exceeded')),
}


@pytest.mark.parametrize('what', FAILURES)
def test_publishing_that_fails(hub, folder, monkeypatch, capfd, caplog, what):
    """An error, the Hub as before, and the token in no output and no log."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.fail(*FAILURES[what])
    assert cli.main(['publish', str(folder), '--repo', ID]) == 1
    printed = capfd.readouterr()
    assert 'timm-harmonic: error: ' in printed.err
    assert TOKEN not in printed.out + printed.err + caplog.text
    assert hub.repositories == {}


def test_no_token_at_all(hub, folder, monkeypatch, capsys):
    monkeypatch.delenv('HF_TOKEN', raising=False)
    hub.fail('POST', 'repos/create', error(401, '', 'Invalid username or password.'))
    assert cli.main(['publish', str(folder), '--repo', ID]) == 1
    assert 'hf auth login' in capsys.readouterr().err


def test_another_organisation(tmp_path):
    code = "import timm; print(timm.models.get_pretrained_cfg('harm_resnet50').hf_hub_id)"
    for env, expected in (
        (dict(TIMM_HARMONIC_HUB_ORG='mirror'), 'mirror'),
        (dict(TIMM_HARMONIC_HUB_ORG=''), 'timm-harmonic'),
    ):
        printed, _ = run(code, tmp_path, env=env).communicate(timeout=60)
        assert printed.strip() == f'{expected}/harm_resnet50.ulicny_in1k'


def test_pickles_are_read_as_data_everywhere():
    package = Path(timm_harmonic.__file__).parent
    files = [*package.rglob('*.py'), package.parent / 'timm_harmonic_autoload.py']
    text = '\n'.join(path.read_text() for path in files)
    loads = re.findall(r'torch\.load\([^)]*\)', text)
    assert loads
    assert all('weights_only=True' in load for load in loads)
    assert not re.search(r'weights_only=False|pickle\.loads?\(|load_state_dict_from_url|trust_remote_code', text)


@pytest.mark.parametrize('key', ['file', 'state_dict', 'url'])
def test_a_config_names_no_other_source(hub, published, source, tmp_path, key):
    """Not a file of the reader's, and no state dict. A pin holds whatever the config says."""
    private = tmp_path / 'private.pth'
    config = json.loads(published['config.json'])
    named = dict(file=str(private), state_dict={'a': 1}, url='http://127.0.0.1:9/x.pth')
    config['pretrained_cfg'][key] = named[key]
    published['config.json'] = json.dumps(config).encode()
    private.write_bytes(b'not what is wanted')
    assert same(create(f'hf-hub:{ID}'), source)
    with pytest.raises(CheckpointError, match=f'but {"0" * 64} is pinned'):
        create(f'hf-hub:{ID}', pretrained_cfg_overlay=dict(notes=('sha256:' + '0' * 64,)))


@pytest.mark.parametrize(
    'pin',
    ['sha256:{AB}', 'SHA256:{ab}', 'sha256: {ab}', 'sha256:{short}', 'sha256={ab}', 'sha256:00{ab}', 'sha-256: {ab}'],
)
def test_what_looks_like_a_pin_and_is_none(hub, published, pin):
    wrong = 'ab' * 32
    note = pin.format(AB=wrong.upper(), ab=wrong, short=wrong[:-1])
    with pytest.raises(CheckpointError, match=r'in the notes is no pin: write sha256: and 64 digits'):
        create(f'hf-hub:{ID}', pretrained_cfg_overlay=dict(notes=('paper: nothing', note)))
    two = (f'sha256:{wrong}', f'sha256:{"cd" * 32}')
    with pytest.raises(CheckpointError, match='pin several files'):
        create(f'hf-hub:{ID}', pretrained_cfg_overlay=dict(notes=two))


def test_a_damaged_file_in_a_read_only_cache(hub, published, source, tmp_path, monkeypatch):
    """The error says that it is damaged, and where."""
    published['model.safetensors'] = b'\xff' * 100

    def read_only(*args):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(download.huggingface_hub, 'scan_cache_dir', read_only)
    with pytest.raises(CheckpointError, match=r'truncated or damaged.*Remove /.*model\.safetensors'):
        create(f'hf-hub:{ID}')


def test_a_commit_between_check_and_upload(hub, folder, monkeypatch):
    """Somebody else's files are not replaced."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.add(ID, {})

    def meanwhile(handler):
        hub.add(ID, {'model.safetensors': b"a colleague's weights"})
        handler.preupload(ID, 'main')

    hub.fail('POST', '/preupload/', meanwhile, times=1)
    with pytest.raises(InputError, match=r'has a new commit since it was checked\. Nothing was published'):
        publish(folder, ID)
    assert hub.repositories[ID].branches['main']['model.safetensors'] == b"a colleague's weights"


def test_a_folder_that_changes_after_the_check(hub, folder, tmp_path, monkeypatch):
    """What was checked is published."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    mine = tmp_path / 'mine'
    shutil.copytree(folder, mine)

    def swap(handler):
        (mine / 'model.safetensors').write_bytes(b'not a checkpoint')
        handler.validate()

    hub.fail('POST', 'validate-yaml', swap, times=1)
    publish(mine, ID)
    published = hub.repositories[ID].branches['main']['model.safetensors']
    assert published == (folder / 'model.safetensors').read_bytes()


def lose_the_answer(handler):
    handler.reply = lambda *args, **kwargs: None
    handler.commit(ID, 'main')
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def test_the_answer_to_a_commit_is_lost(hub, folder, monkeypatch):
    """The commit is there, and so is what is said of it."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.fail('POST', '/commit/', lose_the_answer, times=1)
    with pytest.warns(UserWarning, match='answer of the Hub was lost .*, but all files are there'):
        assert publish(folder, ID).endswith(ID)
    assert 'model.safetensors' in hub.repositories[ID].branches['main']


def test_links_are_not_published(hub, folder, tmp_path):
    mine = tmp_path / 'mine'
    shutil.copytree(folder, mine)
    (tmp_path / 'id_rsa').write_text('PRIVATE KEY')
    (mine / 'summary.csv').symlink_to(tmp_path / 'id_rsa')
    with pytest.raises(InputError, match=r'holds a symbolic link, summary\.csv'):
        publish(mine, ID)
    assert hub.repositories == {}


def test_a_slip_in_the_front_matter(hub, folder, tmp_path):
    mine = tmp_path / 'mine'
    shutil.copytree(folder, mine)
    card = (mine / 'README.md').read_text()
    (mine / 'README.md').write_text(card.replace('license: bsd-3-clause', 'license: bsd-3-clause: yes'))
    with pytest.raises(InputError, match=r'README\.md in .* is damaged: mapping values are not allowed'):
        publish(mine, ID)


def test_a_card_of_the_folder_itself(hub, folder, tmp_path):
    """It was written without --repo, so it says nothing of a place on the Hub."""
    mine = tmp_path / 'mine'
    shutil.copytree(folder, mine)
    card = (mine / 'README.md').read_text()
    (mine / 'README.md').write_text(card.replace(f'hf-hub:{ID}', 'local-dir:mine'))
    with pytest.raises(InputError, match=r'README\.md loads local-dir:mine, but you publish it as'):
        publish(mine, ID)
