"""timm knows the models without an import of the plugin, and a failure of it stops nothing; in fresh interpreters."""

import os
import subprocess
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from reference import DATA, RESNET, small

import timm_harmonic_autoload
from timm_harmonic.export.folder import convert

# How many processes import with eight threads at once; many more by hand.
PROCESSES = int(os.environ.get('TIMM_HARMONIC_TEST_PROCESSES', '8'))
KNOWN = 'import timm; assert timm.is_model("harm_resnet50"), "unknown"'
CLEAN = 'import sys; assert sum("HostFinder" in type(f).__name__ for f in sys.meta_path) <= 1, sys.meta_path'
UNTOUCHED = """
import timm.models, inspect, importlib.machinery as m
loader = timm.models.__loader__
assert type(loader) is m.SourceFileLoader is type(timm.models.__spec__.loader), loader
assert "create_model" in inspect.getsource(timm.models)
"""
CREATES = 'import torch, timm; timm.create_model("resnet18", device="meta"); print("goes on")'
slow = pytest.mark.slow


def python(code, *options, **env):
    """Runs code in a fresh interpreter, warnings as errors unless options say otherwise."""
    command = [sys.executable, *(options or ('-W', 'error')), '-c', code]
    env = dict(os.environ, **env)
    # In a folder without packages: the current folder comes first on the path.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120 + 10 * PROCESSES, env=env, cwd=DATA, check=False
    )


def succeeds(code, *options, **env):
    done = python(code, *options, **env)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    return done


def test_torch_alone_loads_neither():
    """And calling the entry point again changes nothing, before timm is imported and after."""
    succeeds(
        'import torch, sys; assert not {"timm", "timm.models", "timm_harmonic"} & set(sys.modules)\n'
        'from timm_harmonic_autoload import autoload; before = list(sys.meta_path); autoload()\n'
        f'assert sys.meta_path == before\n{KNOWN}\nautoload()\n{CLEAN}'
    )


@slow
@pytest.mark.parametrize(
    'first',
    [
        'import timm',
        'import timm_harmonic; assert timm_harmonic.__version__.count(".") == 2',
        'from timm.models import create_model; create_model("harm_resnet18", device="meta")',
        'from timm.layers import DropPath',
        'import timm.models.resnet',
        'import timm.data',
        'import segmentation_models_pytorch',
        'from transformers import TimmWrapperModel',
    ],
)
def test_whatever_is_imported_first(first):
    """Silently, and timm.models looks as if it had been imported without a plugin."""
    succeeds(f'{first}\n{KNOWN}\n{CLEAN}\n{UNTOUCHED}')


@slow
def test_transformers_loads_a_folder(tmp_path):
    """transformers' own wrapper, which imports timm itself, gives the outputs of timm."""
    model = small('harm_resnet18', levels=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    kwargs = {**RESNET, 'levels': 3}
    del kwargs['num_classes']
    convert(tmp_path / 'weights.pth', 'harm_resnet18', tmp_path / 'out', model_kwargs=kwargs)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    done = python(
        'from transformers import TimmWrapperForImageClassification as Wrapper; import sys, torch\n'
        f'model = Wrapper.from_pretrained({str(tmp_path / "out")!r}).eval()\n'
        'image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n'
        f'torch.save(model(image).logits.detach(), {str(tmp_path / "logits.pt")!r})',
        '-W',
        'default',
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), model(image).detach())


@slow
def test_module_alone_is_light():
    succeeds('import timm_harmonic_autoload, sys; assert not {"torch", "timm", "timm_harmonic"} & set(sys.modules)')


@slow
@pytest.mark.parametrize('switch', ['TIMM_HARMONIC_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'])
def test_switches(switch):
    code = 'import timm, sys; assert not timm.is_model("harm_resnet50"); assert "timm_harmonic" not in sys.modules'
    succeeds(f'{code}\nimport timm_harmonic; assert timm.is_model("harm_resnet50")', **{switch: '0'})


