"""Uploading a folder to the Hugging Face Hub: checked before, in one commit, nothing half done."""

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from ..common import InputError, first_line
from ..models.download import sha256_of
from .folder import FILES, REQUIRED, create_trained


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
    """Uploads a folder to the repository `organisation/name`, in one commit. Returns its url, or the pull request's.

    Options are those of `timm-harmonic publish`. Raises InputError if the folder is not one to publish, the repository
    holds other files, or the token may not write; HfHubHTTPError is what else the Hub answered.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # A copy is checked and uploaded, so that what is published is what was checked.
        files = _check_folder(_copy(folder, Path(temporary)), repo_id, repr(str(folder)))
        with _explaining_errors(repo_id):
            _check_card(files)
            api = HfApi(library_name='timm-harmonic', library_version=version('timm-harmonic'))
            exists = api.repo_exists(repo_id)
            parent = None
            if exists:
                if private and not api.model_info(repo_id).private:
                    raise InputError(f'{repo_id} exists and is public: --private makes new repositories only private.')
                parent = _check_repository(api, files, repo_id, revision, force or create_pr)
            if dry_run:
                return _url(repo_id)
            if not exists:
                api.create_repo(repo_id, private=private)
            try:
                return _upload(api, files, repo_id, parent, revision=revision, create_pr=create_pr)
            except BaseException:
                # A repository that was made here goes away again if nothing got into it, whatever stopped that.
                if not exists and api.repo_exists(repo_id) and set(api.list_repo_files(repo_id)) <= {'.gitattributes'}:
                    api.delete_repo(repo_id)
                raise


def _url(repo_id: str) -> str:
    return f'{huggingface_hub.constants.ENDPOINT}/{repo_id}'


@contextmanager
def _explaining_errors(repo_id: str) -> Iterator[None]:
    """Says what to do if the token may not write, somebody else has committed, or the Hub does not answer."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise InputError(
                f'{repo_id} has a new commit since it was checked. Nothing was published: look at it, and try again.'
            ) from error
        if error.response.status_code not in (401, 403):
            raise
        raise InputError(
            f'the Hub does not let you write to {repo_id}: {error.server_message or first_line(error)}. Log in by '
            '`hf auth login`, or set HF_TOKEN, with a token that may.'
        ) from error
    except (OSError, RuntimeError, TypeError, ValueError):
        raise
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        raise InputError(
            f'{huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__}: {first_line(error)}). '
            'Nothing was published; try again.'
        ) from error


def _upload(
    api: HfApi, files: list[Path], repo_id: str, parent: str | None, *, revision: str | None, create_pr: bool
) -> str:
    """Uploads files as one commit on top of `parent`. Returns where they are."""
    if revision and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    folder = files[0].parent
    place: Any = dict(repo_id=repo_id, revision=revision, create_pr=create_pr, parent_commit=parent)
    message = f'{folder.name} by timm-harmonic {version("timm-harmonic")}'
    try:
        commit = api.upload_folder(folder_path=folder, allow_patterns=list(FILES), commit_message=message, **place)
    except HfHubHTTPError:
        raise
    except Exception as error:  # the commit may be there although its answer is not
        if create_pr or not _is_there(api, files, repo_id, revision):
            raise
        warnings.warn(f'the answer of the Hub was lost ({first_line(error)}), but all files are there.', stacklevel=2)
        return _url(repo_id)
    return commit.pr_url or _url(repo_id)


def _is_there(api: HfApi, files: list[Path], repo_id: str, revision: str | None) -> bool:
    """Whether the repository holds these files now. Raises InputError if it cannot be asked."""
    try:
        there = {entry.rfilename: entry for entry in _entries(api, repo_id, revision)[1]}
    except HfHubHTTPError:
        return False
    except Exception as error:
        raise InputError(
            f'the Hub stopped answering ({type(error).__name__}: {first_line(error)}). Whether the folder is published '
            f'is unknown: look at {_url(repo_id)} before you try again.'
        ) from error
    return all(path.name in there and not _differs(path, there[path.name]) for path in files)


