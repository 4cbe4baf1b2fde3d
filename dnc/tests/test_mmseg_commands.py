"""`dnc seg evaluate`, `predict`, `explain` and `fit`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from PIL import Image

from dnc.cli import main
from dnc.mmseg.config_files import image_pipeline, training_images_to_look_at
from dnc.mmseg.explain import crop_around, look_at, region_cells
from dnc.mmseg.fit import (
    AT_EDGES,
    PER_CLASS,
    drawn,
    edges,
    fit_centroids,
    pixel_features,
    with_centroids,
)
from dnc.mmseg.heads import labels_at
from dnc.mmseg.pixel_anchors import cell_of, centre_of, find_anchors
from dnc.mmseg.predict import class_names, open_model
from dnc.similarity import normalized
from shared_utils.errors import InputError

from .conftest import SOFTMAX_CONFIG, tiny_seg

METRIC = re.compile(r"^(mIoU|aAcc|mAcc) (\d\.\d{4})$", re.MULTILINE)
ONE_LINE = re.compile(r"error: [^\n]+?: got [^\n]+?, expected [^\n]+; [^\n]+\n")


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["seg", *argv]) == 2
    error = capsys.readouterr().err
    assert ONE_LINE.fullmatch(error), error
    return error


@pytest.fixture(scope="module")
def images(seg_run: Path, seg_data: Path) -> Path:
    return seg_data / "images" / "test"


@pytest.fixture(scope="module")
def softmax_run(tmp_path_factory: pytest.TempPathFactory, seg_data: Path) -> Path:
    root = tmp_path_factory.mktemp("softmax")
    argv = ["seg", "train", str(SOFTMAX_CONFIG), "--runs-dir", str(root), "--name", "run"]
    extra = [word for word in tiny_seg(seg_data) if "num_centroids" not in word]
    assert main([*argv, *extra]) == 0
    return root / "dnc" / "run"


# ---- evaluate and predict --------------------------------------------------------------------


def test_evaluate_repeats_the_final_score(
    seg_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((seg_run / "result.json").read_text())["metrics"]
    for words in (
        [str(seg_run)],
        [str(seg_run / "digitscenes_fcn.py"), str(seg_run / "iter_4.pth")],
    ):
        capsys.readouterr()
        assert main(["seg", "evaluate", *words]) == 0
        told = dict(METRIC.findall(capsys.readouterr().out))
        assert {name: float(told[name]) for name in result} == pytest.approx(result, abs=6e-5)


def test_predict_writes_classes_and_overlays(
    seg_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large.png"
    Image.open(next(images.iterdir())).resize((80, 60)).save(large)
    output = tmp_path / "out"
    argv = ["seg", "predict", str(seg_run), str(images), str(large), "--output", str(output)]
    assert main(argv) == 0
    assert str(output / "large_overlay.png") in capsys.readouterr().out
    found = np.asarray(Image.open(output / "large.png"))
    assert (found.shape, found.dtype) == ((60, 80), np.uint8)
    assert found.max() < 11
    assert Image.open(output / "large_overlay.png").size == (80, 60)
    shares = json.loads((output / "predictions.json").read_text())
    assert len(shares) == 5
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-4) for row in shares.values())


def test_two_files_of_one_name_do_not_overwrite_each_other(
    seg_run: Path, images: Path, tmp_path: Path
) -> None:
    for part in "ab":
        (tmp_path / part).mkdir()
        Image.open(next(images.iterdir())).save(tmp_path / part / "same.png")
    words = [str(tmp_path / part / "same.png") for part in "ab"]
    assert main(["seg", "predict", str(seg_run), *words, "--output", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "same.png", "same_overlay.png", "same-2.png", "same-2_overlay.png",
    }  # fmt: skip


def test_wrong_words(
    seg_run: Path, softmax_run: Path, images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = str(seg_run / "digitscenes_fcn.py")
    assert "checkpoint: got nothing" in failure(["evaluate", config], capsys)
    assert "images: got nothing" in failure(["predict", str(seg_run)], capsys)
    assert "no such file" in failure(["evaluate", config, "gone.pth"], capsys)
    assert "config.json: got no such file" in failure(["evaluate", str(tmp_path)], capsys)
    assert "got no image" in failure(["predict", str(seg_run), "gone.jpg"], capsys)
    (tmp_path / "bad.jpg").write_text("no image")
    argv = ["predict", str(seg_run), str(tmp_path / "bad.jpg"), "--output", str(tmp_path / "out")]
    assert "bad.jpg: got a damaged or unreadable file" in failure(argv, capsys)
    assert not (tmp_path / "out").exists()
    # A softmax checkpoint given for a model with sub-centroids, and the other way round.
    told = failure(["evaluate", config, str(softmax_run / "iter_4.pth")], capsys)
    assert "got a softmax classifier in decode_head, expected sub-centroids; turn it" in told
    other = [str(softmax_run / SOFTMAX_CONFIG.name), str(seg_run / "iter_4.pth")]
    assert "got no decode_head.conv_seg.weight" in failure(["evaluate", *other], capsys)
    argv = ["explain", str(softmax_run), str(images)]
    assert "got a learned classifier (FCNHead)" in failure(argv, capsys)


# ---- explain ---------------------------------------------------------------------------------


def test_explain_names_training_pixels(seg_run: Path, images: Path, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    argv = ["seg", "explain", str(seg_run), str(images), "--output", str(page), "--regions", "3"]
    assert main(argv) == 0
    found = json.loads((tmp_path / "why.json").read_text())
    assert 4 <= len(found) <= 12
    for row in found:
        winner = row["winner"]
        assert winner["class_name"] == row["class"]
        assert {"row", "column", "path", "index"} <= winner.keys()
        assert winner["cosine"] >= max(other["cosine"] for other in row["rivals"])
        assert f"training image {winner['index']} at row {winner['row']}" in row["rule"]["short"]
    html = page.read_text()
    assert "Region 1 is" in html
    assert "<script" not in html
    assert html.count("data:image/png") > 10
    # Found once, and kept.
    before = (seg_run / "anchors.pth").stat().st_mtime_ns
    argv = ["seg", "explain", str(seg_run), str(next(images.iterdir())), "--pixel", "20", "30"]
    assert main([*argv, "--output", str(page)]) == 0
    assert (seg_run / "anchors.pth").stat().st_mtime_ns == before
    (pixel,) = json.loads((tmp_path / "why.json").read_text())
    assert pixel["source"].endswith("at row 20, column 28")  # the centre of its cell
    assert "Pixel 1 is" in page.read_text()


def test_a_pixel_outside_is_named(
    seg_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(next(images.iterdir()))
    argv = ["explain", str(seg_run), path, "--pixel", "20", "48", "--output", str(tmp_path / "x")]
    assert "--pixel: got row 20, column 48, expected a row below 48" in failure(argv, capsys)
    assert not (tmp_path / "x").exists()
    assert "regions: got 0" in failure([*argv[:3], "--regions", "0"], capsys)


@pytest.fixture(scope="module")
def opened(seg_run: Path) -> tuple[Any, Any, Any]:
    cfg, model, _ = open_model([str(seg_run)])
    return cfg, model, DATASETS.build(training_images_to_look_at(cfg))


def test_anchors_are_pixels_of_their_class_and_distinct(opened: tuple[Any, Any, Any]) -> None:
    cfg, model, dataset = opened
    head = model.decode_head.classifier
    before = head.centroids.clone()
    found = find_anchors(model, dataset, class_names(cfg)[0])
    assert torch.equal(head.centroids, before)
    assert len({(a.index, a.row, a.column) for a in found.anchors.values()}) == len(found.anchors)
    for (c, k), anchor in found.anchors.items():
        features, labels = pixel_features(model, dataset[anchor.index])
        feature = features["decode_head"]
        grid = labels_at(labels, *feature.shape[2:])
        cell = cell_of(anchor.row, anchor.column, labels.shape[1:], feature.shape[2:])
        assert int(grid[0][cell]) == c
        z = normalized(feature[:, :, cell[0], cell[1]])[0]
        torch.testing.assert_close(z, found.centroids[c, k])
        assert float(z @ before[c, k]) == pytest.approx(anchor.cosine, abs=1e-5)
    # The most similar pixel of the whole set is among them.
    best = max(
        float((normalized(f[0][:, g[0] == 0].T) @ before[0].T).max())
        for f, g in (
            (features["decode_head"], labels_at(labels, *features["decode_head"].shape[2:]))
            for features, labels in (pixel_features(model, item) for item in dataset)
        )
    )
    assert max(a.cosine for (c, _), a in found.anchors.items() if c == 0) == pytest.approx(
        best, abs=1e-5
    )


def test_the_explained_decision_is_that_of_the_model(
    opened: tuple[Any, Any, Any], images: Path
) -> None:
    cfg, model, _ = opened
    path = sorted(images.iterdir())[0]
    seen = look_at(cfg, model, path)
    logits = model.decode_head.classifier.logits_of(seen.cosines.amax(dim=3).flatten(0, 1))
    data = image_pipeline(cfg)({"img_path": str(path), "reduce_zero_label": False})
    with torch.no_grad():
        inputs = model.data_preprocessor(pseudo_collate([data]), False)["inputs"]
        own = model.decode_head(model.extract_feat(inputs))[0]
    torch.testing.assert_close(logits.T.unflatten(1, seen.grid), own)
    classes = seen.cosines.amax(dim=3).argmax(dim=2)
    cells = region_cells(seen.cosines, 100)
    assert len(set(cells)) == len(cells)
    assert {int(classes[cell]) for cell in cells} == set(classes.unique().tolist())


def test_cells_and_their_centres() -> None:
    for size, grid in (((48, 48), (6, 6)), ((50, 41), (7, 6)), ((8, 8), (8, 8))):
        for cell in np.ndindex(*grid):
            row, column = centre_of(cell, size, grid)
            assert cell_of(row, column, size, grid) == cell


def test_a_crop_shows_its_pixel_in_the_middle() -> None:
    picture = np.zeros((60, 60, 3), np.uint8)
    picture[2, 57] = 255
    crop = crop_around(picture, 2, 57, 8)
    assert crop.shape == (128, 128, 3)
    assert crop[64, 64].min() > 60


# ---- fit -------------------------------------------------------------------------------------


def test_fit_turns_a_softmax_run_into_one_with_sub_centroids(
    softmax_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fit", str(softmax_run / SOFTMAX_CONFIG.name), str(softmax_run / "iter_4.pth")]
    argv += ["--runs-dir", str(tmp_path), "--name", "fit", "--num-centroids", "3"]
    assert main(["seg", *argv]) == 0
    folder = tmp_path / "dnc" / "fit"
    result = json.loads((folder / "result.json").read_text())
    assert (result["method"], result["parameters"]["tuned"]) == ("fit", 0)
    assert result["parameters"]["classifier"] == 0
    assert {"predictions.png", "fit.pth", "config.json"} <= {p.name for p in folder.iterdir()}
    before = torch.load(softmax_run / "iter_4.pth", weights_only=True)["state_dict"]
    after = torch.load(folder / "fit.pth", weights_only=True)["state_dict"]
    assert after["decode_head.classifier.centroids"].shape == (11, 3, 16)
    own = [name for name in after if ".classifier." not in name]
    assert all(torch.equal(before[name], after[name]) for name in own)
    capsys.readouterr()
    assert main(["seg", "evaluate", str(folder)]) == 0
    told = dict(METRIC.findall(capsys.readouterr().out))
    assert float(told["mIoU"]) == pytest.approx(result["metrics"]["mIoU"], abs=6e-5)
    assert "which exists" in failure(argv, capsys)


def test_one_centroid_is_the_mean_direction_of_its_pixels(opened: tuple[Any, Any, Any]) -> None:
    cfg, _, dataset = opened
    import dnc.mmseg.fit as module
    from dnc.mmseg.segmentors import build_segmentor

    config = cfg.copy()
    config.model = {**cfg.model, "decode_head": {**cfg.model.decode_head, "num_centroids": 1}}
    torch.manual_seed(0)
    model = build_segmentor(config).eval()
    kept, module.PER_CLASS = module.PER_CLASS, 10_000  # all of them
    try:
        fit_centroids(model, dataset)
    finally:
        module.PER_CLASS = kept
    rows: list[list[torch.Tensor]] = [[] for _ in range(11)]
    for item in dataset:
        features, labels = pixel_features(model, item)
        feature = features["decode_head"]
        grid = labels_at(labels, *feature.shape[2:])[0]
        for c in range(11):
            rows[c].append(normalized(feature[0][:, grid == c].T))
    means = torch.stack([torch.cat(parts).mean(dim=0) for parts in rows])
    expected = torch.nn.functional.normalize(means, dim=1)
    torch.testing.assert_close(
        model.decode_head.classifier.centroids[:, 0], expected, atol=1e-5, rtol=0
    )


def test_fit_may_add_the_layer_norm(softmax_run: Path, tmp_path: Path) -> None:
    argv = ["fit", str(softmax_run / SOFTMAX_CONFIG.name), str(softmax_run / "iter_4.pth")]
    argv += ["--runs-dir", str(tmp_path), "--name", "fit", "--num-centroids", "1"]
    assert main(["seg", *argv, "--cfg-options", "model.decode_head.embed_norm=True"]) == 0
    after = torch.load(tmp_path / "dnc/fit/fit.pth", weights_only=True)["state_dict"]
    assert torch.equal(after["decode_head.embed_norm.weight"], torch.ones(16))
    # Normalised features have no mean over channels, and so have not their mean directions.
    points = after["decode_head.classifier.centroids"]
    assert points.norm(dim=2) == pytest.approx(1, abs=1e-3)
    assert points.mean(dim=2) == pytest.approx(0, abs=1e-3)


def test_edges_are_where_labels_meet() -> None:
    grid = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [9, 0, 0, 0], [2, 0, 0, 0]])[None]
    found = edges(grid, ignored=9)[0]
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]]
    assert found.int().tolist() == expected


def test_most_pixels_of_a_fit_lie_at_edges() -> None:
    grid = torch.zeros(1, 40, 40, dtype=torch.long)
    grid[0, :, 20:] = 1
    features = torch.stack([torch.arange(1600.0).view(1, 40, 40), torch.ones(1, 40, 40)], dim=1)
    rows, labels = drawn(features, grid, 255)
    at_edge = edges(grid, 255).flatten()[rows[:, 0].long()]
    assert torch.bincount(labels).tolist() == [PER_CLASS, PER_CLASS]
    assert torch.equal(grid.flatten()[rows[:, 0].long()], labels)
    for label in (0, 1):
        assert int(at_edge[labels == label].sum()) == round(AT_EDGES * PER_CLASS)
    grid[0, 3:, 20:] = 255  # three edges are left of class 1, and more pixels
    rows, labels = drawn(features, grid, 255)
    assert torch.bincount(labels).tolist() == [PER_CLASS, PER_CLASS]
    assert set(grid.flatten()[rows[:, 0].long()].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("kind", "own", "asked", "expected"),
    [("FCNHead", {}, None, 50), ("FCNHead", {}, 3, 3), ("LayerNormFCNHead", {}, None, 50),
     ("DNCFCNHead", {"num_centroids": 10}, None, 10),
     ("DNCFCNHead", {"num_centroids": 10}, 3, 3)],
)  # fmt: skip
def test_how_many_sub_centroids_fit_makes(
    opened: tuple[Any, Any, Any], kind: str, own: dict[str, int], asked: int | None, expected: int
) -> None:
    config = opened[0].copy()
    head = {**config.model.decode_head, "type": kind, **own}
    if not own:
        head.pop("num_centroids")
    config.model = {**config.model, "decode_head": head}
    made = with_centroids(config, asked).model.decode_head
    assert (made.type, made.num_centroids) == ("DNCFCNHead", expected)
    assert made.get("embed_norm", False) == (kind == "LayerNormFCNHead")


def test_a_decoder_without_a_counterpart_is_named(opened: tuple[Any, Any, Any]) -> None:
    config = opened[0].copy()
    config.model = {**config.model, "decode_head": {"type": "PSPHead", "num_classes": 11}}
    with pytest.raises(
        InputError, match=r"model\.decode_head\.type: got PSPHead, expected FCNHead"
    ):
        with_centroids(config)


@pytest.mark.slow
def test_fit_is_within_three_points_of_the_softmax_it_came_from(tmp_path: Path) -> None:
    argv = ["seg", "train", str(SOFTMAX_CONFIG), "--runs-dir", str(tmp_path), "--name", "softmax"]
    argv += ["--data-root", str(tmp_path / "scenes")]
    assert main(argv) == 0
    run = tmp_path / "dnc" / "softmax"
    last = max(run.glob("iter_*.pth"), key=lambda path: path.stat().st_mtime)
    argv = ["seg", "fit", str(run / SOFTMAX_CONFIG.name), str(last), "--runs-dir", str(tmp_path)]
    assert main([*argv, "--name", "fit"]) == 0
    before, after = (
        json.loads((tmp_path / "dnc" / name / "result.json").read_text())["metrics"]["mIoU"]
        for name in ("softmax", "fit")
    )
    assert before >= 0.6
    assert after >= before - 0.03
