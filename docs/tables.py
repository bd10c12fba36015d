"""Fills the tables of the pages from their sources. `python docs/tables.py` writes them, `--check` lists what differs.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. The sources are timm_harmonic/models/paper.csv and
train_configs/paper_small.csv, the registered models, and the measurements in benchmarks/results.

paper_small.csv has what the READMEs in the authors' folders cifar and stl say: test errors on CIFAR-10 and CIFAR-100,
the median of five runs; test accuracies on STL-10, with ten folds of 1,000 images and with all 5,000. `options` are
ours, `files` those beside it.
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
from timm.models import get_pretrained_cfg  # noqa: E402

from benchmarks import compression, sizes, trained  # noqa: E402
from benchmarks.measure import Setting  # noqa: E402
from benchmarks.small_data import gains, over_tasks  # noqa: E402
from timm_harmonic.models.paper import PAPER  # noqa: E402
from timm_harmonic.small_data.results import interval  # noqa: E402
from timm_harmonic.small_data.training import MEANINGS  # noqa: E402

RESULTS = ROOT / 'benchmarks' / 'results'
PAPER_SMALL = list(
    csv.DictReader((ROOT / 'train_configs' / 'paper_small.csv').read_text(encoding='utf-8').splitlines())
)
BLOCK = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
# Recipes of train_configs that are not the paper's, by file.
RECIPES = dict(
    vgg16_bn='paper, learning rate assumed',
    harm_vgg16_bn='paper, learning rate assumed',
    harm_seresnext101_32x4d="timm's, not the paper's",
    harm_seresnext101_64x4d="timm's, not the paper's",
)
OTHER_FILES = dict(
    distill_truncated='for any truncated network, with a teacher',
    finetune_truncated='for any truncated network',
    gem="[GEM](https://github.com/lorenzobrigato/gem)'s, for few images",
    gem_scaled='the same, wider and longer, for 32 x 32',
    small_data='for few images',
    small_data_strong='for few images, strong augmentation',
    harm_resnet50_a3='[ResNet strikes back](https://arxiv.org/abs/2110.00476), A3',
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


_DEPLOYED = ('resnet18', 'resnet50', 'vgg16_bn', 'regnety_008')
FAMILIES = {
    'ResNet': r'harm\d?_resnet',
    'ResNeXt': r'harm\d?_resnext',
    'SE-ResNeXt': r'harm\d?_seresnext',
    'VGG': r'harm\d?_vgg',
    'wide ResNet, for 32 x 32 pixels': r'harm\d?_wrn',
    'any CNN in timm': 'harmonized',
}


def names() -> str:
    """Every name that timm.create_model takes, by family, and those of released weights with their tag."""
    rows = []
    for family, pattern in FAMILIES.items():
        of_family = [name for name in timm.list_models('harm*') if re.match(pattern, name)]
        configs = {name: get_pretrained_cfg(name) for name in of_family}
        weights = [f'`{name}.{config.tag}`' for name, config in configs.items() if config.has_weights]
        rows.append([family, ', '.join(f'`{name}`' for name in of_family), ', '.join(weights)])
    return markdown(['family', 'names', 'with released weights'], rows)


def models() -> str:
    """The paper's networks: errors from the paper, parameters counted on our models."""
    rows = []
    for name, row in PAPER.items():
        ours = name.startswith('harm')
        count = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
        weights = f'`.{get_pretrained_cfg(name).tag}`' if ours and get_pretrained_cfg(name).has_weights else ''
        model = f'`{name}`' if ours else f"`{name}` (timm's)"
        rows.append([model, row['title'], f'{count / 1e6:.1f}M', row['gmacs'], row['top1'], row['top5'], weights])
    errors = ('top-1 error, paper', 'top-5 error, paper')
    return markdown(['model', 'in the paper', 'parameters', 'GMACs', *errors, 'weights'], rows)


def paper() -> str:
    """One row per file of train_configs."""
    files = {path.stem for path in (ROOT / 'train_configs').glob('*.yaml')}
    rows = [
        [f'`{name}`', row['title'], row['top1'], row['top5'], RECIPES.get(name, 'paper')]
        for name, row in PAPER.items()
        if name in files
    ]
    small = {name for row in PAPER_SMALL for name in row['files'].split()}
    rows += [[f'`{name}`', 'none', '', '', OTHER_FILES[name]] for name in sorted(files - set(PAPER) - small)]
    return markdown(['file', 'row of the paper', 'top-1 error (paper)', 'top-5 error (paper)', 'recipe'], rows)


