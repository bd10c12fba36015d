"""The commands as functions, with the options of their parsers as keywords."""

import argparse
from functools import partial
from importlib import import_module


def call(name, names, *values, **options):
    """Runs a command. `names` are those of positional values; an option that is left out has its default."""
    module, parser = import_module(f'timm_harmonic_cli.{name}'), argparse.ArgumentParser()
    module.add_arguments(parser)
    defaults = {action.dest: action.default for action in parser._actions if action.dest != 'help'}
    given = dict(zip(names[: len(values)], values, strict=True), **options)
    assert given.keys() <= defaults.keys(), given.keys() - defaults.keys()
    return module.run(argparse.Namespace(**{**defaults, **given}))


compare = partial(call, 'compare', ('folder', 'out', 'models'))
compress = partial(call, 'compress', ('model', 'out'))
predict = partial(call, 'predict', ('model', 'images'))
quickstart = partial(call, 'quickstart', ())
