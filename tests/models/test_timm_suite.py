"""timm's own model tests, from the source distribution of the installed version, on our models.

A selection that covers every class; with --every-model all of them.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import smooth_models  # noqa: F401  registers a network with a smoothness
import timm

import timm_harmonic  # noqa: F401  registers the models

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

MODELS = timm.list_models('harm*')
# Basic blocks and bottlenecks, grouped, with attention, with levels, with a smoothness.
SELECTION = [
    *('harm_resnet18', 'harm_resnet50_progressive', 'harm_seresnext50_32x4d', 'harm_vgg11_bn', 'harm_wrn16_8'),
    *('harmonized', 'smooth_resnet18'),
]
# What timm tests on every model of its own, and the arguments after the model's name.
EVERY_MODEL = {
    'test_model_forward': [(1,)],
    'test_model_backward': [(2,)],
    'test_model_default_cfgs': [(1, 'meta')],
    'test_model_forward_torchscript': [(1,)],
    'test_model_forward_features': [(1,)],
    'test_model_forward_intermediates_features': [(1,)],
    'test_model_forward_intermediates': [(1,)],
    'test_prune_intermediate_layers_contract': [()],
    'test_model_forward_fx': [(1,)],
    'test_model_backward_fx': [(2,)],
    'test_model_forward_fx_torchscript': [(1,)],
    # timm runs these on models that it names one by one.
    'test_prune_intermediate_layers_params_used': [()],
    'test_prune_to_stem_feature': [()],
    'test_forward_after_prune_intermediate_layers': [()],
    'test_head_hidden_size': [({},)],
    'test_headless_checkpoint_reload': [({},)],
}
# timm's VGG has neither dilation nor gradient checkpointing, and leaves one position to pool for 64 x 64 pixels. The
# features of a wide residual network have a stride of 4 at most.
RESNETS_ONLY = {
    'test_reset_classifier_keeps_pool': [()],
    'test_model_features_output_stride': [(8,), (16,)],
    'test_features_only_grad_checkpointing_backward': [()],
}
# timm's ResNetV2 normalises its last feature on the way to the head, and gives it out as it is before.
NOT_PREACTIVATED = ('test_model_features_output_stride', 'test_forward_after_prune_intermediate_layers')


def pytest_generate_tests(metafunc):
    if 'timm_test' not in metafunc.fixturenames:
        return
    cases = []
    for model in [*MODELS, 'smooth_resnet18'] if metafunc.config.getoption('--every-model') else SELECTION:
        tests = EVERY_MODEL if 'vgg' in model else {**EVERY_MODEL, **RESNETS_ONLY}
        if 'wrn' in model:
            tests = {test: args for test, args in tests.items() if test not in NOT_PREACTIVATED}
        if model == 'harmonized':  # its class is timm's, and its module has no filter for checkpoints
            tests = {test: args for test, args in tests.items() if test != 'test_headless_checkpoint_reload'}
        for test, arguments in tests.items():
            for args in arguments:
                cases.append(pytest.param(test, (model, *args), id='-'.join([model, test, *map(str, args)])))
    metafunc.parametrize(('timm_test', 'args'), cases)


@pytest.fixture(scope='session')
def timm_tests(tmp_path_factory):
    """timm's tests/test_models.py as a module. TIMM_TESTS names a folder that holds it, else pip fetches it."""
    folder = os.environ.get('TIMM_TESTS')
    if not folder:
        folder = tmp_path_factory.mktemp('timm')
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:']
        done = subprocess.run(
            [*command, f'timm=={timm.__version__}', '-d', str(folder)], capture_output=True, text=True, timeout=300
        )
        archives = list(folder.glob('timm-*.tar.gz'))
        if not archives:
            reason = f'pip could not download the source distribution of timm {timm.__version__}: {done.stderr[-500:]}'
            (pytest.fail if os.environ.get('CI') else pytest.skip)(reason)
        with tarfile.open(archives[0]) as archive:
            members = [m for m in archive.getmembers() if '/tests/' in m.name and m.name.endswith('.py')]
            safe = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}  # not in the first 3.10 and 3.11
            archive.extractall(folder, members, **safe)
        folder = next(folder.glob('timm-*/tests'))
    path = Path(folder) / 'test_models.py'
    spec = importlib.util.spec_from_file_location('timm_test_models', path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings('ignore:Unknown pytest.mark:pytest.PytestUnknownMarkWarning')  # of timm's own project
@pytest.mark.filterwarnings('ignore:.*torch.jit.*is deprecated:FutureWarning')  # timm still scripts its models
@pytest.mark.filterwarnings('ignore:.*torch.jit.*is deprecated:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:The nodes obtained by tracing:UserWarning')  # torchvision, of any dropout
@pytest.mark.filterwarnings('ignore:To copy construct from a tensor:UserWarning')
def test_as_a_timm_model(timm_tests, timm_test, args):
    getattr(timm_tests, timm_test)(*args)


@pytest.mark.parametrize('name', ['harm_resnet18', 'harm_vgg11_bn', 'harm_wrn16_8'])
def test_meta_then_to_empty_then_load(timm_tests, name, monkeypatch):
    """timm's test for models with buffers that are in no state dict. timm runs it on named models."""
    monkeypatch.setattr(timm_tests, '_SWIN_KWARGS', {})
    timm_tests.test_swin_family_reinit_after_to_empty(name, 64)
