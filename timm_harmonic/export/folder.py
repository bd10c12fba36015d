"""The folder of a Hub repository, written from a checkpoint or a network, and its card."""

import argparse
import copy
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
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
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
from torch import nn
from tqdm import tqdm

from ..common import InputError, explained, first_line
from ..common.files import check_new, new_folder, write_text
from ..common.progress import progress
from ..conversion.costs import count_macs
from ..conversion.swap import harmonic_layers
from ..layers import HarmonicBlock2d
from ..models.checkpoints import (
    CheckpointError,
    StateDict,
    basis_options,
    check_fit,
    names_of,
    read_checkpoint,
    rename_keys,
    unwrap,
)
from ..models.paper import REPOSITORY
from ..models.weights import ORGANISATION, TAG, WEIGHTS_NAME, pinned_sha256, released_digits, sha256_of

LICENSE = 'bsd-3-clause'  # of what the authors released
INSTALL = '`git clone` its repository and run `pip install .` in it'  # cards and pages say how from here

_OF_RUN = {'args.yaml': 'train_hparams.yaml', 'summary.csv': 'summary.csv'}  # their names in a run and in a folder
_COMPRESSED = ('compression.json', 'compression.md', 'compression.png', 'deployed.onnx')  # only after compression
FILES = (WEIGHTS_NAME, 'config.json', 'README.md', *_OF_RUN.values(), *_COMPRESSED)
STEPS: Any = dict(unit='step', leave=False, miniters=1, mininterval=0)  # by default tqdm skips some of so few

_SOURCES = ('cache_dir', 'checkpoint_path', 'pretrained')  # how arguments of create_model that name weights begin
_IDS = dict(license=r'[a-z0-9][a-z0-9.+-]*', dataset=r'[\w.-]+(/[\w.-]+)?')  # as the Hub writes them


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


