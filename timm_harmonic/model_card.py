"""The model card of a Hub repository: what a network is, where its weights are from, and what was measured."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, list_pretrained, reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .block import HarmonicBlock2d
from .conv import HarmonicConv2d
from .pretrained import REPOSITORY, pinned_sha256

__all__ = ['CITATION', 'Provenance', 'Stats', 'coefficients', 'count', 'model_card']

CITATION = """\
@article{Ulicny22,
  title   = {Harmonic convolutional networks based on discrete cosine transform},
  author  = {Ulicny, Matej and Krylov, Vladimir A. and Dahyot, Rozenn},
  journal = {Pattern Recognition},
  volume  = {129},
  pages   = {108707},
  year    = {2022},
  doi     = {10.1016/j.patcog.2022.108707}
}"""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where weights come from.

    Attributes:
        file: Name of the source file, empty if there was none.
        sha256: Of the source file, 64 hex digits.
        url: Where the source file was released; empty if it is not a released one.
        notes: What the paper says about them.
        epoch: The training run's epoch that the file is of, counted from 0.
        averaged: Whether the file's averaged weights were taken.
        run: The training run's options; empty if there was none beside the file.
        summary: The run's figures of that epoch, by the names in its summary.csv.
        base: The weights of timm that were compressed; empty if there was a file.
    """

    file: str = ''
    sha256: str = ''
    url: str = ''
    notes: tuple[str, ...] = ()
    epoch: int | None = None
    averaged: bool = False
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: dict[str, str] = dataclasses.field(default_factory=dict)
    base: str = ''


@dataclasses.dataclass(frozen=True)
class Stats:
    """Size and cost of a network, one image at a time.

    Attributes:
        parameters: Trainable ones, before fusing.
        macs: Multiply-adds of one forward pass after fusing.
        activations: Values that convolutions and linear layers put out in it.
        input_size: (C, H, W) of the image.
    """

    parameters: int
    macs: int
    activations: int
    input_size: tuple[int, int, int]


