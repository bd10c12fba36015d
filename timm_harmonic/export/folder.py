"""The folder of a Hub repository, from a checkpoint or a network."""

import argparse
import copy
import csv
import dataclasses
import json
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import (
    get_model_args,
    get_pretrained_cfg,
    list_pretrained,
    model_entrypoint,
    reparameterize_model,
    save_for_hf,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..common import InputError, explained, first_line
from ..common.files import clear_remains, new_folder
from ..common.progress import progress
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicBlock2d, options_of_basis, read_name
from ..models.checkpoints import CheckpointError, StateDict, check_fit, names_of, read_checkpoint, rename_keys, unwrap
from ..models.download import ORGANISATION, WEIGHTS_NAME, pinned_sha256, released_digits, sha256_of
from ..models.paper import REPOSITORY
from ..models.weights import TAG

# What names weights among the arguments of timm.create_model.
_SOURCES = {
    'cache_dir',
    'checkpoint_path',
    'pretrained',
    'pretrained_cfg',
    'pretrained_cfg_overlay',
    'pretrained_strict',
}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where weights come from. What does not apply is empty."""

    file: str = ''  # name of the source file
    sha256: str = ''  # of the source file, 64 hex digits
    url: str = ''  # where the authors released the source file
    notes: tuple[str, ...] = ()  # what the paper says about the weights
    epoch: int | None = None  # of the training run, counted from 0
    averaged: bool = False  # whether the file's averaged weights were taken
    run: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the training run
    summary: dict[str, str] = dataclasses.field(default_factory=dict)  # its figures of that epoch, from summary.csv
    base: str = ''  # the weights of timm that were compressed, without a file


def load_network(
    model_name: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    *,
    random_weights: bool = False,
) -> tuple[Provenance, nn.Module]:
    """Loads a network for a command: its provenance and the network, in evaluation mode."""
    kwargs = model_kwargs or {}
    if Path(model_name).is_dir():
        model_name = f'local-dir:{model_name}'
    if ':' not in model_name and not timm.is_model(model_name):
        raise InputError(f'Unknown model {model_name!r}.')
    if checkpoint is not None:
        source, state = read_source(checkpoint, model_name)
        with torch.device('meta'):
            blank = timm.create_model(model_name, **{**options_of_run(source), **kwargs})
        for name, module in blank.named_modules():
            weight = state.get(f'{name}.weight')
            if not isinstance(module, nn.Conv2d) or not isinstance(weight, Tensor) or weight.ndim != 4:
                continue
            if weight.shape[3] == 1 and weight.shape[2:] != module.kernel_size:
                raise CheckpointError(
                    f'{checkpoint} holds coefficients of a harmonic network ({name}.weight, '
                    f'{tuple(weight.shape)}), but {model_name} is plain: give local-dir: and its folder.'
                )
        if not harmonic_layers(blank):
            check_fit(state, blank, blank.pretrained_cfg['classifier'], blank.pretrained_cfg['first_conv'])
        return source, build_loaded(model_name, state, source, kwargs)
    if ':' in model_name:
        return Provenance(base=model_name), create_trained(model_name, **kwargs)
    if pretrained:
        model = create_trained(model_name, **kwargs)
        name = '.'.join(filter(None, (model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag'))))
        return Provenance(base=f"{name} (timm's weights)"), model
    if not random_weights:
        raise InputError(f'{model_name} needs weights: pass --checkpoint FILE or --pretrained.')
    with explained(f'{model_name} cannot be built', Exception):
        model = timm.create_model(model_name, **kwargs).eval()
    warnings.warn(f'{model_name} has random weights here: pass --pretrained or --checkpoint.', stacklevel=2)
    return Provenance(base=f'{model_name.partition(".")[0]} with random weights'), model


def key_names(model_name: str) -> dict[str, str] | None:
    """The authors' names of an architecture's parameters; None if it is not one of ours."""
    if ':' in model_name:
        return {}  # a repository or a folder has our names
    return getattr(sys.modules[model_entrypoint(model_name).__module__], 'KEY_NAMES', None)


def read_source(path: Path, model_name: str, use_ema: bool | None = None) -> tuple[Provenance, StateDict]:
    """What is known of a checkpoint, and its state dict by our names of parameters. Raises as what it calls does."""
    content = read_checkpoint(path)
    state = rename_keys(unwrap(content, use_ema), key_names(model_name) or {})
    return provenance_of(path, content, model_name, use_ema), state


def options_of_run(source: Provenance) -> dict[str, Any]:
    """The network's options in a training run, without what names the weights that it began from."""
    return {key: value for key, value in (source.run.get('model_kwargs') or {}).items() if key not in _SOURCES}


def provenance_of(path: Path, content: StateDict, model_name: str, use_ema: bool | None) -> Provenance:
    """What is known of a checkpoint: by its hash if it is a released one, else by the run that it lies beside."""
    digest = sha256_of(path)
    if released := _released(path, digest, model_name):
        return released
    run = _run_options(path, content)
    trained = str(run.get('model', model_name))
    if ':' not in trained and trained.partition('.')[0] != model_name:  # a repository or folder may have any name
        raise InputError(f'{path.name} was trained as {trained}, by the options of its run, not as {model_name}.')
    epoch = content.get('epoch') if isinstance(content.get('epoch'), int) else None
    return Provenance(
        path.name,
        digest,
        epoch=epoch,
        averaged=bool(use_ema) or ('state_dict_ema' in content and 'state_dict' not in content),
        run=run,
        summary=_summary(path.parent / 'summary.csv', epoch) if run else {},
    )


def _released(path: Path, digest: str, model_name: str) -> Provenance | None:
    for name in list_pretrained(['harm*', f'{model_name}.*']):
        cfg = get_pretrained_cfg(name)
        digits = released_digits(cfg.url or '')
        if digits and digest.startswith(digits) and cfg.origin_url == REPOSITORY:
            if cfg.architecture != model_name:
                raise InputError(f'{path.name} is the released {name}, not {model_name}.')
            notes = tuple(note for note in cfg.notes if not pinned_sha256(note))
            return Provenance(path.name, digest, url=cfg.url, notes=notes)
    return None


def _run_options(path: Path, content: StateDict) -> dict[str, Any]:
    """Options of the training run: args.yaml beside the checkpoint, or those that timm's train.py saved in it."""
    options = path.parent / 'args.yaml'
    if not options.is_file():
        return dict(vars(content['args'])) if isinstance(content.get('args'), argparse.Namespace) else {}
    try:
        run = yaml.safe_load(options.read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f'{options} is damaged: {first_line(error)}') from error
    if not isinstance(run, dict):
        raise InputError(f'{options} holds no options, but a {type(run).__name__}.')
    if not isinstance(run.get('model_kwargs') or {}, dict):
        raise InputError(f'{options} has model_kwargs {run["model_kwargs"]!r}: they must be NAME: VALUE.')
    if run.get('input_size') is not None:  # it counts in train.py; timm refuses to save a network with both
        run.pop('img_size', None)
    return run


def _summary(path: Path, epoch: int | None) -> dict[str, str]:
    """The run's figures of an epoch, by the last row that it has in summary.csv."""
    if epoch is None or not path.is_file():
        return {}
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(epoch)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f'{path} is damaged: {first_line(error)}') from error
    # A row that is too long has its rest under None.
    figures = {key: value for key, value in (rows or [{}])[-1].items() if key and key.startswith('eval_') and value}
    try:
        return {key: str(float(value)) for key, value in figures.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f'{path} has a figure that is no number in epoch {epoch}: {first_line(error)}') from error


