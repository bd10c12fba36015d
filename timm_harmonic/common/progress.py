"""Progress bars of everything that takes a while."""

import os
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar on a terminal; no bar in a pipe, or if TQDM_DISABLE is set.

    tqdm itself reads that variable at import, possibly before the command sets it.
    """
    disable = True if os.environ.get('TQDM_DISABLE') else None
    return tqdm(*args, **{'disable': disable, **options})
