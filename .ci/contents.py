"""Checks that the wheel is the package and nothing else, and that the sdist is the whole repository.

The description in the wheel has no link into a folder, because an index has none.

    python .ci/contents.py DIST SOURCE

SOURCE is the folder that DIST was built from. Building leaves an egg-info there, and nothing else.
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path


def in_wheel(dist: Path) -> set[str]:
    (wheel,) = dist.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if '.dist-info/' not in name}


def relative_links(dist: Path) -> list[str]:
    (wheel,) = dist.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return re.findall(r'\]\((?!\w+:|#)[^)]*\)', archive.read(name).decode())


def in_sdist(dist: Path) -> set[str]:
    (sdist,) = dist.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        files = {member.name.partition('/')[2] for member in archive.getmembers() if member.isfile()}
    return {name for name in files if name not in {'PKG-INFO', 'setup.cfg'} and '.egg-info/' not in name}


def in_source(source: Path) -> set[str]:
    files = {path.relative_to(source) for path in source.rglob('*') if path.is_file()}
    return {path.as_posix() for path in files if not path.parts[0].endswith('.egg-info')}


_PACKAGED = ('timm_harmonic/', 'timm_harmonic_autoload.py', 'timm_harmonic_cli/')


def main() -> None:
    dist, source = Path(sys.argv[1]), in_source(Path(sys.argv[2]))
    expected = {
        'wheel': {name for name in source if name.startswith(_PACKAGED)},
        'sdist': source,
    }
    problems = [f'the description has a link{link[1:]}' for link in relative_links(dist)]
    for kind, found in {'wheel': in_wheel(dist), 'sdist': in_sdist(dist)}.items():
        problems += [f'{kind}: {name} is missing' for name in sorted(expected[kind] - found)]
        problems += [f'{kind}: {name} does not belong there' for name in sorted(found - expected[kind])]
        print(f'{kind}: {len(found)} files, {len(expected[kind])} expected')
    if problems:
        raise SystemExit('\n'.join(problems))


if __name__ == '__main__':
    main()
