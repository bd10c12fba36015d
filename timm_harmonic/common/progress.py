"""Progress of everything that takes a while: a tqdm bar, which shows itself less often where no terminal is."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar; nothing if TQDM_DISABLE is set by now (tqdm itself reads it at import)."""
    file = options.pop('file', None) or sys.stderr
    disable = file is None or bool(os.environ.get('TQDM_DISABLE'))
    # In a file or a pipe: seconds before the bar shows itself and between its states, and no moves of the cursor.
    seldom = {} if disable or file.isatty() else dict(delay=30, mininterval=30, position=0)
    return tqdm(*args, **{'disable': disable, 'file': file, **options, **seldom})
