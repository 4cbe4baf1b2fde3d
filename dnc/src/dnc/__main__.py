"""`python -m dnc`: the command `dnc`."""

import sys

from dnc.cli import main

sys.exit(main())
