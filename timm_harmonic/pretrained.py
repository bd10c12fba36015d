"""Where pretrained weights come from: a file, the Hugging Face Hub, or the authors' release."""

import contextlib
import hashlib
import os
import re
import socket
import warnings
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model_pretrained,
    list_pretrained,
    resolve_pretrained_cfg,
)
from torch import nn

from .checkpoints import CheckpointError, StateDict, first_line, read_checkpoint

__all__ = [
    'ORGANISATION',
    'REPOSITORY',
    'TAG',
    'WEIGHTS_NAME',
    'build_model',
    'paper_cfg',
    'pinned_sha256',
    'released_cfg',
    'sha256_of',
]

# Our organisation on the Hugging Face Hub. A mirror of it is named by the environment, before the package is imported.
ORGANISATION = os.environ.get('TIMM_HARMONIC_HUB_ORG') or 'timm-harmonic'
REPOSITORY = 'https://github.com/matej-ulicny/harmonic-networks'
TAG = 'ulicny_in1k'  # of the weights that the authors released
WEIGHTS_NAME = 'model.safetensors'

_PIN = re.compile(r'sha256:([0-9a-f]{64})')
_TIMEOUT = 10.0  # seconds without a word from a server
_FROM_A_FILE = 'A file from elsewhere is loaded by pretrained_cfg_overlay=dict(file=PATH).'


