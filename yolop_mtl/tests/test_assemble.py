"""From a configuration to data, network and losses; what a configuration refuses."""

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import yolop_mtl
from shared_utils.config import from_dict, to_dict
from shared_utils.errors import InputError
from yolop_mtl.assemble import build_losses, build_network, choose_anchors, load_split
from yolop_mtl.boxes import COCO_ANCHORS
from yolop_mtl.config import (
    DataConfig,
    FitnessConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from yolop_mtl.loss_weights import BASE_GAINS
from yolop_mtl.model import PRESETS
from yolop_mtl.records import Record

from .label_files import scene_2018, write_image, write_json

SOURCE = Path(yolop_mtl.__file__).parent


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_built_with_its_losses(preset: str) -> None:
    data = DataConfig(img_size=(320, 320), area_classes="three")
    with torch.device("meta"):
        model = build_network(ModelConfig(preset=preset), data, num_classes=3)
    assert model.detection.num_classes == (80 if preset == "release" else 3)
    assert model(torch.empty(1, 3, 64, 64, device="meta"))["drivable"].shape[1] == 3
    criterion, weights = build_losses(LossConfig(assign="plain"), model, data.img_size)
    assert criterion.assign == "plain"
    assert torch.equal(criterion.anchors, model.detection.anchors)
    assert weights.gains["loss_obj"] == pytest.approx(0.7 / 4)
    assert weights.gains["loss_cls"] == pytest.approx(0.3 if preset == "release" else 0.3 * 3 / 80)
    assert list(weights.parameters()) == []


def test_losses_of_a_network_without_boxes_and_with_learned_weights() -> None:
    model = build_network(ModelConfig(preset="nano", tasks=("lane",)), DataConfig(), num_classes=1)
    _, weights = build_losses(LossConfig(is_learned=True), model, (384, 640))
    assert list(weights.log_variances) == ["lane"]


def test_anchors_of_a_run(tmp_path: Path) -> None:
    explicit = tuple(float(n) for n in range(1, 19))
    model = ModelConfig(anchors="explicit", anchor_sizes=explicit)
    table, told = choose_anchors(TrainConfig(model=model), [])
    assert (np.ravel(table).tolist(), told) == (list(explicit), "")
    assert choose_anchors(TrainConfig(), []) == (COCO_ANCHORS, "")
    # Nine sizes of boxes in images of twice the network's size give nine anchors.
    write_image(tmp_path / "a.jpg", size=(128, 256))
    sizes = np.array([[4.0 * n, 2.0 * n] for n in range(3, 12)])
    boxes = np.concatenate([np.zeros_like(sizes), sizes], 1).astype(np.float32)
    records = [Record(tmp_path / "a.jpg", np.repeat(boxes, 9, 0), np.zeros(81, dtype=np.int64))]
    auto = TrainConfig(model=ModelConfig(anchors="auto"), data=DataConfig(img_size=(64, 128)))
    table, told = choose_anchors(auto, records)
    assert np.reshape(table, (-1, 2)).tolist() == pytest.approx(sizes / 2)
    assert "anchors fitted to 81 boxes, fitness 1.000" in told
    with pytest.raises(ValueError, match="boxes: got 0 of 0 with sides of"):
        choose_anchors(auto, [])


def test_default_gains_of_the_configuration_are_those_of_the_losses() -> None:
    assert LossConfig().gains == BASE_GAINS


def test_bdd100k_is_read_as_configured(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    write_json(scene_2018("a"), tmp_path / "det_annotations/train/a.json")
    config = DataConfig(root=tmp_path)
    split = load_split(config, config.train_split)
    assert split.class_names == ("vehicle",)
    assert split.records[0].labels.tolist() == [0, 0, 0]
    split = load_split(dataclasses.replace(config, classes="all"), "train")
    assert len(split.class_names) == 10
    assert split.records[0].labels.tolist() == [2, 3, 0, 4]


def test_coco_is_read_as_configured(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/a.jpg")
    config = DataConfig(source="coco", root=tmp_path, classes="all")
    assert load_split(config, "train").class_names == ()
    data: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1, 2, 5, 6]},
        ],
    }
    write_json(data, tmp_path / "annotations/train.json")
    split = load_split(config, "train")
    assert (split.class_names, split.records[0].labels.tolist()) == (("cat", "car"), [0, 1])
    split = load_split(dataclasses.replace(config, classes="vehicle"), "train")
    assert split.records[0].boxes_xyxy.tolist() == [[1, 2, 6, 8]]
    data["categories"][1]["name"] = "vehicle"
    write_json(data, tmp_path / "annotations/train.json")
    split = load_split(dataclasses.replace(config, classes="vehicle"), "train")
    assert split.records[0].boxes_xyxy.tolist() == [[1, 2, 6, 8]]
    data["categories"][1]["name"] = "Car"
    write_json(data, tmp_path / "annotations/train.json")
    with pytest.raises(InputError, match=r"got vehicle, while the categories are cat, Car, expect"):
        load_split(dataclasses.replace(config, classes="vehicle"), "train")


