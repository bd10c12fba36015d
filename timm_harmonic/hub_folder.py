"""From a checkpoint to the folder of a repository on the Hugging Face Hub."""

import argparse
import csv
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg, list_pretrained, model_entrypoint, save_for_hf
from torch import nn
from tqdm import tqdm

from .checkpoints import CheckpointError, StateDict, first_line, names_of, read_checkpoint, rename_keys, unwrap
from .model_card import Provenance, model_card
from .pretrained import ORGANISATION, REPOSITORY, TAG, WEIGHTS_NAME, pinned_sha256, sha256_of

__all__ = [
    'FILES',
    'LICENSE',
    'REPORTS',
    'REQUIRED',
    'HubError',
    'build_loaded',
    'check_new',
    'convert',
    'key_names',
    'provenance',
    'write_folder',
]

LICENSE = 'bsd-3-clause'

REQUIRED = (WEIGHTS_NAME, 'config.json', 'README.md')
_OPTIONAL = {'args.yaml': 'train_hparams.yaml', 'summary.csv': 'summary.csv'}  # in a run's folder, in a repository
REPORTS = ('compression.json', 'compression.md', 'compression.png')  # of a network that was compressed
FILES = (*REQUIRED, *_OPTIONAL.values(), *REPORTS)


class HubError(RuntimeError):
    """A folder or a repository that is not what it should be; the message says in what."""


def convert(
    checkpoint: Path,
    model_name: str,
    out: Path,
    *,
    repo_id: str = '',
    use_ema: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
    license: str = LICENSE,
    dataset: str = '',
) -> list[Path]:
    """Writes the folder of a Hub repository from a checkpoint, loads it again and compares the outputs.

    The checkpoint is an authors' file or one of a training run of timm. `args.yaml` and `summary.csv` beside it are
    taken along, and say how the network was made and how images were prepared.

    Args:
        checkpoint: The file.
        model_name: Architecture, or `local-dir:` and `hf-hub:` with the network that was trained on from there.
        out: Folder to write, which must be new or empty.
        repo_id: Where the folder is going to be, for the card; our organisation and the name of `out` if empty.
        use_ema: Whether to take averaged weights.
        model_kwargs: Options of the architecture, before those in args.yaml.
        class_names: Names of the classes in their order, for config.json.
        license: Identifier of the weights' licence.
        dataset: Identifier of the training data on the Hub.

    Returns:
        The files written.

    Raises:
        HubError: If the options contradict each other, or the folder does not give the source's outputs.
        CheckpointError: If the checkpoint cannot be read or does not fit.
        FileNotFoundError: If there is no checkpoint.
    """
    names = key_names(model_name) if ':' in model_name or timm.is_model(model_name) else None
    if names is None:
        raise HubError(f'{model_name!r} is not a harmonic model: see `timm-harmonic list`.')
    check_new(out)
    with tqdm(total=4, desc='read', unit='step', leave=False) as steps:
        content = read_checkpoint(checkpoint)
        state = unwrap(content, use_ema)
        source = provenance(checkpoint, content, model_name, use_ema)
        steps.set_description('build')
        steps.update()
        model = build_loaded(model_name, rename_keys(state, names), source, model_kwargs or {})
        if source.url:
            class_names, dataset = ImageNetInfo().label_names(), dataset or 'imagenet-1k'
            repo_id = repo_id or f'{ORGANISATION}/{model_name}.{TAG}'

        def add_run(folder: Path) -> None:
            for theirs, ours in _OPTIONAL.items():
                if source.run and (checkpoint.parent / theirs).is_file():
                    shutil.copyfile(checkpoint.parent / theirs, folder / ours)

        return write_folder(
            model,
            out,
            source,
            steps,
            repo_id=repo_id,
            class_names=class_names,
            license=license,
            dataset=dataset,
            add=add_run,
        )


