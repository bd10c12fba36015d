"""Folders of images in timm's order: their files, splits and classes."""

import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import InputError, explained
from .readers import READABLE

# Names that folders of a split may have, in any case: timm's, and those of test images.
SPLITS = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}
_OF_SYSTEMS = ('thumbs.db', 'desktop.ini')  # files that file managers leave; others are hidden


def natural_order(name: str | Path) -> tuple[list[int | str], str]:
    """Sort key with timm's order of files and classes: numbers by value, letters in any case."""
    parts = re.split(r'(\d+)', str(name).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


def image_files(folder: Path) -> list[Path]:
    """Files in a folder at any depth, in timm's order. Follows links, and leaves hidden files and folders out."""
    found: list[Path] = []

    def wanted(place: str, name: str) -> bool:
        path = Path(place, name)
        if name.startswith('.'):
            if os.access(path, os.R_OK) and any(file.suffix.lower() in READABLE for file in path.iterdir()):
                warnings.warn(f'{path} is passed over, but timm takes it for a class: remove it.', stacklevel=2)
            return False
        return not Path(place).resolve().is_relative_to(path.resolve())  # a link to a folder above would never end

    def fail(error: OSError) -> None:
        raise error

    with explained(f'cannot list {str(folder)!r}', OSError):
        for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
            folders[:] = [name for name in folders if wanted(place, name)]
            found += [Path(place, n) for n in files if not n.startswith('.') and n.lower() not in _OF_SYSTEMS]
    # Without pipes and the like; a broken link is no silent gap.
    return sorted((path for path in found if path.is_file() or not path.exists()), key=natural_order)


def classes_of(files: Sequence[Path], root: Path) -> tuple[list[str], list[int]]:
    """The classes below a folder, in timm's order, and each image's class number, by the folder that holds it."""
    names = ['' if path.parent == root else path.parent.name for path in files]
    classes = sorted(set(names), key=natural_order)
    for first, second in itertools.pairwise(classes):
        if natural_order(first)[0] == natural_order(second)[0]:
            warnings.warn(f'timm puts the classes {first!r} and {second!r} in any order: rename one.', stacklevel=2)
    places = {name: i for i, name in enumerate(classes)}
    return classes, [places[name] for name in names]


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits, by 'train', 'validation' and 'test', or {}. Raises InputError if that is ambiguous."""
    with explained(f'cannot list {str(folder)!r}', OSError):
        here = _folders(folder)
        named = [(split, path) for split, names in SPLITS.items() for path in here if path.name.lower() in names]
        # Beside other folders, one without class folders is a class of this name: trains, in a folder of vehicles.
        found = named if len(named) == len(here) else [(split, path) for split, path in named if _folders(path)]
    if len(named) - len(found) > 1:
        raise InputError(f'{str(folder)!r} has {", ".join(f"{path.name}/" for _, path in named)} beside classes.')
    for (split, path), (other, second) in itertools.combinations(found, 2):
        if other == split:
            both = f'{path.name}/ and {second.name}/'
            raise InputError(f'{str(folder)!r} has {both}, both could be its {split} images: remove or rename one.')
    return dict(found)


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, by any of its names in any case, or the folder itself if there is none."""
    wanted = next((key for key, names in SPLITS.items() if split.lower() in names), '')
    if not wanted and (folder / split).is_dir():
        return folder / split
    return split_folders(folder).get(wanted, folder)


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder, except hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.'))
