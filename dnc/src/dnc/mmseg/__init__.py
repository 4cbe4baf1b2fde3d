"""Nearest sub-centroids in mmsegmentation 1.x; importing this registers everything.

    custom_imports = dict(imports=["dnc.mmseg"], allow_failed_imports=False)

Then `type="DNCFCNHead"` and its like are decoders, and `CentroidHook` and `PlainCheckpointHook` are
hooks.  mmsegmentation: https://github.com/open-mmlab/mmsegmentation, Apache-2.0.
"""

import importlib.util

from shared_utils.errors import InputError

for _name in ("mmengine", "mmcv", "mmseg"):
    if importlib.util.find_spec(_name) is None:
        raise InputError(
            _name, "nothing installed", "dnc[mmseg]", "install it: uv pip install -e 'dnc[mmseg]'"
        )

from dnc.mmseg.compiled_ops import install_stand_in, repair_search  # noqa: E402

install_stand_in()
repair_search()

from dnc.mmseg.backbones import BackboneHook  # noqa: E402
from dnc.mmseg.camvid import CamVid  # noqa: E402
from dnc.mmseg.checkpoints import PlainCheckpointHook  # noqa: E402
from dnc.mmseg.heads import (  # noqa: E402
    DNCASPPHead,
    DNCDepthwiseSeparableASPPHead,
    DNCFCNHead,
    DNCSegformerHead,
    DNCUPerHead,
)
from dnc.mmseg.hooks import CentroidHook  # noqa: E402
from dnc.mmseg.interrupts import InterruptHook, RandomStateHook  # noqa: E402
from dnc.mmseg.precision import Bf16OptimWrapper, ChannelsLastHook  # noqa: E402
from dnc.mmseg.scenes import DigitScenes  # noqa: E402

__all__ = [
    "BackboneHook",
    "Bf16OptimWrapper",
    "CamVid",
    "CentroidHook",
    "ChannelsLastHook",
    "DNCASPPHead",
    "DNCDepthwiseSeparableASPPHead",
    "DNCFCNHead",
    "DNCSegformerHead",
    "DNCUPerHead",
    "DigitScenes",
    "InterruptHook",
    "PlainCheckpointHook",
    "RandomStateHook",
]
