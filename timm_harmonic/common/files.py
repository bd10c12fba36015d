"""Files and folders that are there as a whole or not at all, whatever interrupts their writing."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under another name, then renames it: an interruption leaves no half of a file.

    A link stays, and what it points at is written. What is no file, as /dev/stdout, is written as it is.
    """
    if path.exists() and (not path.is_file() or path.is_relative_to('/dev')):
        write(path)
        return
    path = path.resolve()
    partial = path.with_name(f'.{path.name}.partial')
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: Path, last: str = '') -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end.

    `out` is new, or an empty folder: '.', a link to one or a mount point as well. Into such a folder everything is
    moved, `last` at the end: it is what makes the folder look complete. What a killed process of this machine left is
    cleared. Raises OSError if it cannot be written.
    """
    clear_remains(out)
    exists = out.is_dir()
    if not exists:
        out.parent.mkdir(parents=True, exist_ok=True)
    parent, prefix = (out, '.') if exists else (out.parent, f'.{out.name}')
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f'{prefix}-{socket.gethostname()}-{os.getpid()}-'))
    moved: list[Path] = []
    try:
        folder = temporary / (out.name or 'folder')
        folder.mkdir()
        yield folder
        if exists:
            for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
                moved.append(out / path.name)
                path.rename(moved[-1])
        else:
            folder.rename(out)
        moved = []
    finally:
        for path in moved:  # an interruption: nothing stays
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)


def clear_remains(out: Path) -> None:
    """Removes what killed processes of this machine left of the same folder."""
    host = f'-{socket.gethostname()}-'
    for place, prefix in ((out.parent, f'.{out.name}'), (out, '.')):
        for path in place.glob(f'{prefix}{host}*') if place.is_dir() else ():
            owner = path.name.removeprefix(f'{prefix}{host}').partition('-')[0]
            if owner.isdecimal() and not _is_running(int(owner)):
                shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
