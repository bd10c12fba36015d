"""timm knows the models without an import of the plugin, and a failure of it stops nothing; in fresh interpreters."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import timm
import torch
from reference import DATA

from timm_harmonic.hub.folder import convert

KNOWN = 'import timm; assert timm.is_model("harm_resnet50"), "unknown"'
CLEAN = 'import sys; assert not [f for f in sys.meta_path if "Host" in type(f).__name__], sys.meta_path'
UNTOUCHED = """
import timm.models, inspect, importlib.machinery as m
loader = timm.models.__loader__
assert type(loader) is m.SourceFileLoader is type(timm.models.__spec__.loader), loader
assert "create_model" in inspect.getsource(timm.models)
"""
CREATES = 'import torch, timm; timm.create_model("resnet18", device="meta"); print("goes on")'
FIRST = (
    'import timm',
    'import torch',
    'import torchvision',
    'import timm_harmonic',
    'from timm.models import create_model; create_model("harm_resnet18", device="meta")',
    'from timm.layers import DropPath',
    'import timm.models.resnet',
    'import timm.data',
    'import segmentation_models_pytorch',
    'from transformers import TimmWrapperModel',
)


def python(code, *options, **env):
    """Runs code in a fresh interpreter, warnings as errors unless options say otherwise."""
    command = [sys.executable, *(options or ('-W', 'error')), '-c', code]
    env = dict(os.environ, **env)
    # In a folder without packages: the current folder comes first on the path.
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=DATA, check=False)


def succeeds(code, *options, **env):
    done = python(code, *options, **env)
    assert done.returncode == 0, done.stderr
    return done


def side_by_side(run, cases):
    """Results of a function by case, as many at a time as there are cores: a fresh interpreter takes seconds."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.fixture(scope='module')
def imported_first():
    return side_by_side(lambda first: python(f'{first}\n{KNOWN}\n{CLEAN}\n{UNTOUCHED}'), FIRST)


@pytest.mark.parametrize('first', FIRST)
def test_whatever_is_imported_first(imported_first, first):
    """And timm.models looks as if it had been imported without a plugin."""
    assert (imported_first[first].returncode, imported_first[first].stderr) == (0, '')


def test_transformers_loads_a_folder(tmp_path):
    """transformers' own wrapper, which imports timm itself, gives the outputs of timm."""
    torch.manual_seed(0)
    model = timm.create_model('harm_resnet18', layers=(1, 1, 1, 1), levels=3, num_classes=5)
    torch.save(reference.randomize_batch_norm(model).eval().state_dict(), tmp_path / 'weights.pth')
    convert(
        tmp_path / 'weights.pth', 'harm_resnet18', tmp_path / 'out', model_kwargs=dict(layers=(1, 1, 1, 1), levels=3)
    )
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    succeeds(
        'from transformers import TimmWrapperForImageClassification as Wrapper; import sys, torch\n'
        f'model = Wrapper.from_pretrained({str(tmp_path / "out")!r}).eval()\n'
        'image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n'
        f'torch.save(model(image).logits.detach(), {str(tmp_path / "logits.pt")!r})',
        '-W',
        'default',
    )
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), model(image).detach())


def test_torch_alone_loads_neither():
    """And calling the entry point again changes nothing, before timm is imported and after."""
    succeeds(
        'import torch, sys; assert not {"timm", "timm.models", "timm_harmonic"} & set(sys.modules)\n'
        'from timm_harmonic_autoload import autoload; before = list(sys.meta_path); autoload()\n'
        f'assert sys.meta_path == before\n{KNOWN}\nautoload()\n{CLEAN}'
    )


def test_module_alone_is_light():
    succeeds('import timm_harmonic_autoload, sys; assert not {"torch", "timm", "timm_harmonic"} & set(sys.modules)')


@pytest.mark.parametrize('switch', ['TIMM_HARMONIC_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'])
def test_switches(switch):
    code = 'import timm, sys; assert not timm.is_model("harm_resnet50"); assert "timm_harmonic" not in sys.modules'
    succeeds(f'{code}\nimport timm_harmonic; assert timm.is_model("harm_resnet50")', **{switch: '0'})


def test_called_after_timm():
    """As when a process switches PyTorch's autoloading off and asks for the models later."""
    code = f'import timm; import timm_harmonic_autoload as a; a.autoload(); {KNOWN}; {CLEAN}'
    succeeds(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')


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
    done = succeeds('import timm.models, sys; assert "timm_harmonic" not in sys.modules', PYTHONPATH=str(tmp_path))
    assert done.stderr == ''


# Plugins that cannot be imported: a body, whether warnings are errors, and words of the warning.
BROKEN = {
    'error': ('raise OSError("no space")', 'always', 'OSError: no space'),
    'missing module': ('import no_such_module', 'always', 'ModuleNotFoundError: No module named'),
    'syntax error': ('syntax error', 'always', 'SyntaxError'),
    'error, strict': ('raise OSError("no space")', 'error', 'OSError: no space'),
    'warning, strict': ('import warnings; warnings.warn("old habits")', 'error', 'UserWarning: old habits'),
}
WARNS = ('import warnings; warnings.warn("old habits")', 'always')


@pytest.fixture(scope='module')
def shadowed(tmp_path_factory):
    """By body and treatment of warnings: interpreters with a plugin that shadows the real one."""

    def run(case):
        body, warnings = case
        folder = tmp_path_factory.mktemp('shadowed')
        (folder / 'timm_harmonic').mkdir()
        (folder / 'timm_harmonic' / '__init__.py').write_text(body)
        return python(CREATES, '-W', warnings, PYTHONPATH=str(folder))

    return side_by_side(run, [*(case[:2] for case in BROKEN.values()), WARNS])


@pytest.mark.parametrize('what', BROKEN)
def test_broken_plugin_is_one_warning(shadowed, what):
    """timm goes on, even where warnings are errors."""
    body, warnings, words = BROKEN[what]
    done = shadowed[body, warnings]
    assert (done.returncode, done.stdout) == (0, 'goes on\n'), done.stderr
    assert done.stderr.count('RuntimeWarning') == 1
    assert done.stderr.count(f'importing timm_harmonic failed with {words}') == 1


def test_plugin_that_warns(shadowed):
    assert (shadowed[WARNS].returncode, shadowed[WARNS].stdout) == (0, 'goes on\n')
    assert 'old habits' in shadowed[WARNS].stderr
    assert 'failed' not in shadowed[WARNS].stderr


def test_worker_processes():
    """A spawned process, as of a data loader, imports torch anew."""
    code = (
        'import multiprocessing as mp, timm\n'
        'if __name__ == "__main__":\n'
        '    with mp.get_context("spawn").Pool(1) as pool: assert pool.apply(timm.is_model, ("harm_resnet50",))'
    )
    succeeds(code)


def test_script_with_the_models(tmp_path):
    """python -m timm_harmonic SCRIPT ARGS..., for users who switch autoloading off."""
    script = tmp_path / 'script.py'
    (tmp_path / 'beside.py').write_text('')
    script.write_text(f'import sys, beside\n{KNOWN}\nprint(__name__, sys.argv[0] == {str(script)!r}, sys.argv[1:])')
    command = [sys.executable, '-m', 'timm_harmonic', str(script), '--model', 'harm_resnet50']
    env = dict(os.environ, TIMM_HARMONIC_AUTOLOAD='0')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.stdout == "__main__ True ['--model', 'harm_resnet50']\n", done.stderr
