"""How fast truncated networks are when they are deployed, as ratios to the plain network.

    python -m benchmarks.deploy --out benchmarks/results

Every network is truncated to one level in all layers but its stem, and to shares of its measured time, then deployed.
All variants of a network alternate in one process with the plain network and a second plain one, the noise. In torch
each layer takes the form that is faster in the setting, in ONNX Runtime that of the rule. A network without weights is
as fast as a trained one: nothing here is about accuracy.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn
from tqdm import tqdm

from timm_harmonic import deploy, harmonize, truncate
from timm_harmonic.hub.deployed import export_onnx, onnx_runner

from .environment import environment
from .files import write
from .measure import Setting, compare

MODELS = (
    'resnet18',
    'resnet50',
    'harm_resnet50_progressive',
    'vgg16_bn',
    'regnety_008',
    'convnext_atto',
    'mobilenetv3_small_100',
)
LEVELS, SHARES = (3, 2, 1), (0.75, 0.5)
SETTINGS = {
    'contiguous': Setting('cpu'),
    'channels_last': Setting('cpu', channels_last=True),
    'channels_last, bf16': Setting('cpu', precision='bf16', channels_last=True),
    'compiled': Setting('cpu', compiled=True),
}
ONNX = ('ONNX Runtime', 'ONNX Runtime, int8')
_BATCHES = (1, 8)


def variants(name: str, images: Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Truncated networks by what tables call them, harmonic still, and why others cannot be made.

    A network of ours is lowered from the levels that it has.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(memory_format=_format(images))
    stem = get_pretrained_cfg_value(name, 'first_conv')
    whole = model if name.startswith('harm') else harmonize(model, exclude=stem)
    found, impossible = {'plain': whole}, {}
    for level in LEVELS:
        levels = {stem: None, '*': level} if name.startswith('harm') else {'*': level}
        found[f'level {level}'] = truncate(whole, levels=levels)
    for share in SHARES:
        try:
            found[f'{share:g} of the time'] = truncate(whole, ratio=share, cost='time', images=images)
        except ValueError as error:
            impossible[f'{share:g} of the time'] = str(error)
    return found, impossible


def _format(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def in_torch(name: str, setting: Setting, batch: int, size: int, budget: float) -> dict[str, Any]:
    """One row: all variants in a setting of torch."""
    images = setting.images(batch, size)
    with setting.autocast():
        harmonic, impossible = variants(name, images)
        networks = {key: deploy(model, images) for key, model in harmonic.items() if key != 'plain'}
    plain = {key: deploy(harmonic['plain'], form='dense') for key in ('plain', 'plain again')}
    runs = {key: _run(setting.place(network), setting, images) for key, network in {**plain, **networks}.items()}
    row = dict(runs=compare(runs, 'cpu', budget), impossible=impossible)
    torch.compiler.reset()
    return row


def _run(network: nn.Module, setting: Setting, images: Tensor) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        with setting.autocast():
            return network(images)

    return run


def in_onnx_runtime(name: str, int8: bool, batch: int, size: int, budget: float) -> dict[str, Any]:
    """One row: all variants in ONNX Runtime, int8 with statically quantised weights and activations."""
    images = Setting('cpu').images(batch, size)
    harmonic, impossible = variants(name, images)
    networks = {key: deploy(model) for key, model in harmonic.items() if key != 'plain'}
    plain = deploy(harmonic['plain'], form='dense')
    runs = {key: session(network, images, int8) for key, network in {'plain': plain, **networks}.items()}
    runs = {'plain': runs.pop('plain'), 'plain again': session(plain, images, int8), **runs}
    return dict(runs=compare(runs, 'cpu', budget), impossible=impossible)


def session(network: nn.Module, images: Tensor, int8: bool) -> Callable[[], Any]:
    """A run of a network in ONNX Runtime."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Random(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([dict(images=torch.randn(images.shape).numpy()) for _ in range(2)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        path, ready, quantised = (Path(folder) / name for name in ('fp32.onnx', 'ready.onnx', 'int8.onnx'))
        export_onnx(network, images, path)
        if int8:
            quant_pre_process(str(path), str(ready))
            quantize_static(str(ready), str(quantised), Random(), per_channel=True)
        runner = onnx_runner(quantised if int8 else path)
    return partial(runner, images)


def measure(name: str, setting: str, batch: int, size: int, budget: float) -> dict[str, Any]:
    """One row of the table."""
    if setting in SETTINGS:
        row = in_torch(name, SETTINGS[setting], batch, size, budget)
    else:
        row = in_onnx_runtime(name, setting == ONNX[1], batch, size, budget)
    return dict(model=name, setting=setting, batch=batch, size=size, **row)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    columns = ['plain again', *(f'level {level}' for level in LEVELS), *(f'{share:g} of the time' for share in SHARES)]
    lines = [
        '# Deployed networks against the plain one',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. Ratios of time to the plain network of the same round: median [quartiles]. "Plain again" is '
        'the noise. "0.5 of the time" is truncated to that share in this setting (in ONNX Runtime: of the time in '
        'torch); where it is empty, no levels are so fast. The stem is left alone.',
        '',
        f'| network | in | batch | plain, ms | {" | ".join(columns)} |',
        '|---' * (4 + len(columns)) + '|',
    ]
    for row in report['rows']:
        runs = row['runs']
        cells = [f'`{row["model"]}`', row['setting'], str(row['batch']), f'{1000 * runs["plain"]["seconds"]:.1f}']
        for column in columns:
            run = runs.get(column)
            cells.append(f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]' if run else '')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    every = [*SETTINGS, *ONNX]
    parser = argparse.ArgumentParser(prog='python -m benchmarks.deploy', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME')
    parser.add_argument('--settings', nargs='+', default=every, choices=every, metavar='NAME')
    parser.add_argument('--batches', nargs='+', type=int, default=list(_BATCHES), metavar='N')
    parser.add_argument('--size', type=int, default=224, help='side of the images')
    parser.add_argument('--budget', type=float, default=10, help='seconds for the rounds of one row')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for deploy.json and deploy.md')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    jobs = [(name, setting, batch) for name in args.models for setting in args.settings for batch in args.batches]
    torch.set_num_threads(args.threads)  # here for the environment's sake
    report: dict[str, Any] = dict(environment=environment(), rows=[])
    threads = dict(initializer=torch.set_num_threads, initargs=(args.threads,))
    with get_context('spawn').Pool(1, maxtasksperchild=1, **threads) as fresh:
        for name, setting, batch in tqdm(jobs, unit='row'):
            report['rows'].append(fresh.apply(measure, (name, setting, batch, args.size, args.budget)))
    write(report, table, args.out, 'deploy')


if __name__ == '__main__':
    main()
