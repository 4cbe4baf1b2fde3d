"""The benchmark's sides do what their rows say. No test asserts a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dnc.bench
from dnc import NearestCentroidHead, sinkhorn
from dnc.assignment import sinkhorn as segmented
from dnc.bench import (
    BenchConfig,
    Row,
    Sizes,
    bench,
    build,
    clustering_sides,
    fit_sides,
    inference,
    loop_sinkhorn,
    peak_memory,
    race,
    random_batch,
    train_step,
)
from dnc.cli import main
from dnc.heads import SoftmaxHead

CPU = torch.device("cpu")
TINY = Sizes(
    encoder="resnet10t", img_size=16, num_classes=6, num_samples=300, num_centroids=3,
    fit_samples=2300, fit_dim=12, fit_classes=5,
)  # fmt: skip


def row(**values: Any) -> Row:
    given = {"name": "a", "value": 1.0, "unit": "ratio", "target": 1.0, "direction": "lower"}
    return Row(**{**given, "detail": "", **values})


# ---- rows and rounds -------------------------------------------------------------------------


def test_a_row_knows_whether_its_target_is_met() -> None:
    assert [row(value=v).verdict for v in (0.9, 1.0, 1.1)] == ["met", "met", "MISSED"]
    found = [row(value=v, direction="higher").verdict for v in (0.9, 1.0, 1.1)]
    assert found == ["MISSED", "met", "met"]
    assert row(target=None).verdict == ""


def test_sides_run_in_turn_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a list of durations, so that the medians are known."""
    seen: list[str] = []
    taken = {"a": [9, 9, 5, 1, 2, 3, 100], "b": [9, 9, 20, 30, 10, 1, 50]}  # two warm-ups, five
    now = 0.0

    def side(name: str) -> None:
        nonlocal now
        now += taken[name][seen.count(name)]
        seen.append(name)

    monkeypatch.setattr(dnc.bench.time, "perf_counter", lambda: now)
    seconds = race({name: lambda name=name: side(name) for name in taken}, 5, CPU)
    assert seen == ["a", "b"] * (2 + 5)
    assert seconds == {"a": 3, "b": 20}


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--repeats", "4"], "error: repeats: got 4, expected 5 or more; raise it\n"),
        (["--batch-size", "-1"], "error: batch_size: got -1, expected 0 or more; raise it\n"),
    ],
)
def test_too_few(argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err == error


def test_the_sizes_are_those_of_the_targets() -> None:
    assert Sizes() == Sizes(
        encoder="resnet50", img_size=224, num_classes=1000, num_samples=65536, num_centroids=4,
        fit_samples=50000, fit_dim=512, fit_classes=100,
    )  # fmt: skip


# ---- sides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "num_iters"), [(0.05, 3), (0.5, 1), (0.1, 8)])
def test_the_loop_over_classes_is_the_same_plan(epsilon: float, num_iters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(50, 4, generator=generator) * 2 - 1
    labels = torch.randint(7, (50,), generator=generator)
    labels[labels == 2] = 3  # a class without samples, one with a single one, none of the last
    labels[labels == 4] = 5
    labels[0] = 4
    told = loop_sinkhorn(similarity, labels, 8, epsilon, num_iters)
    found = sinkhorn(similarity, labels, 8, epsilon, num_iters)
    torch.testing.assert_close(told, found, rtol=0, atol=1e-6)
    torch.testing.assert_close(told.sum(dim=1), torch.ones(50))
    assert not torch.allclose(told, loop_sinkhorn(similarity, labels * 0, 8, epsilon, num_iters))


def test_both_sides_of_clustering_give_one_plan() -> None:
    sides = clustering_sides(TINY, CPU)
    assert sides.keys() == {"segmented", "loop"}
    plans = {name: side() for name, side in sides.items()}
    assert plans["loop"].shape == (300, 3)
    torch.testing.assert_close(plans["loop"], plans["segmented"], rtol=0, atol=1e-6)
    assert dnc.bench.sinkhorn is segmented  # not a twin of it


def test_what_is_fitted_has_the_means_of_its_classes() -> None:
    """`means` against a loop; `fit` with one sub-centroid per class against `means`."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2300, 12, generator=generator)
    labels = torch.randint(5, (2300,), generator=generator)
    means = fit_sides(TINY)["means"]()
    for c in range(5):
        own = [x / x.norm() for x, y in zip(features, labels, strict=True) if y == c]
        torch.testing.assert_close(means[c], torch.stack(own).mean(dim=0), rtol=0, atol=1e-6)
    alone = fit_sides(Sizes(num_centroids=1, fit_samples=2300, fit_dim=12, fit_classes=5))
    torch.testing.assert_close(alone["fit"]()[:, 0], F.normalize(means), rtol=0, atol=1e-5)
    assert fit_sides(TINY)["fit"]().shape == (5, 3, 12)


@pytest.mark.parametrize(("kind", "head"), [("dnc", NearestCentroidHead), ("softmax", SoftmaxHead)])
def test_a_step_trains_and_inference_only_looks(kind: Any, head: type[torch.nn.Module]) -> None:
    model = build(kind, TINY, CPU)
    assert type(model["head"]) is head
    images, labels = random_batch(TINY, 8, CPU)
    assert images.shape == (8, 3, 16, 16)
    look, step = inference(model, images), train_step(model, images, labels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = look()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(logits, model["head"](model["encoder"](images)))
    assert not logits.requires_grad
    model.train()
    step()
    after = model.state_dict()
    name = "encoder.network.conv1.0.weight"
    assert not torch.equal(after[name], before[name])
    if kind == "dnc":
        assert int(after["head.usage"].sum()) == 8  # clustered, not only seeded
    else:
        assert not torch.equal(after["head.linear.weight"], before["head.linear.weight"])


@pytest.mark.skipif(not dnc.bench.STATUS.is_file(), reason="no /proc/self/status on this system")
def test_peak_memory_of_a_process_of_its_own() -> None:
    """At least weights, gradients and momentum; the weights of resnet10t are 4.9 M floats."""
    count = sum(p.numel() for p in build("softmax", TINY, CPU).parameters())
    peak = peak_memory("softmax", TINY, 4, CPU)
    assert 3 * 4 * count < peak < 2**31


# ---- the whole -------------------------------------------------------------------------------

NAMES = [
    "balanced clustering: loop / ours",
    "train step: dnc / softmax",
    "inference: dnc / softmax",
    "peak memory of a train step: dnc more than softmax",
    "fit: seconds over twice the class means",
]


def test_bench_writes_what_the_contract_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dnc.bench, "STATUS", Path(__file__))  # as on Linux
    peaks = {"dnc": 3 * 2**30, "softmax": 2 * 2**30}
    monkeypatch.setattr(dnc.bench, "peak_memory", lambda kind, *rest: peaks[kind])
    file = tmp_path / "bench" / "dnc.json"
    bench(BenchConfig(output=file, repeats=5, batch_size=4), TINY)
    report = json.loads(file.read_text())
    assert report.keys() == {"machine", "rows", "skipped"}
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["torch"] == torch.__version__
    assert report["skipped"] == [
        {"name": "all rows on a GPU", "reason": "no GPU that torch can use"},
        {"name": "all rows on segmentation", "reason": "no --segmentation"},
    ]
    rows = report["rows"]
    assert all(set(r) == {"name", "value", "unit", "target", "direction", "detail"} for r in rows)
    assert [r["name"] for r in rows] == NAMES
    assert [r["direction"] for r in rows] == ["higher", *["lower"] * 4]
    assert [r["target"] for r in rows] == [10, 1.05, 1.01, 0.5, 5]
    assert [r["unit"] for r in rows] == ["ratio", "ratio", "ratio", "GiB", "s"]
    assert all(r["value"] > 0 for r in rows[:3])
    assert rows[3]["value"] == 1.0
    assert "resnet10t, 16 px, 6 classes, batch 4, fp32" in rows[1]["detail"]
    assert "N 300, C 6, K 3" in rows[0]["detail"]
    assert "2,300 x 12, 5 classes, K 3" in rows[4]["detail"]
    told = capsys.readouterr().out
    assert all(name in told for name in NAMES)
    assert "MISSED" in told  # of 1 GiB more, where 0.5 are allowed


def test_ratios_are_ours_over_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With made-up times of each side the values of all rows are known."""
    told = {"segmented": 2.0, "loop": 30.0, "dnc": 3.0, "softmax": 2.0, "fit": 7.0, "means": 3.0}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        dnc.bench, "race", lambda sides, *rest: {name: told[name] for name in sides}
    )
    monkeypatch.setattr(dnc.bench, "STATUS", tmp_path / "not there")
    file = tmp_path / "dnc.json"
    bench(BenchConfig(output=file, batch_size=2), TINY)
    report = json.loads(file.read_text())
    found = {r["name"]: r["value"] for r in report["rows"]}
    values = {NAMES[0]: 15.0, NAMES[1]: 1.5, NAMES[2]: 1.5, NAMES[4]: 1.0}
    assert found == values
    reason = f"no {tmp_path / 'not there'} to read it from"
    assert {"name": NAMES[3], "reason": reason} in report["skipped"]
