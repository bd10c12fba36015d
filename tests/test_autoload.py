"""timm knows the models without an import of the plugin, and nothing breaks when it cannot; in fresh interpreters."""

import os
import subprocess
import sys

import pytest
import reference
import timm
import torch
from reference import DATA

from timm_harmonic.hub.folder import convert

KNOWN = 'import timm; assert timm.is_model("harm_resnet50"), "unknown"'
CLEAN = 'import sys; assert not [f for f in sys.meta_path if "Host" in type(f).__name__], sys.meta_path'


def python(code, *options, **env):
    """Runs code in a fresh interpreter, warnings as errors unless options say otherwise."""
    command = [sys.executable, *(options or ('-W', 'error')), '-c', code]
    env = dict(os.environ, **env)
    # Where no package lies beside it: the current folder comes first on the path.
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=DATA, check=False)


def succeeds(code, *options, **env):
    done = python(code, *options, **env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    'first',
    [
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
    ],
)
def test_whatever_is_imported_first(first):
    done = succeeds(f'{first}\n{KNOWN}\n{CLEAN}')
    assert done.stderr == ''


def test_transformers_loads_a_folder(tmp_path):
    """By transformers' own wrapper, which imports timm by itself: the outputs of timm."""
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
    succeeds('import torch, sys; assert not {"timm", "timm.models", "timm_harmonic"} & set(sys.modules)')


def test_module_alone_is_light():
    succeeds('import timm_harmonic_autoload, sys; assert not {"torch", "timm", "timm_harmonic"} & set(sys.modules)')


@pytest.mark.parametrize('switch', ['TIMM_HARMONIC_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD'])
def test_switches(switch):
    code = 'import timm, sys; assert not timm.is_model("harm_resnet50"); assert "timm_harmonic" not in sys.modules'
    succeeds(f'{code}\nimport timm_harmonic; assert timm.is_model("harm_resnet50")', **{switch: '0'})


def test_called_again():
    succeeds(
        'import torch, sys; from timm_harmonic_autoload import autoload; before = list(sys.meta_path); autoload()\n'
        f'assert sys.meta_path == before\n{KNOWN}\nautoload()\n{CLEAN}'
    )


def test_called_after_timm():
    """As when a process switches PyTorch's autoloading off and asks for the models later."""
    code = f'import timm; import timm_harmonic_autoload as a; a.autoload(); {KNOWN}; {CLEAN}'
    succeeds(code, TORCH_DEVICE_BACKEND_AUTOLOAD='0')


def test_host_module_looks_as_ever():
    succeeds(
        'import timm.models, inspect, importlib.machinery as m; loader = timm.models.__loader__\n'
        'assert type(loader) is m.SourceFileLoader is type(timm.models.__spec__.loader), loader\n'
        'assert "create_model" in inspect.getsource(timm.models)'
    )


@pytest.fixture
def broken(tmp_path):
    """A plugin that shadows the real one, with a given body."""

    def write(body):
        (tmp_path / 'timm_harmonic').mkdir()
        (tmp_path / 'timm_harmonic' / '__init__.py').write_text(body)
        return dict(PYTHONPATH=str(tmp_path))

    return write


CREATES = 'import torch, timm; timm.create_model("resnet18", device="meta"); print("goes on")'


@pytest.mark.parametrize('body', ['raise OSError("no space")', 'import no_such_module', 'syntax error'])
def test_broken_plugin_is_one_warning(broken, body):
    done = succeeds(CREATES, '-W', 'always', **broken(body))
    assert done.stdout == 'goes on\n'
    assert done.stderr.count('RuntimeWarning') == 1
    assert 'importing timm_harmonic failed with' in done.stderr


def test_broken_plugin_with_warnings_as_errors(broken):
    done = succeeds(CREATES, '-W', 'error', **broken('raise OSError("no space")'))
    assert done.stdout == 'goes on\n'
    assert done.stderr.count('importing timm_harmonic failed with OSError: no space') == 1


@pytest.mark.parametrize('options', [('-W', 'error'), ('-W', 'always')])
def test_plugin_that_warns(broken, options):
    done = succeeds(CREATES, *options, **broken('import warnings; warnings.warn("old habits")'))
    assert done.stdout == 'goes on\n'
    assert 'old habits' in done.stderr


def test_worker_processes():
    """A spawned process, as data loaders start, imports torch anew."""
    code = (
        'import multiprocessing as mp, timm\n'
        'if __name__ == "__main__":\n'
        '    with mp.get_context("spawn").Pool(1) as pool: assert pool.apply(timm.is_model, ("harm_resnet50",))'
    )
    succeeds(code)


def test_script_with_the_models(tmp_path):
    """python -m timm_harmonic SCRIPT ARGS..., for those who switch autoloading off."""
    script = tmp_path / 'script.py'
    (tmp_path / 'beside.py').write_text('')
    script.write_text(f'import sys, beside\n{KNOWN}\nprint(__name__, sys.argv[0] == {str(script)!r}, sys.argv[1:])')
    command = [sys.executable, '-m', 'timm_harmonic', str(script), '--model', 'harm_resnet50']
    env = dict(os.environ, TIMM_HARMONIC_AUTOLOAD='0')
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.stdout == "__main__ True ['--model', 'harm_resnet50']\n", done.stderr
