"""The card of a folder: what is said about a network and its weights, and where they come from."""

import copy
import dataclasses
import re
import shlex
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from timm.models import get_model_args, model_entrypoint, reparameterize_model
from torch import nn

from ..common.images import noted_scale
from ..conversion.costs import count_macs
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicBlock2d
from ..models.paper import REPOSITORY

INSTALL = '`git clone` its repository and run `pip install .` in it'  # cards and pages say how from here


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where weights come from. Fields that do not apply are empty."""

    file: str = ''  # name of the source file
    sha256: str = ''  # of the source file, 64 hex digits
    url: str = ''  # where the authors released the source file
    notes: tuple[str, ...] = ()  # what the paper says about the weights
    epoch: int | None = None  # of the training run, counted from 0
    averaged: bool = False  # whether the file's averaged weights were taken
    run: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the training run
    base: str = ''  # the network, if its weights did not come from a file


def model_card(model: nn.Module, place: str, source: Provenance, license: str = '', dataset: str = '') -> ModelCard:
    """The card of a network, with front matter. timm loads it by `place`: hf-hub:ORG/NAME or local-dir:FOLDER."""
    args, layers, cfg = get_model_args(model), harmonic_layers(model).values(), model.pretrained_cfg
    of_package = model_entrypoint(cfg['architecture']).__module__.startswith(__name__.partition('.')[0])
    ours = bool(layers) or of_package  # the package is needed to load it
    data = ModelCardData(
        license=license or None,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', *(['harmonic-networks'] if ours else [])],
        datasets=[dataset] if dataset else None,
    )
    fused = reparameterize_model(copy.deepcopy(model).to('meta')).eval()
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name('card.md')),
        name=re.split('[:/]', place)[-1],
        args=args,
        cfg=cfg,
        layers=_layers(model),
        separable=sum(layer.form == 'separable' or layer.mixtures is not None for layer in layers),
        kept=sum(sum(x.numel() for x in (layer.weight, layer.mixtures) if x is not None) for layer in layers),
        full=sum(x.out_channels * x.in_channels // x.groups * x.basis[0].numel() for x in layers),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(fused, torch.empty(1, *cfg['input_size'], device='meta')),
        model=model,
        scale=noted_scale(cfg.get('notes')),
        place_literal=repr(place),
        place_shell=shlex.quote(place),
        source=source,
        license=license,
        dataset=dataset,
        version=version('timm-harmonic'),
        repository=REPOSITORY,
        install=INSTALL if ours else '',
    )


def _layers(model: nn.Module) -> str:
    found: Counter[str] = Counter()
    for layer in harmonic_layers(model).values():
        functions, side = layer.basis.shape[:2]
        normalised = ', normalised responses' if isinstance(layer, HarmonicBlock2d) else ''
        found[f'{side} x {side} with {functions} of {side * side} functions ({layer.named_basis()}){normalised}'] += 1
    return '; '.join(f'{number} of {text}' for text, number in found.items())
