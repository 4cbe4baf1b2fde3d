"""Whether the data of a config is there, looked at before training starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmseg.registry import DATASETS

from dnc.mmseg.config_files import LOADERS, dataset_configs, num_classes_of
from shared_utils.errors import InputError, MissingFileError

GENERATED = ("DigitScenes",)
FROM = {
    "ADE20KDataset": "ADE20K (SceneParsing): unpack ADEChallengeData2016.zip there",
    "CityscapesDataset": "Cityscapes: unpack leftImg8bit and gtFine there, then make labelTrainIds",
    "COCOStuffDataset": "COCO-Stuff: convert it with mmseg's tools/dataset_converters",
}


def check_data(cfg: Any, loaders: Sequence[str] = LOADERS) -> None:
    """Look for the folders, images and label images of data sets, and compare class counts.

    Raises: MissingFileError or InputError that names what is missing.
    """
    num_classes = num_classes_of(cfg)
    for loader, config in dataset_configs(cfg):
        if loader not in loaders:
            continue
        dataset = DATASETS.build({**config, "lazy_init": True})
        names = dataset.metainfo.get("classes")
        if names is not None and len(names) != num_classes:
            raise InputError(
                "model.decode_head.num_classes",
                num_classes,
                f"{len(names)}, the classes of {config['type']}",
                "give both the same",
            )
        if config["type"] not in GENERATED:
            _check_files(loader, config["type"], dataset)


def _check_files(loader: str, kind: str, dataset: Any) -> None:
    remedy = FROM.get(kind, "name the folder that holds it") + "; or give --data-root"
    for key in ("img_path", "seg_map_path"):
        folder = dataset.data_prefix.get(key)
        if folder and not Path(folder).is_dir():
            raise MissingFileError(f"{loader} {key}", f"no folder {folder}", "images", remedy)
    if dataset.ann_file and not Path(dataset.ann_file).exists():
        raise MissingFileError(f"{loader} ann_file", f"no {dataset.ann_file}", "a list", remedy)
    found = dataset.load_data_list()
    if not found:
        where = f"{dataset.data_prefix['img_path']} without *{dataset.img_suffix}"
        raise InputError(f"{loader} img_path", where, "images", remedy)
    for key in ("img_path", "seg_map_path"):
        absent = [row[key] for row in found if row.get(key) and not Path(row[key]).is_file()]
        if absent:
            what = "image" if key == "img_path" else "image without a label image"
            raise InputError(
                f"{loader} {key}",
                f"{len(absent)} of {len(found)} missing, first {absent[0]}",
                f"each {what.split()[0]} with its label image",
                "restore them, or leave those images out",
            )
