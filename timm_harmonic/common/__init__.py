"""The bottom floor: errors and options, files, images, devices, ONNX Runtime and progress bars."""

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimmHarmonicError(RuntimeError):
    """Something that the user can mend; the message says what. The command prints it without a traceback."""


class InputError(TimmHarmonicError, ValueError):
    """An argument, a network, an image or another input cannot be used; the message names it."""


def in_short(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])


@contextmanager
def explained(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns errors of these types into an InputError that begins with `problem`. Our own errors pass unchanged."""
    try:
        yield
    except TimmHarmonicError:
        raise
    except errors as error:
        raise InputError(f'{problem}: {in_short(error)}') from error


def require(**packages: str) -> None:
    """Raises InputError unless all packages are installed. `packages` maps modules to names for pip."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f'missing packages: pip install {" ".join(missing)}')


def parse_option(text: str) -> tuple[str, Any]:
    """Splits NAME=VALUE. The value is a Python literal, or else text. Raises InputError for anything else."""
    name, equals, value = text.strip().partition('=')
    if not name.isidentifier() or not equals:
        raise InputError(f'must be NAME=VALUE, got {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
