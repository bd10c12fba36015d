"""Progress bars of everything that takes a while."""

import os
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar on a terminal; none in a pipe, or if TQDM_DISABLE is set by now (tqdm itself reads it at import)."""
    disable = True if os.environ.get('TQDM_DISABLE') else None
    return tqdm(*args, **{'disable': disable, **options})
