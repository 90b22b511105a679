"""`python -m roberta_pln` is the command `roberta-pln`, for launchers such as `torchrun -m`."""

import sys

from roberta_pln.cli import main

if __name__ == "__main__":
    sys.exit(main())
