"""Tests of the detection plug-in need mmdet, which has an environment of its own.

`make test-mmdet` runs them there; elsewhere they are not collected.
"""

from importlib.util import find_spec

collect_ignore = [] if find_spec("mmdet") else ["tests_mmdet"]
