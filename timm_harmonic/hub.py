"""Repositories of the Hugging Face Hub: from a checkpoint to a folder, and from a folder to the Hub."""

import csv
import dataclasses
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg, list_pretrained, model_entrypoint, save_for_hf
from torch import nn
from tqdm import tqdm

from .checkpoints import CheckpointError, StateDict, first_line, read_checkpoint, rename_keys, unwrap
from .model_card import Provenance, model_card
from .pretrained import ORGANISATION, TAG, WEIGHTS_NAME, pinned_sha256, sha256_of

__all__ = ['LICENSE', 'HubError', 'convert', 'publish']

LICENSE = 'bsd-3-clause'

_REQUIRED = (WEIGHTS_NAME, 'config.json', 'README.md')
_OPTIONAL = {'args.yaml': 'train_hparams.yaml', 'summary.csv': 'summary.csv'}  # in a run's folder, in a repository
_FILES = (*_REQUIRED, *_OPTIONAL.values())


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
        model_name: Architecture.
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
    names = _key_names(model_name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f'{str(out)!r} exists and is not an empty folder: name another.')
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = tqdm(total=4, desc='read', unit='step', leave=False)
    with steps, tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        content = read_checkpoint(checkpoint)
        state = unwrap(content, use_ema)
        source = _provenance(checkpoint, content, model_name, use_ema)
        steps.set_description('build')
        steps.update()
        model = _build(model_name, rename_keys(state, names), source, model_kwargs or {})
        _check_class_names(class_names, model)
        if source.url:
            class_names, dataset = ImageNetInfo().label_names(), dataset or 'imagenet-1k'
            repo_id = repo_id or f'{ORGANISATION}/{model_name}.{TAG}'
        repo_id = repo_id or f'{ORGANISATION}/{out.name}'
        steps.set_description('write')
        steps.update()
        save_for_hf(
            model,
            str(folder),
            safe_serialization=True,
            model_config=dict(label_names=class_names, pretrained_cfg=dict(license=license)),
            data_config=source.run,
        )
        _say_classes_once(folder / 'config.json')
        for theirs, ours in _OPTIONAL.items():
            if source.run and (checkpoint.parent / theirs).is_file():
                shutil.copyfile(checkpoint.parent / theirs, folder / ours)
        steps.set_description('compare')
        steps.update()
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        _compare(model, loaded)
        card = model_card(loaded, repo_id, source, license, dataset, version('timm-harmonic'))
        card.save(folder / 'README.md')
        steps.update()
        if out.exists():
            out.rmdir()  # it is empty
        folder.rename(out)
    return sorted(out.iterdir())


def _key_names(model_name: str) -> dict[str, str]:
    """The authors' names of an architecture's parameters."""
    module = sys.modules[model_entrypoint(model_name).__module__] if timm.is_model(model_name) else None
    if not hasattr(module, 'KEY_NAMES'):
        raise HubError(f'{model_name!r} is not a harmonic model: see `timm-harmonic list`.')
    return module.KEY_NAMES


def _provenance(path: Path, content: StateDict, model_name: str, use_ema: bool) -> Provenance:
    """What is known of a checkpoint: by its hash if it is a released one, else by the run that it lies beside."""
    digest = sha256_of(path)
    source = Provenance(path.name, digest)
    for name in {*list_pretrained('harm*'), *list_pretrained(f'{model_name}.*')}:
        cfg = get_pretrained_cfg(name)
        found = re.search(r'-([0-9a-f]{8,})\.pth$', cfg.url or '')
        if found and digest.startswith(found.group(1)):
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
    elif 'args' in content:
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


def _build(model_name: str, state: StateDict, source: Provenance, model_kwargs: dict[str, Any]) -> nn.Module:
    """The network that the parameters are of, loaded with them. Classes and channels are those of their shapes."""
    kwargs = dict(source.run.get('model_kwargs') or {}, **model_kwargs)
    if source.run.get('gp'):
        kwargs.setdefault('global_pool', source.run['gp'])
    blank = timm.create_model(model_name, device='meta', **kwargs)
    cfg = blank.pretrained_cfg
    root = blank.get_submodule(cfg['first_conv'])
    classifier = state.get(f'{cfg["classifier"]}.weight')
    statistics = state.get(f'{cfg["first_conv"]}.bn.running_mean')
    weight = state.get(f'{cfg["first_conv"]}.weight')
    if statistics is not None and hasattr(root, 'basis'):
        channels = statistics.numel() // root.basis.shape[0]
    elif weight is not None:
        channels = weight.shape[1] * root.groups
    else:
        raise CheckpointError(f'{source.file} has no {cfg["first_conv"]}.weight: it is not a {model_name}.')
    shapes = dict(num_classes=len(classifier) if classifier is not None else 0, in_chans=channels)
    for key, value in shapes.items():
        if kwargs.setdefault(key, value) != value:
            raise HubError(f'{source.file} has {key}={value}, not {kwargs[key]}.')
    overlay = dict(
        state_dict=state,
        num_classes=shapes['num_classes'],
        input_size=(channels, *cfg['input_size'][1:]),
        notes=source.notes or None,
    )
    if not source.url:
        overlay.update(tag=None, url=None, hf_hub_id=None, origin_url=None)
    return timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


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


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> str:
    """Uploads a folder that `convert` wrote, in one commit.

    Args:
        folder: The folder.
        repo_id: `organisation/name`. The repository is made if there is none.
        private: Whether a new repository is private.
        revision: Branch, made if there is none; the main one if None.
        create_pr: Whether to open a pull request rather than to commit.
        dry_run: Whether to stop before anything is written.
        force: Whether to replace what else the repository holds under these names.

    Returns:
        Url of the repository, or of the pull request.

    Raises:
        HubError: If the folder is not one to publish, the repository holds other files, or the token may not write.
        HfHubHTTPError: What else the Hub answered.
    """
    files = _check_folder(folder, repo_id)
    api = HfApi(library_name='timm-harmonic', library_version=version('timm-harmonic'))
    try:
        exists = api.repo_exists(repo_id)
        if exists:
            _check_repository(api, files, repo_id, private=private, revision=revision, force=force or create_pr)
        if dry_run:
            return f'{huggingface_hub.constants.ENDPOINT}/{repo_id}'
        return _upload(api, folder, repo_id, exists, private=private, revision=revision, create_pr=create_pr)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise HubError(
            f'the Hub does not let you write to {repo_id}: {error.server_message or first_line(error)}. Log in by '
            '`hf auth login`, or set HF_TOKEN, with a token that may.'
        ) from error


