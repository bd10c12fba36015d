"""`python -m timm_harmonic` is the `timm-harmonic` command."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