def paper_cfg(first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained config with what all networks of the paper have in common.

    Args:
        first_conv: Name of the root layer.
        classifier: Name of the classifier.
        **kwargs: More entries of the config.
    """
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv,
        classifier=classifier,
        license='bsd-3-clause',
        origin_url=REPOSITORY,
        paper_name='Harmonic Convolutional Networks based on Discrete Cosine Transform',
        paper_ids='arXiv:2001.06570',
        **kwargs,
    )


def released_cfg(name: str, file: str, sha256: str = '', notes: tuple[str, ...] = (), **kwargs: Any) -> dict[str, Any]:
    """`paper_cfg` of a weight that the authors released: on the Hub under our organisation, else at their url.

    Args:
        name: Architecture and tag, the name of the repository on the Hub.
        file: Name of the authors' file; the hex digits at its end are the start of its SHA-256.
        sha256: Pin of the Hub's file: 64 hex digits, or empty as long as none is published.
        notes: The paper's figures.
        **kwargs: For `paper_cfg`.
    """
    return paper_cfg(
        url=f'{REPOSITORY}/releases/download/0.1.0/{file}',
        hf_hub_id=f'{ORGANISATION}/{name}',
        notes=(*notes, f'sha256:{sha256}') if sha256 else notes,
        **kwargs,
    )


def pinned_sha256(notes: str | tuple[str, ...] | None) -> str | None:
    """The SHA-256 that a config's notes pin the Hub's file to, as `sha256:` and 64 hex digits; None if they do not."""
    found = _PIN.search('\n'.join([notes] if isinstance(notes, str) else notes or ()))
    return found and found.group(1)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's build_model_with_cfg, with weights found and read as this module says.

    A weight that we registered comes from the Hub, and from the authors' release if the Hub does not have it. A file,
    a url or a Hub id that the caller names is the only place that is looked in.

    Args:
        model_cls: Class of the network.
        variant: Name of the architecture.
        pretrained: Whether to load weights.
        pretrained_cfg: As in timm: a config, or the tag of one.
        pretrained_cfg_overlay: As in timm: values that replace the config's.
        cache_dir: Where downloads are kept; the Hub's and torch.hub's own folders if None.
        **kwargs: For build_model_with_cfg.

    Returns:
        The network, or its feature extractor.

    Raises:
        RuntimeError: If weights are asked for where none exist, or cannot be downloaded.
        CheckpointError: If the weights cannot be read, do not fit, or are not those that were pinned.
        FileNotFoundError: If the weights' file does not exist.
        HfHubHTTPError: What the Hub answered about an id that the caller named.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    read = None
    if pretrained and not cfg.state_dict:
        read = _read_weights(variant, cfg, overlay, cache_dir)
        if read is not None:
            overlay.update(state_dict=read, source=None)  # with a source, timm would load by itself
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    if read is not None:
        for module in model.modules():  # a feature extractor has a config of its own beside its network's
            if hasattr(module, 'pretrained_cfg'):
                module.pretrained_cfg.pop('state_dict', None)
                if cfg.source:
                    module.pretrained_cfg['source'] = cfg.source
    return model


def _read_weights(variant: str, cfg: Any, overlay: dict[str, Any], cache_dir: str | os.PathLike | None) -> Any:
    """The checkpoint that a config asks for, or None if it is timm's to read."""
    if cfg.source == 'local-dir':
        path = os.path.join(cfg.file, WEIGHTS_NAME)
        return read_checkpoint(path) if os.path.isfile(path) else None
    if not cfg.has_weights:
        raise RuntimeError(
            f'No pretrained weights exist for {variant}. Use pretrained=False, or choose one of: '
            f'{", ".join(list_pretrained("harm*"))}. {_FROM_A_FILE}'
        )
    if cfg.file:
        return read_checkpoint(cfg.file)

    hub_named, url_named, notes = _what_is_named(variant, cfg, overlay)
    if hub_named or (cfg.hf_hub_id and not cfg.url):
        return _from_hub(cfg.hf_hub_id, cfg.hf_hub_filename, pinned_sha256(notes), cache_dir)
    if url_named or not cfg.hf_hub_id:
        try:
            return _from_url(cfg.url, cache_dir)
        except OSError as error:
            raise RuntimeError(
                f'could not download {cfg.url} ({_reason(error)}), and it is not in {_url_cache(cache_dir)}. '
                f'{_FROM_A_FILE}'
            ) from error

    try:
        return _from_hub(cfg.hf_hub_id, None, pinned_sha256(notes), cache_dir)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        on_hub = _reason(error)
    try:
        read = _from_url(cfg.url, cache_dir)
    except OSError as error:
        raise RuntimeError(
            f'the weights of {cfg.hf_hub_id.rpartition("/")[2]} are at neither place.\n'
            f'  Hugging Face Hub, {cfg.hf_hub_id}: {on_hub}; not in {_hub_cache(cache_dir)}\n'
            f"  the authors' release, {cfg.url}: {_reason(error)}; not in {_url_cache(cache_dir)}\n"
            f'{_FROM_A_FILE}'
        ) from error
    warnings.warn(
        f"{cfg.hf_hub_id} is not to be had from the Hugging Face Hub ({on_hub}): loaded the authors' {cfg.url}.",
        stacklevel=2,
    )
    return read


def _what_is_named(variant: str, cfg: Any, overlay: dict[str, Any]) -> tuple[bool, bool, Any]:
    """Whether the caller names a Hub id or a url, beside what is registered, and the notes that may pin its file.

    Notes that came with the weights cannot vouch for them, and the registered ones are about the registered place.
    """
    tagged = f'{variant}.{cfg.tag}'
    registered = get_pretrained_cfg(tagged if is_model_pretrained(tagged) else variant)
    known = {key: getattr(registered, key, None) for key in ('hf_hub_id', 'url', 'notes')}
    hub_named = bool(cfg.source or overlay.get('hf_hub_id') or (cfg.hf_hub_id and cfg.hf_hub_id != known['hf_hub_id']))
    url_named = bool(overlay.get('url') or (cfg.url and cfg.url != known['url']))
    other_file = cfg.source or (hub_named and cfg.notes == known['notes'])
    return hub_named, url_named, overlay.get('notes') or (None if other_file else cfg.notes)


def _hub_cache(cache_dir: str | os.PathLike | None) -> str:
    return os.fspath(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)


def _url_cache(cache_dir: str | os.PathLike | None) -> str:
    return os.fspath(cache_dir or os.path.join(torch.hub.get_dir(), 'checkpoints'))


def _reason(error: BaseException) -> str:
    """What a person needs to know of an error: the Hub's own are several paragraphs."""
    short = {
        'GatedRepoError': 'gated, access has to be asked for',
        'RepositoryNotFoundError': 'no such repository, or no access to it',
        'RemoteEntryNotFoundError': f'{WEIGHTS_NAME} is not in the repository',
    }
    return short.get(type(error).__name__) or first_line(error)


def _from_hub(hub_id: str, filename: str | None, pin: str | None, cache_dir: str | os.PathLike | None) -> StateDict:
    """A checkpoint of a repository `organisation/name` or `organisation/name@revision`.

    Raises:
        RepositoryNotFoundError: If there is no such repository, or no access to it.
        EntryNotFoundError: If it lacks the file, or the Hub cannot be reached and the file is not in the cache.
        CheckpointError: If the file is not what it should be; it does not stay in the cache.
        RuntimeError: If the download breaks off, or cannot be kept.
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
            raise CheckpointError(f'the SHA-256 of {path!r} is {found}, not {pin}, which is pinned.')
        return read_checkpoint(path)
    except CheckpointError as error:
        revision = os.path.basename(os.path.dirname(path))
        huggingface_hub.scan_cache_dir(_hub_cache(cache_dir)).delete_revisions(revision).execute()
        raise CheckpointError(f'{repo_id} on the Hugging Face Hub: {error} {_whether_removed(path)}') from error


def _download_from_hub(repo_id: str, filename: str, revision: str | None, cache_dir: str | os.PathLike | None) -> str:
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision)
        if not isinstance(cached, str):
            _ask_once(repo_id, filename, revision)
        return huggingface_hub.hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
    except (EntryNotFoundError, HfHubHTTPError):
        raise
    except Exception as error:  # whichever HTTP library the Hub's client uses
        raise RuntimeError(
            f'{filename} of {repo_id} could not be downloaded into {_hub_cache(cache_dir)}: {type(error).__name__}: '
            f'{first_line(error)} Nothing was kept; try again. cache_dir=, or the environment variable HF_HOME, names '
            'another folder.'
        ) from error


def _ask_once(repo_id: str, filename: str, revision: str | None) -> None:
    """Asks the Hub for a file that is not in the cache, so that without a network the answer comes soon.

    The client by itself tries six times, with a minute for each.
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


def _from_url(url: str, cache_dir: str | os.PathLike | None) -> StateDict:
    """A checkpoint from a url, kept under its name; a hash in the name must be the start of the content's.

    Raises:
        OSError: If it cannot be downloaded.
        CheckpointError: If it is not what it should be; it does not stay in the cache.
    """
    name = os.path.basename(urlparse(url).path)
    path = os.path.join(_url_cache(cache_dir), name)
    found = re.search(r'-([0-9a-f]{8,})\.', name)
    digest = found.group(1) if found else ''
    if not os.path.exists(path):
        if huggingface_hub.constants.is_offline_mode():
            raise ConnectionError('HF_HUB_OFFLINE is set')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        waiting = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT)  # torch.hub by itself waits for an answer without end
        try:
            torch.hub.download_url_to_file(url, path, hash_prefix=digest or None)
        except RuntimeError as error:
            raise CheckpointError(f'{url} was refused and is not cached: {error}.') from error
        finally:
            socket.setdefaulttimeout(waiting)
    try:
        if not sha256_of(path).startswith(digest):
            raise CheckpointError(f'{path!r} is not the file that its name says: its SHA-256 is another.')
        return read_checkpoint(path)
    except CheckpointError as error:
        with contextlib.suppress(OSError):  # a cache that is read-only
            os.remove(path)
        raise CheckpointError(f'{error} {_whether_removed(path)}') from error
