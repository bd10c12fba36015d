"""train_configs/: every key is an option of timm's train.py, every model exists, and the recipe is the published one.

timm's scripts are in no package. tests/data/train_options.json is a snapshot of train.py's options. To renew it:

    TIMM_SCRIPTS=<checkout of pytorch-image-models> python tests/test_train_configs.py
"""

import argparse
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_harmonic_cli as cli
from timm_harmonic.models.paper import PAPER, PAPER_SMALL
from timm_harmonic.small_data.training import ZOOM, Recipe

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'train_configs').glob('*.yaml'))
SNAPSHOT = Path(__file__).parent / 'data' / 'train_options.json'

# Rows of the paper that have a file: all but one, which its harmonic twin's file names.
ROWS = [name for name in PAPER if name != 'harm0_seresnext101_32x4d']
# Rows for small images, by file.
SMALL = {name: row for row in PAPER_SMALL for name in row['files'].split()}
# Files that are for one process and no row of the paper.
FEW_IMAGES = ['gem', 'small_data']
OTHERS = ['harm_resnet50_a3', 'finetune_truncated', 'distill_truncated', *FEW_IMAGES]
# Rows whose recipe the authors publish.
SGD_ROWS = [name for name in ROWS if 'seresnext' not in name]

# Runs a script until it uses a parser with many options, and prints these, wherever a version of timm keeps its parser.
# The script's folder is not put on sys.path, so it imports the installed timm.
_DUMP_OPTIONS = """
import argparse, json, runpy, sys

parse = argparse.ArgumentParser.parse_known_args

def dump(self, *args, **kwargs):
    if len(self._actions) < 50:
        return parse(self, *args, **kwargs)
    options = {}
    for action in self._actions:
        if action.dest == 'help':
            continue
        flag = isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction))
        mapping = type(action).__name__ == 'ParseKwargs'
        options[action.dest] = {
            'type': 'bool' if flag else 'dict' if mapping else action.type.__name__ if action.type else 'str',
            'nargs': None if flag or mapping else action.nargs,
            'choices': list(action.choices) if action.choices else None,
            'default': action.default,
        }
    print(json.dumps(options))
    raise SystemExit(0)

argparse.ArgumentParser.parse_known_args = dump
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name='__main__')
"""


def read_train_options(scripts: Path) -> dict:
    """Options of the train.py in a checkout of timm: for each its type, nargs, choices and default.

    Args:
        scripts: Folder of train.py.

    Returns:
        {'timm': version of the checkout, 'options': {name as in a YAML file: {...}}}.
    """
    command = [sys.executable, '-c', _DUMP_OPTIONS, str(Path(scripts).resolve() / 'train.py')]
    # Not in the checkout: `python -c` finds packages in the current folder first.
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent, check=False
    )
    assert result.returncode == 0, result.stderr
    version = re.search(r"__version__ = '(.+)'", (Path(scripts) / 'timm' / 'version.py').read_text())
    return {'timm': version.group(1), 'options': json.loads(result.stdout.splitlines()[-1])}


def problem(value, option: dict) -> str | None:
    """Why argparse would not give this value to this option; None if it would."""
    if value is None:
        return None if option['default'] is None else 'null, but the default is another value'
    if option['type'] == 'dict':
        return None if isinstance(value, dict) else 'not a mapping'
    many = option['nargs'] in ('+', '*') or isinstance(option['nargs'], int)
    if many != isinstance(value, list):
        return 'must be a list' if many else 'must not be a list'
    if isinstance(option['nargs'], int) and len(value) != option['nargs']:
        return f'must have {option["nargs"]} entries'
    accepted = {'bool': bool, 'int': int, 'float': (int, float), 'str': str}[option['type']]
    for item in value if many else [value]:
        # YAML reads 1e-4 as a string and yes as a boolean; a boolean is an int for isinstance.
        if not isinstance(item, accepted) or (isinstance(item, bool) and option['type'] != 'bool'):
            return f'{item!r} is no {option["type"]}'
        if option['choices'] and item not in option['choices']:
            return f'{item!r} is none of {option["choices"]}'
    return None


