"""`dnc seg evaluate` and `dnc seg predict`: a trained segmentor on a test set or on images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from PIL import Image

from dnc.commands import image_files
from dnc.mmseg import drawing
from dnc.mmseg.config_files import image_pipeline, load_config
from dnc.mmseg.folders import check_data
from dnc.mmseg.interrupts import saved_steps
from dnc.mmseg.segmentors import load_segmentor, measure
from dnc.mmseg.train import CARD, load_run
from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError

OF_CHECKPOINT = (".pth", ".pt", ".ckpt")


def open_model(
    words: Sequence[str],
    overrides: Sequence[str] = (),
    data_root: str = "",
    *,
    trusted: bool = False,
) -> tuple[Any, Any, list[str]]:
    """The model that words on the command line begin with: `RUN`, or `CONFIG CHECKPOINT`.

    Args:
        words: a run folder, or a config and a checkpoint; after a run folder a checkpoint may
            stand as well, by default the last one is taken.
        overrides: settings of the config to change.
        data_root: of all data sets.
        trusted: open a checkpoint that is more than tensors and plain data.

    Returns: config, model in eval mode, and the words that are left.
    Raises: MissingFileError, InputError.
    """
    if not words:
        raise InputError("model", "nothing", "a run folder, or CONFIG CHECKPOINT", "name them")
    first, rest = Path(words[0]), list(words[1:])
    if first.is_dir():
        cfg, _ = load_run(first, tuple(overrides), data_root)
    else:
        cfg = load_config(first, overrides, data_root)
    if rest and Path(rest[0]).suffix in OF_CHECKPOINT:
        checkpoint = Path(rest.pop(0))
    elif first.is_dir():
        checkpoint = newest_checkpoint(first)
    else:
        raise InputError(
            "checkpoint", "nothing", "a .pth file after the config", f"give {first} CHECKPOINT"
        )
    return cfg, load_segmentor(cfg, checkpoint, trusted=trusted), rest


def newest_checkpoint(run: Path) -> Path:
    """The one that a run ended with.  Raises: InputError where there is none."""
    fitted = run / "fit.pth"
    found = [fitted] if fitted.is_file() else saved_steps(run)
    if not found:
        raise InputError(str(run), f"{CARD} without a checkpoint", "a finished run", "train it")
    return found[0]


def evaluate(
    words: Sequence[str],
    overrides: Sequence[str] = (),
    data_root: str = "",
    *,
    trusted: bool = False,
) -> dict[str, float]:
    """mIoU, aAcc and mAcc of the config's test set, as fractions; arguments as of `open_model`.

    Raises: MissingFileError, InputError.
    """
    cfg, model, rest = open_model(words, overrides, data_root, trusted=trusted)
    if rest:
        raise InputError("words", " ".join(rest), "RUN or CONFIG CHECKPOINT alone", "leave it out")
    check_data(cfg, ("test_dataloader",))
    return measure(cfg, model)


def predict(
    words: Sequence[str],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    trusted: bool = False,
) -> list[Path]:
    """Write label image, overlay and summary of each image.

    Args:
        words: as of `open_model`, then image files, folders and patterns.
        output: folder for `NAME.png` (class numbers), `NAME_overlay.png` and `predictions.json`
            (the share of each class's pixels).
        overrides: as of `open_model`.
        trusted: as of `open_model`.

    Returns: the overlays.
    Raises: MissingFileError; InputError where an image cannot be read; nothing is written then.
    """
    cfg, model, rest = open_model(words, overrides, trusted=trusted)
    if not rest:
        raise InputError("images", "nothing", "files, folders or patterns", "name some")
    files = image_files(rest)
    for path in files:
        with reading(path, "an image"), Image.open(path) as opened:
            opened.load()
    names, palette = class_names(cfg)
    output.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    summary: dict[str, Any] = {}
    for path, stem in zip(files, _distinct([path.stem for path in files]), strict=True):
        found = predict_file(cfg, model, path)
        image = drawing.read_rgb(path, found.shape)
        Image.fromarray(found).save(output / f"{stem}.png")
        made.append(output / f"{stem}_overlay.png")
        Image.fromarray(drawing.overlay(image, found, palette)).save(made[-1])
        shares = np.bincount(found.ravel(), minlength=len(names)) / found.size
        present = np.flatnonzero(shares)
        summary[str(path)] = {names[c]: round(float(shares[c]), 6) for c in present}
    write_text(json.dumps(summary, indent=1) + "\n", output / "predictions.json")
    return made


@torch.no_grad()
def predict_file(cfg: Any, model: Any, path: Path) -> Any:
    """Class numbers (H, W) uint8 of an image file at its own size."""
    data = image_pipeline(cfg)({"img_path": str(path), "reduce_zero_label": False})
    sample = model.test_step(pseudo_collate([data]))[0]
    return sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)


def class_names(cfg: Any) -> tuple[list[str], list[list[int]]]:
    """Names and colours of the classes, of the test set's type; it need not be there."""
    config = cfg.test_dataloader.dataset
    kind = DATASETS.get(config.type)
    meta = {**getattr(kind, "METAINFO", {}), **config.get("metainfo", {})}
    count = cfg.model.decode_head.num_classes
    names = list(meta.get("classes") or [str(c) for c in range(count)])
    random = np.random.default_rng(0)
    palette = meta.get("palette") or random.integers(40, 255, (count, 3)).tolist()
    return names, [list(colour) for colour in palette]


def _distinct(stems: Sequence[str]) -> list[str]:
    """Names of which none occurs twice."""
    seen: dict[str, int] = {}
    found = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        found.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return found
