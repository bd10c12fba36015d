"""The registered models: what each is, and where its weights are."""

import json
from typing import Any

import timm
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg, list_pretrained
from torch import nn

from .block import HarmonicBlock2d
from .conv import HarmonicConv2d
from .convert import ARCHITECTURE
from .pretrained import pinned_sha256

__all__ = ['inventory', 'print_inventory']


def inventory() -> list[dict[str, Any]]:
    """One entry per registered model, but for `harmonized`, which is any model.

    Returns:
        Dictionaries with the model's name, its parameters, its root (kernel/stride and pool), the levels of its stages
        (None keeps all frequencies; empty if only the root is harmonic, or nothing), and its weights: name, repository
        on the Hub, url, and whether a SHA-256 is pinned.
    """
    return [_entry(name) for name in timm.list_models('harm*', exclude_filters=ARCHITECTURE)]


def print_inventory(as_json: bool = False) -> None:
    """Prints the registered models as a table, or as JSON."""
    entries = inventory()
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    table = Table('model', 'params', 'root', 'levels', 'weights', box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[1].justify = 'right'
    for entry in entries:
        levels = ['all' if level is None else str(level) for level in entry['levels']] or ['plain']
        table.add_row(
            entry['model'],
            f'{entry["parameters"] / 1e6:.1f} M',
            entry['root'],
            ' '.join(levels if len(set(levels)) > 1 else levels[:1]),
            ' '.join(w['name'].rpartition('.')[2] for w in entry['weights']),
        )
    for column in table.columns:
        column.no_wrap = True
    console = Console(highlight=False)
    console.print(table)
    console.print(
        '\nroot: kernel/stride and pool; the responses are normalised unless it is plain.\n'
        'levels: one a stage; level L keeps the frequencies with i + j < L.\n'
        f'{ARCHITECTURE}: any convolutional network of timm, by base_model=NAME and level= or levels=.\n'
    )
    for weights in (w for entry in entries for w in entry['weights']):
        pinned = ', pinned' if weights['pinned'] else ''
        console.print(f'{weights["name"]}\n  {weights["hub"]} on the Hugging Face Hub{pinned},', soft_wrap=True)
        console.print(f'  else {weights["url"]}', soft_wrap=True)


def _entry(name: str) -> dict[str, Any]:
    model = timm.create_model(name, device='meta')
    harmonic = any(isinstance(module, HarmonicConv2d) for module in model.modules())
    weights = []
    for tagged in list_pretrained(f'{name}.*'):
        cfg = get_pretrained_cfg(tagged)
        pinned = pinned_sha256(cfg.notes) is not None
        weights.append(dict(name=tagged, hub=cfg.hf_hub_id, url=cfg.url, pinned=pinned))
    return dict(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        root=_root(model),
        levels=list(model.levels) if harmonic else [],
        weights=weights,
    )


def _root(model: nn.Module) -> str:
    root = model.get_submodule(model.pretrained_cfg['first_conv'])
    pool = {nn.MaxPool2d: ' max', nn.AvgPool2d: ' avg'}.get(type(getattr(model, 'maxpool', None)), '')
    plain = '' if isinstance(root, HarmonicBlock2d) else ' plain'
    return f'{root.kernel_size[0]}x{root.kernel_size[1]}/{root.stride[0]}{pool}{plain}'
