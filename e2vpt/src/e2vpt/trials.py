"""Runs of a search, each done once: a trial that is finished on disk is read, not run again."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from e2vpt.config import TrainConfig
from e2vpt.evaluate import Diverged
from e2vpt.train import Setup, train
from shared_utils.checkpoint import write_text
from shared_utils.config import load_json, to_dict
from shared_utils.errors import InputError
from shared_utils.run_log import read_metrics


@dataclass(frozen=True)
class Trial:
    """A finished run.

    Attributes:
        name: of its folder below `trials/`.
        folder: its run folder.
        cfg: what ran.
        result: its `result.json`.
    """

    name: str
    folder: Path
    cfg: TrainConfig
    result: dict[str, Any]

    @property
    def val_top1(self) -> float:
        """Of the last epoch, in [0, 1]; 0 where the run diverged."""
        return float(self.result["metrics"]["val_top1"])

    @property
    def val_loss(self) -> float:
        """After the last epoch; infinite where it diverged or trained on these images too."""
        rows = [] if self.is_diverged else read_metrics(self.folder)
        return float(rows[-1].get("val_loss", math.inf)) if rows else math.inf

    @property
    def test_top1(self) -> float:
        """Of the last epoch, in [0, 1]; final runs alone have it."""
        return float(self.result["metrics"]["test_top1"])

    @property
    def is_diverged(self) -> bool:
        """Its loss or weights became NaN or infinite."""
        return "diverged" in self.result

    @property
    def tuned(self) -> int:
        """Parameters that trained; 0, not counted, where the run diverged."""
        return 0 if self.is_diverged else int(self.result["parameters"]["tuned"])

    @property
    def seconds(self) -> float:
        """Wall time of its training and validation."""
        rows = read_metrics(self.folder)
        return float(rows[-1]["seconds"]) if rows else 0.0


class Trials:
    """Runs trials into one folder."""

    def __init__(self, folder: Path) -> None:
        """Keep trials below `folder`."""
        self.folder = folder

    def place(self, name: str) -> Path:
        """Where a trial is or will be."""
        return self.folder / name

    def run(self, name: str, cfg: TrainConfig, setup: Setup) -> Trial:
        """Run a trial, go on with it where it was interrupted, or read it where it is done.

        A trial that diverges is recorded and counts as the worst, except where it has test images:
        that is a final run, whose figure is asked for.

        Raises: InputError where a trial of that name ran with another configuration, or a final
            run diverged.
        """
        done = self.find(name, cfg)
        if done is not None:
            return done
        folder = self.place(name)
        is_begun = (folder / "config.json").is_file() and (folder / "last.ckpt").is_file()
        if folder.exists() and not is_begun:
            shutil.rmtree(folder)  # killed before its first checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        run = replace(cfg.run, resume=str(folder) if is_begun else "", overwrite=False)
        try:
            train(replace(cfg, run=run), setup, folder)
        except Diverged as error:
            got = str(error).partition(", expected")[0]  # the rest is advice for a single run
            if setup.splits.test is not None:
                raise InputError(
                    f"final run {name}",
                    f"one that diverged ({got})",
                    "a rate that every seed bears",
                    "start a new search with lower --search.lrs",
                ) from error
            self._give_up(folder, got)
        return self._read(name, cfg)

    @staticmethod
    def _give_up(folder: Path, why: str) -> None:
        """Record a candidate whose rate was too high: it counts, with an accuracy of 0."""
        result = {"metrics": {"val_top1": 0.0}, "diverged": why}
        write_text(json.dumps(result, indent=1) + "\n", folder / "result.json")

    def find(self, name: str, cfg: TrainConfig) -> Trial | None:
        """A finished trial, or None.  Raises: InputError where it ran otherwise than `cfg`."""
        folder = self.place(name)
        if (folder / "config.json").is_file():
            before = _compared(load_json(TrainConfig, folder / "config.json"))
            now = _compared(cfg)
            for group in (key for key in now if before[key] != now[key]):
                raise InputError(
                    f"trial {name}",
                    f"another {group} than now",
                    "the configuration the search began with",
                    "resume with the same options, or start a new search",
                )
        return self._read(name, cfg) if (folder / "result.json").is_file() else None

    def _read(self, name: str, cfg: TrainConfig) -> Trial:
        result = json.loads((self.place(name) / "result.json").read_text())
        return Trial(name, self.place(name), cfg, result)


def _compared(cfg: TrainConfig) -> dict[str, Any]:
    """What has to be the same for a trial to be the same run: not where the search lies."""
    run = replace(cfg.run, resume="", overwrite=False, runs_dir=Path())
    plain = to_dict(replace(cfg, about="", run=run))
    plain["prune"]["source"] = Path(cfg.prune.source).name
    return plain
