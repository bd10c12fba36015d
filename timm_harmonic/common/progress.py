"""Progress bars of everything that takes its time."""

import os
from typing import Any

from tqdm import tqdm


def progress(*args: Any, **options: Any) -> tqdm:
    """A bar of tqdm's on a terminal; none in a pipe, or where TQDM_DISABLE is set.

    tqdm reads that variable when it is imported, which may be before the command sets it.
    """
    disable = True if os.environ.get('TQDM_DISABLE') else None
    return tqdm(*args, **{'disable': disable, **options})
