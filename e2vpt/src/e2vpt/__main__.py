"""`python -m e2vpt` is the command `e2vpt`; torchrun starts it so."""

import sys

from e2vpt.cli import main

sys.exit(main())