def _copy(folder: Path, place: Path) -> Path:
    """A copy of a folder's files. Raises InputError if it is none, or has links in it."""
    if not folder.is_dir():
        raise InputError(f'{str(folder)!r} is not a folder.')
    copy = place / (folder.resolve().name or 'folder')
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            kind = 'symbolic link' if path.is_symlink() else 'folder'
            raise InputError(f'{str(folder)!r} holds a {kind}, {path.name}: only files are published.')
        shutil.copyfile(path, copy / path.name)
    return copy


def _check_folder(folder: Path, repo_id: str, name: str) -> list[Path]:
    """The files to upload, of a copy of a folder. Raises unless they are a network that loads, and its card."""
    files = sorted(folder.iterdir())
    names = {path.name for path in files}
    if missing := [name for name in REQUIRED if name not in names]:
        raise InputError(f'{name} lacks {", ".join(missing)}: write it by `timm-harmonic convert`.')
    if others := sorted(names - set(FILES)):
        raise InputError(f'{name} holds {", ".join(others)}; only {", ".join(FILES)} are published.')
    try:
        config = json.loads((folder / 'config.json').read_text())
        card = ModelCard.load(folder / 'README.md')
        licences = config['pretrained_cfg'].get('license'), card.data.license
    except (ValueError, KeyError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise InputError(f'config.json or README.md in {name} is damaged: {error}') from error
    if licences[0] != licences[1]:
        raise InputError(f'config.json says licence {licences[0]!r}, README.md {licences[1]!r}: they must agree.')
    named = set(re.findall(r'(?:hf-hub|local-dir):[\w./-]*\w', card.text)) - {f'hf-hub:{repo_id}'}
    if named:
        raise InputError(
            f'README.md loads {", ".join(sorted(named))}, but you publish it as {repo_id}: '
            f'convert with --repo {repo_id}, or edit it.'
        )
    model = create_trained(f'local-dir:{folder}')
    try:
        with torch.inference_mode():
            finite = model(torch.rand(1, *model.pretrained_cfg['input_size'])).isfinite().all()
    except Exception as error:  # a config may say anything
        problem = f'{type(error).__name__}: {first_line(error)}'
        raise InputError(f'{name} cannot run on an image as its config.json says: {problem}') from error
    if not finite:
        raise InputError(f'{name} gives outputs that are not finite.')
    return files


def _check_card(files: list[Path]) -> None:
    """Raises unless the Hub accepts the card."""
    try:
        ModelCard.load(files[0].parent / 'README.md').validate()
    except ValueError as error:
        raise InputError(f'the Hub does not accept the front matter of README.md: {error}') from error


def _check_repository(api: HfApi, files: list[Path], repo_id: str, revision: str | None, force: bool) -> str | None:
    """Raises if publishing would replace files that are not the same, unless forced. Returns the commit that was seen.

    None if the branch will be made.
    """
    try:
        commit, entries = _entries(api, repo_id, revision)
    except RevisionNotFoundError:
        return None
    ours = {path.name: path for path in files}
    # The Hub makes .gitattributes itself.
    differing = sorted(
        entry.rfilename
        for entry in entries
        if entry.rfilename != '.gitattributes'
        and (entry.rfilename not in ours or _differs(ours[entry.rfilename], entry))
    )
    if differing and not force:
        raise InputError(
            f'{repo_id} holds other files: {", ".join(differing)}. Nothing was uploaded. '
            '--force replaces those of the same name, --create-pr proposes it.'
        )
    return commit


def _entries(api: HfApi, repo_id: str, revision: str | None) -> tuple[str | None, list[RepoSibling]]:
    """The newest commit of a branch, and what it holds."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    return info.sha, info.siblings or []


def _differs(path: Path, entry: RepoSibling) -> bool:
    return sha256_of(path) != entry.lfs.sha256 if entry.lfs else git_hash(path.read_bytes()) != entry.blob_id
