"""Write a saved model as ONNX and check it against the model it came from."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from e2vpt import model_io
from e2vpt.fold import fold as fold_prompts
from e2vpt.model import PromptedModel
from shared_utils.errors import InputError

TOLERANCE = 1e-3  # largest difference of a logit, relative to the largest logit
CHECKED_BATCHES = (1, 3)  # sizes other than the one traced


Fold = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        difference: the largest difference of a logit from the saved model's in PyTorch, relative
            to the largest logit, over random images.
        is_folded: visual prompts are key and value rows in the file.
        form: which form was written, and why not the folded one, in one line.
    """

    difference: float
    is_folded: bool
    form: str


def export_onnx(folder: Path, output: Path, *, fold: Fold = "auto") -> Exported:
    """Export `images` (B, 3, H, W) float32, normalised, to `logits` (B, C); B is free.

    Class names and preprocessing go into the file's metadata as JSON.

    Args:
        folder: what `e2vpt.save` or `e2vpt train` wrote.
        output: the file; its folder is made where it is missing.
        fold: `yes` writes the folded model (see `e2vpt.fold`), `no` the model as it is, `auto` the
            folded one wherever folding is exact.

    Raises: InputError where the model cannot be folded though it is to be, or where onnxruntime
        and the saved model, unfolded, differ by more than the tolerance; no file is left then.
    """
    import onnx
    import onnxruntime

    card = model_io.read_card(folder)
    model = model_io.load(folder)
    written, form = _written(model, fold)
    height, width = (
        card["preprocessing"]["img_size"]
        if card["preprocessing"]
        else model.backbone.patch_embed.img_size
    )
    example = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what counts is checked below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            written,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    proto = program.model_proto
    facts = {key: json.dumps(card[key]) for key in ("class_names", "preprocessing")}
    onnx.helper.set_model_props(proto, facts)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        onnx.save(proto, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        worst = 0.0
        for batch in CHECKED_BATCHES:
            images = torch.randn(
                batch, 3, height, width, generator=torch.Generator().manual_seed(batch)
            )
            with torch.no_grad():
                expected = model(images).numpy()
            got = session.run(["logits"], {"images": images.numpy()})[0]
            worst = max(
                worst, float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6))
            )
        if not worst <= TOLERANCE:
            raise InputError(
                "export",
                f"logits that differ by {worst:.2g} of the largest",
                f"at most {TOLERANCE}",
                "report this model",
            )
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(worst, written is not model, form)


def _written(model: PromptedModel, how: Fold) -> tuple[PromptedModel, str]:
    """The form to write, and what to say of it."""
    if how == "no":
        return model, "not folded, as asked"
    try:
        folded = fold_prompts(model)
    except InputError as refusal:
        if how == "yes":
            raise
        return model, f"not folded: {refusal}"
    rows = [] if folded.kv is None else [key.shape[1] for key in folded.kv.key]
    if not rows:
        return folded, "folded: the plain backbone and a head, no prompts"
    rows += [0] * (folded.geometry.num_layers - len(rows))
    least, most = min(rows), max(rows)
    count = f"{most}" if least == most else f"{least} to {most}"
    return folded, f"folded: the plain backbone's sequence, {count} key and value rows in a layer"
