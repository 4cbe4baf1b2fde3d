"""`python -m yolop_mtl`: the command `yolop-mtl`."""

import sys

from yolop_mtl.cli import main

sys.exit(main())
