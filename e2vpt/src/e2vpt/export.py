"""Write a saved model as ONNX and check it against the model it came from."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch

from e2vpt import model_io
from shared_utils.errors import InputError

TOLERANCE = 1e-3  # largest difference of a logit, relative to the largest logit
CHECKED_BATCHES = (1, 3)  # sizes other than the one traced


def export_onnx(folder: Path, output: Path) -> float:
    """Export `images` (B, 3, H, W) float32, normalised, to `logits` (B, C); B is free.

    Class names and preprocessing go into the file's metadata as JSON.

    Returns: the largest difference from the PyTorch model over random images, run by onnxruntime.
    Raises: InputError where the two differ by more than the tolerance; no file is left then.
    """
    import onnx
    import onnxruntime

    card = model_io.read_card(folder)
    model = model_io.load(folder)
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
            model,
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
    return worst
