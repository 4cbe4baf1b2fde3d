"""The ablation: which runs there are, what they differ in, going on, and the table."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shared_utils.config import parse, save_json
from shared_utils.errors import Interrupted
from shared_utils.run_log import read_metrics
from yolop_mtl import ablate as module
from yolop_mtl import report, train
from yolop_mtl.ablate import AblateConfig, ablate, as_markdown, summarize, with_focal_dice
from yolop_mtl.cli import main
from yolop_mtl.config import TrainConfig
from yolop_mtl.losses import lane_losses
from yolop_mtl.recipes import SYNTHETIC

ROWS = ["none", "mosaic", "mosaic-deconv", "mosaic-deconv-focaldice"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class Trainer:
    """In the place of `train`: writes the files of a run at once, and remembers what it was."""

    def __init__(self, stops_at: int = 10**6) -> None:
        self.made: list[TrainConfig] = []
        self.stops_at = stops_at

    def __call__(self, cfg: TrainConfig) -> Path:
        self.made.append(cfg)
        folder = cfg.run.runs_dir / "yolop_mtl" / cfg.run.name
        folder.mkdir(parents=True, exist_ok=True)
        save_json(cfg, folder / "config.json")
        (folder / "last.ckpt").touch()
        if len(self.made) == self.stops_at:
            raise Interrupted("yolop-mtl train --resume somewhere")
        value = 0.1 * cfg.run.seed + 0.5 * (cfg.model.lane_upsample == "deconv")
        metrics = {"mAP50": 0.25, "lane_IoU": value, "lane_f1": None}
        (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
        return folder


def configure(tmp_path: Path, *words: str) -> AblateConfig:
    return parse(AblateConfig, ["--runs-dir", str(tmp_path), *words], prog="x")


def names(trainer: Trainer) -> list[str]:
    return [cfg.run.name.removeprefix("ablation-") for cfg in trainer.made]


def test_the_rows_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setattr(module, "train", trainer)
    folder = ablate(configure(tmp_path, "--seeds", "2", "--optim.epochs", "60"))
    assert folder == tmp_path / "yolop_mtl/ablation"
    assert names(trainer) == [f"{row}-seed{seed}" for row in ROWS for seed in (0, 1)]
    assert [cfg.run.seed for cfg in trainer.made] == [0, 1] * 4
    none, mosaic, deconv, focal = trainer.made[::2]
    assert all(cfg.optim.epochs == 60 for cfg in trainer.made)
    assert (none.augment.mosaic, none.augment.mixup, none.augment.close_mosaic) == (0, 0, 0)
    assert (mosaic.augment.mosaic, mosaic.augment.mixup, mosaic.augment.close_mosaic) == (
        1,
        0.15,
        3,
    )
    assert mosaic.augment.scale == none.augment.scale == SYNTHETIC.augment.scale
    ways = [cfg.model.lane_upsample for cfg in (none, mosaic, deconv, focal)]
    assert ways == ["nearest", "nearest", "deconv", "deconv"]
    assert none.loss == mosaic.loss == deconv.loss != focal.loss == SYNTHETIC.loss
    report = read(folder / "ablation.json")
    assert [row["figures"]["lane_IoU"]["mean"] for row in report["rows"]] == pytest.approx(
        [0.05, 0.05, 0.55, 0.55]
    )
    assert report["rows"][0]["switches"] == {"mosaic": False, "deconv": False, "focaldice": False}
    assert report["config"]["base"]["optim"]["epochs"] == 60


def test_every_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    monkeypatch.setattr(module, "train", trainer)
    ablate(configure(tmp_path, "--seeds", "1", "--grid", "all", "--seed", "7"))
    assert len(set(names(trainer))) == 8
    assert {"none-seed7", "deconv-seed7", "deconv-focaldice-seed7"} <= set(names(trainer))


def test_what_is_done_is_kept_and_what_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Trainer(stops_at=3)
    monkeypatch.setattr(module, "train", first)
    monkeypatch.setattr(module.sys, "argv", ["yolop-mtl", "ablate", "--seeds", "2"])
    cfg = configure(tmp_path, "--seeds", "2")
    with pytest.raises(Interrupted, match=r"^yolop-mtl ablate --seeds 2$"):
        ablate(cfg)
    assert not (tmp_path / "yolop_mtl/ablation").exists()
    # One that was made and had not begun.
    empty = tmp_path / "yolop_mtl/ablation-mosaic-seed1"
    empty.mkdir()
    again = Trainer()
    monkeypatch.setattr(module, "train", again)
    ablate(cfg)
    assert names(again) == [f"{row}-seed{seed}" for row in ROWS for seed in (0, 1)][2:]
    assert again.made[0].run.resume == str(tmp_path / "yolop_mtl/ablation-mosaic-seed0")
    assert [(cfg.run.resume, cfg.run.overwrite) for cfg in again.made[1:]] == [("", True)] * 5
    third = Trainer()
    monkeypatch.setattr(module, "train", third)
    ablate(cfg)
    assert third.made == []
    ablate(configure(tmp_path, "--seeds", "1", "--overwrite"))
    assert names(third) == [f"{row}-seed0" for row in ROWS]


def test_a_run_of_another_configuration_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", Trainer())
    ablate(configure(tmp_path, "--seeds", "1"))
    with pytest.raises(
        ValueError, match=r"optim\.epochs: got .*-none-seed0 with \d+, expected 4; ta"
    ):
        ablate(configure(tmp_path, "--seeds", "1", "--optim.epochs", "4"))


def test_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 4, 6, requires_grad=True)
    masks = torch.randint(2, (2, 4, 6))
    loss = with_focal_dice(SYNTHETIC, False).loss
    terms = lane_losses(logits, masks, alpha=loss.lane_alpha, gamma=loss.lane_gamma)
    total = loss.gains["loss_lane_focal"] * terms["loss_lane_focal"]
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], masks.float())
    assert total.item() == pytest.approx(expected.item())
    (own,) = torch.autograd.grad(total, logits)
    (plain,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(own, plain)
    assert (loss.lane_dice, loss.lane_iou) == (0, 0)


def test_mean_and_spread() -> None:
    runs = [{"lane_IoU": value, "mAP50": 0.5} for value in (0.1, 0.2, 0.6)]
    runs[1].pop("mAP50")
    (row,) = summarize({(True, False, True): runs})
    assert row["figures"].keys() == {"lane_IoU"}
    assert row["figures"]["lane_IoU"]["mean"] == pytest.approx(0.3)
    assert row["figures"]["lane_IoU"]["std"] == pytest.approx(0.07**0.5)
    (single,) = summarize({(False, False, False): runs[:1]})
    assert single["figures"]["lane_IoU"] == {"mean": 0.1, "std": None}
    lines = as_markdown([row, single]).splitlines()
    assert lines[0] == "| mosaic, mixup | transposed conv. | focal + Dice | mAP50 | lane_IoU |"
    assert lines[2] == "| yes |  | yes | – | 0.300 ± 0.265 |"
    assert lines[3] == "|  |  |  | 0.500 | 0.100 |"


def test_wrong_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--seeds", "0"], r"seeds: got 0, expected 1 or more"),
        (["--resume", "x"], r"resume: got x, expected no run to go on with; give the same --name"),
        (["--model.tasks", "drivable"], r"model\.tasks: got .*, expected lane among them"),
        (["--name", "a/b"], r"--name: got a/b, expected a plain name"),
    ):
        assert main(["ablate", "--runs-dir", str(tmp_path), *words]) == 2
        assert re.search(message, capsys.readouterr().err)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ablate", "--runs-dir", str(tmp_path)]) == 2
    assert "ablate: got several processes, expected one process; " in capsys.readouterr().err


def test_trained_in_earnest(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures are looked at elsewhere, and take the longest.
    monkeypatch.setattr(report, "plot_curves", lambda *args: None)
    monkeypatch.setattr(report.pictures, "predictions", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "write_curves", lambda *args: None)
    monkeypatch.setattr(train, "write_train_batch", lambda *args: None)
    argv = ["ablate", "--runs-dir", str(tmp_path), "--seeds", "1", *quick, "--optim.epochs", "1"]
    assert main(argv) == 0
    table = (tmp_path / "yolop_mtl/ablation/ablation.md").read_text().splitlines()
    assert len(table) == 6
    assert table[2].startswith("|  |  |  | 0.")
    assert table[5].startswith("| yes | yes | yes | 0.")
    runs = [tmp_path / f"yolop_mtl/ablation-{row}-seed0" for row in ROWS]
    logged = [read_metrics(run)[0] for run in runs]
    assert [row["loss_lane_dice"] > 0 for row in logged] == [False, False, False, True]
    assert len({row["loss"] for row in logged}) == 4
    counts = [read(run / "result.json")["parameters"]["total"] for run in runs]
    assert counts[0] == counts[1] > counts[2] == counts[3]
