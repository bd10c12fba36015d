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
FILES, COMMANDS = (sorted(folder.rglob('*.py')) for folder in (PACKAGE, CLI))
MOST_LINES = 500  # of a file


def name_of(path):
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def floor_of(module):
    """0 for the lowest floor."""
    floor = module.partition('.')[0]
    return len(FLOORS) if floor in TOP else FLOORS.index(floor)


def imported(path):
    """Modules of the package that a file imports, as 'floor.module'. All its imports of the package are relative."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            assert PACKAGE.name not in [alias.name.partition('.')[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.partition('.')[0] != PACKAGE.name
        elif isinstance(node, ast.ImportFrom):
            start = [*here[: len(here) + 1 - node.level], *(node.module or '').split('.')]
            place = PACKAGE.joinpath(*filter(None, start))
            # Names of a folder are modules, or names in its __init__.py.
            for found in [place / alias.name for alias in node.names] if place.is_dir() else [place]:
                yield name_of(found if found.with_suffix('.py').is_file() else place / '__init__')


def test_imports_only_run_down_the_floors():
    graph = {name_of(path): set(imported(path)) for path in FILES}
    assert {name.partition('.')[0] for name in graph} == {*FLOORS, *TOP}
    assert set().union(*graph.values()) <= graph.keys()
    assert [(of, name) for of, names in graph.items() for name in names if floor_of(name) > floor_of(of)] == []
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


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
