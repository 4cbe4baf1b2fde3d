"""The examples run as a user runs them, and find what `yolop_mtl.load` finds."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import yolop_mtl

from .networks import blocks

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "onnx_numpy.py"


def test_the_example_is_short_and_needs_no_torch() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 40
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    found = {alias.name for node in nodes for alias in node.names}
    found |= {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert found == {"json", "sys", "numpy", "onnxruntime", "PIL"}


@pytest.mark.parametrize("size", [(48, 90), (200, 150)])
def test_the_example_on_an_image(
    with_nms: Path, lively: Path, size: tuple[int, int], tmp_path: Path
) -> None:
    pixels = (blocks(1, 208, 160)[0, :, : size[0], : size[1]] * 255).to(torch.uint8)
    image = pixels.permute(1, 2, 0).numpy()
    Image.fromarray(image).save(tmp_path / "street.png")
    done = subprocess.run(
        [sys.executable, EXAMPLE, with_nms, tmp_path / "street.png", tmp_path / "overlay.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = yolop_mtl.load(lively, conf=0.3, iou=0.45, device="cpu")(image)
    lines = [line.split() for line in done.stdout.splitlines()]
    # Boxes that lie in the padding alone are no boxes of the image; the example draws them outside.
    boxes = torch.tensor([[float(word) for word in line[2:]] for line in lines])
    boxes = boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
    is_inside = (boxes[:, :2] < boxes[:, 2:]).all(1)
    # Pillow and torch scale images alike up to one level, which moves a box near a threshold.
    assert abs(int(is_inside.sum()) - len(result.scores)) <= 0.05 * len(result.scores)
    apart = (torch.from_numpy(result.boxes_xyxy)[:, None] - boxes).abs().amax(2)
    same = apart < 0.5  # pixels
    labels = [result.class_names.index(line[0]) for line in lines]
    same &= torch.from_numpy(result.labels)[:, None] == torch.tensor(labels)
    scores = torch.tensor([float(line[1]) for line in lines])
    same &= (torch.from_numpy(result.scores)[:, None] - scores).abs() < 0.02
    assert len(same) > 20
    assert same.any(1).float().mean() > 0.95
    overlay = np.asarray(Image.open(tmp_path / "overlay.png"))
    assert overlay.shape == image.shape
    assert (overlay != image).any()
