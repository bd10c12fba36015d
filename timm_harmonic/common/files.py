"""Files and folders that exist as a whole or not at all, even if the process is interrupted or killed."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import InputError, explained

_PREFIX = '.timm-harmonic-'  # of temporary folders; a killed process leaves one behind


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, then renames it to `path`, or to the file that a link at `path` points to.

    Devices and pipes such as /dev/stdout are written directly. Raises InputError if the file cannot be written.
    """
    with explained(f'{str(path)!r} cannot be written', OSError):
        if path.exists() and (not path.is_file() or path.is_relative_to('/dev')):
            write(path)
            return
        path = path.resolve()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_PREFIX) as temporary:
            partial = Path(temporary, path.name)
            write(partial)
            partial.replace(path)


def check_new(out: Path) -> None:
    """Raises InputError unless `out` is an empty folder or does not exist."""
    if out.is_dir():
        if held := sorted(path.name for path in out.iterdir()):
            raise InputError(f'{str(out)!r} is not an empty folder, it contains {held[0]}: choose another.')
    elif os.path.lexists(out):
        raise InputError(f'{str(out)!r} exists and is not an empty folder: choose another.')


@contextmanager
def new_folder(out: Path, keep: bool = True) -> Iterator[Path]:
    """Yields a temporary folder to fill and renames it to `out`, which must be new or an empty folder.

    A folder that cannot be replaced (the working directory, a mount point) is filled by moving the files instead.
    Without `keep`, the temporary folder is removed. Raises InputError if `out` is not empty or cannot be written.
    """
    with explained(f'{str(out)!r} cannot be written', OSError):
        check_new(out)
        out = out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        stays = out.is_dir() and (out == Path.cwd() or out.is_mount() or not os.access(out.parent, os.W_OK))
        with tempfile.TemporaryDirectory(dir=out if stays else out.parent, prefix=_PREFIX) as temporary:
            folder = Path(temporary, out.name or 'folder')
            folder.mkdir()
            yield folder
            if not keep:
                return
            if stays:
                for path in sorted(folder.iterdir(), reverse=True):  # model.safetensors before config.json
                    path.rename(out / path.name)
                return
            if out.is_dir():
                out.rmdir()  # Windows renames nothing onto a folder
            folder.rename(out)
