"""train_configs/: every key is an option of timm's train.py, every model exists, and the recipe is the published one.

timm's scripts are in no package. tests/data/train_options.json is a snapshot of train.py's options. To renew it:

    TIMM_SCRIPTS=<checkout of pytorch-image-models> python tests/test_train_configs.py
"""

import argparse
import csv
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
from timm_harmonic.models.paper import PAPER
from timm_harmonic.small_data.training import CUTOUT, LIGHT, MIXUP, SMOOTHING, ZOOM, Recipe

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'train_configs').glob('*.yaml'))
SNAPSHOT = Path(__file__).parent / 'data' / 'train_options.json'

# Rows of the paper that have a file: all but one, which its harmonic twin's file names.
ROWS = [name for name in PAPER if name != 'harm0_seresnext101_32x4d']
# Rows for small images, by file.
_ROWS = csv.DictReader((ROOT / 'train_configs' / 'paper_small.csv').read_text(encoding='utf-8').splitlines())
SMALL = {name: row for row in _ROWS for name in row['files'].split()}
# Files that are no row of the paper.
OTHERS = [
    'harm_resnet50_a3',
    'finetune_truncated',
    'distill_truncated',
    'gem',
    'gem_scaled',
    'small_data',
    'small_data_strong',
]
# Rows whose recipe the authors publish.
SGD_ROWS = [name for name in ROWS if 'seresnext' not in name]
# GEM's sets in train_configs/README.md, and their numbers of classes.
GEM = {'ciFAIR-10': 10, 'CUB': 200, 'ISIC 2018': 7, 'CLaMM': 12}

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
    """Version of a checkout of timm, and its train.py's options: for each its type, nargs, choices and default."""
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


def check_optimizer(optimizer, model, **expected):
    """That each group has these options, and all parameters are in one."""
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_there_is_one_file_for_every_row():
    assert {path.stem for path in CONFIGS} == {*ROWS, *SMALL, *OTHERS}


def test_every_key_is_an_option_of_train_py():
    options = json.loads(SNAPSHOT.read_text())['options']
    assert {path.stem: problems(load(path.stem), options) for path in CONFIGS} == {path.stem: {} for path in CONFIGS}
    assert problems(dict(lr='1e-4', epochs=True, scale=0.08, nonsense=1), options).keys() == {
        *('lr', 'epochs', 'scale', 'nonsense')
    }


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get('TIMM_SCRIPTS'), reason='TIMM_SCRIPTS names no checkout of timm')
def test_options_of_the_checkout():
    options = read_train_options(Path(os.environ['TIMM_SCRIPTS']))['options']
    assert {path.stem: problems(load(path.stem), options) for path in CONFIGS} == {path.stem: {} for path in CONFIGS}


def test_the_model_exists_and_is_the_one_of_the_file_name():
    for name in (*ROWS, 'harm_resnet50_a3'):
        config = load(name)
        assert config['device_modules'] == ['timm_harmonic']
        assert config['model'] == name.removesuffix('_a3')
        drop = dict(drop_rate=config.get('drop', 0.0), drop_path_rate=config.get('drop_path'))
        model = timm.create_model(config['model'], **drop, **config.get('model_kwargs', {}), device='meta')
        assert model.num_classes == 1000


@pytest.mark.parametrize('name', ['harm_wrn28_10_cifar100', 'harm_wrn16_8_stl10'])
def test_small_images(name):
    """The network of the row, and the authors' recipe."""
    config, row, args = load(name), SMALL[name], arguments(name)
    words = (word.partition('=') for word in row['options'].split())
    assert config['model'] == row['model']
    assert config['model_kwargs'] == {key: yaml.safe_load(value) for key, _, value in words}
    expected = dict(device_modules=['timm_harmonic'], num_classes=100, img_size=32, epochs=200, batch_size=128)
    milestones = [60, 120, 160]
    if name.endswith('stl10'):
        expected |= dict(num_classes=10, img_size=96, epochs=1000, batch_size=32)
        milestones = [300, 400, 600, 800]
    assert {key: getattr(args, key) for key in expected} == expected
    model = timm.create_model(config['model'], num_classes=config['num_classes'], **config['model_kwargs'])
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    check_optimizer(optimizer, model, momentum=0.9, nesterov=False, weight_decay=5e-4)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    for epoch in range(1, args.epochs):
        scheduler.step(epoch)
        steps = sum(
            epoch + 1 >= milestone for milestone in milestones
        )  # at the start of the 60th epoch, as the authors
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 * 0.2**steps)


