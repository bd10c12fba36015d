"""The side of a test of killed commands that gets killed. It imports nothing of the tests."""

import os
import signal
import sys

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'shutil.rmtree', 'shutil.move')


def command(arguments, changes, stop_before=None):
    """Runs a command, and is killed before the change of that number of files or folders.

    The exit status is the command's; `changes` gets the number of changes.
    """
    import torch

    import timm_harmonic_cli

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def watch(event, details):
        written = event == 'open' and isinstance(details[2], int) and details[2] & _WRITING
        if written or event in _CHANGES:
            if changes.value == stop_before:
                os.kill(os.getpid(), signal.SIGKILL)
            changes.value += 1

    sys.addaudithook(watch)
    sys.exit(timm_harmonic_cli.main(arguments))
