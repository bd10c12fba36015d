"""The package's imports only run down its floors, and its files stay short. All of it is read from the source."""

import ast
import graphlib
from pathlib import Path

import pytest

import timm_harmonic

PACKAGE = Path(timm_harmonic.__file__).parent
FLOORS = ('layers', 'conversion', 'models', 'hub', 'small_data')
TOP = ('__init__', '__main__')  # the modules above all floors
MOST_LINES = 350  # of a file


def imported(path, package=PACKAGE):
    """Modules of the package that a file imports, as 'floor.module', and imports of it that are not relative."""
    here = path.relative_to(package).parts[:-1]
    modules, absolute = set(), []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            absolute += [alias.name for alias in node.names if alias.name.partition('.')[0] == package.name]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            absolute += [node.module] * (node.module.partition('.')[0] == package.name)
        elif isinstance(node, ast.ImportFrom):
            start = [*here[: len(here) + 1 - node.level], *(node.module or '').split('.')]
            place = package.joinpath(*filter(None, start))
            # Names of a folder are modules, or names in its __init__.py.
            names = [place / alias.name for alias in node.names] if place.is_dir() else [place]
            modules |= {
                name_of(found if found.with_suffix('.py').is_file() else place / '__init__', package) for found in names
            }
    return modules, absolute


def name_of(path, package):
    return '.'.join(path.relative_to(package).with_suffix('').parts)


def floor_of(module):
    """0 for the lowest floor."""
    floor = module.partition('.')[0]
    return len(FLOORS) if floor in TOP else FLOORS.index(floor)


def upward(files, package=PACKAGE):
    """Imports from a higher floor."""
    names = {name_of(path, package): path for path in files}
    return [
        (name, m) for name, path in names.items() for m in imported(path, package)[0] if floor_of(m) > floor_of(name)
    ]


FILES = sorted(PACKAGE.rglob('*.py'))


def test_every_file_is_on_a_floor():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in FILES} == {*FLOORS, *TOP}


def test_imports_only_run_down():
    assert upward(FILES) == []


def test_there_are_no_circles():
    graph = {name_of(path, PACKAGE): imported(path)[0] for path in FILES}
    assert set().union(*graph.values()) <= graph.keys()
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_package_imports_itself_by_relative_imports():
    assert [(path.name, name) for path in FILES for name in imported(path)[1]] == []


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('from ..models.weights import build', {'models.weights'}),
        ('def f():\n    from ..models import weights', {'models.weights'}),
        ('if TYPE_CHECKING:\n    from .. import __main__', {'__main__'}),
        ('from .dct import full_level', {'layers.dct'}),
        ('from . import dct, Layer', {'layers.dct', 'layers.__init__'}),
        ('from ..layers import Layer', {'layers.__init__'}),
        ('import torch\nfrom torch import nn', set()),
    ],
)
def test_imports_are_found_wherever_they_are(source, expected, tmp_path):
    """Otherwise the tests above could not fail."""
    package = tmp_path / 'package'
    for name in ('layers/conv.py', 'layers/dct.py', 'models/weights.py', '__main__.py'):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text('')
    path = package / 'layers' / 'conv.py'
    path.write_text(source)
    assert imported(path, package) == (expected, [])
    found = {module for _, module in upward([path], package)}
    assert found == {module for module in expected if not module.startswith('layers')}
    path.write_text('import package.layers\nfrom package import __main__')
    assert imported(path, package) == (set(), ['package.layers', 'package'])


def lines_of(path):
    return len(path.read_text(encoding='utf-8').splitlines())


def test_files_are_short():
    texts = [path for path in PACKAGE.rglob('*') if path.suffix in ('.py', '.md', '.csv')]
    assert [(path.name, lines_of(path)) for path in texts if lines_of(path) > MOST_LINES] == []
