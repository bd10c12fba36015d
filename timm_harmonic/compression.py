"""From any convolutional network of timm to the folder of a compressed one: `timm-harmonic compress`."""

import importlib.util
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import parse_model_name
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .checkpoints import CheckpointError, check_fit, read_checkpoint, rename_keys, unwrap
from .convert import ARCHITECTURE, PatternLevels, Selection, harmonize
from .hub_folder import HubError, build_loaded, check_new, key_names, provenance, write_folder
from .model_card import Provenance
from .report import HarmonicReport, harmonic_report
from .swap import harmonic_layers
from .truncation import Losses, choose_levels, losses_by_weight, parameters_of, truncate

__all__ = ['compress']

_POINTS = 40  # of the curve of parameters against energy


def compress(
    model_name: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    level: int | None = None,
    levels: PatternLevels | None = None,
    energy: float | None = None,
    max_params: int | None = None,
    ratio: float | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    normalization: str = 'l1',
    data: Path | None = None,
    batches: int = 8,
    batch_size: int = 32,
    evaluate: Path | None = None,
    split: str = 'validation',
    data_config: dict[str, Any] | None = None,
    repo_id: str = '',
    license: str = '',
) -> HarmonicReport:
    """Makes a network harmonic, truncates it, and writes the folder of a Hub repository with a report.

    Args:
        model_name: Any name that timm takes, `hf-hub:` and `local-dir:` included.
        out: Folder to write, which must be new or empty.
        checkpoint: File with the weights, of a training run or a state dict.
        pretrained: Whether to take the weights that timm knows.
        model_kwargs: Options of the architecture.
        level: See `truncate`, as are levels, energy, max_params and ratio.
        include: See `harmonize`, as are exclude and normalization.
        data: Image folder whose training split weighs the frequencies.
        batches: How many batches of it.
        batch_size: Of these, and of the evaluation.
        evaluate: Image folder on which accuracies before and after are measured.
        split: Of the evaluation.
        data_config: How images are prepared, by timm's names (img_size, mean, std, crop_pct, interpolation), where it
            is not as the network's config or its training run says.
        repo_id: Where the folder is going to be, for the card.
        license: Identifier of the weights' licence; the base's if empty, and 'other' if that is not known.

    Returns:
        The report.

    Raises:
        HubError: If the options contradict each other, or a network cannot be compressed into such a folder.
        CheckpointError: If the checkpoint cannot be read or does not fit.
        ValueError: If `harmonize` or `truncate` refuses.
    """
    check_new(out)
    if importlib.util.find_spec('matplotlib') is None:
        raise HubError('the picture needs matplotlib: pip install "timm-harmonic[compress]"')
    with tqdm(total=7, desc='build', unit='step', leave=False) as steps:
        source, plain = _load(model_name, checkpoint, pretrained, model_kwargs or {})
        _say(steps, 'harmonize')
        whole = harmonize(plain, include=include, exclude=exclude, normalization=normalization)
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        whole.to(device)
        _say(steps, 'truncate')
        amount = dict(level=level, levels=levels, energy=energy, max_params=max_params, ratio=ratio)
        config = _data_config(whole, {**source.run, **(data_config or {})})
        weighed = None if data is None else _calibration(_loader(whole, data, 'train', batch_size, config), batches)
        small = truncate(whole, **amount, data=weighed)
        report = harmonic_report(small)
        _say(steps, 'evaluate')
        measured = {}
        if evaluate is not None:
            for when, model in (('before', whole), ('after', small)):
                measured[when] = _evaluate(model, _loader(model, evaluate, split, batch_size, config))
        losses = losses_by_weight(whole)
        record = dict(
            timm_harmonic=version('timm-harmonic'),
            torch=torch.__version__,
            timm=timm.__version__,
            source=source.file or source.base,
            options={name: value for name, value in amount.items() if value is not None},
            weighed_by='filters' if data is None else f'responses to {batches} batches of {batch_size} images',
            accuracy=measured,
            report=report.to_dict(),
        )
        license = license or plain.pretrained_cfg.get('license') or 'other'

        def add(folder: Path) -> None:
            _write_report(folder, record, report, whole, small, losses)

        write_folder(small.cpu(), out, source, steps, data_config=config, repo_id=repo_id, license=license, add=add)
    return report


def _say(steps: tqdm, what: str) -> None:
    steps.set_description(what)
    steps.update()


def _load(model_name: str, path: Path | None, pretrained: bool, kwargs: dict[str, Any]) -> tuple[Provenance, nn.Module]:
    """The network to compress, in evaluation, and where its weights are from."""
    elsewhere = parse_model_name(model_name)[0] is not None
    if path is None:
        model = timm.create_model(model_name, pretrained=pretrained or elsewhere, **kwargs).eval()
        cfg = model.pretrained_cfg
        name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
        if elsewhere:
            return Provenance(base=model_name), model
        return Provenance(base=f"{name} (timm's weights)" if pretrained else f'{name}, not trained'), model
    content = read_checkpoint(path)
    state = rename_keys(unwrap(content), key_names(model_name) or {})
    source = provenance(path, content, model_name, None)
    _check_kind(path, state, model_name, {**(source.run.get('model_kwargs') or {}), **kwargs})
    return source, build_loaded(model_name, state, source, kwargs)


