"""Lets `import dnc` in a test mean the package dnc/src/dnc and not the folder dnc/.

In import mode importlib pytest calls the file dnc/tests/test_x.py "dnc.tests.test_x" and, before
running it, puts a module "dnc" made from the bare folder into sys.modules, unless one is there
already. The installed packages are therefore put there first, lazily: a package is loaded when its
own tests are, so the tests of one never load or break on another.
"""

import importlib.util
import sys

for _name in ("shared_utils", "e2vpt", "dnc", "yolop_mtl"):
    _spec = importlib.util.find_spec(_name) if _name not in sys.modules else None
    # Not installed: None, or for the folder itself a spec without a file.
    if _spec is not None and _spec.origin is not None and _spec.loader is not None:
        _spec.loader = importlib.util.LazyLoader(_spec.loader)
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)