def test_a_configuration_survives_json() -> None:
    config = TrainConfig(
        model=ModelConfig(preset="nano", tasks=("lane",)), loss=LossConfig(box=0.1)
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_is_read_somewhere() -> None:
    read = set()
    for path in SOURCE.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            # In config.py a field is read where a property makes something of it.
            if isinstance(node, ast.Attribute) and path.name != "config.py":
                read.add(node.attr)
    gains = {name.removeprefix("loss_") for name in LossConfig().gains}
    read |= gains | FitnessConfig().weights.keys()
    for group in dataclasses.fields(TrainConfig):
        names = (
            {group.name}
            if group.name in ("recipe", "about")
            else {f.name for f in dataclasses.fields(group.default_factory)}
        )
        assert names - read - {"about"} == set(), group.name  # told by --help


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ModelConfig, {"tasks": ("lanes",)}, "tasks: got 'lanes', expected known tasks; did you"),
        (DataConfig, {"img_size": (360, 640)}, r"data.img_size: got \(360, 640\), expected a heig"),
        (DataConfig, {"lane_format": "value"}, "mask_format: got 'value' for lane masks, expected"),
        (LossConfig, {"box": -1.0}, r"loss.box: got -1.0, expected 0 or more; correct it"),
        (LossConfig, {"lane_alpha": 2.0}, r"loss.lane_alpha: got 2.0, expected 0 or more and "),
        (LossConfig, {"lane_fp": -1.0}, r"loss.lane_fp: got -1.0, expected 0 or more; correct it"),
        (LossConfig, {"lane_exponent": 0.0}, r"loss.lane_exponent: got 0.0, expected more than 0"),
        (LossConfig, {"obj": math.nan}, r"loss.obj: got nan, expected 0 or more; correct it"),
        (ModelConfig, {"anchors": "explicit"}, r"model.anchor_sizes: got 0 numbers with model.anc"),
        (ModelConfig, {"anchors": "explicit", "anchor_sizes": (1.0,)}, r"got 1, expected 18 numb"),
        (
            ModelConfig,
            {"anchors": "explicit", "anchor_sizes": (0.0,) * 18},
            r"model.anchor_sizes: got .*, expected sides of more than 0 pixels",
        ),
        (DataConfig, {"batch_size": 0}, r"data.batch_size: got 0, expected 1 or more; correct it"),
        (DataConfig, {"num_scenes": (0, 1)}, r"data.num_scenes: got \(0, 1\), expected 1 or more"),
        (DataConfig, {"scene_size": (8, 64)}, r"data.scene_size: got \(8, 64\), expected sides of"),
        (OptimConfig, {"lr": 0.0}, r"optim.lr: got 0.0, expected more than 0; correct it"),
        (OptimConfig, {"momentum": 1.0}, r"optim.momentum: got 1.0, expected more than 0 and at "),
        (OptimConfig, {"epochs": 2}, r"optim.warmup_epochs: got 3.0, expected at most optim.epoc"),
        (FitnessConfig, {"lane_f1": -1.0}, r"fitness.lane_f1: got -1.0, expected 0 or more"),
        (
            FitnessConfig,
            {"mAP50_95": 0.0, "drivable_mIoU": 0.0, "lane_f1": 0.0},
            r"fitness: got weights of 0, expected one of more than 0",
        ),
        (RunConfig, {"val_every": 0}, r"val_every: got 0, expected 1 or more; correct it"),
        (RunConfig, {"seed": -1}, r"seed: got -1, expected 0 to 4294967295; correct it"),
    ],
)
def test_wrong_values_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)