def problems(config: dict, options: dict) -> dict[str, str]:
    """Keys of a config that train.py would not take, and why."""
    found = {key: 'no such option' if key not in options else problem(config[key], options[key]) for key in config}
    return {key: why for key, why in found.items() if why}


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / 'train_configs' / f'{name}.yaml').read_text())


def arguments(name: str) -> argparse.Namespace:
    """What train.py's parser makes of a config."""
    options = json.loads(SNAPSHOT.read_text())['options']
    return argparse.Namespace(**({key: option['default'] for key, option in options.items()} | load(name)))


each_config = pytest.mark.parametrize('name', [path.stem for path in CONFIGS])


def test_there_is_one_file_for_every_row():
    assert {path.stem for path in CONFIGS} == {*ROWS, *SMALL, *OTHERS}


@each_config
def test_every_key_is_an_option_of_train_py(name):
    assert problems(load(name), json.loads(SNAPSHOT.read_text())['options']) == {}


@each_config
def test_options_of_the_checkout(name, live_options):
    assert problems(load(name), live_options) == {}


@pytest.fixture(scope='module')
def live_options():
    if not os.environ.get('TIMM_SCRIPTS'):
        pytest.skip('TIMM_SCRIPTS names no checkout of timm; its train.py is in no package')
    return read_train_options(Path(os.environ['TIMM_SCRIPTS']))['options']


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('learning_rate', 0.1),
        ('lr', '1e-4'),
        ('epochs', 2.5),
        ('epochs', True),
        ('amp', 1),
        ('scale', 0.08),
        ('model', ['harm_resnet50']),
        ('model_kwargs', 'levels=3'),
        ('input_size', [224, 224]),
        ('kd_distill_type', 'none'),
        ('opt', None),
    ],
)
def test_wrong_keys_and_values_are_noticed(key, value):
    assert key in problems({key: value}, json.loads(SNAPSHOT.read_text())['options'])


@pytest.mark.parametrize('name', [*ROWS, 'harm_resnet50_a3'])
def test_the_model_exists_and_is_the_one_of_the_file_name(name):
    config = load(name)
    assert config['device_modules'] == ['timm_harmonic']
    assert config['model'] == name.removesuffix('_a3')
    with torch.device('meta'):
        model = timm.create_model(
            config['model'],
            drop_rate=config.get('drop', 0.0),
            drop_path_rate=config.get('drop_path'),
            **config.get('model_kwargs', {}),
        )
    assert model.num_classes == 1000


@pytest.mark.parametrize('name', sorted({path.stem for path in CONFIGS} - {*SMALL, *FEW_IMAGES}))
def test_the_comment_states_the_total_batch(name):
    text, config = (ROOT / 'train_configs' / f'{name}.yaml').read_text(), load(name)
    stated = re.search(
        r'^# Batch: (\d+) per process x 8 processes (?:x (\d+) accumulated steps )?= (\d+) in total', text, re.MULTILINE
    )
    assert int(stated.group(1)) == config['batch_size']
    assert int(stated.group(2) or 1) == config['grad_accum_steps']
    assert int(stated.group(3)) == config['batch_size'] * 8 * config['grad_accum_steps']


def errors_of(name):
    """The paper's top-1 and top-5 errors in percent, at 224 and, where the row has them, at 320."""
    top1, top5 = (PAPER[name][key].split(' / ') for key in ('top1', 'top5'))
    return list(zip(top1, top5, strict=True))


def numbers(text):
    return re.findall(r'\d+\.\d\d', text)


