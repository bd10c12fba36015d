"""How fast truncated networks are when they are deployed, as ratios to the plain network.

    python -m benchmarks.deploy --out benchmarks/results
    python -m benchmarks.deploy --device cuda --out benchmarks/results

Every network is truncated to one level in all layers but its stem, and to shares of its measured time, then deployed.
All variants of a network alternate in one process with the plain network and a second plain one, the noise. Each layer
takes the form that is faster in the setting; in 8 bits, that of floats in ONNX Runtime, where each session is alive
only while it is timed. A network without weights is as fast as a trained one: nothing here is about accuracy. Rows of
the report in --out stay if they are not measured again, and it was made by the same versions.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value, reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from timm_harmonic import deploy, export_onnx, harmonize, truncate
from timm_harmonic.conversion.costs import costs_of, set_forms
from timm_harmonic.conversion.timing import times_of
from timm_harmonic.conversion.truncate import budget_of, choose_levels, losses_by_filters

from .environment import environment
from .files import write
from .measure import Setting, as_ratios, compare, fresh_processes, usable

MODELS = (
    'resnet18',
    'resnet50',
    'harm_resnet50_progressive',
    'vgg16_bn',
    'regnety_008',
    'convnext_atto',
    'mobilenetv3_small_100',
)
LEVELS, SHARES = (3, 2, 1), (0.75, 0.6, 0.5)
SETTINGS = {
    'contiguous': Setting('cpu'),
    'channels_last': Setting('cpu', channels_last=True),
    'channels_last, bf16': Setting('cpu', precision='bf16', channels_last=True),
    'compiled': Setting('cpu', compiled=True),
    'CUDA': Setting('cuda'),
    'CUDA, channels_last': Setting('cuda', channels_last=True),
    'CUDA, channels_last, bf16': Setting('cuda', precision='bf16', channels_last=True),
}
ONNX = ('ONNX Runtime', 'ONNX Runtime, int8')
_BATCHES = dict(cpu=[1, 8], cuda=[1, 128])
_SLOW = ('channels_last, bf16', 'compiled')  # minutes a row: only for the first batch size


def variants(name: str, images: Tensor, runtime: str = 'torch') -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Truncated networks by what tables call them, harmonic still, and why others cannot be made.

    Their forms are the faster ones, measured once for all of them: what `truncate` and `deploy` do for each. A network
    of ours is lowered from the levels that it has.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(images.device, memory_format=_format(images))
    stem = get_pretrained_cfg_value(name, 'first_conv')
    whole = model if name.startswith('harm') else harmonize(model, exclude=stem)
    costs, losses = costs_of(whole, 'time', images, runtime), losses_by_filters(whole)
    top = {layer: max(of) for layer, of in costs.of.items()}
    choices: dict[str, dict[str, int]] = {}
    impossible = {}
    for level in LEVELS:
        choices[f'level {level}'] = {layer: most if layer == stem else min(level, most) for layer, most in top.items()}
    for share in SHARES:
        try:
            choices[f'{share:g} of the time'] = choose_levels(losses, costs, budget_of(costs, share))
        except ValueError as error:
            impossible[f'{share:g} of the time'] = str(error)
    found = {'plain': whole}
    for key, levels in choices.items():
        found[key] = truncate(whole, levels=levels)
        set_forms(found[key], {layer: costs.of[layer][level].form for layer, level in levels.items()})
    return found, impossible


def _format(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def in_torch(name: str, setting: Setting, batch: int, size: int, budget: float) -> dict[str, Any]:
    """One row: all variants in a setting of torch."""
    images = setting.images(batch, size)
    with setting.autocast():
        harmonic, impossible = variants(name, images)
        networks = {key: reparameterize_model(model) for key, model in harmonic.items() if key != 'plain'}
    plain = {key: deploy(harmonic['plain'], form='dense') for key in ('plain', 'plain again')}
    runs = {key: _run(setting.place(network), setting, images) for key, network in {**plain, **networks}.items()}
    row = dict(runs=compare(runs, setting.device, budget), impossible=impossible)
    torch.compiler.reset()
    return row


def _run(network: nn.Module, setting: Setting, images: Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        with setting.autocast():
            return network(images)

    return run


def in_onnx_runtime(name: str, settings: list[str], batches: list[int], size: int) -> list[dict[str, Any]]:
    """Rows of a network in ONNX Runtime, all from the same files. int8 has static ranges, of random images."""
    images = {batch: Setting('cpu').images(batch, size) for batch in batches}
    first = images[batches[0]]
    harmonic, impossible = variants(name, first, 'onnxruntime')
    plain = {key: deploy(harmonic['plain'], form='dense') for key in ('plain', 'plain again')}
    networks = {**plain, **{key: reparameterize_model(model) for key, model in harmonic.items() if key != 'plain'}}
    rows = []
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder:
            files = {key: Path(folder, f'{key}.onnx') for key in networks}
            for key, network in networks.items():
                export_onnx(
                    network, first, files[key], int8=[torch.randn(8, 3, size, size)] if setting == ONNX[1] else None
                )
            for batch, x in images.items():
                times = {key: [ms / 1000 for ms in of] for key, of in times_of(files, x).items()}
                of = dict(runs=as_ratios(times), impossible=impossible)
                rows.append(dict(model=name, setting=setting, batch=batch, size=size, **of))
    return rows


def measure(name: str, setting: str, batches: list[int], size: int, budget: float) -> list[dict[str, Any]]:
    """Rows of a network in a setting of torch."""
    rows = []
    for batch in batches[:1] if setting in _SLOW else batches:
        row = in_torch(name, SETTINGS[setting], batch, size, budget)
        rows.append(dict(model=name, setting=setting, batch=batch, size=size, **row))
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    columns = ['plain again', *(f'level {level}' for level in LEVELS), *(f'{share:g} of the time' for share in SHARES)]
    lines = [
        '# Deployed networks against the plain one',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. Ratios of time to the plain network of the same round: median [quartiles]. "Plain again" '
        'times plain against plain: the noise. "0.5 of the time" is truncated to that share in this setting '
        f'({report.get("shares", "in ONNX Runtime: of the time in torch")}); an empty cell means that no choice of '
        'levels reaches it. The stem stays as it is. Slow rows have batch 1 only. Rows that were not measured again '
        'may be some days older than the date.',
        '',
        f'| network | in | batch | plain, ms | {" | ".join(columns)} |',
        '|---' * (4 + len(columns)) + '|',
    ]
    for row in report['rows']:
        runs = row['runs']
        cells = [f'`{row["model"]}`', row['setting'], str(row['batch']), f'{1000 * runs["plain"]["seconds"]:.1f}']
        for column in columns:
            run = runs.get(column)
            none = '' if column in row['impossible'] else 'not measured'
            cells.append(f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]' if run else none)
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def with_saved(report: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """The report, with the rows of a saved one that it lacks."""
    if not path or not path.exists():
        return report
    saved = json.loads(path.read_text())
    versions = ('torch', 'timm', 'timm_harmonic', 'processor', 'threads')
    if any(saved['environment'][key] != report['environment'][key] for key in versions):
        return report

    def which(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ('model', 'setting', 'batch', 'size'))

    rows = {which(row): row for of in (saved, report) for row in of['rows']}
    return dict(report, rows=list(rows.values()))


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.deploy', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME')
    parser.add_argument('--device', type=usable, choices=sorted(_BATCHES), default='cpu')
    parser.add_argument('--settings', nargs='+', choices=[*SETTINGS, *ONNX], metavar='NAME')
    parser.add_argument('--batches', nargs='+', type=int, metavar='N')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--budget', type=float, default=5, help='seconds for the rounds of one row')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for deploy.json and deploy.md, or deploy-cuda')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    on_device = [name for name, setting in SETTINGS.items() if setting.device == args.device]
    on_device += ONNX if args.device == 'cpu' else []
    settings = [setting for setting in on_device if setting in (args.settings or on_device)]
    if elsewhere := {*(args.settings or [])} - {*settings}:
        parser.error(f'{", ".join(sorted(elsewhere))}: not on --device {args.device}')
    batches = args.batches or _BATCHES[args.device]
    jobs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    for name in args.models:
        jobs += [(measure, (name, key, batches, args.size, args.budget)) for key in settings if key not in ONNX]
        if in_onnx := [key for key in settings if key in ONNX]:
            jobs.append((in_onnx_runtime, (name, in_onnx, batches, args.size)))
    torch.set_num_threads(args.threads)  # here for the environment's sake
    report: dict[str, Any] = dict(
        environment=environment(args.device), shares='in 8 bits: of the time of floats', rows=[]
    )
    with fresh_processes(args.threads) as fresh:
        for function, options in tqdm(jobs):
            report['rows'] += fresh.apply(function, options)
    name = 'deploy' if args.device == 'cpu' else f'deploy-{args.device}'
    write(with_saved(report, args.out and args.out / f'{name}.json'), table, args.out, name)


if __name__ == '__main__':
    main()
