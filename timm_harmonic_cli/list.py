"""The registered models: what each is, and where its weights are."""

import json
from typing import Any

import timm
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg, list_pretrained

from timm_harmonic.conversion.harmonize import ARCHITECTURE
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.layers import HarmonicBlock2d, HarmonicConv2d
from timm_harmonic.models.weights import pinned_sha256


def inventory() -> list[dict[str, Any]]:
    """One entry per registered model, except `harmonized`, which is any model: size, stem, levels, and its weights.

    Levels are None where all frequencies are kept, and empty if only the stem is harmonic, or nothing.
    """
    return [_entry(name) for name in timm.list_models('harm*', exclude_filters=ARCHITECTURE)]


def print_inventory(as_json: bool = False) -> None:
    """Prints the registered models as a table, or as JSON."""
    entries = inventory()
    if as_json:
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
        '\nstem: kernel/stride and pool. Its responses are normalised unless it is plain.\n'
        'levels: one per stage. Level L keeps the frequencies with i + j < L.\n'
        f'{ARCHITECTURE}: any convolutional network of timm, by base_model=NAME and level= or levels=.\n'
    )
    for weights in (w for entry in entries for w in entry['weights']):
        pinned = ', pinned' if weights['pinned'] else ''
        console.print(f'{weights["name"]}\n  {weights["hub"]} on the Hugging Face Hub{pinned},', soft_wrap=True)
        console.print(f'  else {weights["url"]}', soft_wrap=True)


def _entry(name: str) -> dict[str, Any]:
    model = timm.create_model(name, device='meta')
    harmonic = any(isinstance(layer, HarmonicConv2d) for layer in harmonic_layers(model).values())
    weights = []
    for tagged in list_pretrained(f'{name}.*'):
        cfg = get_pretrained_cfg(tagged)
        weights.append(dict(name=tagged, hub=cfg.hf_hub_id, url=cfg.url, pinned=pinned_sha256(cfg.notes) is not None))
    parameters, levels = sum(p.numel() for p in model.parameters()), list(model.levels) if harmonic else []
    first = model.get_submodule(model.pretrained_cfg['first_conv'])
    pool = {'MaxPool2d': ' max', 'AvgPool2d': ' avg'}.get(type(getattr(model, 'maxpool', None)).__name__, '')
    plain = '' if isinstance(first, HarmonicBlock2d) else ' plain'
    stem = f'{first.kernel_size[0]}x{first.kernel_size[1]}/{first.stride[0]}{pool}{plain}'
    return dict(model=name, parameters=parameters, stem=stem, levels=levels, weights=weights)
