"""A classifier on disk: `model.safetensors` (weights and sub-centroids) and `model.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dnc.anchors import Anchors
from dnc.config import DataConfig, ModelConfig
from dnc.data import eval_transform
from dnc.encoders import build_encoder
from dnc.heads import build_head
from dnc.model import NearestCentroidClassifier
from shared_utils import checkpoint
from shared_utils.config import from_dict, to_dict
from shared_utils.errors import InputError

WEIGHTS, CARD = "model.safetensors", "model.json"
PIXELS = ("img_size", "resize", "mean", "std")
TRAINING_ONLY = ("head.memory.", "head.idle", "head.usage", "head.updates")


def save(
    classifier: NearestCentroidClassifier, folder: Path, model: ModelConfig, data: DataConfig
) -> None:
    """Write what is deployed; the memory of training is left out."""
    tensors = {
        name: tensor
        for name, tensor in classifier.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    card = {
        "format": 1,
        "model": to_dict(model),
        "embed_dim": classifier.head.embed_dim,
        "class_names": classifier.class_names,
        "preprocessing": {name: getattr(data, name) for name in PIXELS},
        "anchors": None if classifier.anchors is None else asdict(classifier.anchors),
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_weights(tensors, folder / WEIGHTS, {"format": "pt"})
    checkpoint.write_text(json.dumps(card, indent=1) + "\n", folder / CARD)


def read_card(folder: Path) -> dict[str, Any]:
    """`model.json`.  Raises: MissingFileError; InputError where it is damaged."""
    with checkpoint.reading(folder / CARD, "a model.json of dnc"):
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
    return card


def load(folder: Path) -> NearestCentroidClassifier:
    """A classifier in eval mode, on the CPU.

    Raises: MissingFileError; InputError where the files do not belong together.
    """
    card = read_card(folder)
    model = from_dict(ModelConfig, {**card["model"], "pretrained": False}, "model")
    data = DataConfig(**_pixels(card["preprocessing"]))
    encoder = build_encoder(
        model.encoder, img_size=data.img_size, stem=model.stem, embed_norm=model.embed_norm
    )
    head = build_head(model, len(card["class_names"]), card["embed_dim"])
    classifier = NearestCentroidClassifier(encoder, head, card["class_names"], eval_transform(data))
    tensors, _ = checkpoint.load_weights(folder / WEIGHTS)
    own = classifier.state_dict()
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            raise InputError(
                f"{folder / WEIGHTS} {name}",
                f"shape {tuple(tensor.shape)}",
                f"{tuple(own[name].shape)}, by {CARD}",
                "restore the two files of one run",
            )
    found = classifier.load_state_dict(tensors, strict=False)
    missing = [name for name in found.missing_keys if not name.startswith(TRAINING_ONLY)]
    if missing or found.unexpected_keys:
        odd = (missing + found.unexpected_keys)[0]
        raise InputError(
            str(folder / WEIGHTS),
            f"{'no' if missing else 'an unknown'} {odd}",
            f"what {CARD} names",
            "restore the two files of one run",
        )
    if card["anchors"] is not None:
        classifier.anchors = Anchors.from_plain(card["anchors"])
    return classifier.eval()


def _pixels(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