def _upload(
    api: HfApi, folder: Path, repo_id: str, exists: bool, *, private: bool, revision: str | None, create_pr: bool
) -> str:
    with _no_empty_repository(api, repo_id, exists):
        if not exists:
            api.create_repo(repo_id, private=private)
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(_FILES),
            commit_message=f'{folder.name} by timm-harmonic {version("timm-harmonic")}',
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or f'{huggingface_hub.constants.ENDPOINT}/{repo_id}'


def _check_folder(folder: Path, repo_id: str) -> list[Path]:
    """The files to upload; raises unless they are a network that loads, and a card that the Hub takes."""
    if not folder.is_dir():
        raise HubError(f'{str(folder)!r} is not a folder.')
    files = sorted(folder.iterdir())
    names = {path.name for path in files}
    if missing := [name for name in _REQUIRED if name not in names]:
        raise HubError(f'{str(folder)!r} lacks {", ".join(missing)}: write it by `timm-harmonic convert`.')
    if others := sorted(names - set(_FILES)):
        raise HubError(f'{str(folder)!r} holds {", ".join(others)}; only {", ".join(_FILES)} are published.')
    try:
        config = json.loads((folder / 'config.json').read_text())
        card = ModelCard.load(folder / 'README.md')
        licences = config['pretrained_cfg'].get('license'), card.data.license
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise HubError(f'config.json or README.md in {str(folder)!r} is damaged: {error}') from error
    if licences[0] != licences[1]:
        raise HubError(f'config.json says licence {licences[0]!r}, README.md {licences[1]!r}: they must agree.')
    named = {name for name in re.findall(r'hf-hub:([\w.-]+/[\w.-]+)', card.text) if name != repo_id}
    if named:
        raise HubError(
            f'README.md loads {", ".join(sorted(named))}, but is to be published as {repo_id}: '
            f'convert with --repo {repo_id}, or edit it.'
        )
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        if not model(torch.rand(1, *model.pretrained_cfg['input_size'])).isfinite().all():
            raise HubError(f'{str(folder)!r} gives outputs that are not finite.')
    try:
        card.validate()
    except ValueError as error:
        raise HubError(f'the Hub does not take the front matter of README.md: {error}') from error
    return files


def _check_repository(
    api: HfApi, files: list[Path], repo_id: str, *, private: bool, revision: str | None, force: bool
) -> None:
    """Raises if a repository holds anything that publishing could take for its own, unless forced."""
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        return  # a branch that is going to be made
    if private and not info.private:
        raise HubError(f'{repo_id} exists and is public: --private would not make it private.')
    if force:
        return
    ours = {path.name: path for path in files}
    differing = []
    for entry in info.siblings or []:
        if entry.rfilename == '.gitattributes':
            continue
        path = ours.get(entry.rfilename)
        if path is None:
            differing.append(entry.rfilename)
        elif entry.lfs is not None:
            if entry.lfs.sha256 != sha256_of(path):
                differing.append(entry.rfilename)
        elif entry.blob_id != _git_blob_id(path):
            differing.append(entry.rfilename)
    if differing:
        raise HubError(
            f'{repo_id} holds other files: {", ".join(sorted(differing))}. Nothing was uploaded. '
            '--force replaces those of the same name, --create-pr proposes it.'
        )


def _git_blob_id(path: Path) -> str:
    """The name that git gives to a file's content (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@contextmanager
def _no_empty_repository(api: HfApi, repo_id: str, existed: bool) -> Iterator[None]:
    """Takes a repository that was made here away again if nothing got into it, whatever stopped that."""
    try:
        yield
    except BaseException:
        if not existed and api.repo_exists(repo_id) and set(api.list_repo_files(repo_id)) <= {'.gitattributes'}:
            api.delete_repo(repo_id)
        raise