def create_trained(model_name: str, **kwargs: Any) -> nn.Module:
    """A network of timm with the weights that its name stands for, in evaluation.

    A folder or a repository has a config by somebody else, which may hold anything: raises InputError if no network can
    be made of it, CheckpointError if its weights do not fit, OSError if something cannot be read.
    """
    try:
        model = timm.create_model(model_name, pretrained=True, **kwargs).eval()
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        if ':' not in model_name:
            raise
        raise InputError(
            f'no network can be made of {model_name}, by its config.json: {type(error).__name__}: {first_line(error)}'
        ) from error
    theirs, ours = model.pretrained_cfg.get('num_classes'), kwargs.get('num_classes')
    if ours and theirs != ours:  # timm leaves the classifier random then
        raise InputError(f'{model_name} has weights of {theirs} classes, not of {ours}.')
    return model


def build_loaded(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """The network that parameters belong to, loaded with them, in evaluation.

    Their shapes say classes and channels, and their basis is part of them.

    `model_kwargs` replace the training run's. Raises CheckpointError if the parameters do not fit, InputError if an
    option contradicts them.
    """
    if given := sorted(_SOURCES & model_kwargs.keys()):
        raise InputError(f'{given[0]} is no option of a network: the weights are those of {source.file}.')
    kwargs = {**_basis_of(state), **options_of_run(source), **model_kwargs}
    if kwargs.get('features_only'):
        raise InputError(
            'leave features_only out, and give it to timm.create_model later: a folder has a whole network.'
        )
    if source.run.get('gp'):
        kwargs.setdefault('global_pool', source.run['gp'])
    try:
        with torch.device('meta'):
            blank = timm.create_model(model_name, **kwargs)
    except Exception as error:  # timm asserts some options, and looks up others
        shown = ', '.join(f'{key}={value!r}' for key, value in kwargs.items()) or 'no options'
        raise InputError(
            f'{model_name} cannot be built with {shown}: {type(error).__name__}: {first_line(error)}'
        ) from error
    shapes = _shapes(blank, state, f'{source.file} has no {{}}: it is not a {model_name}.')
    for key, value in shapes.items():
        if kwargs.setdefault(key, value) != value:
            raise InputError(f'{source.file} has {key}={value}, not {kwargs[key]}.')
    overlay = dict(
        state_dict=state,
        source=None,
        num_classes=shapes['num_classes'],
        input_size=(shapes['in_chans'], *blank.pretrained_cfg['input_size'][1:]),
        notes=source.notes or None,
    )
    if not source.url:
        overlay.update(tag=None, url=None, hf_hub_id=None, origin_url=None, license=None)
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.pop('state_dict', None)
    return model.eval()


def _basis_of(state: StateDict) -> dict[str, Any]:
    """The options of the basis that coefficients refer to, where it is not the authors'."""
    names = {read_name(value) for key, value in state.items() if key.endswith('.basis_name')}
    return options_of_basis(names.pop()) if len(names) == 1 else {}


def _shapes(blank: nn.Module, state: StateDict, missing: str) -> dict[str, int]:
    """Classes and input channels of parameters, by the first and the last layer of their network."""
    (first, *_), (last, *_) = (names_of(blank.pretrained_cfg[key]) for key in ('first_conv', 'classifier'))
    stem, classifier = blank.get_submodule(first), state.get(f'{last}.weight')
    statistics, weight = state.get(f'{first}.bn.running_mean'), state.get(f'{first}.weight')
    for key, value, least in ((f'{first}.weight', weight, 2), (f'{last}.weight', classifier, 1)):
        if value is not None and value.ndim < least:
            raise CheckpointError(f'{key} of the checkpoint has shape {tuple(value.shape)}.')
    if statistics is not None and hasattr(stem, 'basis'):
        channels = statistics.numel() // stem.basis.shape[0]
    elif weight is not None:
        channels = weight.shape[1] * stem.groups
    else:
        raise CheckpointError(missing.format(f'{first}.weight'))
    return dict(num_classes=0 if classifier is None else len(classifier), in_chans=channels)


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
        released=_released_notes(place) if source.url else [],
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


def _released_notes(place: str) -> list[tuple[str, str]]:
    """The released weights, and what the paper says about each."""
    rows = []
    for name in list_pretrained('harm*'):
        cfg = get_pretrained_cfg(name)
        if cfg.origin_url == REPOSITORY and cfg.notes:
            title = f'**{name}**' if place.endswith(f'/{name}') else name
            rows.append((title, '; '.join(note for note in cfg.notes if not pinned_sha256(note))))
    return rows


LICENSE = 'bsd-3-clause'  # of what the authors released

REQUIRED = (WEIGHTS_NAME, 'config.json', 'README.md')
_OF_RUN = {'args.yaml': 'train_hparams.yaml', 'summary.csv': 'summary.csv'}  # in a run's folder, in a repository
_COMPRESSED = ('compression.json', 'compression.md', 'compression.png', 'deployed.onnx')  # beside such a network
FILES = (*REQUIRED, *_OF_RUN.values(), *_COMPRESSED)
STEPS: Any = dict(unit='step', leave=False, miniters=1, mininterval=0)  # by default tqdm skips some of so few


def convert(
    checkpoint: Path,
    model_name: str,
    out: Path,
    *,
    repo_id: str = '',
    use_ema: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    license: str = '',
    dataset: str = '',
) -> list[Path]:
    """Writes the folder of a Hub repository from a checkpoint, loads it again and compares the outputs.

    Options are those of `timm-harmonic convert`. Returns the files written. Raises InputError if the options contradict
    each other, or the folder does not give the source's outputs; CheckpointError if the checkpoint cannot be read or
    does not fit; FileNotFoundError if there is none.
    """
    if ':' not in model_name and (not timm.is_model(model_name) or key_names(model_name) is None):
        raise InputError(f'{model_name!r} is not a harmonic model: see `timm-harmonic list`.')
    check_new(out)
    with progress(total=4, desc='read', **STEPS) as steps:
        source, state = read_source(checkpoint, model_name, use_ema)
        next_step(steps, 'build')
        model = build_loaded(model_name, state, source, model_kwargs or {})
        if source.url:
            class_names, dataset = ImageNetInfo().label_names(), dataset or 'imagenet-1k'
            license = license or LICENSE
            repo_id = repo_id or f'{ORGANISATION}/{model_name}.{TAG}'

        def add_run(folder: Path) -> None:
            for theirs, ours in _OF_RUN.items():
                if source.run and (checkpoint.parent / theirs).is_file():
                    if (checkpoint.parent / theirs).is_symlink():
                        raise InputError(f'{checkpoint.parent / theirs} is a symbolic link: put the file itself there.')
                    shutil.copyfile(checkpoint.parent / theirs, folder / ours)

        about: dict[str, Any] = dict(repo_id=repo_id, class_names=class_names, license=license, dataset=dataset)
        return write_folder(model, out, source, steps, add=add_run, **about)


def check_new(out: Path) -> None:
    """Refuses a folder with files in it, or what is no folder, by a InputError."""
    clear_remains(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'{str(out)!r} exists and is not an empty folder: name another.')


def next_step(steps: tqdm, what: str) -> None:
    """Moves a progress bar to its next step."""
    steps.set_description(what)
    steps.update()


def write_folder(
    model: nn.Module,
    out: Path,
    source: Provenance,
    steps: tqdm,
    *,
    repo_id: str = '',
    class_names: list[str] | None = None,
    license: str = '',
    dataset: str = '',
    data_config: dict[str, Any] | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> list[Path]:
    """Writes the folder of a Hub repository from a network, loads it again and compares the outputs.

    In the end the folder is there as a whole, or not at all. `data_config` says how to prepare images, by timm's names
    (as the training run did if None), `add` writes more files, and the progress bar moves by three. Returns the files.
    Raises InputError if the folder is not new, or does not give the network's outputs.
    """
    check_new(out)
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(f'{len(class_names)} class names for {model.num_classes} classes.')
    with new_folder(out, last='config.json') as folder:  # without a config timm loads nothing
        next_step(steps, 'write')
        _save(model, folder, license, class_names, source.run if data_config is None else data_config)
        add(folder)
        next_step(steps, 'compare')
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        _compare(model, loaded)
        place = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{out.resolve().name}'
        model_card(loaded, place, source, license, dataset).save(folder / 'README.md')
        steps.update()
    return sorted(out.iterdir())


def _save(
    model: nn.Module, folder: Path, license: str, class_names: list[str] | None, data_config: dict[str, Any]
) -> None:
    model_config = dict(label_names=class_names, pretrained_cfg=dict(license=license or None))
    try:
        save_for_hf(model, str(folder), safe_serialization=True, model_config=model_config, data_config=data_config)
    except SafetensorError as error:  # a full disk
        raise InputError(f'the weights cannot be written to {folder.parent}: {first_line(error)}') from error
    # timm writes num_classes at the top and among model_args; transformers does not take the latter.
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2))


@torch.inference_mode()
def _compare(model: nn.Module, loaded: nn.Module) -> None:
    """Raises unless the folder's network gives the source's outputs on random images, up to float32 rounding."""
    images = torch.randn(2, *loaded.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected, found = model(images), loaded(images)
    if not expected.isfinite().all():
        raise InputError('the checkpoint gives outputs that are not finite.')
    if expected.shape != found.shape:
        raise InputError(f'the folder gives outputs of shape {tuple(found.shape)}, not {tuple(expected.shape)}.')
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
    if error > 1e-6:
        raise InputError(
            f'the folder gives other outputs than the checkpoint: they differ by {error:.1e} of the largest.'
        )
