"""What a finished run's prompts are worth: `prompts.json` and the picture of it, `prompts.png`."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from e2vpt import pictures, start
from e2vpt.attention_maps import attention_to_prompts
from e2vpt.config import PruneConfig, TrainConfig
from e2vpt.data import DataSplits, ImageSet
from e2vpt.model import PromptedModel
from e2vpt.prompts import VisualPrompts
from e2vpt.pruning import importance, survivors
from shared_utils.checkpoint import write_text

NUM_IMAGES = 256
BATCH_SIZE = 32  # at most; gradients in full precision need more memory than training had


def write(
    fabric: Fabric, network: PromptedModel, splits: DataSplits, cfg: TrainConfig, folder: Path
) -> None:
    """Write `prompts.json` and `prompts.png` into a run folder; none for a model without prompts.

    Measured on at most 256 images of the validation split, or of the training split where there is
    none, taken evenly from all of it and without augmentation.
    """
    if network.visual is None and network.kv is None:
        return
    split, images = ("val", splits.val) if splits.val is not None else ("train", splits.train)
    loader = _loader(images, min(cfg.data.batch_size, BATCH_SIZE))
    with fabric.autocast():
        attention = attention_to_prompts(network, loader)
    report: dict[str, Any] = {
        "split": split,
        "images": min(len(images), NUM_IMAGES),
        "attention": {name: shares.tolist() for name, shares in attention.items()},
        "importance": _importance(network, loader, cfg.prune),
        "pruned_by": _pruned_by(folder) if cfg.prune.source else None,
    }
    write_text(json.dumps(report, indent=1) + "\n", folder / "prompts.json")
    pictures.prompts(report, folder.name, folder / "prompts.png")


def _loader(images: ImageSet, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    count = min(len(images), NUM_IMAGES)
    return DataLoader(
        images.with_augment("none"),
        batch_size=batch_size,
        sampler=[i * len(images) // count for i in range(count)],
    )


def _importance(network: PromptedModel, loader: Any, options: PruneConfig) -> dict[str, Any] | None:
    """Scores of the prompts as they are now, and which of their segments are left."""
    visual = network.visual
    if visual is None:
        return None
    layers = network.geometry.layers[: visual.num_layers]
    num_segments = math.gcd(options.of_segments, *(layer.embed_dim for layer in layers))
    interleaved, per_layer = False, bool(options.source) and options.per_layer
    if (layout := visual.layout) is not None:
        num_segments, interleaved = layout.num_segments, layout.is_interleaved
        per_layer = per_layer or layout.per_layer
    scores = importance(network, loader, num_segments, per_layer=per_layer, interleaved=interleaved)
    kept = _kept_segments(visual)
    return {
        **{name: tensor.tolist() for name, tensor in scores.items()},
        "kept_segments": None if kept is None else kept.tolist(),
    }


def _kept_segments(visual: VisualPrompts) -> Tensor | None:
    """Bool (P, R), or (L, P, R) where layers differ; None where nothing was pruned inside."""
    layout, segments = visual.layout, visual.segments
    if layout is None or segments is None:
        return None
    segments = segments.cpu().long()
    if layout.is_zeroed:
        kept = segments > 0
    else:
        kept = torch.zeros(*segments.shape[:2], layout.num_segments, dtype=torch.bool)
        kept.scatter_(-1, segments, True)
    return kept if layout.per_layer else kept[0]


def _pruned_by(folder: Path) -> dict[str, Any]:
    """The scores that chose the prompts of a pruned run, and the numbers of those that stayed."""
    saved = json.loads((folder / start.IMPORTANCE).read_bytes())
    tokens, options = torch.tensor(saved["tokens"], dtype=torch.float64), saved["prune"]
    return {
        "tokens": saved["tokens"],
        "kept": survivors(tokens, options["num_tokens"]).tolist(),
        "random": options["random"],
        "signed": options["compat"],
    }
