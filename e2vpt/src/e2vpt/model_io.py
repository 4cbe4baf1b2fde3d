"""Save what was tuned and load it onto its backbone again.

A saved model is a folder with `model.safetensors` (prompts and head, under 1 MB as a rule) and
`model.json` (what it is made of, and the backbone it belongs to).
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from e2vpt.adapters import detached
from e2vpt.backbones import Backbone, fingerprint, load_backbone
from e2vpt.images import Preprocessing
from e2vpt.model import (
    PromptedModel,
    PromptSpec,
    load_tuned_state,
    parameter_report,
    remove,
    tuned_state,
)
from e2vpt.weight_files import WEIGHT_FILES
from shared_utils import checkpoint
from shared_utils.config import from_dict
from shared_utils.errors import InputError, MissingFileError

WEIGHTS, CARD = "model.safetensors", "model.json"
UNKNOWN = "unknown"  # weights of a backbone whose source `save` was not told


def save(
    model: PromptedModel,
    folder: Path | str,
    *,
    backbone: Backbone | None = None,
    class_names: list[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write `model.safetensors` and `model.json`, both or neither.

    Args:
        model: what `prompt` or `load` gave.
        folder: made where it is missing.
        backbone: where the backbone came from; by default its timm name is recorded, and `load`
            must be given the module where that name's published weights are not the ones used.
        class_names: of the head's outputs, in order.
        preprocessing: what images must go through.

    Raises: InputError where the disk is full; files already there stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "project": "e2vpt",
        "format": 1,
        "backbone": _backbone_card(model, backbone),
        "spec": model.spec.dict(),
        "parameters": parameter_report(model),
        "class_names": class_names,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }
    # Both are written before one replaces an old file: weights and card must belong together.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as place:
        staged = Path(place)
        checkpoint.save_weights(tuned_state(model), staged / WEIGHTS, {"format": "pt"})
        checkpoint.write_text(json.dumps(card, indent=2) + "\n", staged / CARD)
        for name in (WEIGHTS, CARD):
            os.replace(staged / name, folder / name)


def load(
    folder: Path | str, backbone: nn.Module | None = None, *, sha256: str = ""
) -> PromptedModel:
    """Build the model that `save` wrote, in eval mode.

    Args:
        folder: holds `model.safetensors` and `model.json`.
        backbone: the module to put the prompts on; None loads the one named in `model.json`.
        sha256: `fingerprint(backbone)` where the caller has it already.

    Raises: MissingFileError; InputError where a file is damaged, the backbone is not the one the
        prompts were trained on, or the tensors do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    spec = from_dict(PromptSpec, card["spec"], f"{folder / CARD} spec")
    known = card["backbone"]
    if backbone is None:
        if not known["name"]:
            raise InputError("backbone", "no name in model.json", "the module", "pass backbone=")
        size = known["img_size"]
        backbone = load_backbone(
            known["name"],
            known["architecture"] if known["is_file"] else "",
            img_size=None if size is None else (size[0], size[1]),
        ).module
    tensors, _ = checkpoint.load_weights(folder / WEIGHTS)
    # A backbone that trains is in the file, whole (full) or the part that trained, which the
    # fingerprint of one that was saved without its source has in it.
    in_part = spec.backbone_trains in ("bias", "partial")
    is_known = known["weights"] != UNKNOWN if in_part else True
    if spec.backbone_trains != "full" and is_known:
        found = sha256 or fingerprint(backbone)
        if found != known["sha256"]:
            raise InputError(
                "backbone",
                f"weights with fingerprint {found[:12]}",
                f"{known['sha256'][:12]}, those of {known['name'] or 'the saved model'}",
                "load that backbone",
            )
    model = PromptedModel(backbone, spec)
    try:
        load_tuned_state(model, tensors, str(folder / WEIGHTS))
    except InputError:
        remove(model)  # it is the caller's
        raise
    return model.eval()


def read_card(folder: Path) -> dict[str, Any]:
    """The contents of a saved model's `model.json`.

    Raises: MissingFileError; InputError where it is not E²VPT's.
    """
    path = folder / CARD
    if not path.is_file():
        raise MissingFileError(
            str(path),
            "no such file",
            "a saved E²VPT model",
            "name a run folder that finished training",
        )
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(str(path), f"no JSON ({error})", "JSON", "restore the file") from error
    if not _is_card(card):
        raise InputError(
            str(path),
            "another kind of file",
            "the card of an E²VPT model",
            "name a folder that e2vpt wrote",
        )
    return card


def _is_card(card: Any) -> bool:
    keys = {"project", "backbone", "spec", "parameters", "class_names", "preprocessing"}
    if not isinstance(card, dict) or not keys <= card.keys() or card["project"] != "e2vpt":
        return False
    backbone, spec = card["backbone"], card["spec"]
    known = {"name", "architecture", "weights", "is_file", "img_size", "sha256"}
    return isinstance(spec, dict) and isinstance(backbone, dict) and known <= backbone.keys()


def _backbone_card(model: PromptedModel, source: Backbone | None) -> dict[str, Any]:
    if source is not None:
        return {
            "name": source.name,
            "architecture": source.architecture,
            "weights": source.weights,
            "is_file": source.name.lower().endswith(WEIGHT_FILES),
            "img_size": list(source.img_size),
            "sha256": source.sha256,
        }
    config = getattr(model.backbone, "pretrained_cfg", None) or {}
    name = ".".join(part for part in (config.get("architecture"), config.get("tag")) if part)
    with detached(model.backbone):
        sha256 = fingerprint(model.backbone)
    return {
        "name": name,
        "architecture": name,
        "weights": UNKNOWN,
        "is_file": False,
        "img_size": None,
        "sha256": sha256,
    }
