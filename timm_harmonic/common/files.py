"""Files and folders that exist as a whole or not at all, even if the process is interrupted or killed."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from . import InputError, explained

_PREFIX = '.timm-harmonic-'  # of temporary folders; a killed process leaves one behind


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, then renames it to `path`, or to the file that a link at `path` points to.

    A file that is replaced keeps its mode. Devices, pipes and open descriptors such as /dev/stdout get the content once
    it is complete. Raises InputError if the file cannot be written.
    """
    with explained(f'{str(path)!r} cannot be written', OSError):
        stream = _stream(path)
        path = path.resolve()
        with tempfile.TemporaryDirectory(dir=None if stream else path.parent, prefix=_PREFIX) as temporary:
            partial = Path(temporary, path.name)
            write(partial)
            if stream is None:
                if path.exists():
                    partial.chmod(stat.S_IMODE(path.stat().st_mode))
                partial.replace(path)
                return
            with stream, partial.open('rb') as content:
                shutil.copyfileobj(content, stream)


def _stream(path: Path) -> BinaryIO | None:
    """The open descriptor, device or pipe at `path`. By its name alone, a file behind a descriptor would be emptied."""
    named = re.fullmatch(r'/(?:dev|proc/self)/fd/(\d+)', str(path))
    for number in (1, 2, *map(int, named.groups() if named else ())):
        with suppress(OSError):
            if os.path.samestat(path.stat(), os.stat(number)):
                return open(os.dup(number), 'wb')
    return path.open('wb') if path.exists() and not path.is_file() else None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 whatever the locale. Names of files that are not UTF-8 get escapes such as \\xff."""
    names_decoded = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    path.write_text(names_decoded, encoding='utf-8', newline='\n')


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
            for path in filter(Path.is_file, folder.rglob('*')):  # safetensors lets nobody else read its files
                path.chmod(folder.stat().st_mode & 0o666)
            if stays:
                for path in sorted(folder.iterdir(), reverse=True):  # model.safetensors before config.json
                    path.rename(out / path.name)
                return
            if out.is_dir():
                folder.chmod(stat.S_IMODE(out.stat().st_mode))
                out.rmdir()  # Windows renames nothing onto a folder
            folder.rename(out)
