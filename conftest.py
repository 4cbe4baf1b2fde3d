"""Lets `import dnc` in a test mean the package dnc/src/dnc and not the folder dnc/.

In import mode importlib pytest calls the file dnc/tests/test_x.py "dnc.tests.test_x" and, before
running it, puts a module "dnc" made from the bare folder into sys.modules, unless one is there
already. The installed packages are therefore imported here first, at once and not lazily: torch and
timm look through sys.modules while they are imported, which would load a lazy module too early.
"""

import importlib
import importlib.util

for _name in ("shared_utils", "e2vpt", "dnc", "yolop_mtl"):
    _spec = importlib.util.find_spec(_name)
    # Not installed: None, or for the folder itself a spec without a file.
    if _spec is not None and _spec.origin is not None:
        importlib.import_module(_name)