def test_the_rows_share_the_published_recipe():
    own = ('model', 'model_kwargs', 'drop')
    shared = {key: value for key, value in load('harm_resnet50').items() if key not in own}
    for name in SGD_ROWS:
        assert {key: value for key, value in load(name).items() if key not in own} == shared
        assert load(name)['drop'] == (0.5 if 'vgg' in name else 0.0)


def test_the_published_recipe_gives_the_papers_optimizer_and_rates():
    args = arguments('harm_resnet50')
    assert args.batch_size * 8 == 256
    model = timm.create_model(args.model, layers=(1, 1, 1, 1), num_classes=2)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    check_optimizer(optimizer, model, momentum=0.9, nesterov=False, dampening=0, weight_decay=1e-4)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == 100
    for epoch in range(epochs):
        # As train.py does: the first epoch has the rate of the new optimizer, the others what the schedule says.
        if epoch:
            scheduler.step(epoch)
        for update in range(10):
            scheduler.step_update(epoch * 10 + update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 * 0.1 ** (epoch // 30))


@pytest.mark.slow
def test_the_truncated_network_is_what_the_comment_makes(tmp_path, monkeypatch):
    """The command of the comment writes the folder that the file reads. Here, of another network without a download."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'train_configs' / 'finetune_truncated.yaml').read_text()
    command = re.search(r'^#   timm-harmonic (compress .+)$', text, re.MULTILINE).group(1).split()
    command = ['resnet18' if part == 'resnet50.a1_in1k' else part for part in command if part != '--pretrained']
    assert cli.main(command) == 0
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


@pytest.mark.parametrize('name', ['small_data', 'small_data_strong'])
def test_the_recommended_recipe_is_the_measured_one(name):
    """Network, optimizer and augmentation are those of benchmarks/small_data.py and `compare`."""
    args, strong = arguments(name), name.endswith('strong')
    recipe = Recipe()
    assert args.device_modules == ['timm_harmonic']
    model = timm.create_model(args.model, num_classes=5, **args.model_kwargs)
    assert model.conv1.smoothness == model.layer1[0].conv1.smoothness == 0.5
    assert (args.opt, args.lr, args.weight_decay) == (recipe.opt, recipe.lr, recipe.weight_decay)
    assert (args.batch_size, args.train_interpolation) == (recipe.batch_size, recipe.interpolation)
    assert tuple(args.scale) == ZOOM
    assert args.warmup_epochs == recipe.warmup_share * args.epochs
    found = (args.color_jitter, args.reprob, args.mixup, args.smoothing)
    assert found == ((LIGHT, CUTOUT, MIXUP, SMOOTHING) if strong else (0, 0, 0, 0))
    assert (args.remode == 'const', args.cutmix) == (strong, 0)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    assert isinstance(optimizer, torch.optim.AdamW)


def test_gems_protocol():
    args = arguments('gem')
    model = timm.create_model(args.model, num_classes=5, **args.model_kwargs)
    assert isinstance(model.maxpool, torch.nn.MaxPool2d)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    check_optimizer(optimizer, model, momentum=0.9, nesterov=False, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=20)
    assert epochs == 500
    for update in (0, 1, 5000, 9999):
        scheduler.step_update(update)
        expected = args.lr * (1 + math.cos(math.pi * update / 10_000)) / 2
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize('name', GEM)
def test_options_of_gems_sets(name):
    """train.py has them, and the network can be made with them."""
    options, found = json.loads(SNAPSHOT.read_text())['options'], {}
    for word in gem_rows()[name]:
        if word.startswith('--') and not word[2:3].isdigit():
            values = found.setdefault(word[2:].replace('-', '_'), [])
        else:
            values.append(yaml.safe_load(word))
    given = {key: values if options[key]['nargs'] else values[0] for key, values in found.items()}
    if 'model_kwargs' in found:
        words = (word.split('=') for word in found['model_kwargs'])
        given['model_kwargs'] = {option: yaml.safe_load(value) for option, value in words}
    assert problems(given, options) == {}
    config = load('gem') | given
    channels = dict(in_chans=config['in_chans']) if 'in_chans' in config else {}
    classes = dict(num_classes=config['num_classes'])
    model = timm.create_model(config['model'], **classes, **config['model_kwargs'], **channels, device='meta')
    assert model.num_classes == GEM[name]


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
