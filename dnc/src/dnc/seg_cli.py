"""The commands `dnc seg ...`: parse and report. mmsegmentation is loaded when one runs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shared_utils.config import parse
from shared_utils.errors import InputError

Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")]


@dataclass(frozen=True, kw_only=True)
class SegTrainConfig:
    """Train a segmentor under sub-centroids (or any config of mmsegmentation)."""

    config: tyro.conf.Positional[str] = ""
    """config file, such as dnc/configs/digitscenes_fcn.py; not needed with --resume"""
    cfg_options: Words = ()
    """settings of the config to change, as mmengine has it: train_cfg.max_iters=100"""
    data_root: str = ""
    """folder of the data, in place of the config's"""
    amp: bool = False
    """autocast: float16 with loss scaling on a GPU, bfloat16 on a CPU"""
    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none"
    """what started several processes; torchrun is noticed without it"""
    trusted: bool = False
    """open load_from even where it is more than tensors and plain data, which can run code"""
    name: str = ""
    """folder name of the run (default: the config's name and the time)"""
    runs_dir: Path = Path("runs")
    """folder that holds the runs"""
    resume: str = ""
    """run folder to go on with"""
    overwrite: bool = False
    """empty an existing run folder of that name"""
    seed: int = 0
    """seed of every random choice"""

    def __post_init__(self) -> None:
        """Check the seed's range, and that there is something to train."""
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "0 to 4294967295", "correct it")
        if not self.config and not self.resume:
            raise InputError("config", "nothing", "a config file", "name one, or give --resume RUN")


def _train(argv: Sequence[str]) -> None:
    asked = parse(SegTrainConfig, argv, prog="dnc seg train", about=SegTrainConfig.__doc__ or "")
    from dnc.mmseg.train import SegRun, train

    train(SegRun(**asdict(asked)))


SEG_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train a segmentor: CONFIG first"),
}