@pytest.mark.parametrize('name', ROWS)
def test_the_comment_and_the_readme_state_the_papers_errors(name):
    comment = (ROOT / 'train_configs' / f'{name}.yaml').read_text().split('\n\n')[0].replace('\n# ', ' ')
    shown = re.search(r'Paper: top-1 error (.+?)\(', comment).group(1)
    assert numbers(shown) == list(sum(errors_of(name), ()))
    assert 'ot re-measured here' in comment
    readme = (ROOT / 'train_configs' / 'README.md').read_text()
    row = re.search(rf'^\| `{name}` \|.*$', readme, re.MULTILINE).group(0)
    assert numbers(row) == list(sum(zip(*errors_of(name), strict=True), ()))


def options_of(row):
    """Options of a row of the table for small images, as YAML has them."""
    return {key: yaml.safe_load(value) for key, _, value in (of.partition('=') for of in row['options'].split())}


@pytest.mark.parametrize('name', SMALL)
def test_small_images(name):
    """The network of the row, the authors' recipe, and their figures in the comment."""
    config, row, dataset = load(name), SMALL[name], name.rpartition('_')[2]
    assert config['device_modules'] == ['timm_harmonic']
    assert config['model'] == row['model']
    assert config['model_kwargs'] == options_of(row)
    model = timm.create_model(config['model'], num_classes=config['num_classes'], **config['model_kwargs'])
    assert config['num_classes'] == (100 if dataset == 'cifar100' else 10)
    size = 96 if dataset == 'stl10' else 32
    assert config['img_size'] == size
    epochs = dict(stl10=(1000, [300, 400, 600, 800])).get(dataset, (200, [60, 120, 160]))
    args = arguments(name)
    assert (args.epochs, args.decay_milestones) == epochs
    assert args.batch_size == (32 if dataset == 'stl10' else 128)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['weight_decay']) == (0.9, False, 5e-4)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    for epoch in range(1, args.epochs):
        scheduler.step(epoch)
        steps = sum(epoch + 1 >= milestone for milestone in epochs[1])  # at the start of the 60th epoch, as the authors
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 * 0.2**steps)
    comment = (ROOT / 'train_configs' / f'{name}.yaml').read_text().replace('\n# ', ' ')
    figures = [row['stl10'], row['stl10_folds']] if dataset == 'stl10' else [row[dataset]]
    plain = next(
        r for r in PAPER_SMALL if r['model'] == row['model'].replace('harm_', 'harm0_') and r['title'] != row['title']
    )
    figures += [plain['stl10'], plain['stl10_folds']] if dataset == 'stl10' else [plain[dataset]]
    stated = re.search(r'Paper: test (.+?)Not re-measured here', comment).group(1)
    assert numbers(stated) == numbers(' '.join(figures))


def test_the_file_of_the_twin_states_the_errors_of_the_baseline():
    """Of the one row without a file."""
    comment = (
        (ROOT / 'train_configs' / 'harm_seresnext101_32x4d.yaml').read_text().split('\n\n')[0].replace('\n# ', ' ')
    )
    shown = re.search(r'Its baseline in the paper, (.+?)--model harm0_seresnext101_32x4d', comment).group(1)
    assert numbers(shown) == list(sum(errors_of('harm0_seresnext101_32x4d'), ()))


@pytest.mark.parametrize('name', SGD_ROWS)
def test_the_rows_share_the_published_recipe(name):
    own = ('model', 'model_kwargs', 'drop')
    recipe = {key: value for key, value in load(name).items() if key not in own}
    assert recipe == {key: value for key, value in load('harm_resnet50').items() if key not in own}
    assert load(name)['drop'] == (0.5 if 'vgg' in name else 0.0)