def paper_small() -> str:
    """The paper's networks for small images, and the files of train_configs that are for them."""
    rows = []
    for row in PAPER_SMALL:
        options = {key: float(value) for key, _, value in (of.partition('=') for of in row['options'].split())}
        options = {key: int(value) if value.is_integer() else value for key, value in options.items()}
        count = sum(p.numel() for p in timm.create_model(row['model'], device='meta', **options).parameters())
        model = f'`{row["model"]}`' + (f' `{row["options"]}`' if row['options'] else '')
        files = ', '.join(f'`{name}`' for name in row['files'].split())
        figures = [row[key] for key in ('cifar10', 'cifar100', 'stl10_folds', 'stl10')]
        rows.append([row['title'], model, f'{count / 1e6:.1f}M', *figures, files])
    errors = ['CIFAR-10 error, paper', 'CIFAR-100 error, paper']
    accuracies = ['STL-10 accuracy, folds, paper', 'all, paper']
    return markdown(['in the paper', 'model', 'parameters', *errors, *accuracies, 'file'], rows)


def speed() -> str:
    """Times as ratios to plain networks, from benchmarks/results/cpu.json and its kin for other versions of torch."""
    rows = []
    for path in sorted([*RESULTS.glob('torch-*/cpu.json'), RESULTS / 'cpu.json']):
        report = json.loads(path.read_text())
        version = report['environment']['torch'].partition('+')[0]
        of_settings = _ratios(report, 8)
        rows += [[name, version, *cells] for (name, how), cells in of_settings.items() if how == 'fp32, contiguous']
    return markdown(['network', 'torch', *_titles(8)], rows)


def speed_cuda() -> str:
    """The same on a GPU in all settings, from benchmarks/results/cuda.json."""
    of_settings = _ratios(json.loads((RESULTS / 'cuda.json').read_text()), 128)
    return markdown(['network', 'in', *_titles(128)], [[*which, *cells] for which, cells in of_settings.items()])


def _titles(batch: int) -> list[str]:
    each = ['harmonic', 'original']
    return ['eval, batch 1: fused', *each, f'batch {batch}: fused', *each, f'training step, batch {batch}', 'original']


def _ratios(report: dict[str, Any], batch: int) -> dict[tuple[str, str], list[str]]:
    """Ratios in the order of the titles, by network and setting, without compiled ones."""
    evaluation = [('eval', size, key) for size in (1, batch) for key in ('fused', 'harmonic', 'original')]
    columns = [*evaluation, ('train', batch, 'harmonic'), ('train', batch, 'original')]
    found: dict[tuple[str, str], dict[tuple[str, int], Any]] = {}
    for row in report['rows']:
        if not row['compiled']:
            how = str(Setting(row['device'], row['precision'], row['channels_last'])).removesuffix(', eager')
            found.setdefault((f'`{row["model"]}`', how), {})[row['mode'], row['batch']] = row['runs']
    return {
        which: [f'{runs[mode, size][key]["ratio"]:.2f}' for mode, size, key in columns] for which, runs in found.items()
    }


def truncation() -> str:
    """Accuracy of networks as cut, from benchmarks/results/compression.json, one column for each cut."""
    report = json.loads((RESULTS / 'compression.json').read_text())
    found = {(row['axis'], row['share'], row['method']): row for row in report['summary']}
    cuts = list(dict.fromkeys((axis, share) for axis, share, _ in found if axis))
    header = ['', *(f'{100 * share:.0f} % of the {compression.AXES[axis]}' for axis, share in cuts)]
    rows = []
    for method, title in compression.METHODS.items():
        of_method = [found[(*cut, method)] for cut in cuts]
        if of_method[0]['before'] is not None:
            rows.append([title, *(compression.cell(row['before'], row['before_deviation']) for row in of_method)])
    return markdown(header, rows)


def file_sizes() -> str:
    """Sizes of truncated networks' files in megabytes, from benchmarks/results/sizes.json."""
    report = json.loads((RESULTS / 'sizes.json').read_text())
    return markdown(['MB', *sizes.FILES.values()], [sizes.cells(row) for row in report['rows']])