def load_network(
    model_name: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    *,
    random_weights: bool = False,
) -> tuple[Provenance, nn.Module]:
    """Loads a network for a command: its provenance and the network, in evaluation mode.

    `model_name` is a name of timm (hf-hub: and local-dir: included) or the path of a folder. Its weights are those of a
    checkpoint, of the folder or repository, or timm's if `pretrained`; `random_weights` allows none, with a warning.
    Raises InputError if the network has no weights or cannot be built, CheckpointError if its weights do not fit.
    """
    kwargs = model_kwargs or {}
    if Path(model_name).is_dir() and not timm.is_model(model_name):
        model_name = f'local-dir:{model_name}'
    if checkpoint is not None:
        source, state = read_source(checkpoint, model_name)
        return source, build_loaded(model_name, state, source, kwargs)
    if ':' in model_name:
        return Provenance(base=model_name), create_trained(model_name, **kwargs)
    if pretrained:
        model = create_trained(model_name, **kwargs)
        name = '.'.join(filter(None, (model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag'))))
        return Provenance(base=f"{name} (timm's weights)"), model
    if not random_weights:
        raise InputError(f'{model_name} needs weights: pass --checkpoint FILE or --pretrained.')
    model = _create(model_name, kwargs).eval()
    warnings.warn(f'{model_name} has random weights: pass --pretrained or --checkpoint FILE.', stacklevel=2)
    return Provenance(base=f'{model_name.partition(".")[0]} with random weights'), model


def key_names(model_name: str) -> dict[str, str] | None:
    """The authors' names of an architecture's parameters; None if it is not one of ours."""
    if ':' in model_name:
        return {}  # a repository or a folder has our names
    module = model_entrypoint(model_name).__module__ if timm.is_model(model_name) else ''
    return getattr(sys.modules.get(module), 'KEY_NAMES', None)


def read_source(path: Path, model_name: str, use_ema: bool | None = None) -> tuple[Provenance, StateDict]:
    """Returns the provenance of a checkpoint, and its state dict under our names of parameters.

    A released file is recognised by its hash; otherwise the run that the file lies in is described. Raises
    CheckpointError if the file cannot be read, InputError if it belongs to another architecture.
    """
    content = read_checkpoint(path)
    state = rename_keys(unwrap(content, use_ema), key_names(model_name) or {})
    digest = sha256_of(path)
    if released := _released(path, digest, model_name):
        return released, state
    run = _run_options(path, content)
    trained = str(run.get('model', model_name))
    if ':' not in trained and trained.partition('.')[0] != model_name:  # a repository or folder may have any name
        raise InputError(f'{path.name} was trained as {trained}, by the options of its run, not as {model_name}.')
    epoch = content.get('epoch') if isinstance(content.get('epoch'), int) else None
    averaged = bool(use_ema) or ('state_dict_ema' in content and 'state_dict' not in content)
    return Provenance(path.name, digest, epoch=epoch, averaged=averaged, run=run), state


def _released(path: Path, digest: str, model_name: str) -> Provenance | None:
    for name in list_pretrained(['harm*', f'{model_name}.*']):
        cfg = get_pretrained_cfg(name)
        digits = released_digits(cfg.origin_url or '')
        if digits and digest.startswith(digits):
            if cfg.architecture != model_name:
                raise InputError(f'{path.name} is the released {name}, not {model_name}.')
            return Provenance(path.name, digest, url=cfg.origin_url, notes=_paper_notes(cfg))
    return None


def _paper_notes(cfg: Any) -> tuple[str, ...]:
    return tuple(note for note in cfg.notes if not pinned_sha256(note))


def _run_options(path: Path, content: StateDict) -> dict[str, Any]:
    """Options of the training run: args.yaml beside the checkpoint, or those that timm's train.py saved in it."""
    options = path.parent / 'args.yaml'
    if not options.is_file():
        return dict(vars(content['args'])) if isinstance(content.get('args'), argparse.Namespace) else {}
    try:
        run = yaml.safe_load(options.read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise InputError(f'{options} is damaged: {first_line(error)}') from error
    if not isinstance(run, dict):
        raise InputError(f'{options} holds a {type(run).__name__}, not options.')
    if not isinstance(run.get('model_kwargs') or {}, dict):
        raise InputError(f'{options} has model_kwargs {run["model_kwargs"]!r}: they must be NAME: VALUE.')
    if run.get('input_size') is not None:  # it counts in train.py; timm refuses to save a network with both
        run.pop('img_size', None)
    return run


def options_of_run(source: Provenance) -> dict[str, Any]:
    """The network's options in a training run, without those that name the weights it started from."""
    options = source.run.get('model_kwargs') or {}
    return {key: value for key, value in options.items() if not str(key).startswith(_SOURCES)}


def _create(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm.create_model for a name and options from a user or a stranger's config, whatever timm raises for them."""
    options = ', '.join(f'{key}={value!r}' for key, value in kwargs.items() if not key.startswith(_SOURCES))
    with explained(f'{model_name} cannot be created' + f' with {options}' * bool(options), Exception):
        return timm.create_model(model_name, **kwargs)


def create_trained(model_name: str, **kwargs: Any) -> nn.Module:
    """Creates a network of timm with the weights of its name, in evaluation mode.

    Raises InputError if the name is unknown or its config makes no network, CheckpointError if its weights do not fit.
    """
    model = _create(model_name, dict(kwargs, pretrained=True)).eval()
    theirs, ours = model.pretrained_cfg.get('num_classes'), kwargs.get('num_classes')
    if ours and theirs != ours:  # timm leaves the classifier random then
        raise InputError(f'the weights of {model_name} have {theirs} classes, not {ours}.')
    return model


def build_loaded(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """Builds a network and loads parameters into it. Their shapes give its classes and channels.

    `model_kwargs` replace the options of the training run in `source`. Raises CheckpointError if the parameters do not
    fit, InputError if options contradict them or the network cannot be built.
    """
    if given := [key for key in model_kwargs if key.startswith(_SOURCES)]:
        raise InputError(f'{given[0]} is not an option of a network: the weights are those of {source.file}.')
    kwargs = {**basis_options(state), **options_of_run(source), **model_kwargs}
    if kwargs.get('features_only'):
        raise InputError('leave features_only out: give it to timm.create_model when you load the folder.')
    if source.run.get('gp'):
        kwargs.setdefault('global_pool', source.run['gp'])
    with torch.device('meta'):
        blank = _create(model_name, kwargs)
    if not harmonic_layers(blank):  # timm would say less about a misfit
        check_fit(state, blank, blank.pretrained_cfg['classifier'], blank.pretrained_cfg['first_conv'])
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
    model = _create(model_name, dict(kwargs, pretrained=True, pretrained_cfg_overlay=overlay))
    model.pretrained_cfg.pop('state_dict', None)  # timm's own networks keep it
    return model.eval()


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

    The options are those of `timm-harmonic convert`. Returns the files. Raises InputError if they contradict each other
    or the outputs differ, CheckpointError if the checkpoint cannot be read or does not fit.
    """
    if key_names(model_name) is None:
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
                path = checkpoint.parent / theirs
                if source.run and path.is_file():
                    if path.is_symlink():  # it may point to a file that is private
                        raise InputError(f'{path} is a symbolic link: put the file itself there.')
                    shutil.copyfile(path, folder / ours)

        about: dict[str, Any] = dict(repo_id=repo_id, class_names=class_names, license=license, dataset=dataset)
        return write_folder(model, out, source, steps, add=add_run, **about)


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

    `out` must be new or empty, and is written as a whole or not at all. `steps` is a progress bar that moves by three.
    repo_id, license and dataset are ids of the Hub, for the card. `data_config` tells how to prepare images, by timm's
    names; by default the options of the training run do. `add` writes more files. Returns the files. Raises InputError
    if an argument is invalid, or the folder does not give the network's outputs.
    """
    for key, value in (('license', license), ('dataset', dataset)):
        if value and not re.fullmatch(_IDS[key], value):
            raise InputError(f'{key} {value!r} is not an id of the Hugging Face Hub.')
    try:
        validate_repo_id(repo_id or 'no/repository')
    except HFValidationError as error:
        raise InputError(first_line(error)) from error
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(f'{len(class_names)} class names for {model.num_classes} classes.')
    with new_folder(out) as folder:
        next_step(steps, 'write')
        _save(model, folder, license, class_names, source.run if data_config is None else data_config)
        add(folder)
        next_step(steps, 'compare')
        loaded = create_trained(f'local-dir:{folder}')
        _compare(model, loaded)
        place = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{out.resolve().name}'
        write_text(folder / 'README.md', str(model_card(loaded, place, source, license, dataset)))
        _check_files(folder)
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
    # timm writes num_classes at the top and among model_args; transformers refuses the latter.
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    write_text(path, json.dumps(config, indent=2))


@torch.inference_mode()
def _compare(model: nn.Module, loaded: nn.Module) -> None:
    """Raises unless the folder's network gives the source's outputs on random images, up to float32 rounding."""
    images = torch.randn(2, *loaded.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected, found = model(images), loaded(images)
    if not expected.isfinite().all():
        raise InputError('the outputs of the checkpoint are not finite.')
    if expected.shape != found.shape:
        raise InputError(f'the outputs of the folder have shape {tuple(found.shape)}, not {tuple(expected.shape)}.')
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
    if error > 1e-6:
        raise InputError(f'the outputs of the folder and the checkpoint differ by {error:.1e} of the largest.')


def _check_files(folder: Path) -> None:
    """Raises unless the folder holds only files that belong there, and its card and config name one licence."""
    strange = [path.name for path in sorted(folder.iterdir()) if path.name not in FILES or path.is_symlink()]
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    licences = ModelCard.load(folder / 'README.md').data.license, config['pretrained_cfg'].get('license')
    if strange or licences[0] != licences[1]:
        raise InputError(f'the folder is not fit for the Hub: files {strange}, licences {licences}.')


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
    fused = reparameterize_model(copy.deepcopy(model).to('meta')).eval()
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name('card.md')),
        name=re.split('[:/]', place)[-1],
        architecture=model.pretrained_cfg['architecture'],
        base_model=repr(args['base_model']) if 'base_model' in args else '',
        layers=_layers(model),
        separable=sum(layer.form == 'separable' for layer in layers),
        kept=sum(layer.weight.numel() for layer in layers),
        full=sum(layer.weight.numel() // len(layer.basis) * layer.basis[0].numel() for layer in layers),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(fused, torch.empty(1, channels, height, width, device='meta')),
        classes=model.num_classes,
        features=model.num_features,
        options=_options(args),
        channels=channels,
        height=height,
        image_width=width,
        place_literal=repr(place),
        source=source,
        license=license,
        dataset=dataset,
        version=version('timm-harmonic'),
        repository=REPOSITORY,
        install=INSTALL,
    )


def _options(args: dict[str, Any]) -> str:
    """Options as in Python. One that lists every layer is only mentioned."""
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
