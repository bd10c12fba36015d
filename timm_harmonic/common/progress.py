"""Progress of everything that takes a while: a bar on a terminal, and a line now and then elsewhere."""

import os
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS = 30  # between lines


def progress(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar; lines in a file or a pipe; nothing if TQDM_DISABLE is set by now (tqdm itself reads it at import)."""
    file = options.pop('file', None) or sys.stderr
    disable = file is None or bool(os.environ.get('TQDM_DISABLE'))
    if not disable and not file.isatty():
        file = _Lines(file)
    return tqdm(*args, **{'disable': disable, 'file': file, **options})


class _Lines:
    """The file of a bar that gets lines: the bar's state every 30 seconds, hence nothing of a short one."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._written = file, time.monotonic()

    def write(self, text: str) -> None:
        # Bars also write moves of the cursor, and blanks to clear themselves.
        if text.startswith('\r') and text.strip() and time.monotonic() >= self._written + _SECONDS:
            self._written = time.monotonic()
            with suppress(OSError):  # the work goes on without a reader
                self._file.write(text.strip() + '\n')
                self._file.flush()

    def flush(self) -> None: ...
