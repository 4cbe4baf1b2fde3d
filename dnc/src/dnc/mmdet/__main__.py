"""`python -m dnc.mmdet CONFIG`: train a detector and measure it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from dnc.seg_cli import SegTrainConfig
from shared_utils.config import parse
from shared_utils.errors import run_main

ABOUT = "Train a detector of mmdetection under sub-centroids (or any config of it)."


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _train(words))


def _train(words: Sequence[str]) -> None:
    asked = parse(SegTrainConfig, words, prog="python -m dnc.mmdet", about=ABOUT)
    from dnc.mmdet.train import train
    from dnc.mmseg.train import SegRun

    train(SegRun(**asdict(asked)))


if __name__ == "__main__":
    sys.exit(main())
