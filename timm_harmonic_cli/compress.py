"""Any convolutional network of timm made harmonic, truncated, and written as a folder: `timm-harmonic compress`."""

import importlib.util
import json
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.models import parse_model_name, reparameterize_model
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_harmonic.common import InputError
from timm_harmonic.common.device import usable_device
from timm_harmonic.common.images import MODES
from timm_harmonic.common.images import data_config as data_config_of
from timm_harmonic.common.progress import progress
from timm_harmonic.conversion.costs import forms_by_time, set_forms
from timm_harmonic.conversion.deploy import deploy as make_plain
from timm_harmonic.conversion.harmonize import ARCHITECTURE, Selection, harmonize, record_options
from timm_harmonic.conversion.report import HarmonicReport, draw_truncation, harmonic_report
from timm_harmonic.conversion.swap import harmonic_layers
from timm_harmonic.conversion.truncate import truncate
from timm_harmonic.export.folder import (
    STEPS,
    Provenance,
    build_loaded,
    check_new,
    create_trained,
    next_step,
    options_of_run,
    read_source,
    write_folder,
)
from timm_harmonic.export.onnx import check_packages, write_deployed
from timm_harmonic.models.checkpoints import CheckpointError, check_fit

_BATCHES = 8  # of --data


def compress(
    model_name: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    normalization: str = 'l1',
    smoothness: float | None = None,
    data: Path | None = None,
    batches: int | None = None,
    batch_size: int = 32,
    evaluate: Path | None = None,
    split: str = 'validation',
    data_config: dict[str, Any] | None = None,
    repo_id: str = '',
    license: str = '',
    cost: str = 'parameters',
    refit: bool = False,
    deploy: bool = False,
    channels_last: bool = False,
    device: str | None = None,
    workers: int = 0,
    **amount: Any,
) -> HarmonicReport:
    """Makes a network harmonic, truncates it, and writes the folder of a Hub repository with a report.

    Options are those of `timm-harmonic compress`; `amount` is what `truncate` takes of them. `data_config` says how to
    prepare images, by timm's names (img_size, mean, std, crop_pct, interpolation), where the network's config or its
    training run should not decide. Multiply-adds and times are those of one random image. Returns the report. Raises
    InputError if options contradict each other or the folder cannot be written, CheckpointError if the checkpoint does
    not fit, ValueError if `harmonize` or `truncate` refuses.
    """
    check_new(out)
    if importlib.util.find_spec('matplotlib') is None:
        raise InputError('the picture needs matplotlib: pip install matplotlib')
    for option, given in (('--refit', refit), ('--batches', batches is not None)):
        if given and data is None:
            raise InputError(f'{option} needs --data, an image folder. Labels are not used.')
    if cost != 'parameters' and amount.get('ratio') is None:
        raise InputError('--cost is what --ratio is of: give --ratio too.')
    if (model_kwargs or {}).get('features_only'):
        raise InputError(
            'compress writes whole networks: leave features_only out, and give it to timm.create_model later.'
        )
    for folder in (data, evaluate):
        if folder is not None and not folder.is_dir():
            raise InputError(f'{str(folder)!r} is no folder of images.')
    place, batches = usable_device(device), batches or _BATCHES
    if deploy:
        check_packages()
    with progress(total=7, desc='build', **STEPS) as steps:
        source, plain = _load(model_name, checkpoint, pretrained, model_kwargs or {})
        next_step(steps, 'harmonize')
        basis: dict[str, Any] = dict(normalization=normalization, smoothness=smoothness)
        whole = harmonize(plain, include=include, exclude=exclude, **basis)
        whole.to(place)
        if channels_last:
            whole.to(memory_format=torch.channels_last)
        next_step(steps, 'truncate')
        config = data_config_of(whole, {**source.run, **(data_config or {})})
        load = partial(_loader, batch_size=batch_size, config=config, workers=workers)
        images = None if data is None else _calibration(load(whole, data, 'train'), batches)
        example = _example(whole, config['input_size'], channels_last)
        _check_size(whole, example)
        costs: dict[str, Any] = {} if cost == 'parameters' else dict(cost=cost, images=example)
        small = truncate(whole, **amount, **costs, data=images, refit=refit)
        if deploy and cost == 'parameters':  # the others have chosen the forms
            set_forms(small, forms_by_time(small, example))
            record_options(small)
        next_step(steps, 'evaluate')
        measured = {}
        if evaluate is not None:
            loader = load(whole, evaluate, split)
            _check_classes(loader, whole, evaluate)
            measured = {when: _evaluate(model, loader) for when, model in (('before', whole), ('after', small))}
        report = harmonic_report(small, example)
        more = {**(dict(cost=cost) if cost != 'parameters' else {}), **(dict(refit=True) if refit else {})}
        record = dict(
            timm_harmonic=version('timm-harmonic'),
            torch=torch.__version__,
            timm=timm.__version__,
            source=source.file or source.base,
            options={**{name: value for name, value in amount.items() if value is not None}, **more},
            weighed_by='filters' if data is None else f'outputs on {batches} batches of {batch_size} images',
            timed=f'one image, {example.device.type}, {"channels_last" if channels_last else "contiguous"}, '
            f'{torch.get_num_threads()} threads',
            accuracy=measured,
            report=report.to_dict(),
        )

        networks = (make_plain(whole, form='dense'), reparameterize_model(small.eval())) if deploy else ()

        def add_report(folder: Path) -> None:
            if networks:
                record['deployed'] = write_deployed(*networks, example, folder)
            (folder / 'compression.json').write_text(json.dumps(record, indent=1) + '\n')
            (folder / 'compression.md').write_text(_page(record, report))
            draw_truncation(folder / 'compression.png', whole, small)

        license = license or plain.pretrained_cfg.get('license') or ''
        about: dict[str, Any] = dict(repo_id=repo_id, license=license)
        for parameter in small.parameters():  # not by .to(memory_format=...), which leaves (O, I, P, 1) as they are
            parameter.data = parameter.data.contiguous()  # safetensors takes no other
        write_folder(small.cpu(), out, source, steps, data_config=config, add=add_report, **about)
    return report


