"""`python -m timm_harmonic`: the `timm-harmonic` command, or any script with the models registered.

python -m timm_harmonic quickstart
python -m timm_harmonic validate.py --model harm_resnet50 ...
torchrun --nproc-per-node 2 -m timm_harmonic train.py --model harm_resnet50 ...
"""

import runpy
import sys
from pathlib import Path

from .cli import main


def run_script(argv: list[str]) -> None:
    """Runs a script as `python SCRIPT ARGS...` would; the package, and with it the models, are imported already.

    Args:
        argv: The script's path and its arguments.
    """
    sys.argv[:] = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    if len(sys.argv) > 1 and sys.argv[1].endswith('.py'):
        run_script(sys.argv[1:])
    else:
        sys.exit(main())
