"""The folder of a Hub repository, from a checkpoint or a network."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn
from tqdm import tqdm

from ..conversion.progress import progress
from ..models.checkpoints import first_line
from ..models.download import ORGANISATION, WEIGHTS_NAME
from ..models.weights import TAG
from .card import model_card
from .provenance import HubError, Provenance, build_loaded, key_names, read_source
from .writing import clear_remains, new_folder

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

    Options are those of `timm-harmonic convert`. Returns the files written. Raises HubError if the options contradict
    each other, or the folder does not give the source's outputs; CheckpointError if the checkpoint cannot be read or
    does not fit; FileNotFoundError if there is none.
    """
    if ':' not in model_name and (not timm.is_model(model_name) or key_names(model_name) is None):
        raise HubError(f'{model_name!r} is not a harmonic model: see `timm-harmonic list`.')
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
                        raise HubError(f'{checkpoint.parent / theirs} is a symbolic link: put the file itself there.')
                    shutil.copyfile(checkpoint.parent / theirs, folder / ours)

        about: dict[str, Any] = dict(repo_id=repo_id, class_names=class_names, license=license, dataset=dataset)
        return write_folder(model, out, source, steps, add=add_run, **about)


def check_new(out: Path) -> None:
    """Refuses a folder with files in it, or what is no folder, by a HubError."""
    clear_remains(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f'{str(out)!r} exists and is not an empty folder: name another.')


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
    Raises HubError if the folder is not new, or does not give the network's outputs.
    """
    check_new(out)
    if class_names is not None and len(class_names) != model.num_classes:
        raise HubError(f'{len(class_names)} class names for {model.num_classes} classes.')
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
        raise HubError(f'the weights cannot be written to {folder.parent}: {first_line(error)}') from error
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
        raise HubError('the checkpoint gives outputs that are not finite.')
    if expected.shape != found.shape:
        raise HubError(f'the folder gives outputs of shape {tuple(found.shape)}, not {tuple(expected.shape)}.')
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo().tiny))
    if error > 1e-6:
        raise HubError(
            f'the folder gives other outputs than the checkpoint: they differ by {error:.1e} of the largest.'
        )