def count(model: nn.Module) -> Stats:
    """Counts parameters, multiply-adds and activations; on the meta device, so that nothing is computed.

    Args:
        model: Network with a `pretrained_cfg`, which says the size of the images.

    Returns:
        The counts.
    """
    fused = reparameterize_model(copy.deepcopy(model).to('meta')).eval()
    size = tuple(model.pretrained_cfg['input_size'])
    outputs: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output.numel())

    for module in fused.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        fused(torch.empty(1, *size, device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    return Stats(parameters, counter.get_total_flops() // 2, sum(outputs), size)


def coefficients(model: nn.Module) -> tuple[int, int]:
    """How many coefficients the harmonic layers of a network have, and would have with all frequencies."""
    kept = full = 0
    for layer in model.modules():
        if isinstance(layer, (HarmonicConv2d, HarmonicBlock2d)):
            functions, side = layer.basis.shape[:2]
            kept += layer.weight.numel()
            full += layer.weight.numel() // functions * side * side
    return kept, full


def model_card(
    model: nn.Module, repo_id: str, source: Provenance, license: str, dataset: str = '', version: str = ''
) -> ModelCard:
    """The card of one repository.

    Args:
        model: Network with the weights.
        repo_id: Where the card is to be: `organisation/name`.
        source: Where the weights are from.
        license: Identifier of the weights' licence.
        dataset: Identifier of the data on the Hub, empty if it is not there.
        version: Of this package.

    Returns:
        The card, with its front matter.
    """
    data = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'harmonic-networks'],
        datasets=[dataset] if dataset else None,
    )
    sections = [
        f'# Model card for {repo_id.rpartition("/")[2]}',
        _description(model, source),
        '## Model Details\n' + '\n'.join(_details(model, source, license, dataset, version)),
        '## Model Usage\n' + _usage(repo_id, model),
        *([f'## Model Comparison\n{_comparison(repo_id)}'] if source.url else []),
        f'## Citation\n```bibtex\n{CITATION}\n```',
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n')


def _description(model: nn.Module, source: Provenance) -> str:
    cfg = model.pretrained_cfg
    harmonic = [m for m in model.modules() if isinstance(m, (HarmonicConv2d, HarmonicBlock2d))]
    kind = 'harmonic network: its filters are learned combinations of fixed DCT functions'
    if not harmonic:
        kind = 'plain network, a baseline of harmonic networks'
    trained = 'Trained with timm. ' if source.run else ''
    if source.url:
        trained = 'Trained by the authors of the paper on ImageNet-1k. '
    base = f' (`base_model={model._model_args["base_model"]!r}`)' if 'base_model' in model._model_args else ''
    parts = [
        f'Weights of `{cfg["architecture"]}`{base}, a {kind}. {trained}Converted by '
        '[timm-harmonic](https://pypi.org/project/timm-harmonic), which registers the architecture in timm.'
    ]
    kept, full = coefficients(model)
    if kept < full:
        whole = sum(p.numel() for p in model.parameters()) + full - kept
        parts.append(
            f'**Compressed:** the harmonic layers keep {kept:,} of {full:,} coefficients ({kept / full:.1%}), the low '
            f'frequencies. With all of them the network would have {whole:,} parameters. Multiply-adds are the same.'
        )
    if model.in_chans != 3:
        parts.append(f'**Input:** images of {model.in_chans} channel{"s" * (model.in_chans > 1)}, not three.')
    if 'channels' in model._model_args:
        parts.append(f'**Reduced width:** `channels={model._model_args["channels"]}`.')
    return '\n\n'.join(parts)


def _details(model: nn.Module, source: Provenance, license: str, dataset: str, version: str) -> list[str]:
    stats = count(model)
    channels, height, width = stats.input_size
    lines = [
        '- **Model Type:** Image classification / feature backbone',
        f'- **Model Stats:** (measured when this card was written, timm-harmonic {version}; multiply-adds and '
        'activations after fusing)',
        f'  - Params (M): {stats.parameters / 1e6:.2f}',
        f'  - GMACs: {stats.macs / 1e9:.2f}',
        f'  - Activations (M): {stats.activations / 1e6:.2f}',
        f'  - Image size: {height} x {width}, {channels} channel{"s" * (channels > 1)}',
        f'- **Classes:** {model.num_classes}',
        f'- **Harmonic layers:** {_layers(model)}',
        '- **Papers:**',
        '  - Harmonic Convolutional Networks based on Discrete Cosine Transform: https://arxiv.org/abs/2001.06570',
        '  - Harmonic Networks for Image Classification (BMVC 2019)',
    ]
    if options := {k: v for k, v in model._model_args.items() if k not in ('num_classes', 'in_chans', 'global_pool')}:
        lines.append(f'- **Options:** {", ".join(_option(k, v) for k, v in options.items())}')
    if dataset:
        lines.append(f'- **Dataset:** {dataset}')
    lines.append(f'- **Source:** {source.url or source.file or source.base}')
    if source.sha256:
        lines.append(f'  - SHA-256: `{source.sha256}`')
    if source.url:
        lines.append(f"  - converted from the authors' release ({REPOSITORY})")
        lines.append("- **Results on ImageNet-1k:** the figures are the paper's")
        lines += [f'  - {note}' for note in source.notes]
    if source.averaged:
        lines.append('  - averaged weights (EMA)')
    if source.epoch is not None:
        lines.append(f'  - epoch {source.epoch} of its run, counted from 0')
    if source.summary:
        whose = 'averaged weights' if source.run.get('model_ema') else 'weights'
        lines.append(f'- **Results:** measured by the run itself (summary.csv) on its validation data, its {whose}')
        lines += [f'  - {name}: {float(value):.3f}' for name, value in source.summary.items() if value]
        if source.run.get('model_ema') and not source.averaged:
            lines.append('  - these are not the weights in this repository, which were not averaged')
    lines.append(f'- **License:** {license}')
    return lines


def _option(name: str, value: Any) -> str:
    """An option as in Python; one that names every layer only says so."""
    listed = isinstance(value, (dict, list)) and len(value) > 4
    return f'`{name}` of {len(value)} layers, in config.json' if listed else f'`{name}={value!r}`'


def _layers(model: nn.Module) -> str:
    found: dict[str, int] = {}
    for layer in model.modules():
        if isinstance(layer, (HarmonicConv2d, HarmonicBlock2d)):
            functions, side = layer.basis.shape[:2]
            normalised = ', normalised responses' if isinstance(layer, HarmonicBlock2d) else ''
            text = f'{side} x {side} with {functions} of {side * side} functions ({layer.normalization}){normalised}'
            found[text] = found.get(text, 0) + 1
    return '; '.join(f'{number} of {text}' for text, number in found.items()) or 'none'


def _usage(repo_id: str, model: nn.Module) -> str:
    channels, height, width = model.pretrained_cfg['input_size']
    if channels in (1, 3):
        image = "transform(Image.open('image.jpg').convert({!r})).unsqueeze(0)".format('L' if channels == 1 else 'RGB')
        imports, transform = (
            'from PIL import Image\n',
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)\n',
        )
    else:
        image = f'torch.rand(1, {channels}, {height}, {width})  # your image, normalised'
        imports = transform = ''
    return f"""\
`pip install timm-harmonic` is all: with it installed, timm knows the architecture.

### Image classification
```python
import timm
import torch
{imports}
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
{transform}image = {image}
with torch.inference_mode():
    probabilities, classes = model(image).softmax(-1).topk({min(5, model.num_classes)})
```

### Feature maps
```python
backbone = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True).eval()
for features, reduction in zip(backbone(image), backbone.feature_info.reduction()):
    print(features.shape, reduction)
```

### Embeddings
```python
encoder = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=0).eval()
embedding = encoder(image)  # (1, {model.num_features})
```

### For deployment
```python
plain = timm.models.reparameterize_model(model)  # every harmonic layer is a plain convolution now
```"""


def _comparison(repo_id: str) -> str:
    """The released weights and what the paper says about each."""
    rows: list[Sequence[str]] = []
    for name in list_pretrained('harm*'):
        cfg = get_pretrained_cfg(name)
        if cfg.origin_url == REPOSITORY and cfg.notes:
            notes = '; '.join(note for note in cfg.notes if not pinned_sha256(note))
            rows.append((f'**{name}**' if repo_id.endswith(f'/{name}') else name, notes))
    return '| weights | errors on ImageNet-1k |\n|---|---|\n' + '\n'.join(f'| {a} | {b} |' for a, b in rows)
