"""`python -m timm_harmonic`: the `timm-harmonic` command, or any script with the models registered.

python -m timm_harmonic validate.py --model harm_resnet50 ...
torchrun --nproc-per-node 2 -m timm_harmonic train.py --model harm_resnet50 ...
"""

import runpy
import sys
from pathlib import Path

from timm_harmonic_cli import main


def run_script(argv: list[str]) -> None:
    """Runs a script as `python SCRIPT ARGS...` would, with the models registered by the import above."""
    sys.argv[:] = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    if len(sys.argv) > 1 and sys.argv[1].endswith('.py'):
        run_script(sys.argv[1:])
    else:
        sys.exit(main())
