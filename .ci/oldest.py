"""Prints the oldest versions that a pyproject.toml promises, as pip's constraints.

    python .ci/oldest.py pyproject.toml

It reads what users install: the dependencies and the extras for commands, not the tools of the tests.
"""

import sys
from pathlib import Path

import tomli
from packaging.requirements import Requirement


def main() -> None:
    project = tomli.loads(Path(sys.argv[1]).read_text())['project']
    extras = project['optional-dependencies']
    lines = {*project['dependencies'], *extras['compress'], *extras['compare'], *extras['quickstart']}
    for requirement in map(Requirement, sorted(lines)):
        if requirement.name == project['name']:
            continue  # another extra
        floors = [specifier.version for specifier in requirement.specifier if specifier.operator == '>=']
        if len(floors) != 1:
            raise SystemExit(f'{requirement}: a dependency without a lower bound promises every version')
        print(f'{requirement.name}=={floors[0]}')


if __name__ == '__main__':
    main()
