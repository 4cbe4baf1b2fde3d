"""`prompts.json` and `prompts.png` of a finished run, of every method and after pruning."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import e2vpt
from e2vpt import pictures, prompt_report, start
from e2vpt.config import TrainConfig
from e2vpt.data import build_loader
from e2vpt.methods import build_spec
from e2vpt.train import Setup, prepare, train
from shared_utils.config import load_json

FILES = {"prompts.json", "prompts.png"}


@pytest.fixture(scope="module")
def setup(digits_run: Path) -> Setup:
    """Backbone and images of the finished run."""
    return prepare(load_json(TrainConfig, digits_run / "config.json"))


def report_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "prompts.json").read_text())
    return read


def write(
    folder: Path, digits_run: Path, setup: Setup, model: Any = (), prune: Any = ()
) -> set[str]:
    """What a run with other options writes, before its first step; the names of its files."""
    cfg = load_json(TrainConfig, digits_run / "config.json")
    cfg = replace(
        cfg, model=replace(cfg.model, **dict(model)), prune=replace(cfg.prune, **dict(prune))
    )
    network, scores = start.build_network(
        cfg, build_spec(cfg.model, 10), setup.backbone.module, setup.splits, setup.fabric
    )
    if scores is not None:
        start.save_scores(scores, cfg.prune, folder)
    prompt_report.write(setup.fabric, network, setup.splits, cfg, folder)
    return {path.name for path in folder.iterdir()}


def test_the_report_says_what_the_library_says(digits_run: Path, setup: Setup) -> None:
    model = e2vpt.load(digits_run)
    report = report_of(digits_run)
    assert (report["split"], report["images"]) == ("val", 40)  # of --data.limit
    assert setup.splits.val is not None
    cfg = load_json(TrainConfig, digits_run / "config.json")
    loader = build_loader(setup.splits.val, cfg.data, train=False)
    with torch.autocast("cpu", torch.bfloat16):
        attention = e2vpt.attention_to_prompts(model, loader)
    assert report["attention"].keys() == attention.keys()
    for name, shares in attention.items():
        assert report["attention"][name] == pytest.approx(shares.tolist(), abs=1e-6)
    scores = e2vpt.importance(model, loader, 8)
    importance = report["importance"]
    for name, atol in (("tokens", 1e-7), ("segments", 0)):
        np.testing.assert_allclose(importance[name], scores[name], rtol=1e-3, atol=atol)
    assert np.shape(importance["segments"]) == (4, 8)
    assert (importance["interleaved"], importance["kept_segments"]) == (False, None)
    assert report["pruned_by"] is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_of_a_pruned_run(
    tmp_path: Path, digits_run: Path, setup: Setup, interleaved: bool
) -> None:
    options = {"num_tokens": 1, "num_segments": 3, "interleaved": interleaved}
    write(tmp_path, digits_run, setup, prune={"source": str(digits_run), **options})
    report = report_of(tmp_path)
    by, saved = report["pruned_by"], json.loads((tmp_path / "importance.json").read_text())
    assert by["tokens"] == saved["tokens"]
    assert by["kept"] == sorted(np.argsort(saved["tokens"])[1:].tolist())
    assert (by["random"], by["signed"]) == (False, False)
    assert report["importance"]["interleaved"] == interleaved
    kept = np.array(report["importance"]["kept_segments"])
    assert kept.shape == (3, 8)
    assert (kept.sum(axis=1) == 5).all()
    scores = np.array(report["importance"]["segments"])
    assert (scores[~kept] == 0).all()
    assert (scores[kept] > 0).all()


def test_other_ways_of_pruning(tmp_path: Path, digits_run: Path, setup: Setup) -> None:
    options = {"source": str(digits_run), "num_tokens": 1, "num_segments": 3}
    reports = {}
    for way in ("compat", "random", "per_layer"):
        (tmp_path / way).mkdir()
        written = write(tmp_path / way, digits_run, setup, prune={**options, way: True})
        assert written == FILES | {"importance.json"}
        reports[way] = report_of(tmp_path / way)
    assert reports["compat"]["pruned_by"]["signed"]
    assert np.sum(reports["compat"]["importance"]["kept_segments"]) == 3 * 5
    assert len(reports["compat"]["importance"]["tokens"]) == 4  # set to zero, but still there
    assert reports["random"]["pruned_by"]["random"]
    by, importance = (reports["per_layer"][part] for part in ("pruned_by", "importance"))
    assert np.shape(by["tokens"]) == (2, 4)
    assert np.shape(by["kept"]) == np.shape(importance["tokens"]) == (2, 3)
    assert np.shape(importance["kept_segments"]) == (2, 3, 8)


def test_layers_pruned_apart_are_scored_apart(
    tmp_path: Path, digits_run: Path, setup: Setup
) -> None:
    """Prompt k of one layer has nothing to do with prompt k of another, whole as they are."""
    options = {"source": str(digits_run), "num_tokens": 1, "per_layer": True}
    write(tmp_path, digits_run, setup, prune=options)
    importance = report_of(tmp_path)["importance"]
    assert np.shape(importance["tokens"]) == (2, 3)
    assert importance["kept_segments"] is None


@pytest.mark.parametrize("method", ["linear", "bias", "full"])
def test_nothing_without_prompts(
    tmp_path: Path, digits_run: Path, setup: Setup, method: str
) -> None:
    assert write(tmp_path, digits_run, setup, {"method": method}) == set()


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"method": "vpt-shallow"}, {"visual"}),
        ({"method": "vpt-deep"}, {"visual"}),
        ({"num_visual_prompts": 0}, {"kv"}),
        ({"prompt_dim": 16, "kv_deep": False}, {"visual", "kv"}),
    ],
)
def test_what_applies(
    tmp_path: Path, digits_run: Path, setup: Setup, options: Any, kinds: set[str]
) -> None:
    assert write(tmp_path, digits_run, setup, options) == FILES
    report = report_of(tmp_path)
    assert {kind for kind in ("visual", "kv") if any(report["attention"][kind])} == kinds
    assert (report["importance"] is None) == ("visual" not in kinds)


def test_training_images_where_there_are_no_others(
    tmp_path: Path, digits_run: Path, setup: Setup
) -> None:
    only = replace(setup, splits=replace(setup.splits, val=None, test=None))
    assert write(tmp_path, digits_run, only) == FILES
    assert report_of(tmp_path)["split"] == "train"


def test_trials_measure_nothing(tmp_path: Path, digits_run: Path, setup: Setup) -> None:
    cfg = load_json(TrainConfig, digits_run / "config.json")
    train(replace(cfg, optim=replace(cfg.optim, epochs=1)), setup, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "result.json" in names
    assert not names & FILES


def test_images_come_from_all_of_the_split(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    images = setup.splits.val
    assert images is not None
    monkeypatch.setattr(prompt_report, "NUM_IMAGES", 7)
    drawn = [labels for _, labels in prompt_report._loader(images, 3)]
    assert [len(labels) for labels in drawn] == [3, 3, 1]
    expected = [images.labels[i] for i in (0, 5, 11, 17, 22, 28, 34)]
    assert torch.cat(drawn).tolist() == expected


# ---- the picture ----------------------------------------------------------------------------


def made_up(
    layers: int, prompts: int, rows: int, left: int = 0, per_layer: bool = False
) -> dict[str, Any]:
    """A report with random numbers; with `left`, of a run pruned to so many prompts."""
    rng = np.random.default_rng(0)
    shape = (layers, left or prompts) if per_layer else (left or prompts,)
    before = rng.random((layers, prompts) if per_layer else (prompts,))
    kept = np.sort(np.argsort(before)[..., prompts - left :])
    shares = {
        "visual": rng.random(layers) * 0.5 * (prompts > 0),
        "kv": rng.random(layers) * 0.5 * (rows > 0),
        "uniform_visual": np.full(layers, prompts / (50 + prompts + rows)),
        "uniform_kv": np.full(layers, rows / (50 + prompts + rows)),
    }
    importance = {
        "tokens": rng.random(shape).tolist(),
        "segments": (rng.random((*shape, 8)) * 1e-5).tolist(),
        "interleaved": False,
        "kept_segments": (rng.random((*shape, 8)) < 0.5).tolist() if left else None,
    }
    by = {"tokens": before.tolist(), "kept": kept.tolist(), "random": False, "signed": False}
    return {
        "split": "val",
        "images": 256,
        "attention": {name: values.tolist() for name, values in shares.items()},
        "importance": importance if prompts else None,
        "pruned_by": by if left else None,
    }


@pytest.mark.parametrize(
    "sizes", [(12, 1, 0), (24, 100, 5, 60), (24, 10, 5, 7, True), (2, 0, 5), (12, 300, 1)]
)
def test_nothing_is_cut_off_or_lies_over_another(
    tmp_path: Path, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda s, *a, **k: (drawn.append(s), real(s, *a, **k)))
    pictures.prompts(made_up(*sizes), "a_$run_{$", tmp_path / "prompts.png")
    with Image.open(tmp_path / "prompts.png") as image:
        assert image.size[0] == 990
    (figure,) = drawn
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    assert "a_$run_{$: prompts on 256 images (val)" in [text.get_text() for text in texts]
    titles = [a.get_title(loc="left") for a in figure.axes if a.get_title(loc="left")]
    assert len(titles) == (3 if sizes[1] else 1)
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])
