"""The model card of a Hub repository: card.md, filled with what a network is and where its weights come from."""

import copy
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from timm.models import get_model_args, get_pretrained_cfg, list_pretrained, reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..conversion.convolutions import harmonic_layers
from ..layers import HarmonicBlock2d
from ..models.download import pinned_sha256
from ..models.paper import REPOSITORY
from .provenance import Provenance

# How the package is installed today. Cards and pages say it from here.
INSTALL = '`pip install .` in a checkout of timm-harmonic'


def count(model: nn.Module) -> dict[str, int]:
    """Multiply-adds, and activations of convolutions and linear layers, of the fused network for one image."""
    fused = reparameterize_model(copy.deepcopy(model).to('meta')).eval()
    outputs: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output.numel())

    for module in fused.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        fused(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return dict(macs=counter.get_total_flops() // 2, activations=sum(outputs))


def model_card(model: nn.Module, place: str, source: Provenance, license: str = '', dataset: str = '') -> ModelCard:
    """The card of a network with its weights, front matter included.

    `place` is what timm loads it by: hf-hub:organisation/name, or local-dir:FOLDER.
    """
    data = ModelCardData(
        license=license or None,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'harmonic-networks'],
        datasets=[dataset] if dataset else None,
    )
    args, layers = get_model_args(model), harmonic_layers(model).values()
    channels, height, width = model.pretrained_cfg['input_size']
    about = dict(
        name=re.split('[:/]', place)[-1],
        architecture=model.pretrained_cfg['architecture'],
        base_model=repr(args['base_model']) if 'base_model' in args else '',
        layers=_layers(model),
        separable=sum(layer.form == 'separable' for layer in layers),
        kept=sum(layer.weight.numel() for layer in layers),
        full=sum(layer.weight.numel() // len(layer.basis) * layer.basis[0].numel() for layer in layers),
        parameters=sum(p.numel() for p in model.parameters()),
        classes=model.num_classes,
        features=model.num_features,
        width=args.get('channels'),
        options=_options(args),
        released=_released(place) if source.url else [],
    )
    size = dict(channels=channels, height=height, image_width=width)
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name('card.md')),
        **dict(
            about,
            **count(model),
            **size,
            place=place,
            place_literal=repr(place),
            source=source,
            license=license,
            dataset=dataset,
        ),
        **dict(version=version('timm-harmonic'), repository=REPOSITORY, install=INSTALL),
    )


def _options(args: dict[str, Any]) -> str:
    """Options as in Python. One that names every layer is only mentioned."""
    shown = {key: value for key, value in args.items() if key not in ('num_classes', 'in_chans', 'global_pool')}
    return ', '.join(
        f'`{key}` of {len(value)} layers, in config.json'
        if isinstance(value, (dict, list)) and len(value) > 4
        else f'`{key}={value!r}`'
        for key, value in shown.items()
    )


def _layers(model: nn.Module) -> str:
    found: Counter[str] = Counter()
    for layer in harmonic_layers(model).values():
        functions, side = layer.basis.shape[:2]
        normalised = ', normalised responses' if isinstance(layer, HarmonicBlock2d) else ''
        found[f'{side} x {side} with {functions} of {side * side} functions ({layer.named_basis()}){normalised}'] += 1
    return '; '.join(f'{number} of {text}' for text, number in found.items())


def _released(place: str) -> list[tuple[str, str]]:
    """The released weights, and what the paper says about each."""
    rows = []
    for name in list_pretrained('harm*'):
        cfg = get_pretrained_cfg(name)
        if cfg.origin_url == REPOSITORY and cfg.notes:
            title = f'**{name}**' if place.endswith(f'/{name}') else name
            rows.append((title, '; '.join(note for note in cfg.notes if not pinned_sha256(note))))
    return rows