def check_new(out: Path) -> None:
    """Refuses a folder with files in it.

    Raises:
        HubError: If it is one, or no folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f'{str(out)!r} exists and is not an empty folder: name another.')


def write_folder(
    model: nn.Module,
    out: Path,
    source: Provenance,
    steps: tqdm,
    *,
    repo_id: str = '',
    class_names: list[str] | None = None,
    license: str = LICENSE,
    dataset: str = '',
    data_config: dict[str, Any] | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> list[Path]:
    """Writes the folder of a Hub repository from a network, loads it again and compares the outputs.

    The folder is there as a whole in the end, or not at all.

    Args:
        model: Network that timm has built, in evaluation.
        out: Folder to write, which must be new or empty.
        source: Where its weights are from.
        steps: Progress bar, which is moved by three.
        repo_id: Where the folder is going to be, for the card; our organisation and the name of `out` if empty.
        class_names: Names of the classes in their order, for config.json.
        license: Identifier of the weights' licence.
        dataset: Identifier of the training data on the Hub.
        data_config: How images are prepared, by timm's names; as the training run did if None.
        add: Writes more files into the folder.

    Returns:
        The files written.

    Raises:
        HubError: If `out` is not new, or the folder does not give the network's outputs.
    """
    check_new(out)
    _check_class_names(class_names, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        steps.set_description('write')
        steps.update()
        save_for_hf(
            model,
            str(folder),
            safe_serialization=True,
            model_config=dict(label_names=class_names, pretrained_cfg=dict(license=license)),
            data_config=source.run if data_config is None else data_config,
        )
        _say_classes_once(folder / 'config.json')
        add(folder)
        steps.set_description('compare')
        steps.update()
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        _compare(model, loaded)
        repo_id = repo_id or f'{ORGANISATION}/{out.name}'
        card = model_card(loaded, repo_id, source, license, dataset, version('timm-harmonic'))
        card.save(folder / 'README.md')
        steps.update()
        if out.exists():
            out.rmdir()  # it is empty
        folder.rename(out)
    return sorted(out.iterdir())


def key_names(model_name: str) -> dict[str, str] | None:
    """The authors' names of an architecture's parameters; None if it is not one of ours.

    A repository or a folder has parameters by our names.
    """
    if ':' in model_name:
        return {}
    return getattr(sys.modules[model_entrypoint(model_name).__module__], 'KEY_NAMES', None)


def provenance(path: Path, content: StateDict, model_name: str, use_ema: bool | None) -> Provenance:
    """What is known of a checkpoint: by its hash if it is a released one, else by the run that it lies beside."""
    digest = sha256_of(path)
    source = Provenance(path.name, digest)
    for name in list_pretrained(['harm*', f'{model_name}.*']):
        cfg = get_pretrained_cfg(name)
        found = re.search(r'-([0-9a-f]{8,})\.pth$', cfg.url or '')
        if found and digest.startswith(found.group(1)) and cfg.origin_url == REPOSITORY:
            if cfg.architecture != model_name:
                raise HubError(f'{path.name} is the released {name}, not {model_name}.')
            notes = tuple(note for note in cfg.notes if not pinned_sha256(note))
            return dataclasses.replace(source, url=cfg.url, notes=notes)

    run, epoch = {}, content.get('epoch')
    options = path.parent / 'args.yaml'
    if options.is_file():
        try:
            run = yaml.safe_load(options.read_text(encoding='utf-8'))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise HubError(f'{options} is damaged: {first_line(error)}') from error
    elif isinstance(content.get('args'), argparse.Namespace):
        run = vars(content['args'])
    if not isinstance(run, dict):
        raise HubError(f'{options} holds no options, but a {type(run).__name__}.')
    trained = str(run.get('model', model_name))
    if ':' not in trained and trained.partition('.')[0] != model_name:  # a repository or folder may have any name
        raise HubError(f'{path.name} was trained as {trained}, by the options of its run, not as {model_name}.')
    row: dict[str, str] = {}
    if run and isinstance(epoch, int) and (summary := path.parent / 'summary.csv').is_file():
        with open(summary, newline='') as file:
            rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(epoch)]
        row = {k: v for k, v in (rows or [{}])[-1].items() if k.startswith('eval_')}
    epoch = epoch if isinstance(epoch, int) else None
    averaged = use_ema or ('state_dict_ema' in content and 'state_dict' not in content)
    return dataclasses.replace(source, epoch=epoch, averaged=averaged, run=run, summary=row)


def build_loaded(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """The network that parameters are of, loaded with them. Classes and channels are those of their shapes.

    Args:
        model_name: Any name that timm takes.
        state: Its parameters.
        source: Where they are from.
        model_kwargs: Options of the architecture, before those of the training run.

    Returns:
        The network, in evaluation.

    Raises:
        CheckpointError: If the parameters do not fit.
        HubError: If an option contradicts them.
    """
    kwargs = dict(source.run.get('model_kwargs') or {}, **model_kwargs)
    if source.run.get('gp'):
        kwargs.setdefault('global_pool', source.run['gp'])
    with torch.device('meta'):
        blank = timm.create_model(model_name, **kwargs)
    cfg = blank.pretrained_cfg
    (first, *_), (last, *_) = names_of(cfg['first_conv']), names_of(cfg['classifier'])
    root = blank.get_submodule(first)
    classifier = state.get(f'{last}.weight')
    statistics = state.get(f'{first}.bn.running_mean')
    weight = state.get(f'{first}.weight')
    if statistics is not None and hasattr(root, 'basis'):
        channels = statistics.numel() // root.basis.shape[0]
    elif weight is not None:
        channels = weight.shape[1] * root.groups
    else:
        raise CheckpointError(f'{source.file} has no {first}.weight: it is not a {model_name}.')
    shapes = dict(num_classes=len(classifier) if classifier is not None else 0, in_chans=channels)
    for key, value in shapes.items():
        if kwargs.setdefault(key, value) != value:
            raise HubError(f'{source.file} has {key}={value}, not {kwargs[key]}.')
    overlay = dict(
        state_dict=state,
        source=None,
        num_classes=shapes['num_classes'],
        input_size=(channels, *cfg['input_size'][1:]),
        notes=source.notes or None,
    )
    if not source.url:
        overlay.update(tag=None, url=None, hf_hub_id=None, origin_url=None)
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg.pop('state_dict', None)
    return model.eval()


def _say_classes_once(path: Path) -> None:
    """timm writes num_classes at the top and, if it was given, among model_args: transformers trips over the latter."""
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2))


def _check_class_names(class_names: list[str] | None, model: nn.Module) -> None:
    if class_names is not None and len(class_names) != model.num_classes:
        raise HubError(f'{len(class_names)} class names for {model.num_classes} classes.')


@torch.inference_mode()
def _compare(model: nn.Module, loaded: nn.Module) -> None:
    """Raises unless the folder's network gives the source's outputs on random images, up to float32 rounding."""
    images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
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
