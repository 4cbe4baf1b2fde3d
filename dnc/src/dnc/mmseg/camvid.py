"""CamVid, the road scenes of Cambridge, in the form most papers use: 480 x 360, 11 classes.

Brostow et al., "Semantic object classes in video", 2009; the split and the 11 classes are those of
SegNet.  Next to images in `train`, `val` and `test` lie label images of the same names in
`trainannot`, `valannot` and `testannot`, whose value 11 means unlabelled.
"""

from typing import Any, ClassVar

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

UNLABELLED = 11


@DATASETS.register_module()
class CamVid(BaseSegDataset):
    """Images and label images of CamVid; unlabelled pixels become the ignore index."""

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": (
            "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
            "pedestrian", "bicyclist",
        ),
        "palette": [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
            [0, 128, 192],
        ],
    }  # fmt: skip

    def __init__(self, img_suffix: str = ".png", **kwargs: Any) -> None:
        """Take `BaseSegDataset`'s arguments; `img_suffix` is `.jpg` in some copies."""
        super().__init__(img_suffix=img_suffix, seg_map_suffix=".png", **kwargs)

    def get_label_map(self, new_classes: Any = None) -> dict[int, int]:
        """Old label to new one, the unlabelled to the ignore index."""
        known = super().get_label_map(new_classes) or {}
        return {**known, UNLABELLED: self.ignore_index}
