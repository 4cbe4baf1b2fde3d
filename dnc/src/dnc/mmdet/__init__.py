"""Nearest sub-centroids in mmdetection 3.x; importing this registers everything.

    custom_imports = dict(imports=["dnc.mmdet"], allow_failed_imports=False)

Then `type="DNCShared2FCBBoxHead"` is the box head of a two-stage detector. The hooks are those of
`dnc.mmseg`.  mmdetection: https://github.com/open-mmlab/mmdetection, Apache-2.0.
"""

import importlib.util

from shared_utils.errors import InputError

for _name in ("mmengine", "mmcv", "mmdet"):
    if importlib.util.find_spec(_name) is None:
        raise InputError(_name, "nothing installed", "dnc[mmdet]", "install it: make install-mmdet")

from dnc.mmseg.compiled_ops import have_compiled_ops  # noqa: E402

if not have_compiled_ops():
    raise InputError(
        "mmcv",
        "a build without compiled operations",
        "full mmcv, whose NMS and RoIAlign detectors call",
        "install it: make install-mmdet",
    )

import dnc.mmseg  # noqa: E402, F401
from dnc.mmdet.heads import DNCShared2FCBBoxHead  # noqa: E402
from dnc.mmdet.scenes import DigitBoxes  # noqa: E402

__all__ = ["DNCShared2FCBBoxHead", "DigitBoxes"]
