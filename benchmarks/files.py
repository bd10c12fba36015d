"""What every benchmark writes: its report as JSON and as a table, and a picture if it has one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ['write']

Report = dict[str, Any]


def write(
    report: Report,
    table: Callable[[Report], str],
    folder: Path | None,
    name: str,
    plot: Callable[[Report, Path], None] | None = None,
) -> None:
    """Prints a report as a table, and writes name.json, name.md and name.png into a folder, if one is given."""
    print(table(report))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f'{name}.json').write_text(json.dumps(report, indent=1) + '\n')
    (folder / f'{name}.md').write_text(table(report))
    if plot is not None:
        plot(report, folder / f'{name}.png')
