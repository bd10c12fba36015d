"""The folder of a Hub repository, written from a checkpoint or a network."""

import argparse
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg, list_pretrained, model_entrypoint, save_for_hf
from torch import nn
from tqdm import tqdm

from ..common import InputError, explained
from ..common.files import check_new, new_folder, write_text
from ..common.images import data_config as config_of_images
from ..common.images import noted_scale, scale_note
from ..common.progress import progress
from ..conversion.swap import harmonic_layers
from ..models.checkpoints import StateDict, basis_options, check_fit, fit_keys, read_checkpoint, sizes_of, unwrap
from ..models.weights import ORGANISATION, TAG, WEIGHTS_NAME, pinned_sha256, released_digits, sha256_of
from .card import Provenance, model_card

_OF_RUN = {'args.yaml': 'train_hparams.yaml', 'summary.csv': 'summary.csv'}  # their names in a run and in a folder
_COMPRESSED = ('compression.json', 'compression.md', 'compression.png', 'deployed.onnx', 'deployed-int8.onnx')
FILES = (WEIGHTS_NAME, 'config.json', 'README.md', *_OF_RUN.values(), *_COMPRESSED)
STEPS: Any = dict(unit='step', leave=False, miniters=1, mininterval=0)  # by default tqdm skips some of so few

# Options of create_model, and their names in timm's train.py.
_OF_NETWORK = {key: key for key in ('num_classes', 'in_chans', 'bn_eps', 'bn_momentum')}
_OF_NETWORK |= dict(global_pool='gp', drop_rate='drop', drop_path_rate='drop_path', drop_block_rate='drop_block')
# What a config says about the weights that it came with.
_CLAIMS = ('license', 'origin_url', 'url', 'hf_hub_id', 'tag', 'paper_ids', 'paper_name', 'description', 'notes')

_SOURCES = ('cache_dir', 'checkpoint_path', 'pretrained')  # how arguments of create_model that name weights begin
_IDS = dict(license=r'[a-z0-9][a-z0-9.+-]*', dataset=r'[\w.-]+(/[\w.-]+)?')  # as the Hub writes them


