"""Show the models and where their weights are.

Example:

  timm-harmonic list --json
"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `timm-harmonic list`."""
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> None:
    """Runs `timm-harmonic list`: prints the registered models as a table, or as JSON."""
    import json

    from rich.console import Console
    from rich.table import Table

    entries = inventory()
    if args.json:
        print(json.dumps(entries, indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ('model', 'params', 'stem', 'levels', 'weights'):
        table.add_column(title, justify='right' if title == 'params' else 'left', no_wrap=title in ('model', 'params'))
    for entry in entries:
        levels = ['all' if level is None else str(level) for level in entry['levels']] or ['plain']
        table.add_row(
            entry['model'],
            f'{entry["parameters"] / 1e6:.1f} M',
            entry['stem'],
            ' '.join(levels if len(set(levels)) > 1 else levels[:1]),
            ' '.join(w['name'].rpartition('.')[2] for w in entry['weights']),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        '\nstem: kernel size/stride, pooling; "plain" if it does not normalise responses.\n'
        'levels: one per stage. Level L keeps the frequencies with i + j < L.\n'
        'harmonized: any convolutional network of timm, with base_model=NAME and level= or levels=.\n'
    )
    for weights in (w for entry in entries for w in entry['weights']):
        source = f'{weights["hub"]} on the Hugging Face Hub' if weights['hub'] else weights['url']
        console.print(f'{weights["name"]}\n  {source}', soft_wrap=True)


def inventory() -> list[dict[str, Any]]:
    """One entry per registered model: size, stem, levels and weights. `harmonized` has none, as it is any model.

    Levels are None if all frequencies are kept, and empty if nothing but the stem is harmonic.
    """
    import timm

    return [_entry(name) for name in timm.list_models('harm*', exclude_filters='harmonized')]


def _entry(name: str) -> dict[str, Any]:
    import timm
    from timm.models import get_pretrained_cfg, list_pretrained

    from timm_harmonic import HarmonicBlock2d, HarmonicConv2d

    model = timm.create_model(name, device='meta')
    harmonic = any(isinstance(module, HarmonicConv2d) for module in model.modules())
    configs = {tagged: get_pretrained_cfg(tagged) for tagged in list_pretrained(f'{name}.*')}
    parameters, levels = sum(p.numel() for p in model.parameters()), [*model.levels] if harmonic else []
    first = model.get_submodule(model.pretrained_cfg['first_conv'])
    pool = {'MaxPool2d': ' max', 'AvgPool2d': ' avg'}.get(type(getattr(model, 'maxpool', None)).__name__, '')
    plain = '' if isinstance(first, HarmonicBlock2d) else ' plain'
    return dict(
        model=name,
        parameters=parameters,
        stem=f'{first.kernel_size[0]}x{first.kernel_size[1]}/{first.stride[0]}{pool}{plain}',
        levels=levels,
        weights=[dict(name=tagged, hub=cfg.hf_hub_id, url=cfg.url) for tagged, cfg in configs.items()],
    )