def test_the_published_recipe_gives_the_papers_optimizer_and_rates():
    args = arguments('harm_resnet50')
    assert args.batch_size * 8 == 256
    model = timm.create_model(args.model, layers=(1, 1, 1, 1), num_classes=2)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['dampening']) == (0.9, False, 0)
        assert group['weight_decay'] == 1e-4
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == 100
    for epoch in range(epochs):
        # As train.py does: the first epoch has the rate of the new optimizer, the others what the schedule says.
        if epoch:
            scheduler.step(epoch)
        for update in range(10):
            scheduler.step_update(epoch * 10 + update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 * 0.1 ** (epoch // 30))


def test_the_truncated_network_is_what_the_comment_makes(tmp_path, monkeypatch):
    """The command of the comment writes the folder that the file reads. Here, of another network without a download."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'train_configs' / 'finetune_truncated.yaml').read_text()
    command = re.search(r'^#   timm-harmonic (compress .+)$', text, re.MULTILINE).group(1).split()
    assert (
        cli.main(['resnet18' if part == 'resnet50.a1_in1k' else part for part in command if part != '--pretrained'])
        == 0
    )
    config = load('finetune_truncated')
    model = timm.create_model(config['model'], pretrained=config['pretrained'])
    assert sum(p.numel() for p in model.parameters()) <= 0.75 * 11_689_512
    assert model.layer4[1].conv2.normalization == 'ortho'


def test_the_distilled_recipe_is_the_fine_tuned_one_with_a_teacher():
    own = {'kd_model_name', 'kd_distill_type', 'kd_temperature', 'distill_loss_weight', 'smoothing'}
    distilled, tuned = load('distill_truncated'), load('finetune_truncated')
    assert distilled.keys() - tuned.keys() == own - {'smoothing'}
    assert {key: value for key, value in distilled.items() if key not in own} == {
        key: value for key, value in tuned.items() if key not in own
    }
    assert timm.is_model_pretrained(distilled['kd_model_name'])


def test_the_a3_recipe_is_the_published_one():
    args = arguments('harm_resnet50_a3')
    published = dict(img_size=160, crop_pct=0.95, epochs=100, warmup_epochs=5, opt='lamb', lr=8e-3, weight_decay=0.02)
    published |= dict(sched='cosine', bce_loss=True, smoothing=0.0, mixup=0.1, cutmix=1.0, drop=0.0, drop_path=0.0)
    published |= dict(aug_repeats=0, reprob=0.0, hflip=0.5, model_ema=False, amp=True, clip_grad=None)
    assert {key: getattr(args, key) for key in published} == published
    assert args.aa.startswith('rand-m6-mstd0.5')


def readme_blocks():
    """What the Python of train_configs/README.md defines."""
    namespace = {}
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    for block in re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
        exec(compile(block, 'train_configs/README.md', 'exec'), namespace)
    return namespace


def gem_rows():
    """Options of GEM's sets in train_configs/README.md, by set."""
    text = (ROOT / 'train_configs' / 'README.md').read_text()
    rows = re.findall(r'^\| ([\w \d-]+) \| `(--[^`]+)` \| .+\|$', text, re.MULTILINE)
    return {name: options.split() for name, options in rows}


def test_the_recommended_recipe_is_the_measured_one():
    """Network, optimizer and crops are those of benchmarks/small_data.py."""
    args = arguments('small_data')
    recipe = Recipe()
    assert args.device_modules == ['timm_harmonic']
    model = timm.create_model(args.model, num_classes=5, **args.model_kwargs)
    assert model.conv1.smoothness == model.layer1[0].conv1.smoothness == 1
    assert (args.opt, args.lr, args.weight_decay) == (recipe.opt, recipe.lr, recipe.weight_decay)
    assert (args.batch_size, args.train_interpolation) == (recipe.batch_size, recipe.interpolation)
    assert tuple(args.scale) == ZOOM
    assert args.warmup_epochs == recipe.warmup_share * args.epochs
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    assert isinstance(optimizer, torch.optim.AdamW)


def test_gems_protocol():
    args = arguments('gem')
    model = timm.create_model(args.model, num_classes=5, **args.model_kwargs)
    assert isinstance(model.maxpool, torch.nn.MaxPool2d)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group['momentum'], group['nesterov'], group['weight_decay']) == (0.9, False, args.weight_decay)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=20)
    assert epochs == 500
    for update in (0, 1, 5000, 9999):
        scheduler.step_update(update)
        expected = args.lr * (1 + math.cos(math.pi * update / 10_000)) / 2
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize('name', ['ciFAIR-10', 'CUB', 'ISIC 2018', 'CLaMM'])
def test_options_of_gems_sets(name):
    """train.py has them, and the network can be made with them."""
    options, found = json.loads(SNAPSHOT.read_text())['options'], {}
    for word in gem_rows()[name]:
        if word.startswith('--') and not word[2:3].isdigit():
            values = found.setdefault(word[2:].replace('-', '_'), [])
        else:
            values.append(yaml.safe_load(word))
    given = {}
    for key, values in found.items():
        if key == 'model_kwargs':
            given[key] = dict(word.split('=') for word in values)
            given[key] = {option: yaml.safe_load(value) for option, value in given[key].items()}
        else:
            given[key] = values if options[key]['nargs'] else values[0]
    assert problems(given, options) == {}
    config = load('gem') | given
    channels = dict(in_chans=config['in_chans']) if 'in_chans' in config else {}
    model = timm.create_model(
        config['model'], num_classes=config['num_classes'], **config['model_kwargs'], **channels, device='meta'
    )
    assert (
        model.num_classes == dict(zip(['ciFAIR-10', 'CUB', 'ISIC 2018', 'CLaMM'], [10, 200, 7, 12], strict=True))[name]
    )


