"""`python -m timm_harmonic`: the `timm-harmonic` command, or any script with the models registered.

python -m timm_harmonic validate.py --model harm_resnet50 ...
torchrun --nproc-per-node 2 -m timm_harmonic train.py --model harm_resnet50 ...
"""

import runpy
import sys
from pathlib import Path

from timm_harmonic_cli import main

if __name__ == '__main__':
    if len(sys.argv) > 1 and sys.argv[1].endswith('.py'):  # as `python SCRIPT ARGS...`, with the models registered
        del sys.argv[0]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name='__main__')
    else:
        sys.exit(main())
