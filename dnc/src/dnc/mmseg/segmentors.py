"""Segmentors of mmseg, built from configs and loaded from checkpoints with a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor, nn

from dnc.mmseg import checkpoints
from dnc.mmseg.owners import centroid_heads
from shared_utils.errors import InputError

# Of a nearest-centroid head: what training alone needs may be missing.
TRAINING_ONLY = ("idle", "usage", "updates")


@dataclass(frozen=True)
class Loaded:
    """Which weights of a checkpoint went into a model: names.

    Attributes:
        loaded: those that fit.
        missing: of the model, not in the file.
        unexpected: in the file, not of the model.
        odd: in both, with another shape.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    odd: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected", "odd"):
            if names := getattr(self, what):
                told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
                parts.append(
                    f"{len(names)} {'of another shape' if what == 'odd' else what} ({told})"
                )
        return "; ".join(parts)


def load_into(model: nn.Module, weights: Mapping[str, Tensor]) -> Loaded:
    """Copy what fits into a model, and say what did and what did not."""
    own = model.state_dict()
    odd = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    fitting = {n: t for n, t in weights.items() if n in own and n not in odd}
    model.load_state_dict(fitting, strict=False)
    return Loaded(
        tuple(fitting),
        tuple(name for name in own if name not in weights),
        tuple(name for name in weights if name not in own),
        tuple(odd),
    )


def build_segmentor(cfg: Any) -> Any:
    """The model of a config, with random weights, for one process."""
    model_cfg = cfg.model.copy()
    model_cfg.pretrained = None
    model_cfg.setdefault("train_cfg", {})
    model_cfg.setdefault("test_cfg", {"mode": "whole"})
    if "data_preprocessor" not in model_cfg and "data_preprocessor" in cfg:
        model_cfg.data_preprocessor = cfg.data_preprocessor
    return revert_sync_batchnorm(MODELS.build(model_cfg))


def load_segmentor(cfg: Any, checkpoint: Path, *, trusted: bool = False) -> Any:
    """The trained model, in eval mode on the device there is.

    Raises: MissingFileError; InputError where the file does not open, is of another model, or is
        that of a softmax decoder while the config's has sub-centroids.
    """
    model = build_segmentor(cfg)
    weights = checkpoints.state_dict_of(checkpoints.load(checkpoint, trusted=trusted))
    report = load_into(model, weights)
    heads = [name for name, _ in centroid_heads(model)]
    absent = [name for name in heads if f"{name}.classifier.centroids" in report.missing]
    if absent and f"{absent[0]}.conv_seg.weight" in report.unexpected:
        raise InputError(
            str(checkpoint),
            f"a softmax classifier in {absent[0]}",
            "sub-centroids",
            "turn it into them with dnc seg fit, or give the config it was trained with",
        )
    missing = [n for n in report.missing if not n.endswith(TRAINING_ONLY)]
    if missing or report.odd:
        name = (missing + list(report.odd))[0]
        raise InputError(
            str(checkpoint),
            f"{'no' if missing else 'another shape of'} {name} ({report})",
            "the weights of the config's model",
            "give the config it was trained with",
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


@torch.no_grad()
def measure(cfg: Any, model: Any) -> dict[str, float]:
    """The metrics of the config's test set, as fractions by mmseg's names (`mIoU`, `aAcc`, ...)."""
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    model.eval()
    for batch in loader:
        evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    return fractions(evaluator.evaluate(len(loader.dataset)))


def fractions(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Percentages, as mmseg gives them -> fractions."""
    return {name: float(value) / 100 for name, value in metrics.items()}


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """For result.json: `tuned`, `total`, `percent`, and those of classifiers alone."""
    total = sum(p.numel() for p in model.parameters())
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    places = ("conv_seg", ".classifier", ".fc_cls")  # the last in detectors
    own = [m for n, m in model.named_modules() if n.endswith(places)]
    return {
        "tuned": tuned,
        "total": total,
        "percent": 100 * tuned / total,
        "classifier": sum(p.numel() for module in own for p in module.parameters()),
    }
