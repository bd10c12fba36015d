"""Where pretrained weights come from: a file, the Hugging Face Hub, or the authors' release."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model_pretrained,
    list_pretrained,
    resolve_pretrained_cfg,
)

from .checkpoints import StateDict, read_checkpoint
from .download import (
    ORGANISATION,
    WEIGHTS_NAME,
    CacheDir,
    from_hub,
    from_url,
    hub_cache,
    pinned_sha256,
    reason_of,
    url_cache,
)
from .paper import REPOSITORY, paper_cfg

TAG = 'ulicny_in1k'  # of the weights that the authors released

_FROM_A_FILE = 'To load a file that you have, pass pretrained_cfg_overlay=dict(file=PATH).'


def released_cfg(name: str, file: str, sha256: str = '', notes: tuple[str, ...] = (), **kwargs: Any) -> dict[str, Any]:
    """`paper_cfg` of a weight that the authors released: on the Hub under our organisation, else at their url.

    `name` is the repository on the Hub, `sha256` pins its file (64 hex digits; empty as long as none is published), and
    the hex digits in the name of the authors' file begin its SHA-256.
    """
    return paper_cfg(
        url=f'{REPOSITORY}/releases/download/0.1.0/{file}',
        hf_hub_id=f'{ORGANISATION}/{name}',
        notes=(*notes, f'sha256:{sha256}') if sha256 else notes,
        **kwargs,
    )


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: CacheDir = None,
    **kwargs: Any,
) -> Any:
    """timm's build_model_with_cfg, with weights found and read as this module says.

    A weight that we registered comes from the Hub, or from the authors' release if the Hub does not have it. If the
    caller names a file, a url or a Hub id, no other place is tried.

    Raises:
        RuntimeError: If weights are asked for where none exist, or cannot be downloaded.
        CheckpointError: If the weights cannot be read, do not fit, or are not those that were pinned.
        FileNotFoundError: If the weights' file does not exist.
        HfHubHTTPError: What the Hub answered about an id that the caller named.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if cfg.source:
        pretrained_cfg = cfg = _of_this_source(cfg, overlay)
    read = None
    if pretrained and not cfg.state_dict:
        read = _read_weights(variant, cfg, overlay, cache_dir)
        if read is not None:
            overlay.update(state_dict=read, source=None)  # with a source, timm would load by itself
    source = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, cache_dir=cache_dir)
    model = build_model_with_cfg(model_cls, variant, pretrained, **source, **kwargs)
    if read is not None:
        for module in model.modules():  # a feature extractor has a config of its own beside its network's
            if hasattr(module, 'pretrained_cfg'):
                module.pretrained_cfg.pop('state_dict', None)
                if cfg.source:
                    module.pretrained_cfg['source'] = cfg.source
    return model


def _read_weights(variant: str, cfg: PretrainedCfg, overlay: dict[str, Any], cache_dir: CacheDir) -> StateDict | None:
    """The checkpoint that a config asks for, or None if timm has to read it."""
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
    hub_named, url_named, pin = _named_by_caller(variant, cfg, overlay)
    if hub_named or (cfg.hf_hub_id and not cfg.url):
        return from_hub(cfg.hf_hub_id, cfg.hf_hub_filename, pin, cache_dir)
    if url_named or not cfg.hf_hub_id:
        return _from_url_only(cfg.url, cache_dir)
    return _from_hub_or_release(cfg, pin, cache_dir)


def _of_this_source(cfg: PretrainedCfg, overlay: dict[str, Any]) -> PretrainedCfg:
    """The config that came with a repository or a folder, without other sources that it names: only the caller may."""
    file = cfg.file if cfg.source == 'local-dir' else overlay.get('file')
    return dataclasses.replace(cfg, file=file, state_dict=overlay.get('state_dict'))


def _named_by_caller(variant: str, cfg: PretrainedCfg, overlay: dict[str, Any]) -> tuple[bool, bool, str | None]:
    """Whether the caller names a Hub id or a url that is not the registered one, and the pin of the Hub's file.

    Notes that came with weights cannot vouch for them, and ours pin the registered place only.
    """
    tagged = f'{variant}.{cfg.tag}'
    registered = get_pretrained_cfg(tagged if is_model_pretrained(tagged) else variant)
    known = {key: getattr(registered, key, None) for key in ('hf_hub_id', 'url', 'notes')}
    hub = bool(cfg.source or overlay.get('hf_hub_id') or (cfg.hf_hub_id and cfg.hf_hub_id != known['hf_hub_id']))
    url = bool(overlay.get('url') or (cfg.url and cfg.url != known['url']))
    not_for_this_file = cfg.source or (hub and cfg.notes == known['notes'])
    return hub, url, pinned_sha256(overlay.get('notes') or (None if not_for_this_file else cfg.notes))


def _from_url_only(url: str, cache_dir: CacheDir) -> StateDict:
    try:
        return from_url(url, cache_dir)
    except OSError as error:
        raise RuntimeError(
            f'could not download {url} ({reason_of(error)}), and it is not in {url_cache(cache_dir)}. {_FROM_A_FILE}'
        ) from error


def _from_hub_or_release(cfg: PretrainedCfg, pin: str | None, cache_dir: CacheDir) -> StateDict:
    """A weight of ours, from the Hub; from the authors' release, with a warning, if the Hub does not have it."""
    try:
        return from_hub(cfg.hf_hub_id, None, pin, cache_dir)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        on_hub = reason_of(error)
    try:
        read = from_url(cfg.url, cache_dir)
    except OSError as error:
        raise RuntimeError(
            f'the weights of {cfg.hf_hub_id.rpartition("/")[2]} are at neither place.\n'
            f'  Hugging Face Hub, {cfg.hf_hub_id}: {on_hub}; not in {hub_cache(cache_dir)}\n'
            f"  the authors' release, {cfg.url}: {reason_of(error)}; not in {url_cache(cache_dir)}\n"
            f'{_FROM_A_FILE}'
        ) from error
    warnings.warn(
        f"{cfg.hf_hub_id} could not be loaded from the Hugging Face Hub ({on_hub}): loaded the authors' {cfg.url}.",
        stacklevel=2,
    )
    return read
