"""timm's unmodified scripts with train_configs/, on the image folder that the quickstart exports.

The scripts are in no package: the environment variable TIMM_SCRIPTS names a checkout of pytorch-image-models. They are
copied to another folder first. Python looks for packages beside a script, and the checkout has its own timm there, but
these tests are for the installed one.
"""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference
import timm
import torch
from PIL import Image
from test_train_configs import gem_rows

import timm_harmonic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get('TIMM_SCRIPTS'),
        reason='TIMM_SCRIPTS names no checkout of pytorch-image-models; its scripts are in no package',
    ),
]

CONFIG = Path(__file__).resolve().parents[1] / 'train_configs' / 'harm_resnet50.yaml'
TIMEOUT = 600  # seconds, for each process
PER_CLASS = dict(train=8, validation=5)  # images of those that the quickstart exports
LR = 0.1 * 16 / 256
SMALL = ('--model-kwargs', 'layers=(1,1,1,1)')


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """A command that must succeed, run in a folder without packages."""
    env = dict(os.environ, OMP_NUM_THREADS='2', CUDA_VISIBLE_DEVICES='')
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd, env=env, check=False
    )
    assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}'
    return result


class Workplace:
    """The copied scripts, the image folder, and one folder for each training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts = folder / 'scripts'
        self.images = folder / 'images'
        self.scripts.mkdir()
        for name in ('train.py', 'validate.py', 'benchmark.py', 'inference.py', 'onnx_export.py'):
            shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / name, self.scripts / name)
        run(sys.executable, '-m', 'timm_harmonic', 'quickstart', '--export', self.images, cwd=folder)
        for split, count in PER_CLASS.items():
            classes = list((self.images / split).iterdir())
            for patch in (patch for folder in classes for patch in sorted(folder.iterdir())[count:]):
                patch.unlink()
        self.num_classes = len(classes)

    def run(self, script: str, *options: object) -> subprocess.CompletedProcess:
        """Runs one of the scripts as it is. Only autoloading lets timm know the models."""
        return run(sys.executable, self.scripts / script, *options, cwd=self.folder)

    def common(self) -> list[str]:
        options = f'--num-classes {self.num_classes} --img-size 64 --workers 0 --device cpu --batch-size 16'
        return [*options.split(), '--data-dir', str(self.images)]

    def summary(self, name: str, epoch: int = 0) -> dict[str, float]:
        """Checks that a run wrote one row of sound numbers, and returns them."""
        with (self.folder / name / 'summary.csv').open() as file:
            (row,) = csv.DictReader(file)
        numbers = {key: float(value) for key, value in row.items()}
        assert numbers['epoch'] == epoch
        assert 0 < numbers['train_loss'] < 20
        assert 0 < numbers['eval_loss'] < 100
        assert 0 <= numbers['eval_top1'] <= numbers['eval_top5'] <= 100
        return numbers

    def output(self, name: str) -> tuple:
        return ('--output', self.folder, '--experiment', name, '--epochs', 1)

    def train(self, name: str, *options: object, epoch: int = 0) -> dict:
        """Numbers of a run of train.py, its checkpoints are in `self.folder / name`."""
        # The config's rate is for 256 images a step.
        rest = ('-c', CONFIG, *self.output(name), *self.common(), '--lr', LR, *options)
        self.run('train.py', *rest)
        return self.summary(name, epoch)

    def validate(self, name: str, *options: object) -> dict:
        """Result of validate.py for the last checkpoint of a run, with the mean loss of its log."""
        paths = ('--split', 'validation', '--checkpoint', self.folder / name / 'last.pth.tar')
        result = self.run('validate.py', '--model', 'harm_resnet50', *paths, *self.common(), '--log-freq', 1, *options)
        loss = re.findall(r'Loss: +\S+ \( *([\d.]+)\)', result.stderr)[-1]
        return dict(json.loads(result.stdout.split('--result\n')[1]), loss=float(loss))

    def checkpoint(self, name: str) -> dict:
        return torch.load(self.folder / name / 'last.pth.tar', map_location='cpu', weights_only=False)

    def one_image(self) -> float:
        """Least difference of two accuracies, in percent."""
        return 100 / sum(1 for _ in (self.images / 'validation').glob('*/*'))


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp('train_scripts'))


@pytest.fixture(scope='module')
def small_run(workplace):
    return workplace.train('small', *SMALL)


def check_validated(validated: dict, trained: dict[str, float], images: float, loss: float) -> None:
    """Checks that validate.py finds what train.py found, within a percentage of the images and a share of the loss.

    After one epoch on few images the accuracy is near chance, as a broken network's would be. The loss decides.
    """
    assert validated['loss'] == pytest.approx(trained['eval_loss'], rel=loss)
    for key in ('top1', 'top5'):
        assert validated[key] == pytest.approx(trained[f'eval_{key}'], abs=images)


def test_the_scripts_use_the_installed_timm(workplace):
    (workplace.scripts / 'probe.py').write_text('import timm; print(timm.__file__)\n')
    used = run(sys.executable, workplace.scripts / 'probe.py', cwd=workplace.folder).stdout.strip()
    assert Path(used).samefile(timm.__file__)


def test_one_epoch_of_harm_resnet50_then_validation(workplace):
    trained = workplace.train('full')
    model = timm.create_model('harm_resnet50', num_classes=workplace.num_classes)
    model.load_state_dict(workplace.checkpoint('full')['state_dict'])
    plain = workplace.validate('full')
    check_validated(plain, trained, images=1e-3, loss=1e-3)
    fused = workplace.validate('full', '--reparam')
    # Rounding may move an image across a decision.
    check_validated(fused, trained, images=1.01 * workplace.one_image(), loss=1e-3)
    assert fused['param_count'] == pytest.approx(plain['param_count'], abs=0.01)


def test_the_run_kept_the_options_of_the_config(workplace, small_run):
    args = workplace.checkpoint('small')['args']
    assert (args.opt, args.weight_decay, args.sched, args.smoothing) == ('momentum', 1e-4, 'step', 0.0)
    groups = workplace.checkpoint('small')['optimizer']['param_groups']
    assert [(group['weight_decay'], group['nesterov']) for group in groups] == [(1e-4, False)]
    assert small_run['lr'] == pytest.approx(LR)


def test_killed_in_the_second_epoch_and_resumed(workplace, small_run):
    """The run that was killed goes on as the one that ended after its first epoch does: the same bits."""
    command = (sys.executable, workplace.scripts / 'train.py', '-c', CONFIG, *workplace.output('killed'))
    command += (*workplace.common(), '--lr', LR, *SMALL, '--epochs', 2, '--log-interval', 1)
    env = dict(os.environ, OMP_NUM_THREADS='2', CUDA_VISIBLE_DEVICES='')
    log = workplace.folder / 'killed.log'
    with log.open('w') as file:
        process = subprocess.Popen(list(map(str, command)), stderr=file, stdout=file, cwd=workplace.folder, env=env)
    try:
        deadline = time.monotonic() + TIMEOUT
        while 'Train: 1 [   3/' not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    for name, source in (('resumed', 'killed'), ('regular', 'small')):
        last = workplace.folder / source / 'last.pth.tar'
        workplace.train(name, *SMALL, '--resume', last, '--epochs', 2, epoch=1)
    one, other = (workplace.checkpoint(name) for name in ('resumed', 'regular'))
    assert (one['epoch'], other['epoch']) == (1, 1)
    for part in ('state_dict', 'optimizer'):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_averaged_weights_and_gradient_checkpointing(workplace):
    options = ('--model-ema', '--model-ema-decay', 0.5, '--grad-checkpointing')
    trained = workplace.train('averaged', *SMALL, *options)
    checkpoint = workplace.checkpoint('averaged')
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys()
    # train.py reports the averaged network where there is one.
    check_validated(workplace.validate('averaged', *SMALL, '--use-ema'), trained, images=1e-3, loss=1e-3)


def test_larger_images_with_test_time_pooling(workplace, small_run):
    # Pooling at test time is for images larger than the 224 of the model's config.
    result = workplace.validate('small', *SMALL, '--img-size', 256, '--test-pool')
    assert (result['img_size'], result['crop_pct']) == (256, 1.0)
    assert 0 <= result['top1'] <= result['top5'] <= 100


def test_fine_tuning_from_a_file_in_the_authors_layout(workplace):
    path, theirs = workplace.folder / 'authors.pth.tar', reference.generated_state_dict('harm_resnet50')
    torch.save(dict(epoch=1, arch='resnet50', state_dict={f'module.{k}': v for k, v in theirs.items()}), path)
    # With so small a rate the weights stay those that were loaded. 0 would stand for timm's default.
    workplace.train('tuned_authors', '--pretrained', '--pretrained-path', path, '--lr', 1e-12)
    tuned = workplace.checkpoint('tuned_authors')['state_dict']
    assert tuned['fc.weight'].shape[0] == workplace.num_classes
    for key, authors_key in (('conv1', 'harm1'), ('layer1.0.conv2', 'layer1.0.harm2'), ('layer2.0.conv1',) * 2):
        expected = theirs[f'{authors_key}.weight'].reshape(tuned[f'{key}.weight'].shape)
        torch.testing.assert_close(tuned[f'{key}.weight'], expected, rtol=0, atol=1e-6)


def test_benchmark(workplace):
    common = '--bench both --device cpu --batch-size 2 --img-size 64 --num-warm-iter 1 --num-bench-iter 10'
    result = workplace.run('benchmark.py', '--model', 'harm_resnet50', *SMALL, *common.split())
    figures = json.loads(result.stdout.split('--result\n')[1])
    assert figures['model'] == 'harm_resnet50'
    assert all(figures[f'{mode}_samples_per_sec'] > 0 for mode in ('infer', 'train'))


def test_inference(workplace, small_run):
    pytest.importorskip('pandas', reason="timm's inference.py imports pandas")
    common = f'--num-classes {workplace.num_classes} --img-size 64 --device cpu --workers 0 --no-console-results'
    paths = ('--data-dir', workplace.images / 'validation', '--checkpoint', workplace.folder / 'small' / 'last.pth.tar')
    results = ('--results-dir', workplace.folder / 'predictions', '--include-index')
    workplace.run('inference.py', '--model', 'harm_resnet50', *SMALL, *paths, *common.split(), *results)
    with (workplace.folder / 'predictions' / 'harm_resnet50-64.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == PER_CLASS['validation'] * workplace.num_classes
    assert all(0 <= int(row['index']) < workplace.num_classes and 0 < float(row['prob']) <= 1 for row in rows)


def test_onnx_export(workplace):
    """Fused: nothing but what a plain ResNet-18 has, and the outputs by onnxruntime, which the script compares."""
    onnx = pytest.importorskip('onnx', reason="timm's onnx_export.py writes ONNX")
    pytest.importorskip('onnxruntime', reason='onnx_export.py --check-forward runs it')
    torch.manual_seed(0)
    torch.save(timm.create_model('harm_resnet18').state_dict(), workplace.folder / 'weights.pth')
    options = ('--checkpoint', workplace.folder / 'weights.pth', '--img-size', 96, '--reparam', '--check-forward')
    workplace.run('onnx_export.py', workplace.folder / 'out.onnx', '--model', 'harm_resnet18', *options)
    operators = [node.op_type for node in onnx.load(workplace.folder / 'out.onnx').graph.node]
    assert operators.count('Conv') == 20
    assert not {'MatMul', 'BatchNormalization', 'Einsum', 'Reshape'} & set(operators)


def test_a_run_becomes_a_hub_folder(workplace, small_run):
    """What train.py leaves is what `convert` reads: options and weights."""
    out = workplace.folder / 'published'
    checkpoint = workplace.folder / 'small' / 'last.pth.tar'
    command = (sys.executable, '-m', 'timm_harmonic', 'convert', checkpoint, '--model', 'harm_resnet50', '--out', out)
    run(*command, cwd=workplace.folder)
    assert (out / 'train_hparams.yaml').read_text() == (workplace.folder / 'small' / 'args.yaml').read_text()
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == (3, 64, 64)
    trained = timm.create_model('harm_resnet50', layers=(1, 1, 1, 1), num_classes=workplace.num_classes).eval()
    trained.load_state_dict(workplace.checkpoint('small')['state_dict'])
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(images), trained(images))


TRUNCATED = CONFIG.with_name('finetune_truncated.yaml')


def command_line(workplace, *arguments):
    return run(sys.executable, '-m', 'timm_harmonic', *arguments, cwd=workplace.folder)


def test_truncate_fine_tune_validate_fuse_export(workplace, small_run):
    """All steps that the pages describe, with a network that was trained here."""
    onnx = pytest.importorskip('onnx', reason="timm's onnx_export.py writes ONNX")
    last = workplace.folder / 'small' / 'last.pth.tar'
    options = ('--ratio', 0.75, '--evaluate', workplace.images)
    command_line(workplace, 'compress', 'harm_resnet50', '--checkpoint', last, *options, '--out', 'truncated')
    record = json.loads((workplace.folder / 'truncated' / 'compression.json').read_text())
    assert record['report']['parameters'] <= 0.75 * record['report']['parameters_before']
    assert record['accuracy']['before']['top1'] == pytest.approx(float(small_run['eval_top1']), abs=1e-3)

    tune = (*workplace.common(), '--amp-dtype', 'bfloat16')  # in float16, a CPU takes minutes
    workplace.run('train.py', '-c', TRUNCATED, *workplace.output('tuned'), *tune)
    trained = workplace.summary('tuned')
    state = workplace.checkpoint('tuned')['state_dict']
    assert sum(value.numel() for key, value in state.items() if not key.endswith('num_batches_tracked')) < 20e6

    checkpoint = workplace.folder / 'tuned' / 'last.pth.tar'
    paths = ('--split', 'validation', '--model', 'local-dir:truncated', '--checkpoint', checkpoint)
    for reparam in ((), ('--reparam',)):
        result = workplace.run('validate.py', *paths, *workplace.common(), *reparam)
        found = json.loads(result.stdout.split('--result\n')[1])
        # Trained in bfloat16, validated in float32.
        assert found['top1'] == pytest.approx(trained['eval_top1'], abs=2.01 * workplace.one_image())

    options = ('--num-classes', workplace.num_classes, '--img-size', 64, '--reparam', '--check-forward')
    options = ('--model', 'local-dir:truncated', '--checkpoint', checkpoint, *options)
    workplace.run('onnx_export.py', workplace.folder / 'truncated.onnx', *options)
    operators = [node.op_type for node in onnx.load(workplace.folder / 'truncated.onnx').graph.node]
    assert not {'MatMul', 'BatchNormalization', 'Einsum', 'Reshape'} & set(operators)

    command_line(workplace, 'convert', checkpoint, '--model', 'local-dir:truncated', '--out', 'final')
    model = timm.create_model(f'local-dir:{workplace.folder / "final"}', pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_distillation_from_the_uncut_network(workplace):
    """The recipe with a teacher, both from folders; the fast form is trained."""
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=workplace.num_classes)
    student = timm_harmonic.harmonize(teacher, level=2, form={'layer4.*': 'separable'})
    for name, model in (('teacher', teacher), ('student', student)):
        timm.models.save_for_hf(model, workplace.folder / name)
    config = CONFIG.with_name('distill_truncated.yaml')
    networks = ('--model', 'local-dir:student', '--kd-model-name', 'local-dir:teacher')
    options = (*workplace.output('distilled'), *networks, *workplace.common(), '--amp-dtype', 'bfloat16')
    workplace.run('train.py', '-c', config, *options)
    workplace.summary('distilled')
    assert workplace.checkpoint('distilled')['state_dict']['layer4.1.conv2.weight'].shape == (512, 512, 3, 1)


def test_functions_of_each_channel_are_tuned_resumed_and_distilled(workplace):
    """The pairs stay, the coefficients learn, averages too; a folder is made of the last checkpoint."""
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=workplace.num_classes)
    student = timm_harmonic.truncate(timm_harmonic.harmonize(teacher, normalization='ortho'), ratio=0.4, per='channel')
    for name, model in (('uncut', teacher), ('pairs', student)):
        timm.models.save_for_hf(model, workplace.folder / name)
    own = dict(student.state_dict())
    kept = [key for key in own if key.endswith('.kept')]
    assert len(kept) > 5
    networks = ('--model', 'local-dir:pairs', *workplace.common(), '--amp-dtype', 'bfloat16')
    tune = ('-c', TRUNCATED, *networks, '--model-ema', '--model-ema-decay', 0.5)
    workplace.run('train.py', *tune, *workplace.output('paired'))
    workplace.summary('paired')
    again = ('--resume', workplace.folder / 'paired' / 'last.pth.tar', '--epochs', 2)
    workplace.run('train.py', *tune, *workplace.output('again'), *again)
    workplace.summary('again', epoch=1)
    config, teach = CONFIG.with_name('distill_truncated.yaml'), ('--kd-model-name', 'local-dir:uncut')
    workplace.run('train.py', '-c', config, *networks, *teach, *workplace.output('taught'))
    for name, averaged in (('paired', True), ('again', True), ('taught', False)):
        for key in ('state_dict', 'state_dict_ema')[: 1 + averaged]:
            state = workplace.checkpoint(name)[key]
            for mask in kept:
                assert torch.equal(state[mask], own[mask])
                weight = f'{mask.removesuffix("kept")}weight'
                assert state[weight].shape == own[weight].shape
                assert not torch.equal(state[weight], own[weight])
    last = workplace.folder / 'again' / 'last.pth.tar'
    command_line(workplace, 'convert', last, '--model', 'local-dir:pairs', '--out', 'tuned_pairs')
    model = timm.create_model(f'local-dir:{workplace.folder / "tuned_pairs"}', pretrained=True)
    state = workplace.checkpoint('again')['state_dict']
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_harmonized_by_its_options(workplace):
    """train.py builds and truncates the network. validate.py takes the same options, and a folder stores them."""
    kwargs = ('--model-kwargs', 'base_model=mobilenetv3_small_050', 'level=3', "levels={'blocks.4.*':2}")
    paths = ('--model', 'harmonized', *workplace.common(), *kwargs)
    ema = ('--model-ema', '--model-ema-decay', 0.5)
    workplace.run('train.py', *paths, *workplace.output('harmonized'), *ema, '--bn-eps', 0.01, '--drop-path', 0.1)
    trained = workplace.summary('harmonized')
    state = workplace.checkpoint('harmonized')['state_dict']
    assert state['blocks.3.0.conv_dw.weight'].shape[2:] == (6, 1)
    assert state['blocks.4.0.conv_dw.weight'].shape[2:] == (3, 1)
    checkpoint = ('--checkpoint', workplace.folder / 'harmonized' / 'last.pth.tar', '--use-ema')
    command_line(workplace, 'convert', checkpoint[1], '--use-ema', '--model', 'harmonized', '--out', 'options')
    folder = ('--model', 'local-dir:options', '--pretrained', *workplace.common())
    for options in ((*paths, 'bn_eps=0.01', *checkpoint), folder):
        result = workplace.run('validate.py', *options, '--split', 'validation')
        found = json.loads(result.stdout.split('--result\n')[1])
        assert found['top1'] == pytest.approx(trained['eval_top1'], abs=1e-3)
    loaded = timm.create_model(f'local-dir:{workplace.folder / "options"}', pretrained=True)
    assert {norm.eps for norm in loaded.modules() if hasattr(norm, 'running_var')} == {0.01}


def test_recipe_for_few_images(workplace):
    """The recommended network in one epoch of train.py, then validate.py, as it is and fused."""
    options = (*workplace.output('few'), *workplace.common(), '--warmup-epochs', 0, '--lr', 1e-4)
    workplace.run('train.py', '-c', CONFIG.with_name('small_data.yaml'), *options)
    trained = workplace.summary('few')
    network = '--model harm_resnet18 --model-kwargs smoothness=1.0 stem_pool=max --crop-pct 1.0 --split validation'
    options = (*network.split(), *workplace.common(), '--checkpoint', workplace.folder / 'few' / 'last.pth.tar')
    for reparam in ((), ('--reparam',)):
        result = workplace.run('validate.py', *options, *reparam)
        found = json.loads(result.stdout.split('--result\n')[1])
        assert found['top1'] == pytest.approx(trained['eval_top1'], abs=1.01 * workplace.one_image())


def test_gems_sets(workplace):
    """The options of a set train the network for an epoch, on pictures of two classes."""
    folder = workplace.folder / 'two'
    for split, label, number in itertools.product(('train', 'validation'), range(2), range(4)):
        path = folder / split / str(label) / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50 + 50 * label).convert('RGB').save(path)
    few = '--num-classes 2 --batch-size 4 --workers 0 --device cpu'
    paths = (*workplace.output('gem'), '--data-dir', folder)
    workplace.run('train.py', '-c', CONFIG.with_name('gem.yaml'), *gem_rows()['ciFAIR-10'], *paths, *few.split())
    workplace.summary('gem')


def test_the_page_sets_the_scripts_up(tmp_path):
    """docs/training.md, from an empty folder: the scripts find the configurations, and the installed timm."""
    root = Path(timm_harmonic.__file__).resolve().parents[1]
    page = (root / 'docs' / 'training.md').read_text(encoding='utf-8')
    block = re.search('```\\n(git clone.*?)```', page, re.DOTALL)[1]
    origin, place = tmp_path / 'origin', tmp_path / 'place'
    for folder in (origin, place):
        folder.mkdir()
    (origin / 'timm').mkdir()
    (origin / 'timm' / '__init__.py').write_text('raise ImportError("the clone\'s timm")')
    shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / 'train.py', origin)
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'init.defaultBranch=main']
    for command in (['init'], ['add', '.'], ['commit', '-m', 'x'], ['tag', f'v{timm.__version__}']):
        run(*git, *command, cwd=origin)
    addresses = {'https://github.com/huggingface/pytorch-image-models': f'file://{origin}', 'REPOSITORY': str(root)}
    for theirs, ours in addresses.items():
        assert block.count(theirs) == 1
        block = block.replace(theirs, ours)
    block = f'set -e\npip() {{ true; }}\n{block}\npython train.py -c train_configs/small_data.yaml --help\npwd'
    assert run('bash', '-c', block, cwd=place).stdout.endswith(f'{place}/scripts\n')