def test_a_quarter_of_each_class_is_split_off(tmp_path):
    for name, count in (('a', 8), ('b', 5)):
        for place in range(count):
            path = tmp_path / 'train' / name / f'{place}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{name}{place}')
    readme_blocks()['split'](tmp_path / 'train', tmp_path / 'search')
    for name, kept, out in (('a', 6, 2), ('b', 3, 2)):
        folders = [tmp_path / 'search' / part / name for part in ('train', 'validation')]
        parts = [{path.read_text() for path in folder.iterdir()} for folder in folders]
        assert [len(part) for part in parts] == [kept, out]
        assert not parts[0] & parts[1]


def test_gems_splits_become_image_folders(tmp_path):
    images = tmp_path / 'images'
    (images / 'birds').mkdir(parents=True)
    for name in ('birds/a', 'birds/b', 'c'):
        (images / f'{name}.jpg').write_text(name)
    (tmp_path / 'train0.txt').write_text('birds/a 0\nbirds/b 0\nc 11\n')
    readme_blocks()['from_split'](tmp_path / 'train0.txt', images, '.jpg', tmp_path / 'train')
    written = {str(path.relative_to(tmp_path / 'train')): path.read_text() for path in tmp_path.glob('train/*/*')}
    assert written == {'0/a.jpg': 'birds/a', '0/b.jpg': 'birds/b', '11/c.jpg': 'c'}


def test_cifar_becomes_an_image_folder(tmp_path):
    """Of each class the same slice, over all batches, in their order."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3072), dtype=np.uint8)
    for number, half in enumerate((slice(0, 4), slice(4, 8))):
        batch = dict(data=pixels[half], labels=[0, 1, 0, 1])
        (tmp_path / f'data_batch_{number}').write_bytes(pickle.dumps(batch))
    batches = [tmp_path / f'data_batch_{number}' for number in (0, 1)]
    readme_blocks()['from_cifar'](batches, tmp_path / 'train', slice(1, 3))
    found = {str(path.relative_to(tmp_path / 'train')): path for path in tmp_path.glob('train/*/*')}
    places = {'0/00000.png': 2, '0/00001.png': 4, '1/00000.png': 3, '1/00001.png': 5}
    assert found.keys() == places.keys()
    for name, place in places.items():
        with Image.open(found[name]) as image:
            assert (np.asarray(image).transpose(2, 0, 1).ravel() == pixels[place]).all()


if __name__ == '__main__':
    text = json.dumps(read_train_options(Path(os.environ['TIMM_SCRIPTS'])), indent=1, sort_keys=True)
    SNAPSHOT.write_text(text + '\n')
