"""Downloads of weights: from the Hugging Face Hub and from a url, checked before they are used."""

import contextlib
import os
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

from ..common import first_line
from .checkpoints import CheckpointError, StateDict, read_checkpoint

# Our organisation on the Hugging Face Hub. The environment can name a mirror before the package is imported.
ORGANISATION = os.environ.get('TIMM_HARMONIC_HUB_ORG') or 'timm-harmonic'
WEIGHTS_NAME = 'model.safetensors'

_PIN = re.compile(r'sha256:([0-9a-f]{64})')
_MEANT_AS_A_PIN = re.compile(r'sha-?256\s*[:=]\s*\S*', re.IGNORECASE)
_TIMEOUT = 10.0  # seconds without an answer from a server


def pinned_sha256(notes: str | tuple[str, ...] | None) -> str | None:
    """The SHA-256 that a config's notes pin the Hub's file to, as `sha256:` and 64 hex digits; None without a pin.

    Raises CheckpointError if something there looks like a pin and is none, or there are several.
    """
    meant = _MEANT_AS_A_PIN.findall('\n'.join([notes] if isinstance(notes, str) else notes or ()))
    for text in meant:
        if not _PIN.fullmatch(text):
            raise CheckpointError(f'{text!r} in the notes is no pin: write sha256: and 64 digits, 0-9 and a-f.')
    if len(set(meant)) > 1:
        raise CheckpointError(f'the notes pin several files: {" and ".join(sorted(set(meant)))}.')
    return meant[0].removeprefix('sha256:') if meant else None


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def released_digits(name: str) -> str:
    """The hex digits in a file's name or url that begin its SHA-256, as NAME-DIGITS.pth; empty without them."""
    found = re.search(r'-([0-9a-f]{8,})\.', os.path.basename(name))
    return found.group(1) if found else ''


CacheDir = str | Path | None  # None stands for the Hub's and torch.hub's own folders


def hub_cache(cache_dir: CacheDir) -> str:
    """Folder where the Hub's files are kept."""
    return os.fspath(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)


def url_cache(cache_dir: CacheDir) -> str:
    """Folder where files of a url are kept."""
    return os.fspath(cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints'))


def reason_of(error: BaseException) -> str:
    """An error in a few words: the Hub's own messages are several paragraphs long."""
    short = {
        'GatedRepoError': 'gated: ask for access',
        'RepositoryNotFoundError': 'no such repository, or no access to it',
        'RemoteEntryNotFoundError': f'{WEIGHTS_NAME} is not in the repository',
    }
    return short.get(type(error).__name__) or first_line(error)


def from_hub(hub_id: str, filename: str | None, pin: str | None, cache_dir: CacheDir) -> StateDict:
    """A checkpoint of a repository `organisation/name` or `organisation/name@revision`.

    Raises RepositoryNotFoundError and EntryNotFoundError as the Hub's client does, CheckpointError if the file is not
    what it should be (it does not stay in the cache), RuntimeError if the download breaks off or cannot be kept.
    """
    repo_id, _, revision = hub_id.partition('@')
    own = repo_id.startswith(f'{ORGANISATION}/')
    if own and filename not in (None, WEIGHTS_NAME):
        raise CheckpointError(f'{filename!r} of {repo_id} was not loaded: only {WEIGHTS_NAME} is taken from there.')
    try:
        path = _download_from_hub(repo_id, filename or WEIGHTS_NAME, revision or None, cache_dir)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        if own or filename:
            raise
        path = _download_from_hub(repo_id, 'pytorch_model.bin', revision or None, cache_dir)
    try:
        if pin and (found := sha256_of(path)) != pin:
            raise CheckpointError(f'the SHA-256 of {path!r} is {found}, but {pin} is pinned.')
        return read_checkpoint(path)
    except CheckpointError as error:
        revision = os.path.basename(os.path.dirname(path))
        with contextlib.suppress(OSError):  # a cache that is read-only
            huggingface_hub.scan_cache_dir(hub_cache(cache_dir)).delete_revisions(revision).execute()
        raise CheckpointError(f'{repo_id} on the Hugging Face Hub: {error} {_whether_removed(path)}') from error


def _download_from_hub(repo_id: str, filename: str, revision: str | None, cache_dir: CacheDir) -> str:
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        if not isinstance(cached, str):
            _ask_once(repo_id, filename, revision)
        return huggingface_hub.hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
    except (EntryNotFoundError, HfHubHTTPError):
        raise
    except Exception as error:  # whichever HTTP library the Hub's client uses
        raise RuntimeError(
            f'{filename} of {repo_id} could not be downloaded into {hub_cache(cache_dir)}: {type(error).__name__}: '
            f'{first_line(error)} Nothing was kept; try again. To use another folder, pass cache_dir= or set the '
            'environment variable HF_HOME.'
        ) from error


def _ask_once(repo_id: str, filename: str, revision: str | None) -> None:
    """Asks the Hub for a file before it is downloaded, so that without a network the answer comes soon.

    The client itself tries six times, with a minute for each.
    """
    url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (429, 500, 502, 503, 504):
            raise
    except Exception as error:
        raise LocalEntryNotFoundError(
            f'{huggingface_hub.constants.ENDPOINT} cannot be reached ({type(error).__name__}: {first_line(error)})'
        ) from error


def _whether_removed(path: str) -> str:
    return f'Remove {path}.' if os.path.exists(path) else 'It was removed from the cache.'


def from_url(url: str, cache_dir: CacheDir) -> StateDict:
    """A checkpoint from a url, kept under its name. A hash in the name must begin the content's SHA-256.

    Raises OSError if it cannot be downloaded, CheckpointError if it is not what it should be. Such a download is not
    kept. A file that was there before stays: other programs keep theirs in the same folder.
    """
    name = os.path.basename(urlparse(url).path)
    path = os.path.join(url_cache(cache_dir), name)
    digits = released_digits(name)
    if not os.path.exists(path):
        return _download_from_url(url, path, digits)
    try:
        if not sha256_of(path).startswith(digits):
            raise CheckpointError(f'{path!r} is not the file that its name says: it has another SHA-256.')
        return read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} It was there before, in place of {url}: remove it if no other program needs it, or pass another '
            'cache_dir.'
        ) from error


def _download_from_url(url: str, path: str, digits: str) -> StateDict:
    """Downloads a checkpoint and reads it, and only then gives the file its name."""
    if huggingface_hub.is_offline_mode():
        raise ConnectionError('HF_HUB_OFFLINE is set')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unchecked = os.path.join(os.path.dirname(path), f'.{os.getpid()}-{threading.get_ident()}-{os.path.basename(path)}')
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub itself waits for an answer without end
    try:
        torch.hub.download_url_to_file(url, unchecked, hash_prefix=digits or None)
        read = read_checkpoint(unchecked)
        os.replace(unchecked, path)
        return read
    except RuntimeError as error:  # the hash that torch compares, and what cannot be read
        reason = str(error).replace(repr(unchecked), 'it').rstrip('.')
        raise CheckpointError(f'{url} was refused and is not cached: {reason}.') from error
    finally:
        socket.setdefaulttimeout(waiting)
        with contextlib.suppress(FileNotFoundError):
            os.remove(unchecked)
