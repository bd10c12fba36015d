"""Imports only run down the floors of the package, and files stay short. All of it is read from the source."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import timm_harmonic
import timm_harmonic_cli

PACKAGE, CLI = (Path(module.__file__).parent for module in (timm_harmonic, timm_harmonic_cli))
FLOORS = ('common', 'layers', 'conversion', 'models', 'small_data', 'export')  # from the lowest to the highest
TOP = ('__init__', '__main__')  # modules above all floors
MOST_LINES = 500  # of a file


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
COMMANDS = sorted(CLI.glob('*.py'))


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


@pytest.mark.parametrize('path', COMMANDS, ids=lambda path: path.stem)
def test_commands_import_little_at_the_top_and_nothing_private(path):
    """Help does not wait for what is imported at the top: the standard library and the other commands."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    assert {name.partition('.')[0] for name in names} <= sys.stdlib_module_names
    inner = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [alias.name for node in inner for alias in node.names if alias.name.startswith('_')] == []


def test_files_are_short():
    texts = [path for path in (*PACKAGE.rglob('*'), *COMMANDS) if path.suffix in ('.py', '.md', '.csv')]
    long = {path.name: len(path.read_text(encoding='utf-8').splitlines()) for path in texts}
    assert {name: count for name, count in long.items() if count > MOST_LINES} == {}
