"""What a device gets: sizes of the files of truncated networks, by level and by kind of file.

    python -m benchmarks.sizes --out benchmarks/results

Sizes do not depend on the weights, but for a few bytes: they are random. A minute a network.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg_value, reparameterize_model
from torch import nn
from tqdm import tqdm

from timm_harmonic import deploy, export_onnx, harmonize
from timm_harmonic.common.onnx import write_onnx

from .environment import environment
from .files import write

MODELS = ('resnet18', 'resnet50')
LEVELS = (None, 3, 2, 1)
# By what tables call them; the rule's form is separable at levels 1 and 2, where it has fewer multiply-adds.
FILES = {
    'weights': 'weights, .safetensors',
    'harmonic': 'ONNX, harmonic',
    'dense': 'ONNX, fused',
    'deployed': 'ONNX, deployed',
    'int8': 'ONNX, deployed, int8',
}
_SIZE = 224


def sizes(name: str, level: int | None) -> dict[str, int]:
    """Bytes of each kind of file of a network at a level, its stem left alone. None: the plain network."""
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, _SIZE, _SIZE)
    small = model
    if level is not None:
        small = harmonize(model, level=level, exclude=get_pretrained_cfg_value(name, 'first_conv'))
    found = dict(weights=len(safetensors.torch.save(small.state_dict())), dense=_onnx(reparameterize_model(small)))
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Any] = dict(int8=[torch.randn(8, 3, _SIZE, _SIZE)])
        if level is not None:
            kinds['deployed'] = None
        for kind, int8 in kinds.items():
            export_onnx(deploy(small), images, file := Path(folder, f'{kind}.onnx'), int8=int8)
            found[kind] = file.stat().st_size
    if level is not None:
        found['harmonic'] = _onnx(small)
    return found


def _onnx(network: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'network.onnx'
        write_onnx(network, torch.randn(2, 3, _SIZE, _SIZE), path)
        return path.stat().st_size


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table: the network, and megabytes of its files."""
    name = f'`{row["model"]}`, ' + ('plain' if row['level'] is None else f'level {row["level"]}')
    return [name, *(f'{row["bytes"][kind] / 1e6:.1f}' if kind in row['bytes'] else '' for kind in FILES)]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    lines = [
        '# Sizes of files',
        '',
        f'Measured with torch {env["torch"]}, timm {env["timm"]}, {env["date"]}. Megabytes of 10^6 bytes. The stem is '
        'left alone. Fused: every layer is one convolution of full size again. Deployed: separable at levels 1 and 2, '
        'by the rule of `deploy`. Int8 is static, by ONNX Runtime.',
        '',
        f'| network | {" | ".join(FILES.values())} |',
        '|---' * (1 + len(FILES)) + '|',
        *(f'| {" | ".join(cells(row))} |' for row in report['rows']),
    ]
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.sizes', description=__doc__.partition('\n')[0])
    parser.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for sizes.json and sizes.md')
    parser.add_argument('--show', type=Path, metavar='JSON', help='print the table of a saved run, run nothing')
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    torch.manual_seed(0)
    which = [(name, level) for name in args.models for level in LEVELS]
    rows = [dict(model=name, level=level, bytes=sizes(name, level)) for name, level in tqdm(which, unit='network')]
    write(dict(environment=environment(), rows=rows), table, args.out, 'sizes')


if __name__ == '__main__':
    main()
