"""The benchmark's sides do what their rows say. No test asserts a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2vpt import bench_bank
from e2vpt.bench import BenchConfig, bench
from e2vpt.cli import main
from e2vpt.measure import Row, race
from e2vpt.micro_vit import build_micro_vit


def row(**values: Any) -> Row:
    given = {"name": "a", "value": 1.0, "unit": "ratio", "target": 1.0, "direction": "lower"}
    return Row(**{**given, "detail": "", **values})


def test_a_row_knows_whether_its_target_is_met() -> None:
    assert [row(value=v).verdict for v in (0.9, 1.0, 1.1)] == ["met", "met", "MISSED"]
    found = [row(value=v, direction="higher").verdict for v in (0.9, 1.0, 1.1)]
    assert found == ["MISSED", "met", "met"]
    assert row(target=None).verdict == ""


def test_sides_run_in_turn() -> None:
    seen: list[str] = []
    sides = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    seconds = race(sides, 5, torch.device("cpu"))
    assert seen == ["a", "b"] * (2 + 5)
    assert seconds.keys() == {"a", "b"}
    assert all(0 <= value < 1 for value in seconds.values())


@pytest.fixture
def service() -> bench_bank.Service:
    backbone = build_micro_vit(0, embed_dim=64, depth=2, num_heads=1)
    return bench_bank.build_service(backbone, torch.device("cpu"))


def test_the_tasks_are_those_of_the_rows(service: bench_bank.Service) -> None:
    specs = bench_bank.task_specs()
    assert len(specs) == len(service.bank.tasks) == 64
    assert len(service.alone) == 32
    counts = [spec.num_visual_prompts for spec in specs]
    assert (min(counts), max(counts)) == (5, 60)
    classes = {spec.num_classes for spec in specs}
    assert (min(classes), max(classes), len(classes)) == (10, 100, 64)
    folded = [model.spec.num_visual_prompts for model in service.alone.values()]
    assert max(folded) == 60
    assert folded != sorted(folded)
    assert service.alone[service.middle].spec.num_visual_prompts == sorted(folded)[16]
    # Keys and values of 2 layers of width 64 in the bank; keys that are values too as trained.
    heads = sum(65 * spec.num_classes for spec in specs)
    rows = sum(spec.num_visual_prompts + 5 for spec in specs) * 2 * 64
    assert service.stored_bytes == 4 * (2 * rows + heads)
    assert service.tuned_bytes == 4 * (rows + heads)


def test_all_sides_of_the_bank_give_the_same_logits(service: bench_bank.Service) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    sides = bench_bank.sides(service, images, "fp32")
    mixed, alone = sides["mixed"](), sides["one by one"]()
    assert [len(logits) for logits in mixed] == [len(logits) for logits in alone]
    for found, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    at = list(service.alone).index(service.middle)
    torch.testing.assert_close(sides["one task"]()[at], mixed[at], atol=1e-5, rtol=1e-4)
    half = bench_bank.sides(service, images, "bf16")
    assert {logits.dtype for side in half.values() for logits in side()} == {torch.bfloat16}


def test_suite_bank_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ("tiny ViT", 32, lambda: build_micro_vit(0, embed_dim=64, depth=1, num_heads=1), 1.1)
    monkeypatch.setattr(bench_bank, "PLACES", (place,))
    file = tmp_path / "bench" / "e2vpt.json"
    bench(BenchConfig(suite="bank", output=file, repeats=1))
    report = json.loads(file.read_text())
    assert report["machine"]["threads"] == torch.get_num_threads()
    rows = report["rows"]
    assert [r["name"] for r in rows] == [
        "tiny ViT: mixed batch / batch of one task, fp32",
        "tiny ViT: images per second mixed / one by one, fp32",
        "tiny ViT: memory of a task / its prompts and head",
        "tiny ViT: mixed batch / batch of one task, bf16",
        "tiny ViT: images per second mixed / one by one, bf16",
    ]
    assert [r["direction"] for r in rows] == ["lower", "higher", "lower", "lower", "higher"]
    speedup = 4.0 if torch.cuda.is_available() else None
    assert [r["target"] for r in rows] == [1.1, speedup, None, 1.1, speedup]
    assert all(r["value"] > 0 for r in rows)
    assert rows[2]["value"] < 2
    assert "tiny ViT: mixed batch" in capsys.readouterr().out


def test_suite_train_does_not_measure_the_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e2vpt.bench.train_rows", lambda *rest: [row(name=rest[1])])
    monkeypatch.setattr("e2vpt.bench.memory_row", lambda *rest: row(name=f"memory {rest[1]}"))
    monkeypatch.setattr("e2vpt.bench.STATUS", Path(__file__))  # as on Linux
    monkeypatch.setattr(bench_bank, "bank_rows", None)
    file = tmp_path / "e2vpt.json"
    bench(BenchConfig(suite="train", output=file))
    names = [r["name"] for r in json.loads(file.read_text())["rows"]]
    assert names == ["fp32", "memory fp32", "bf16", "memory bf16"]


def test_a_suite_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "bnak"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --suite: got ")
    assert error.count("\n") == 1
