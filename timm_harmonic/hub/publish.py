"""Uploading a folder to the Hugging Face Hub: checked before, in one commit, nothing half done."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from ..models.checkpoints import first_line
from ..models.download import sha256_of
from .folder import FILES, REQUIRED
from .provenance import HubError


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

    Options are those of `timm-harmonic publish`. Raises HubError if the folder is not one to publish, the repository
    holds other files, or the token may not write; HfHubHTTPError is what else the Hub answered.
    """
    with _explaining_errors(repo_id):
        files = _check_folder(folder, repo_id)
        api = HfApi(library_name='timm-harmonic', library_version=version('timm-harmonic'))
        exists = api.repo_exists(repo_id)
        if exists:
            _check_repository(api, files, repo_id, private=private, revision=revision, force=force or create_pr)
        if dry_run:
            return f'{huggingface_hub.constants.ENDPOINT}/{repo_id}'
        return _upload(api, folder, repo_id, exists, private=private, revision=revision, create_pr=create_pr)


@contextmanager
def _explaining_errors(repo_id: str) -> Iterator[None]:
    """Says what to do if the token may not write, or the Hub does not answer."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise HubError(
            f'the Hub does not let you write to {repo_id}: {error.server_message or first_line(error)}. Log in by '
            '`hf auth login`, or set HF_TOKEN, with a token that may.'
        ) from error
    except (OSError, RuntimeError, TypeError, ValueError):
        raise
    except Exception as error:  # of whichever HTTP library the Hub's client uses
        raise HubError(
            f'{huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__}: {first_line(error)}). '
            'Nothing was published; try again.'
        ) from error


def _upload(
    api: HfApi, folder: Path, repo_id: str, exists: bool, *, private: bool, revision: str | None, create_pr: bool
) -> str:
    try:
        if not exists:
            api.create_repo(repo_id, private=private)
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = f'{folder.name} by timm-harmonic {version("timm-harmonic")}'
        place: Any = dict(repo_id=repo_id, revision=revision, create_pr=create_pr, commit_message=message)
        commit = api.upload_folder(folder_path=folder, allow_patterns=list(FILES), **place)
    except BaseException:
        # A repository that was made here goes away again if nothing got into it, whatever stopped that.
        if not exists and api.repo_exists(repo_id) and set(api.list_repo_files(repo_id)) <= {'.gitattributes'}:
            api.delete_repo(repo_id)
        raise
    return commit.pr_url or f'{huggingface_hub.constants.ENDPOINT}/{repo_id}'


def _check_folder(folder: Path, repo_id: str) -> list[Path]:
    """The files to upload. Raises unless they are a network that loads and a card that the Hub accepts."""
    if not folder.is_dir():
        raise HubError(f'{str(folder)!r} is not a folder.')
    files = sorted(folder.iterdir())
    names = {path.name for path in files}
    if missing := [name for name in REQUIRED if name not in names]:
        raise HubError(f'{str(folder)!r} lacks {", ".join(missing)}: write it by `timm-harmonic convert`.')
    if others := sorted(names - set(FILES)):
        raise HubError(f'{str(folder)!r} holds {", ".join(others)}; only {", ".join(FILES)} are published.')
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
            f'README.md loads {", ".join(sorted(named))}, but you publish it as {repo_id}: '
            f'convert with --repo {repo_id}, or edit it.'
        )
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        if not model(torch.rand(1, *model.pretrained_cfg['input_size'])).isfinite().all():
            raise HubError(f'{str(folder)!r} gives outputs that are not finite.')
    try:
        card.validate()
    except ValueError as error:
        raise HubError(f'the Hub does not accept the front matter of README.md: {error}') from error
    return files


def _check_repository(
    api: HfApi, files: list[Path], repo_id: str, *, private: bool, revision: str | None, force: bool
) -> None:
    """Raises if publishing would replace files that are not the same, unless forced."""
    if private and not api.model_info(repo_id).private:
        raise HubError(f'{repo_id} exists and is public: --private makes new repositories only private.')
    if force:
        return
    try:
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        return  # a branch that will be made
    ours = {path.name: path for path in files}

    def differs(entry: RepoSibling) -> bool:
        path = ours.get(entry.rfilename)
        if path is None:
            return entry.rfilename != '.gitattributes'  # the Hub makes this file itself
        return sha256_of(path) != entry.lfs.sha256 if entry.lfs else git_hash(path.read_bytes()) != entry.blob_id

    differing = sorted(entry.rfilename for entry in info.siblings or [] if differs(entry))
    if differing:
        raise HubError(
            f'{repo_id} holds other files: {", ".join(differing)}. Nothing was uploaded. '
            '--force replaces those of the same name, --create-pr proposes it.'
        )