@slow
def test_called_after_timm():
    """As when a process switches PyTorch's autoloading off and asks for the models later."""
    code = f'import timm; import timm_harmonic_autoload as a; a.autoload(); {KNOWN}; {CLEAN}'
    succeeds(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')


@slow
def test_called_while_timm_models_is_imported(tmp_path):
    """The plugin must not start in the middle of it. Here, a timm that calls the entry point there, without torch."""
    bodies = {
        'timm': '',
        'timm/models': 'import timm_harmonic_autoload as a; a.autoload()\nregister_model = print',
        'timm_harmonic': 'from timm.models import register_model',
    }
    for package, body in bodies.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').write_text(body)
    succeeds('import timm.models, sys; assert "timm_harmonic" not in sys.modules', PYTHONPATH=str(tmp_path))


@slow
@pytest.mark.parametrize(
    ('body', 'warnings', 'words'),
    [
        ('import no_such_module', 'always', 'ModuleNotFoundError: No module named'),
        ('syntax error', 'always', 'SyntaxError'),
        ('raise OSError("no space")', 'error', 'OSError: no space'),
        ('import warnings; warnings.warn("old habits")', 'error', 'UserWarning: old habits'),
        ('import warnings; warnings.warn("old habits")', 'always', None),
    ],
)
def test_broken_plugin_is_one_warning(body, warnings, words, tmp_path):
    """Of a plugin that shadows the real one. timm goes on, even where warnings are errors."""
    (tmp_path / 'timm_harmonic').mkdir()
    (tmp_path / 'timm_harmonic' / '__init__.py').write_text(body)
    done = python(CREATES, '-W', warnings, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, 'goes on\n'), done.stderr
    if words is None:  # a plugin that warns of something is not broken
        assert 'old habits' in done.stderr
        assert 'failed' not in done.stderr
    else:
        assert done.stderr.count('RuntimeWarning') == 1
        assert done.stderr.count(f'importing timm_harmonic failed with {words}') == 1


@slow
def test_an_old_timm_beside_a_script_is_named(tmp_path):
    """As in a clone of its repository: Python imports it before the installed one."""
    (tmp_path / 'timm' / 'models').mkdir(parents=True)
    (tmp_path / 'timm' / '__init__.py').write_text('__version__ = "0.9.2"\nfrom . import models')
    (tmp_path / 'timm' / 'models' / '__init__.py').write_text('')
    (tmp_path / 'train.py').write_text('import torch, timm; print(timm.__version__)')
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONSAFEPATH'}
    command = [sys.executable, str(tmp_path / 'train.py')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=True)
    assert done.stdout == '0.9.2\n'
    assert f'Python took timm 0.9.2 from {tmp_path / "timm"}. ' in done.stderr
    assert 'set PYTHONSAFEPATH=1' in done.stderr


@slow
def test_worker_processes():
    """A spawned process (a data loader's worker) imports torch again."""
    succeeds(
        'import multiprocessing as mp, timm\n'
        'if __name__ == "__main__":\n'
        '    with mp.get_context("spawn").Pool(1) as pool: assert pool.apply(timm.is_model, ("harm_resnet50",))'
    )


@slow
@pytest.mark.parametrize('module', ['timm.models.vgg', 'timm_harmonic.models.harm_vgg'])
def test_the_import_after_an_interrupted_one(module):
    """As by Ctrl-C in a notebook, in timm or in the plugin behind it: the next import of timm brings the models."""
    succeeds(
        f"""
import sys, torch
class Once:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and not self.done:
            self.done = True
            raise KeyboardInterrupt
sys.meta_path.insert(1, Once())
try:
    import timm
except KeyboardInterrupt:
    pass
else:
    raise SystemExit('was not interrupted')
import timm
{KNOWN}
{CLEAN}
{UNTOUCHED}"""
    )


# What eight threads import first, each in the same moment.
TOGETHER = ('timm', 'timm.models', 'timm_harmonic', 'timm.layers', 'timm.data', 'timm.models.resnet', 'json.tool')
TOGETHER += ('timm_harmonic.layers',)


@slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_threads_that_import_at_once():
    """No thread hangs, and the models are there: in processes that have imported torch alone."""
    done = python(
        f"""
import faulthandler, os, sys, threading, time, torch

def child(number):
    sys.setswitchinterval(1e-5)
    barrier, errors = threading.Barrier({len(TOGETHER)}), []
    def run(name):
        barrier.wait()
        start = time.monotonic()
        while time.monotonic() < start + 60:
            try:
                __import__(name)
                return
            except (ImportError, KeyError, RuntimeError) as error:
                # Python gives up where circular imports of timm wait for each other, with the plugin and without.
                last = repr(error)
                time.sleep(0.05)
        errors.append((name, last))
    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in {TOGETHER!r}]
    for thread in threads[number % 8:] + threads[:number % 8]:
        thread.start()
    for thread in threads:
        thread.join(90)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(all_threads=True)
        os._exit(3)
    import timm
    if errors or not timm.is_model('harm_resnet50'):
        print(errors, file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(0)

for number in range({PROCESSES}):
    pid = os.fork()
    if pid == 0:
        child(number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (number, status)
print('all', {PROCESSES})""",
        '-W',
        'ignore',
    )
    assert done.stdout == f'all {PROCESSES}\n', done.stderr


@slow
def test_no_look_up_is_missed():
    """While the finder of timm.models comes and is asked, other threads find what they import."""
    succeeds(
        """
import importlib.machinery, json.tool, sys, threading, timm_harmonic_autoload
from importlib._bootstrap import _find_spec
sys.setswitchinterval(1e-6)
stop, missed = threading.Event(), []
def other():
    while not stop.is_set():
        if _find_spec('json', None) is None:
            missed.append(1)
thread = threading.Thread(target=other)
thread.start()
for _ in range(2000):
    timm_harmonic_autoload.autoload()
    _find_spec('timm.models', importlib.machinery.PathFinder.find_spec('timm').submodule_search_locations)
    sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != '_HostFinder']
stop.set()
thread.join()
assert not missed, len(missed)"""
    )


@slow
def test_script_with_the_models(tmp_path):
    """python -m timm_harmonic SCRIPT ARGS..., for users who switch autoloading off."""
    script = tmp_path / 'script.py'
    (tmp_path / 'beside.py').write_text('')
    script.write_text(f'import sys, beside\n{KNOWN}\nprint(__name__, sys.argv[0] == {str(script)!r}, sys.argv[1:])')
    command = [sys.executable, '-m', 'timm_harmonic', str(script), '--model', 'harm_resnet50']
    env = dict(os.environ, TIMM_HARMONIC_AUTOLOAD='0')
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.stdout == "__main__ True ['--model', 'harm_resnet50']\n", done.stderr


def test_loaders_stay_as_they_were(monkeypatch):
    """Also those whose exec_module is an attribute of the object, as import hooks make them."""
    plugged = []
    monkeypatch.setattr(timm_harmonic_autoload, '_import_plugin', lambda: plugged.append(True))

    class Loader:
        def exec_module(self, module):
            module.done = True

    own = Loader()
    own.exec_module = partial(Loader.exec_module, own)
    for loader in (Loader(), own):
        before, module = dict(vars(loader)), ModuleType('timm.models')
        module.__spec__ = SimpleNamespace(loader=loader)
        monkeypatch.setattr(
            sys, 'meta_path', [SimpleNamespace(find_spec=lambda *_, of=loader: SimpleNamespace(loader=of))]
        )
        spec = timm_harmonic_autoload._HostFinder().find_spec('timm.models')
        spec.loader.exec_module(module)
        assert module.done
        assert vars(loader) == before
        assert module.__loader__ is module.__spec__.loader is loader
    assert len(plugged) == 2
    fixed = SimpleNamespace(loader=None)
    monkeypatch.setattr(sys, 'meta_path', [SimpleNamespace(find_spec=lambda *_: fixed)])
    assert timm_harmonic_autoload._HostFinder().find_spec('timm.models') is fixed
