"""Show the models and where their weights are.

docs/models.md says more about each. Example:

  timm-harmonic list
"""

import argparse

from . import show


def add_arguments(parser: argparse.ArgumentParser) -> None: ...


def run(args: argparse.Namespace) -> None:
    import timm
    from rich.table import Table
    from timm.models import get_pretrained_cfg, list_pretrained

    table, sources = Table('model', 'parameters', 'weights', box=None, pad_edge=False), []
    for name in timm.list_models('harm*', exclude_filters='harmonized'):
        size = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
        tagged = list_pretrained(f'{name}.*')
        table.add_row(name, f'{size / 1e6:.1f} M', ' '.join(weights.rpartition('.')[2] for weights in tagged))
        for weights in tagged:
            cfg = get_pretrained_cfg(weights)
            sources += [weights, f'  {cfg.hf_hub_id} on the Hugging Face Hub' if cfg.hf_hub_id else f'  {cfg.url}']
    show(table)
    about = '\nharmonized: any convolutional network of timm, with base_model=NAME and level= or levels=.\n'
    print(about, *sources, sep='\n')