def deployed() -> str:
    """Times at levels 2 and 1, from benchmarks/results/deploy.json: three networks that gain and one that does not."""
    rows = json.loads((RESULTS / 'deploy.json').read_text())['rows']
    found: dict[str, list[str]] = {}
    for row in rows:
        settings = ('channels_last', 'ONNX Runtime', 'ONNX Runtime, int8')
        if row['batch'] == 1 and row['setting'] in settings and row['model'] in _DEPLOYED:
            cells = found.setdefault(f'`{row["model"]}`', [])
            cells += [f'{row["runs"][name]["ratio"]:.2f}' for name in ('level 2', 'level 1')]
    where = ['PyTorch, channels_last', 'ONNX Runtime', '8 bits, of plain 8 bits']
    header = [f'{place}: level 2' if level == 2 else 'level 1' for place in where for level in (2, 1)]
    return markdown(['', *header], [[name, *cells] for name, cells in found.items()])


def detector_half() -> str:
    """The detector cut to half of its multiply-adds, from benchmarks/results/detector.json."""
    report = json.loads((RESULTS / 'detector.json').read_text())
    rows = []
    for row in report['rows']:
        if row['share'] in (0.5, None) or row['method'] == 'time':
            cells = []
            for kind, yardstick in (('float', 'float'), ('int8', 'of_int8')):
                cells += [
                    f'{row[kind]["error"]:.3f}',
                    f'{row[kind]["truth"]:.1f}',
                    f'{row[kind]["bytes"] / 1e6:.1f}',
                ]
                cells.append(f'{row["time"][yardstick]["ratio"]:.2f}' if row['time'] else '')
            rows.append([trained.title_of(row), *cells])
    header = ['error', 'F1', 'MB', 'time', '8 bits: error', 'F1', 'MB', 'time']
    return markdown(['cut to half of the multiply-adds', *header], rows)


def quickstart() -> str:
    """The quickstart with its defaults, from benchmarks/results/quickstart.json."""
    report = json.loads((RESULTS / 'quickstart.json').read_text())
    titles = {name: f'{meaning} (`{name}`)' for name, meaning in MEANINGS.items()}
    rows = []
    for name, of in report['networks'].items():
        kinds = ('accuracy', 'accuracy_as_trained')
        cells = [compression.cell(statistics.mean(of[kind]), statistics.stdev(of[kind])) for kind in kinds]
        gain = '' if name == 'harm0' else interval(of['difference'])
        rows.append([titles[name], *cells, gain, f'{of["parameters"]:,}'])
    header = ['model', 'test accuracy, %', 'as trained, %', 'minus plain (95 % interval)', 'parameters']
    return markdown(header, rows)


def small_data() -> str:
    """The small network of the evaluation with AdamW: differences to plain, over tasks and on the worst one."""
    report = json.loads((RESULTS / 'small_data_evaluation.json').read_text())
    rows = [row for row in report['rows'] if (row['group'], row['opt']) == ('small', 'adamw')]
    found, tasks = gains(rows), list(dict.fromkeys(row['task'] for row in rows))
    lines = []
    for name in dict.fromkeys(variant for variant, _ in found):
        worst = min(tasks, key=lambda task: found[name, task]['mean'])
        wins = sum(found[name, task]['mean'] > 0 for task in tasks)
        lowest = f'{worst}, {interval(found[name, worst])}'
        lines.append([name, interval(over_tasks(found, name, tasks)), f'{wins} of {len(tasks)}', lowest])
    return markdown(['points above plain', 'mean of the tasks', 'tasks above plain', 'worst task'], lines)


_ALL = (
    names,
    models,
    paper,
    paper_small,
    speed,
    speed_cuda,
    truncation,
    deployed,
    detector_half,
    file_sizes,
)
TABLES = {f.__name__: f for f in (*_ALL, quickstart, small_data)}


def fill(text: str) -> str:
    """A page with its tables filled again."""
    return BLOCK.sub(lambda match: f'{match[1]}{TABLES[match[2]]()}\n{match[3]}', text)


def main(check: bool) -> int:
    """Fills all pages, or lists those whose tables differ from their sources. Returns the exit code."""
    pages = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), ROOT / 'train_configs' / 'README.md']
    stale = []
    for page in pages:
        text = page.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(filled)
    if stale:
        print(f'{"differ from their sources" if check else "written"}: {", ".join(stale)}')
    return 1 if check and stale else 0


if __name__ == '__main__':
    sys.exit(main(check='--check' in sys.argv[1:]))