def _check_kind(path: Path, state: dict[str, Any], model_name: str, kwargs: dict[str, Any]) -> None:
    """Refuses parameters that do not fit, before timm would with less to say."""
    with torch.device('meta'):
        model = timm.create_model(model_name, **kwargs)
    harmonic = harmonic_layers(model)
    for name, module in model.named_modules():
        weight = state.get(f'{name}.weight')
        if not isinstance(module, nn.Conv2d) or not isinstance(weight, Tensor) or weight.ndim != 4:
            continue
        if module.kernel_size != (1, 1) and weight.shape[3] == 1 and weight.shape[2:] != module.kernel_size:
            raise CheckpointError(
                f'{path} holds coefficients of a harmonic network ({name}.weight, {tuple(weight.shape)}), and '
                f'{model_name} is plain: give the name it was trained as, {ARCHITECTURE} with --model-kwargs '
                f'base_model={model_name}, or local-dir: and its folder.'
            )
    if not harmonic:
        cfg = model.pretrained_cfg
        check_fit(state, model.state_dict(), cfg['classifier'], cfg['first_conv'])


def _data_config(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared for a network; a mean and deviation of other channels become their averages."""
    config = resolve_data_config(dict(given, in_chans=model.in_chans), model=model)
    channels = config['input_size'][0]
    for key in ('mean', 'std'):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def _loader(model: nn.Module, folder: Path, split: str, batch_size: int, config: dict[str, Any]) -> Any:
    """timm's loader of an image folder, with the transforms of the network's evaluation."""
    if not folder.is_dir():
        raise HubError(f'{str(folder)!r} is no folder of images.')
    mode = {1: 'L', 3: 'RGB'}.get(config['input_size'][0])
    if mode is None:
        raise HubError(f'images of {config["input_size"][0]} channels cannot be read from {str(folder)!r}.')
    dataset = create_dataset('', str(folder), split=split, input_img_mode=mode)
    classes = len(getattr(dataset.reader, 'class_to_idx', ()))
    if classes > model.num_classes:
        raise HubError(f'{str(folder)!r} has {classes} classes, the network {model.num_classes}.')
    return create_loader(
        dataset,
        config['input_size'],
        batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        device=next(model.parameters()).device,
    )


def _calibration(loader: Any, batches: int) -> Iterator[Any]:
    """Some images, drawn at random but always the same."""
    dataset, size = loader.dataset, loader.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return _shown(DataLoader(Subset(dataset, order[: batches * size].tolist()), size), 'weigh')


def _shown(loader: Iterable[Any], what: str) -> Iterator[Any]:
    yield from tqdm(loader, desc=what, unit='batch', leave=False)


@torch.inference_mode()
def _evaluate(model: nn.Module, loader: Any) -> dict[str, float]:
    """Accuracies in percent, of one crop."""
    model.eval()
    device = next(model.parameters()).device
    meters = {k: AverageMeter() for k in (1, 5) if k <= model.num_classes}
    for images, labels in _shown(loader, 'evaluate'):
        found = accuracy(model(images.to(device)), labels.to(device), topk=tuple(meters))
        for meter, value in zip(meters.values(), found, strict=True):
            meter.update(value.item(), len(labels))
    return {f'top{k}': meter.avg for k, meter in meters.items()}


def _mean_kept(losses: Losses, levels: dict[str, int]) -> float:
    """Share of energy that is kept at these levels, averaged over layers, as the picture shows it."""
    return 1 - sum(losses[name][level] for name, level in levels.items()) / len(levels)


def _write_report(
    folder: Path,
    record: dict[str, Any],
    report: HarmonicReport,
    whole: nn.Module,
    small: nn.Module,
    losses: Losses,
) -> None:
    from .compression_figure import draw

    (folder / 'compression.json').write_text(json.dumps(record, indent=1) + '\n')
    lines = [
        f'# Compression of {report.model}',
        '',
        f'Weights: {record["source"]}. {", ".join(f"{k}={v}" for k, v in record["options"].items())}; frequencies '
        f'weighed by {record["weighed_by"]}. Multiply-adds are those of the plain network.',
        '',
    ]
    if accuracies := record['accuracy']:
        lines += ['| accuracy, %, measured | before | after |', '|---|---|---|']
        lines += [f'| {k} | {v:.2f} | {accuracies["after"][k]:.2f} |' for k, v in accuracies['before'].items()]
        lines += ['', 'Before any fine-tuning.', '']
    (folder / 'compression.md').write_text('\n'.join(lines) + report.to_markdown())

    levels = {name: layer.level or layer.full_level for name, layer in harmonic_layers(small).items()}
    present = parameters_of(whole, {})
    least = parameters_of(whole, {name: min(of) for name, of in losses.items()})
    budgets = {least + round((present - least) * i / (_POINTS - 1)) for i in range(_POINTS)}
    curve = {}
    for budget in sorted(budgets):
        chosen = choose_levels(whole, losses, budget)
        curve[parameters_of(whole, chosen)] = _mean_kept(losses, chosen)
    draw(
        folder / 'compression.png',
        f'{report.model}: {report.parameters:,} of {report.parameters_before:,} parameters',
        losses,
        levels,
        sorted(curve.items()),
        (report.parameters, _mean_kept(losses, levels)),
    )
