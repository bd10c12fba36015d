"""Show the models and where their weights are.

Example:

  timm-harmonic list
"""

import argparse

from . import show


def add_arguments(parser: argparse.ArgumentParser) -> None: ...


def run(args: argparse.Namespace) -> None:
    import timm
    from rich.table import Table
    from timm.models import get_pretrained_cfg, list_pretrained

    from timm_harmonic import HarmonicBlock2d, HarmonicConv2d

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ('model', 'params', 'stem', 'levels', 'weights'):
        table.add_column(title, justify='right' if title == 'params' else 'left', no_wrap=title in ('model', 'params'))
    sources = []
    for name in timm.list_models('harm*', exclude_filters='harmonized'):
        model = timm.create_model(name, device='meta')
        harmonic = any(isinstance(module, HarmonicConv2d) for module in model.modules())
        levels = ['all' if level is None else str(level) for level in model.levels] if harmonic else ['plain']
        first = model.get_submodule(model.pretrained_cfg['first_conv'])
        pool = {'MaxPool2d': ' max', 'AvgPool2d': ' avg'}.get(type(getattr(model, 'maxpool', None)).__name__, '')
        plain = '' if isinstance(first, HarmonicBlock2d) else ' plain'
        tagged = list_pretrained(f'{name}.*')
        table.add_row(
            name,
            f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M',
            f'{first.kernel_size[0]}x{first.kernel_size[1]}/{first.stride[0]}{pool}{plain}',
            ' '.join(levels if len(set(levels)) > 1 else levels[:1]),
            ' '.join(weights.rpartition('.')[2] for weights in tagged),
        )
        for weights in tagged:
            cfg = get_pretrained_cfg(weights)
            sources += [weights, f'  {cfg.hf_hub_id} on the Hugging Face Hub' if cfg.hf_hub_id else f'  {cfg.url}']
    show(table)
    print(
        '\nstem: kernel size/stride, pooling; "plain" if it does not normalise responses.\n'
        'levels: one per stage. Level L keeps the frequencies with i + j < L.\n'
        'harmonized: any convolutional network of timm, with base_model=NAME and level= or levels=.\n',
        *sources,
        sep='\n',
    )