def _load(model_name: str, path: Path | None, pretrained: bool, kwargs: dict[str, Any]) -> tuple[Provenance, nn.Module]:
    """Where the weights of the network to compress come from, and the network, in evaluation."""
    if path is not None:
        return _load_checkpoint(model_name, path, kwargs)
    if parse_model_name(model_name)[0] is not None:
        return Provenance(base=model_name), create_trained(model_name, **kwargs)
    if not pretrained:
        model = timm.create_model(model_name, **kwargs).eval()
        warnings.warn(
            f'{model_name} has random weights here: pass --pretrained or --checkpoint to compress a trained network.',
            stacklevel=2,
        )
        return Provenance(base=f'{model_name.partition(".")[0]} with random weights'), model
    model = create_trained(model_name, **kwargs)
    name = '.'.join(filter(None, (model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag'))))
    return Provenance(base=f"{name} (timm's weights)"), model


def _load_checkpoint(model_name: str, path: Path, kwargs: dict[str, Any]) -> tuple[Provenance, nn.Module]:
    source, state = read_source(path, model_name)
    with torch.device('meta'):
        model = timm.create_model(model_name, **{**options_of_run(source), **kwargs})
    _refuse_coefficients(path, state, model_name, model)
    if not harmonic_layers(model):  # timm would say less about what does not fit
        check_fit(state, model, model.pretrained_cfg['classifier'], model.pretrained_cfg['first_conv'])
    return source, build_loaded(model_name, state, source, kwargs)


def _refuse_coefficients(path: Path, state: dict[str, Any], model_name: str, model: nn.Module) -> None:
    """Refuses a harmonic network's parameters for a plain one."""
    for name, module in model.named_modules():
        weight = state.get(f'{name}.weight')
        if not isinstance(module, nn.Conv2d) or not isinstance(weight, Tensor) or weight.ndim != 4:
            continue
        if module.kernel_size != (1, 1) and weight.shape[3] == 1 and weight.shape[2:] != module.kernel_size:
            raise CheckpointError(
                f'{path} holds coefficients of a harmonic network ({name}.weight, {tuple(weight.shape)}), but '
                f'{model_name} is plain: give the name it was trained as, {ARCHITECTURE} with --model-kwargs '
                f'base_model={model_name}, or local-dir: and its folder.'
            )


def _example(model: nn.Module, size: tuple[int, ...], channels_last: bool) -> Tensor:
    """One random image, for multiply-adds and times."""
    image = torch.randn(1, *size).to(next(model.parameters()))
    return image.to(memory_format=torch.channels_last) if channels_last else image


def _check_size(model: nn.Module, image: Tensor) -> None:
    """Raises InputError if a network cannot run on images of this size, as one with windows of its own."""
    try:
        with torch.inference_mode():
            model(image)
    except (AssertionError, RuntimeError) as error:
        side = ' x '.join(map(str, image.shape[2:]))
        raise InputError(f'the network takes no images of {side} pixels: {error}. See --img-size.') from error


def _loader(model: nn.Module, folder: Path, split: str, batch_size: int, config: dict[str, Any], workers: int) -> Any:
    """timm's loader of an image folder, with the transforms of the network's evaluation."""
    mode = MODES.get(config['input_size'][0])
    if mode is None:
        raise InputError(f'images of {config["input_size"][0]} channels cannot be read from {str(folder)!r}.')
    dataset = create_dataset('', str(folder), split=split, input_img_mode=mode)
    images = {key: config[key] for key in ('interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    device = next(model.parameters()).device
    here = dict(num_workers=workers, use_prefetcher=False, persistent_workers=False, device=device)
    return create_loader(dataset, config['input_size'], batch_size, **images, **here)


def _check_classes(loader: Any, model: nn.Module, folder: Path) -> None:
    """Raises InputError if a folder has other classes than the network."""
    classes = len(getattr(loader.dataset.reader, 'class_to_idx', ()))
    if classes != model.num_classes:
        raise InputError(f'{str(folder)!r} has {classes} classes, the network {model.num_classes}.')


def _calibration(loader: Any, batches: int) -> Any:
    """Batches of images drawn at random, but always the same ones."""
    dataset, size = loader.dataset, loader.batch_size
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    chosen = DataLoader(Subset(dataset, order[: batches * size].tolist()), size)
    return progress(chosen, desc='weigh', unit='batch', leave=False)


@torch.inference_mode()
def _evaluate(model: nn.Module, loader: Any) -> dict[str, float]:
    """Accuracies in percent, of one crop."""
    model.eval()
    device = next(model.parameters()).device
    meters = {k: AverageMeter() for k in (1, 5) if k <= model.num_classes}
    for images, labels in progress(loader, desc='evaluate', unit='batch', leave=False):
        found = accuracy(model(images.to(device)), labels.to(device), topk=tuple(meters))
        for meter, value in zip(meters.values(), found, strict=True):
            meter.update(value.item(), len(labels))
    return {f'top{k}': meter.avg for k, meter in meters.items()}


_DEPLOYED = dict(
    bytes=('ONNX file, bytes', ',d'),
    parameters=('parameters', ',d'),
    macs=('multiply-adds', ',d'),
    torch_ms=('torch, ms', '.3g'),
    onnx_ms=('ONNX Runtime on the CPU, ms', '.3g'),
)


def _deployed_line(title: str, form: str, key: str, deployed: dict[str, Any]) -> str:
    before, after = (deployed[name][key] for name in ('plain', 'compressed'))
    return f'| {title} | {before:{form}} | {after:{form}} | {after / before:.2f} |'


def accuracy_table(record: dict[str, Any]) -> str:
    """The accuracies in compression.json, as Markdown."""
    before, after = (record['accuracy'][when] for when in ('before', 'after'))
    lines = [f'| {k} | {v:.2f} | {after[k]:.2f} |' for k, v in before.items()]
    return '\n'.join(['| accuracy, %, measured | before | after |', '|---|---|---|', *lines])


def deployed_table(record: dict[str, Any]) -> str:
    """What compression.json says of the deployed network, as Markdown."""
    lines = ['| deployed, measured here | plain | compressed | ratio |', '|---|---|---|---|']
    return '\n'.join([*lines, *(_deployed_line(*of, key, record['deployed']) for key, of in _DEPLOYED.items())])


def _page(record: dict[str, Any], report: HarmonicReport) -> str:
    """compression.md: what was done, the accuracies, and the report."""
    options = ', '.join(f'{key}={value}' for key, value in record['options'].items())
    lines = [
        f'# Compression of {report.model}',
        '',
        f'Weights: {record["source"]}. {options}; frequencies weighed by {record["weighed_by"]}. Multiply-adds are of '
        f'one image; milliseconds are measured here, for {record["timed"]}.',
        '',
    ]
    if 'deployed' in record:
        lines += [deployed_table(record), '']
    if record['accuracy']:
        lines += [accuracy_table(record), '', 'Before any fine-tuning.', '']
    return '\n'.join([*lines, report.to_markdown()])
