"""The generated scenes of digits as a data set of mmdet."""

from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from dnc.mmseg.scenes import CLASSES, PALETTE, Scenes, write_scenes


@DATASETS.register_module()
class DigitBoxes(CocoDataset):
    """Boxes of digits in COCO's form; made below `data_root` when first asked for."""

    METAINFO = {"classes": CLASSES[1:], "palette": list(PALETTE[1:])}  # noqa: RUF012

    def __init__(self, data_root: str, scenes: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Generate what is missing, then read.

        Args:
            data_root: folder of the scenes.
            scenes: fields of `Scenes` that differ from its defaults.
            **kwargs: of `CocoDataset`.
        """
        options: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in (scenes or {}).items()
        }
        write_scenes(Path(data_root), Scenes(**options))
        super().__init__(data_root=data_root, **kwargs)
