"""`yolop-mtl val`: files, conditions, weights without a run, and what is kept of an image."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from yolop_mtl import model_io, val_report
from yolop_mtl.cli import main
from yolop_mtl.clock import Clock
from yolop_mtl.conditions import by_condition
from yolop_mtl.config import DataConfig, ModelConfig
from yolop_mtl.evaluate import ImageResult, evaluate, summarize
from yolop_mtl.model import build_model
from yolop_mtl.records import Conditions, Record
from yolop_mtl.val import ValConfig, as_numbered, val

from .known_network import SIZE, KnownNetwork, autocast, batches, outputs, truths

QUICK = {"accelerator": "cpu", "num_workers": 0, "batch_size": 2}
PARTS = {"load", "network", "postprocessing", "counting"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def results(count: int = 7, **options: Any) -> list[ImageResult]:
    samples = truths(count=count)
    settings = {"class_names": ("car", "truck"), "data": DataConfig(img_size=SIZE)}
    network = KnownNetwork(outputs(samples, noise=0.4))
    found = evaluate(
        network, batches(samples, 3), device="cpu", autocast=autocast, **(settings | options)
    )
    return found.images


def records(*times: str) -> list[Record]:
    return [
        Record(Path(f"{number}.jpg"), conditions=Conditions("clear", "", time))
        for number, time in enumerate(times)
    ]


def test_each_condition_has_the_figures_of_its_images_alone() -> None:
    images = results()
    labelled = records("night", "", "daytime", "night", "daytime", "night", "daytime")
    rows = by_condition(images, labelled, 2)
    assert [(row.attribute, row.value, row.num_images) for row in rows] == [
        ("weather", "clear", 7),
        ("timeofday", "daytime", 3),
        ("timeofday", "night", 3),
    ]
    assert rows[0].metrics == summarize(images, 2).metrics
    night = [images[number] for number in (0, 3, 5)]
    assert rows[2].metrics == summarize(night, 2).metrics
    assert rows[1].metrics != rows[2].metrics
    assert "legacy_lane_IoU" in rows[1].metrics
    assert by_condition(images, records(*[""] * 7), 2)[1:] == []
    # Of a part of the images, as with an image that could not be had.
    assert by_condition(images[3:], labelled, 2)[2].num_images == 2


def held(value: object) -> Iterator[np.ndarray[Any, Any]]:
    """Every array that a result keeps alive, whole even where it is a view."""
    if isinstance(value, np.ndarray):
        yield value if value.base is None or not isinstance(value.base, np.ndarray) else value.base
    elif isinstance(value, tuple):
        for part in value:
            yield from held(part)
    else:
        assert value is None or isinstance(value, int), type(value)


def test_what_is_kept_of_an_image_is_bounded() -> None:
    torch.manual_seed(0)
    network = build_model("nano", num_classes=2).eval()
    samples = truths(count=4)
    found = evaluate(
        network, batches(samples, 2), class_names=("car", "truck"), data=DataConfig(img_size=SIZE),
        device="cpu", autocast=autocast, conf=1e-6, max_det=20,
    )  # fmt: skip
    assert max(len(image.boxes.scores) for image in found.images if image.boxes) == 20
    for image, sample in zip(found.images, samples, strict=True):
        num_truths = 0 if sample.labels is None else len(sample.labels)
        assert sum(array.nbytes for array in held(image)) <= 20 * 28 + num_truths * 24 + 2048


def test_a_clock_is_told_of_every_part() -> None:
    watch = Clock("cpu")
    results(clock=watch)
    assert watch.ms_per_image.keys() == PARTS
    assert all(value > 0 for value in watch.ms_per_image.values())


def test_files_of_an_evaluation(
    quick_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "val"
    argv = ["val", str(quick_run), "--out", str(out), "--batch-size", "2"]
    assert main([*argv, "--accelerator", "cpu", "--num-workers", "0"]) == 0
    assert {path.name for path in out.iterdir()} == {"boxes.png", "lanes.png", "val.json"}
    for name in ("boxes.png", "lanes.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    report = read(out / "val.json")
    assert (report["images"], report["split"]) == (3, "val")
    assert report["labelled_images"] == {"boxes": 3, "drivable": 3, "lane": 3}
    assert report["ms_per_image"].keys() == PARTS
    frames = read(quick_run / "config.json")["data"]["root"]
    scenes = read(Path(frames) / "labels/det_20/det_val.json")
    for attribute in ("weather", "scene", "timeofday"):
        values = [scene["attributes"][attribute] for scene in scenes]
        found = {name: part["images"] for name, part in report["conditions"][attribute].items()}
        assert found == {value: values.count(value) for value in values}
    told = capsys.readouterr().out
    for words in ("strict", "legacy", "by condition", "timeofday: ", "ms per image: load "):
        assert words in told
    assert f"{report['metrics']['lane_accuracy']:.4f}" in told
    assert f"{report['metrics']['legacy_lane_accuracy']:.4f}" in told


def test_nothing_is_written_over(quick_run: Path, tmp_path: Path) -> None:
    cfg = ValConfig(run=quick_run, out=str(tmp_path / "val"), **QUICK)
    first = val(cfg)
    before = (tmp_path / "val/val.json").read_text()
    with pytest.raises(ValueError, match=r"out: got .*earlier evaluation.*say --overwrite"):
        val(cfg)
    assert (tmp_path / "val/val.json").read_text() == before
    again = val(ValConfig(run=quick_run, out=str(tmp_path / "val"), overwrite=True, **QUICK))
    assert again.found.metrics == first.found.metrics
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"")
    cfg = ValConfig(run=quick_run, out=str(tmp_path / "mine"), overwrite=True, **QUICK)
    with pytest.raises(ValueError, match=r"out: got .*holds no val\.json, expected a new folder"):
        val(cfg)
    cfg = ValConfig(run=quick_run, out=str(tmp_path / "mine/photo.png/x"), **QUICK)
    with pytest.raises(ValueError, match=r"out: got .*expected a folder that can be written"):
        val(cfg)


def test_folded_norms_change_nothing_but_rounding(quick_run: Path, tmp_path: Path) -> None:
    found = [
        val(ValConfig(run=quick_run, out=str(tmp_path / str(fuse)), fuse=fuse, **QUICK)).found
        for fuse in (False, True)
    ]
    for name, value in found[0].metrics.items():
        assert found[1].metrics[name] == pytest.approx(value, abs=5e-3), name


def test_weights_without_a_run(
    quick_run: Path, driving_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(val_report, "write_curves", lambda *args: None)
    for name in (model_io.WEIGHTS, model_io.CARD):
        shutil.copy(quick_run / name, tmp_path / name)
    of_data = {"root": str(driving_scenes), "source": "synthetic", "scene_size": (120, 160)}
    expected = read(quick_run / "result.json")["metrics"]
    for run in (tmp_path, tmp_path / model_io.WEIGHTS):
        result = val(ValConfig(run=run, **of_data, **QUICK))
        assert result.folder.parent == tmp_path
        assert result.folder.name.startswith("val-val-")
        assert result.found.metrics["lane_accuracy"] == pytest.approx(expected["lane_accuracy"])
        shutil.rmtree(result.folder)
    small = val(ValConfig(run=tmp_path, **of_data, **QUICK, limit=1, split="train"))
    assert [image.number for image in small.found.images] == [0]
    assert read(small.folder / "val.json")["data"]["img_size"] == [64, 96]
    with pytest.raises(ValueError, match=r"root: got nothing for weights without a run, expected"):
        val(ValConfig(run=tmp_path, **QUICK))


def test_classes_are_those_of_the_same_name(
    driving_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the released network, whose vehicles are the fourth of its classes."""
    monkeypatch.setattr(val_report, "write_curves", lambda *args: None)
    torch.manual_seed(0)
    names = ("zero", "one", "vehicle", "three")
    save = {"config": ModelConfig(preset="nano"), "data": DataConfig(img_size=(64, 96))}
    model_io.save(build_model("nano", num_classes=4), tmp_path, class_names=names, **save)
    cfg = ValConfig(run=tmp_path, root=str(driving_scenes), source="synthetic",
                    scene_size=(120, 160), **QUICK)  # fmt: skip
    result = val(cfg)
    labels = [image.boxes.truth_labels for image in result.found.images if image.boxes]
    assert set(np.concatenate(labels)) == {2}
    model_io.save(build_model("nano", num_classes=1), tmp_path, class_names=("horse",), **save)
    with pytest.raises(ValueError, match=r"root: got class '.*', expected those of the network, h"):
        val(cfg)


def test_numbers_stay_where_names_have_the_same_place() -> None:
    record = Record(Path("a"), np.zeros((2, 4), np.float32), np.array([0, 1]))
    kept = [record, Record(Path("b"))]
    assert as_numbered(kept, ("a", "b"), ("a", "b", "c")) is kept
    moved = as_numbered(kept, ("a", "b"), ("b", "c", "a"))
    assert moved[0].labels.tolist() == [2, 0]
    assert moved[1].labels is None


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match=r"img_size: got \(60, 96\), expected a height and a wid"):
        ValConfig(run=Path("x"), img_size=(60, 96))
    with pytest.raises(ValueError, match=r"limit: got -1, expected 0 or more"):
        ValConfig(run=Path("x"), limit=-1)
