"""Where pretrained weights come from: a file, a folder, a pinned file on the Hugging Face Hub, or the authors' url."""

import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, build_model_with_cfg, list_pretrained, resolve_pretrained_cfg

from ..common import in_short
from .checkpoints import CheckpointError, read_checkpoint
from .paper import REPOSITORY, paper_cfg

TAG = 'ulicny_in1k'  # of the weights that the authors released
ORGANISATION = 'timm-harmonic'  # on the Hugging Face Hub
WEIGHTS_NAME = 'model.safetensors'

_NAMES = (WEIGHTS_NAME, 'pytorch_model.bin')  # timm's, in its order of preference
_PIN = re.compile(r'sha-?256\s*[:=]\s*\S*', re.IGNORECASE)  # or what looks like one
_FROM_A_FILE = 'To load a file that you have, pass pretrained_cfg_overlay=dict(file=PATH).'


def released_cfg(name: str, file: str, sha256: str = '', notes: tuple[str, ...] = (), **kwargs: Any) -> dict[str, Any]:
    """`paper_cfg` of a weight that the authors released as `file`, or that is our repository `name` on the Hub.

    The Hub is the source if `sha256` (64 hex digits) pins our model.safetensors.
    """
    url = f'{REPOSITORY}/releases/download/0.1.0/{file}'
    on_hub = dict(hf_hub_id=f'{ORGANISATION}/{name}', notes=(*notes, f'sha256:{sha256}'))
    source = on_hub if sha256 else dict(url=url, notes=notes)
    return paper_cfg(**{**kwargs, **source, 'origin_url': url})


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """timm's build_model_with_cfg, with weights found, checked and read by this module.

    A config that came with a repository or a folder cannot name other files or vouch for its own weights: only the
    caller can, by `pretrained_cfg_overlay`. Raises CheckpointError for weights that cannot be loaded as they should be.
    """
    overlay = pretrained_cfg_overlay or {}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    source = cfg.source
    if source:
        file = cfg.file if source == 'local-dir' else overlay.get('file')
        cfg = dataclasses.replace(cfg, file=file, state_dict=overlay.get('state_dict'))
    if pretrained:
        state = cfg.state_dict or read_checkpoint(_find_weights(variant, cfg, overlay, cache_dir))
        cfg = dataclasses.replace(cfg, state_dict=state, source=None)  # with a source, timm would load by itself
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg=cfg, **kwargs)
    for module in model.modules():  # a feature extractor has a config too
        if hasattr(module, 'pretrained_cfg'):
            module.pretrained_cfg.pop('state_dict', None)
            if source:
                module.pretrained_cfg['source'] = source
    return model


def _find_weights(variant: str, cfg: PretrainedCfg, overlay: dict[str, Any], cache_dir: str | Path | None) -> Path:
    """The local path of a config's weights, downloaded if necessary and checked against its pin."""
    named = {key: overlay[key] for key in ('file', 'hf_hub_id', 'url') if overlay.get(key)}
    places = named or vars(cfg)
    pin = pinned_sha256(overlay.get('notes') or (None if named or cfg.source else cfg.notes))
    if places.get('file'):
        path = Path(places['file'])
        if path.is_dir():
            path = next((path / name for name in _NAMES if (path / name).is_file()), path / WEIGHTS_NAME)
    elif places.get('hf_hub_id'):
        path = _from_hub(places['hf_hub_id'], cfg.hf_hub_filename, cache_dir)
    elif places.get('url'):
        path = _from_url(places['url'], cache_dir)
    else:
        choice = f'use pretrained=False, or choose one of {", ".join(list_pretrained("harm*"))}'
        raise CheckpointError(f'No pretrained weights exist for {variant}: {choice}. {_FROM_A_FILE}')
    if pin and path.is_file() and (found := sha256_of(path)) != pin:
        # In the Hub's cache a name is a link: only without the file itself is it downloaded again.
        place = path.resolve()
        raise CheckpointError(f'{path} has the SHA-256 {found}, but {pin} is pinned. If it was cached, remove {place}.')
    return path


def _from_hub(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    """A file of a repository `organisation/name` or `organisation/name@revision`, by the Hub's client."""
    repo_id, _, revision = hub_id.partition('@')
    options: dict[str, Any] = dict(revision=revision or None, cache_dir=cache_dir)
    try:
        try:
            path = huggingface_hub.hf_hub_download(repo_id, filename or WEIGHTS_NAME, **options)
        except EntryNotFoundError as error:
            if filename or isinstance(error, LocalEntryNotFoundError):
                raise
            path = huggingface_hub.hf_hub_download(repo_id, _NAMES[1], **options)
    except Exception as error:  # of the Hub, of its client's HTTP library, or of the file system
        raise _not_downloaded(f'{repo_id} on the Hugging Face Hub', error) from error
    return Path(path)


def _from_url(url: str, cache_dir: str | Path | None) -> Path:
    """A file from a url, kept in torch.hub's folder under its name only once it is known to be a checkpoint."""
    path = Path(cache_dir or Path(torch.hub.get_dir(), 'checkpoints'), os.path.basename(urlparse(url).path))
    digits = released_digits(path.name)
    if not path.exists():
        try:
            if huggingface_hub.is_offline_mode():
                raise ConnectionError('HF_HUB_OFFLINE is set')
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix='.') as temporary:
                partial = Path(temporary, path.name)
                torch.hub.download_url_to_file(url, str(partial), hash_prefix=digits or None)
                read_checkpoint(partial)
                partial.replace(path)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash, or not a checkpoint
            raise _not_downloaded(url, error) from error
    elif digits and not sha256_of(path).startswith(digits):
        raise CheckpointError(f'{path} does not match the hash in its name: remove it, or pass another cache_dir.')
    return path


def _not_downloaded(place: str, error: Exception) -> CheckpointError:
    return CheckpointError(f'could not download the weights from {place} ({in_short(error)}). {_FROM_A_FILE}')


def pinned_sha256(notes: str | tuple[str, ...] | None) -> str | None:
    """The SHA-256 that a config's notes pin its file to, as `sha256:` and 64 digits. CheckpointError if unclear."""
    pins = sorted(set(_PIN.findall('\n'.join([notes] if isinstance(notes, str) else notes or ()))))
    for pin in pins:
        if len(pins) > 1 or not re.fullmatch('sha256:[0-9a-f]{64}', pin):
            raise CheckpointError(f'invalid pin {" and ".join(pins)}: expected one sha256: with 64 digits 0-9, a-f.')
    return pins[0].removeprefix('sha256:') if pins else None


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def released_digits(name: str) -> str:
    """The hex digits at the end of a file's name (NAME-DIGITS.pth), with which its SHA-256 begins; '' without them."""
    found = re.search(r'-([0-9a-f]{8,})\.', os.path.basename(name))
    return found.group(1) if found else ''
