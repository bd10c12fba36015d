"""Progress of everything that takes a while: a tqdm bar, which shows itself less often where no terminal is."""

import os
import sys
from typing import Any

from tqdm import tqdm

_SECONDS = 30  # without a terminal: between states of a bar, and before the first


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar; nothing if TQDM_DISABLE is set by now (tqdm itself reads it at import)."""
    file = options.pop('file', None) or sys.stderr
    disable = file is None or bool(os.environ.get('TQDM_DISABLE'))
    seldom = {} if disable or file.isatty() else dict(delay=_SECONDS, mininterval=_SECONDS)
    return tqdm(*args, **{'disable': disable, 'file': file, **options, **seldom})
