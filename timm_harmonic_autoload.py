"""Lets timm know the harmonic models without an import: `import timm` is enough.

PyTorch calls the entry points of the group `torch.backends` at the end of `import torch`. Ours puts one finder on
sys.meta_path, which has the plugin imported whenever timm.models has been executed. This module imports neither torch
nor timm, and whatever goes wrong, `import torch` and `import timm` go on. TIMM_HARMONIC_AUTOLOAD=0, or PyTorch's own
TORCH_DEVICE_BACKEND_AUTOLOAD=0, switches it off.
"""

import importlib
import os
import sys
import warnings
from typing import Any

_HOST = 'timm.models'
_PLUGIN = 'timm_harmonic'


def autoload() -> None:
    """Imports the plugin once timm.models is there, now or later. Never raises."""
    if os.environ.get('TIMM_HARMONIC_AUTOLOAD') == '0' or _PLUGIN in sys.modules:
        return
    host = sys.modules.get(_HOST)
    if host is not None and not getattr(host.__spec__, '_initializing', False):
        _import_plugin()
    elif not any(isinstance(finder, _HostFinder) for finder in sys.meta_path):
        # Other threads may walk the list: what moves up is at most asked twice. Taking the finder away again could make
        # them skip the next one, so it stays. After an import of timm that was interrupted it is needed again, too.
        sys.meta_path.insert(0, _HostFinder())


def _import_plugin() -> None:
    try:
        importlib.import_module(_PLUGIN)
    except Exception as error:
        host = sys.modules.get(_HOST.partition('.')[0])
        message = (
            f'the harmonic models are not available: importing {_PLUGIN} failed with {type(error).__name__}: {error}. '
            f'Python took timm {getattr(host, "__version__", "?")} from {next(iter(getattr(host, "__path__", "?")))}. '
            'If you have installed another timm, set PYTHONSAFEPATH=1 (Python 3.11 or later) or check out its version '
            'beside the script. TIMM_HARMONIC_AUTOLOAD=0 switches the models off.'
        )
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # warnings are errors here, but this one must not stop the host's import
            print(f'RuntimeWarning: {message}', file=sys.stderr)


class _HostFinder:
    """Finds timm.models as the other finders do, and has the plugin imported after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _HOST:
            return None
        # Not by importlib.util.find_spec: it imports the parent, and another thread may hold that one's lock and wait
        # for the lock that is held here.
        others = [finder for finder in tuple(sys.meta_path) if not isinstance(finder, _HostFinder)]
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, 'find_spec'))
        spec: Any = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPlugin(spec.loader)
        return spec


class _ThenPlugin:
    """A loader that executes a module by its own loader, gives that back its place, and imports the plugin."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _import_plugin()