def load_network(
    model_name: str,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    use_ema: bool = False,
    random_weights: bool = False,
) -> tuple[Provenance, nn.Module]:
    """Loads a network for a command, in evaluation mode, with its provenance.

    `model_name` is a name of timm (hf-hub: and local-dir: included) or the path of a folder. Weights are those of a
    checkpoint (averaged ones with `use_ema`), of the folder or repository, or timm's if `pretrained`; `random_weights`
    allows none, with a warning. Raises InputError and CheckpointError.
    """
    kwargs = model_kwargs or {}
    if Path(model_name).is_dir() and not timm.is_model(model_name):
        model_name = f'local-dir:{model_name}'
    if checkpoint is not None:
        source, state = read_source(checkpoint, model_name, use_ema)
        return source, build_loaded(model_name, state, source, kwargs)
    if ':' in model_name:
        return Provenance(base=model_name), create_trained(model_name, **kwargs)
    if pretrained:
        model = create_trained(model_name, **kwargs)
        name = '.'.join(filter(None, (model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag'))))
        return Provenance(base=f"{name} (timm's weights)"), model
    if not timm.is_model(model_name):
        raise InputError(f'{model_name!r} is neither a folder nor a model of timm.')
    if not random_weights:
        raise InputError(f'{model_name} needs weights: pass --checkpoint FILE or --pretrained.')
    model = _create(model_name, kwargs).eval()
    _own(model.pretrained_cfg)
    warnings.warn(f'{model_name} has random weights: pass --pretrained or --checkpoint FILE.', stacklevel=2)
    return Provenance(base=f'{model_name.partition(".")[0]} with random weights'), model


def key_names(model_name: str) -> dict[str, str] | None:
    """The authors' names of an architecture's parameters; None if it is not one of ours."""
    if ':' in model_name:
        return {}  # a repository or a folder has our names
    module = model_entrypoint(model_name).__module__ if timm.is_model(model_name) else ''
    return getattr(sys.modules.get(module), 'KEY_NAMES', None)


def read_source(path: Path, model_name: str, use_ema: bool = False) -> tuple[Provenance, StateDict]:
    """The provenance of a checkpoint and its state dict: released files are known by hash, others by their run."""
    content = read_checkpoint(path)
    state = unwrap(content, use_ema)
    digest = sha256_of(path)
    if released := _released(path, digest, model_name.partition('.')[0]):
        return released, state
    run = _run_options(path, content)
    trained = str(run.get('model') or model_name)
    # A repository or a folder has options of its own, and may have another name here.
    trained_as, named = (':' if ':' in name else name.partition('.')[0] for name in (trained, model_name))
    if trained_as != named:
        raise InputError(f'{path.name} was trained as {trained}, by the options of its run, not as {model_name}.')
    epoch = content.get('epoch') if isinstance(content.get('epoch'), int) else None
    return Provenance(path.name, digest, epoch=epoch, averaged=use_ema, run=run), state


def _released(path: Path, digest: str, model_name: str) -> Provenance | None:
    for name in list_pretrained(['harm*', f'{model_name}.*']):
        cfg = get_pretrained_cfg(name)
        digits = released_digits(cfg.origin_url or '')
        if digits and digest.startswith(digits):
            if cfg.architecture != model_name:
                raise InputError(f'{path.name} is the released {name}, not {model_name}.')
            notes = tuple(note for note in cfg.notes if not pinned_sha256(note))  # those of the paper
            return Provenance(path.name, digest, url=cfg.origin_url, notes=notes)
    return None


def _run_options(path: Path, content: StateDict) -> dict[str, Any]:
    """Options of the training run: args.yaml beside the checkpoint, or those that timm's train.py saved in it."""
    options = path.parent / 'args.yaml'
    run: Any = dict(vars(content['args'])) if isinstance(content.get('args'), argparse.Namespace) else {}
    if options.is_file():
        with explained(f'{options} is damaged', yaml.YAMLError, ValueError, OSError):
            run = yaml.safe_load(options.read_text(encoding='utf-8'))
    place = options if options.is_file() else f'the run of {path.name}'
    if not isinstance(run, dict):
        raise InputError(f'{place} holds a {type(run).__name__}, not options.')
    if not isinstance(run.get('model_kwargs') or {}, dict):
        raise InputError(f'{place} has model_kwargs {run["model_kwargs"]!r}: they must be NAME: VALUE.')
    run.pop('scale', None)  # of random crops; elsewhere scale is the value of images that stands for 1
    size = run.pop('input_size', None)
    if isinstance(size, (list, tuple)) and len(size) == 3:  # it counts in train.py; timm saves no network with both
        run |= dict(in_chans=size[0], img_size=size[1])
        run |= dict(img_size=None, input_size=size) if size[1] != size[2] else {}
    elif size is not None:  # the side, in other scripts
        run['img_size'] = size
    return run


def _own(cfg: dict[str, Any]) -> None:
    """Removes from a config what it says about other weights than those that the network has now."""
    scale = noted_scale(cfg.get('notes'))
    for key in _CLAIMS:
        cfg.pop(key, None)
    if scale is not None:
        cfg['notes'] = [scale_note(scale)]


def _create(model_name: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm.create_model for a name and options from a user or a stranger's config, whatever timm raises for them."""
    options = ', '.join(f'{key}={value!r}' for key, value in kwargs.items() if not key.startswith(_SOURCES))
    with explained(f'{model_name} cannot be created' + f' with {options}' * bool(options), Exception):
        return timm.create_model(model_name, **kwargs)


def create_trained(model_name: str, **kwargs: Any) -> nn.Module:
    """Creates a network of timm with the weights of its name, in evaluation. Raises InputError or CheckpointError."""
    model = _create(model_name, dict(kwargs, pretrained=True)).eval()
    theirs, ours = model.pretrained_cfg.get('num_classes'), kwargs.get('num_classes')
    if ours and theirs != ours:  # timm leaves the classifier random then
        raise InputError(f'the weights of {model_name} have {theirs} classes, not {ours}.')
    return model


def build_loaded(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """Builds a network with options and parameters of a run, whose shapes tell classes and channels."""
    if given := [key for key in model_kwargs if key.startswith(_SOURCES)]:
        raise InputError(f'{given[0]} is not an option of a network: the weights are those of {source.file}.')
    run = source.run
    if ':' not in model_name:
        model_name = run.get('model') or model_name  # its tag may have another config
    kwargs = basis_options(state)
    if run.get('bn_tf'):  # of older versions of timm
        kwargs |= dict(bn_eps=1e-3, bn_momentum=0.01)
    kwargs |= {key: run[name] for key, name in _OF_NETWORK.items() if run.get(name) is not None}
    # Without the weights that the run started from.
    kwargs |= {k: value for k, value in (run.get('model_kwargs') or {}).items() if not str(k).startswith(_SOURCES)}
    kwargs |= model_kwargs
    if kwargs.get('features_only'):
        raise InputError('leave features_only out: give it to timm.create_model when you load the folder.')
    with torch.device('meta'):
        blank = _create(model_name, kwargs)
    state = fit_keys(state, blank, key_names(model_name) or {})
    if not harmonic_layers(blank):  # timm would say less about a misfit
        check_fit(state, blank, blank.pretrained_cfg['classifier'], blank.pretrained_cfg['first_conv'])
    sizes = sizes_of(state, blank, f'{source.file} has no {{}}: it is not a {model_name}.')
    for key, value in sizes.items():
        if kwargs.setdefault(key, value) != value:
            raise InputError(f'{source.file} has {key}={value}, not {kwargs[key]}.')
    overlay = dict(
        state_dict=state,
        source=None,
        num_classes=sizes['num_classes'],
        input_size=(sizes['in_chans'], *blank.pretrained_cfg['input_size'][1:]),
        label_offset=None,
        **(dict(notes=source.notes) if source.url else {}),
    )
    model = _create(model_name, dict(kwargs, pretrained=True, pretrained_cfg_overlay=overlay))
    model.pretrained_cfg.pop('state_dict', None)  # timm's own networks keep it
    if not source.url:
        _own(model.pretrained_cfg)
    return model.eval()


def convert(
    checkpoint: Path,
    model_name: str,
    out: Path,
    *,
    use_ema: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    **about: Any,
) -> list[Path]:
    """Writes the folder of a Hub repository from a checkpoint, with the options of `timm-harmonic convert`.

    `data_config` tells how to prepare images, uncropped if there is no run; `about` is for `write_folder`. Returns the
    files. Raises InputError and CheckpointError.
    """
    if key_names(model_name) is None:
        raise InputError(f'{model_name!r} is not a harmonic model: see `timm-harmonic list`.')
    check_new(out)
    with progress(total=3, desc='read', **STEPS) as steps:
        source, model = load_network(model_name, checkpoint, False, model_kwargs, use_ema)
        if source.url:
            repo_id = f'{ORGANISATION}/{model_name.partition(".")[0]}.{TAG}'
            theirs = dict(repo_id=repo_id, license=model.pretrained_cfg['license'], dataset='imagenet-1k')
            about = {key: about.get(key) or value for key, value in theirs.items()}
            about['class_names'] = ImageNetInfo().label_names()
        given = data_config or {}
        if given and not source.run:  # a loop of one's own hardly crops
            given = dict(crop_pct=1.0) | given
        images = {**source.run, **(dict(input_size=None) if 'img_size' in given else {}), **given}

        def add_run(folder: Path) -> None:
            for theirs, ours in _OF_RUN.items():
                path = checkpoint.parent / theirs
                if source.run and path.is_file():
                    if path.is_symlink():  # it may point to a file that is private
                        raise InputError(f'{path} is a symbolic link: put the file itself there.')
                    shutil.copyfile(path, folder / ours)

        return write_folder(model, out, source, steps, add=add_run, data_config=images, **about)


def next_step(steps: tqdm, what: str) -> None:
    """Moves a progress bar to its next step."""
    steps.set_description(what, refresh=False)
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
    keep: bool = True,
) -> list[Path]:
    """Writes the folder of a Hub repository from a network, loads it again, compares the outputs; returns the files.

    `out` must be new or empty, and is written as a whole or not at all. `steps` is a progress bar that moves by three.
    `data_config` tells how to prepare images; by default the options of the training run do. Without a licence, the
    config's origin and paper are left out: they are about other weights. `add` writes more files. Without `keep`, all
    is done but nothing stays. Raises InputError.
    """
    for key, value in (('license', license), ('dataset', dataset)):
        if value and not re.fullmatch(_IDS[key], value):
            raise InputError(f'{key} {value!r} is not an id of the Hugging Face Hub.')
    with explained(f'{repo_id!r} is not the name of a repository', HFValidationError):
        validate_repo_id(repo_id or 'no/repository')
    if class_names is not None and len(class_names) != model.num_classes:
        raise InputError(f'{len(class_names)} class names for {model.num_classes} classes.')
    images = dict(source.run if data_config is None else data_config)
    for key in ('mean', 'std'):
        images[key] = [images[key]] if isinstance(images.get(key), (int, float)) else images.get(key)
    config_of_images(model, images)  # raises if they make no sense
    with new_folder(out, keep) as folder:
        next_step(steps, 'write')
        config = dict(label_names=class_names, pretrained_cfg=dict(license=license or None))
        _save(model, folder, config, images, own=not license and not source.url)
        add(folder)
        next_step(steps, 'compare')
        loaded = create_trained(f'local-dir:{folder}')
        _compare(model, loaded)
        place = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{out.resolve().name}'
        write_text(folder / 'README.md', str(model_card(loaded, place, source, license, dataset)))
        if strange := [path.name for path in sorted(folder.iterdir()) if path.name not in FILES or path.is_symlink()]:
            raise InputError(f'the folder is not fit for the Hub: files {strange}.')
        steps.update()
    return sorted(out.iterdir()) if keep else []


def _save(model: nn.Module, folder: Path, model_config: dict[str, Any], images: dict[str, Any], own: bool) -> None:
    scale = images.pop('scale', None)
    # As safetensors needs; .to(memory_format=...) leaves (O, I, P, 1) as it is.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    full_disk = explained(f'the weights cannot be written to {folder.parent}', SafetensorError)
    with full_disk, explained('the network cannot be saved for such images', TypeError, ValueError, AssertionError):
        save_for_hf(model, str(folder), safe_serialization=True, model_config=model_config, data_config=images)
    # timm writes num_classes at the top and among model_args; transformers refuses the latter.
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    cfg = config['pretrained_cfg']
    if own:
        _own(cfg)
    if scale is not None:
        notes = [cfg['notes']] if isinstance(cfg.get('notes'), str) else cfg.get('notes') or []
        cfg['notes'] = [*(note for note in notes if noted_scale(note) is None), scale_note(scale)]
    write_text(path, json.dumps(config, indent=2))


@torch.inference_mode()
def _compare(model: nn.Module, loaded: nn.Module) -> None:
    """Raises unless the folder's network gives the source's outputs on random images, up to float32 rounding."""
    images = torch.randn(2, *loaded.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    side = ' x '.join(map(str, images.shape[2:]))  # windows of attention may need another
    with explained(f'the network cannot run on images of {side} pixels (see --img-size)', Exception):
        expected, found = model(images), loaded(images)
    if not expected.isfinite().all():
        raise InputError('the outputs of the checkpoint are not finite.')
    if expected.shape != found.shape:
        raise InputError(f'the outputs of the folder have shape {tuple(found.shape)}, not {tuple(expected.shape)}.')
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
    if error > 1e-6:
        raise InputError(f'the outputs of the folder and the checkpoint differ by {error:.1e} of the largest.')
