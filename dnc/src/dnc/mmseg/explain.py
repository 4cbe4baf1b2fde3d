"""`dnc seg explain`: the training pixels behind a segmentation, on one page.

A pixel or, of each predicted region, the pixel most similar to an anchor is explained by the
training pixel that it is nearest to, the rivals of other classes, and a map of how similar each
place of the image is to that training pixel. What is explained is the decision at the resolution of
the features, before it is enlarged to the image.

Shapes: C classes, K sub-centroids of a class, D width, h w the grid of features, H W the image.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from dnc.commands import image_files
from dnc.explain import decision
from dnc.mmseg import checkpoints, drawing
from dnc.mmseg.config_files import image_pipeline, training_images_to_look_at
from dnc.mmseg.folders import check_data
from dnc.mmseg.heads import NearestCentroidMixin
from dnc.mmseg.pixel_anchors import PixelAnchors, cell_of, centre_of, find_anchors
from dnc.mmseg.predict import class_names, open_model
from dnc.page import Anchor, Explanation, explanation_dict, render_explanations
from shared_utils import checkpoint
from shared_utils.checkpoint import reading, write_text
from shared_utils.errors import InputError

CACHE = "anchors.pth"
SHOWN = 128  # pixels of a crop's side on the page
REACH = 4  # a crop reaches so many cells of the grid to each side


@dataclass(frozen=True)
class _Seen:
    """An image as the network sees it: cosines (h, w, C, K) and the picture (H, W, 3)."""

    path: Path
    cosines: Tensor
    picture: Any

    @property
    def grid(self) -> tuple[int, int]:
        return self.cosines.shape[0], self.cosines.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.shape[0], self.picture.shape[1]


def explain(
    words: Sequence[str],
    output: Path,
    *,
    pixel: tuple[int, int] | None = None,
    regions: int = 6,
    top: int = 5,
    overrides: Sequence[str] = (),
    data_root: str = "",
    trusted: bool = False,
) -> int:
    """Write the page and the JSON file that explain a segmentation.

    Args:
        words: a run folder, or a config and a checkpoint; then image files, folders, patterns.
        output: the page; the JSON file has its name.
        pixel: row and column of the pixel to explain; None: the largest regions.
        regions: how many of each image.
        top: classes to name, the predicted one included.
        overrides: settings of the config to change.
        data_root: of all data sets.
        trusted: open a checkpoint that is more than tensors and plain data.

    Returns: how many decisions are explained.
    Raises: MissingFileError; InputError where the model has no sub-centroids, or an image or the
        training set cannot be read; nothing is written then.
    """
    cfg, model, rest = open_model(words, overrides, data_root, trusted=trusted)
    if not isinstance(model.decode_head, NearestCentroidMixin):
        raise InputError(
            "model.decode_head",
            f"a learned classifier ({type(model.decode_head).__name__})",
            "sub-centroids, whose cosines decide",
            "turn it into them with dnc seg fit",
        )
    head = model.decode_head.classifier
    if not head.is_faithful:
        raise InputError(
            "logit_norm", "affine, under which the nearest need not win", "none", "train without it"
        )
    if not rest:
        raise InputError("images", "nothing", "files, folders or patterns", "name some")
    files = image_files(rest)
    check_data(cfg, ("train_dataloader",))
    names, _ = class_names(cfg)
    dataset = DATASETS.build(training_images_to_look_at(cfg))
    run = Path(words[0])
    anchors = _anchors(model, dataset, names, run if run.is_dir() else None)
    anchors.apply(head)
    crops = _Crops(anchors)
    found: list[Explanation] = []
    for path in files:
        seen = look_at(cfg, model, path)
        if pixel is None:
            cells = [(cell, "region") for cell in region_cells(seen.cosines, regions)]
        else:
            _require_inside(pixel, seen)
            cells = [(cell_of(*pixel, seen.size, seen.grid), "pixel")]
        found += [_explained(head, anchors, crops, names, seen, c, k, top) for c, k in cells]
    classes = [
        (name, [crops.anchor(names, c, k, 1.0) for k in range(head.num_centroids)
                if (c, k) in anchors.anchors])
        for c, name in enumerate(names)
    ]  # fmt: skip
    about = (
        f"{type(model.decode_head).__name__} with {head.num_centroids} sub-centroids per class, "
    )
    about += f"each of them a pixel of one of {len(dataset):,} training images."
    title = f"Why {run.name if run.is_dir() else run.stem} segments as it does"
    page = render_explanations(found, classes, title, about)
    active = head.active.sum(dim=1)
    data = [
        explanation_dict(
            e,
            int(active[e.predicted.class_index] * (active.sum() - active[e.predicted.class_index])),
        )
        for e in found
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(data, indent=1) + "\n", output.with_suffix(".json"))
    write_text(page, output)
    return len(found)


@torch.no_grad()
def look_at(cfg: Any, model: Any, path: Path) -> _Seen:
    """Cosines of each cell of an image.  Raises: InputError where the image cannot be read."""
    with reading(path, "an image"):
        picture = drawing.read_rgb(path)
    item = image_pipeline(cfg)({"img_path": str(path), "reduce_zero_label": False})
    inputs = model.data_preprocessor(pseudo_collate([item]), False)["inputs"]
    kept: list[Tensor] = []
    head = model.decode_head
    hook = head.classifier.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    try:
        head(model.extract_feat(inputs))
    finally:
        hook.remove()
    feature = kept[0][0]  # (D, h, w)
    cosines = head.classifier.cosines(feature.flatten(1).T)
    return _Seen(path, cosines.unflatten(0, feature.shape[1:]), picture)


def region_cells(cosines: Tensor, count: int) -> list[tuple[int, int]]:
    """The cell most similar to an anchor, of each of the largest regions of one class.

    Args:
        cosines: (h, w, C, K).
        count: regions.

    Returns: (row, column) of cells, that of the largest region first.
    """
    best = cosines.amax(dim=(2, 3)).cpu().numpy()
    classes = cosines.amax(dim=3).argmax(dim=2).cpu().numpy()
    regions: list[tuple[int, int, int]] = []
    for c in np.unique(classes):
        numbers, total = ndimage.label(classes == c)
        for number in range(1, total + 1):
            inside = numbers == number
            place = int(np.where(inside, best, -np.inf).argmax())
            y, x = divmod(place, classes.shape[1])
            regions.append((-int(inside.sum()), y, x))
    return [(y, x) for _, y, x in sorted(regions)[:count]]


class _Crops:
    """Pictures of the training pixels with what surrounds them, each read once."""

    def __init__(self, anchors: PixelAnchors) -> None:
        self.anchors = anchors
        self.made: dict[tuple[int, int], bytes] = {}
        self.cell = 0  # pixels of a grid's cell; known once an image was looked at

    def anchor(self, names: Sequence[str], c: int, k: int, cosine: float) -> Anchor:
        found = self.anchors.anchors[c, k]
        if (c, k) not in self.made:
            picture = drawing.read_rgb(found.path)
            self.made[c, k] = drawing.png(crop_around(picture, found.row, found.column, self.cell))
        return Anchor(
            class_index=c,
            class_name=names[c],
            centroid=k,
            index=found.index,
            path=found.path,
            cosine=cosine,
            image=self.made[c, k],
            pixel=(found.row, found.column),
        )


def crop_around(picture: NDArray[Any], row: int, column: int, cell: int) -> Any:
    """A square around a pixel, enlarged, with a frame around its cell; edges are repeated."""
    reach = max(12, REACH * cell)
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    part = Image.fromarray(padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1])
    scale = SHOWN / (2 * reach + 1)
    drawn = part.resize((SHOWN, SHOWN), Image.Resampling.BILINEAR)
    _frame(drawn, (reach + 0.5) * scale, (reach + 0.5) * scale, max(4, cell * scale / 2))
    return np.asarray(drawn)


def _explained(
    head: Any,
    anchors: PixelAnchors,
    crops: _Crops,
    names: Sequence[str],
    seen: _Seen,
    cell: tuple[int, int],
    kind: str,
    top: int,
) -> Explanation:
    """The explanation of one cell of an image."""
    row, column = centre_of(cell, seen.size, seen.grid)
    size = seen.size[0] // seen.grid[0]
    crops.cell = crops.cell or size
    marked = Image.fromarray(seen.picture)
    scale = max(1.0, 256 / max(marked.size))
    marked = marked.resize([round(side * scale) for side in marked.size])
    _frame(marked, (column + 0.5) * scale, (row + 0.5) * scale, max(6, size * scale / 2))
    cosines = seen.cosines[cell]

    def anchor(c: int, k: int, cosine: float) -> Anchor:
        return crops.anchor(names, c, k, cosine)

    winner = divmod(int(cosines.flatten().argmax()), cosines.shape[1])
    similar = seen.cosines[:, :, winner[0], winner[1]].clamp(0, 1).cpu().numpy()
    heat = Image.fromarray((similar * 255).round().astype(np.uint8)).resize(
        marked.size, Image.Resampling.BILINEAR
    )
    return decision(
        head,
        cosines,
        anchor,
        top=min(top, len(names)),
        image=drawing.png(np.asarray(marked)),
        source=f"{seen.path} at row {row}, column {column}",
        kind=kind,
        similarity=drawing.png(np.asarray(heat.convert("RGB"))),
    )


def _frame(drawn: Image.Image, x: float, y: float, half: float) -> None:
    pen = ImageDraw.Draw(drawn)
    for grow, colour in ((1, "black"), (0, "white")):
        reach = half + grow
        pen.rectangle((x - reach, y - reach, x + reach, y + reach), outline=colour)


def _require_inside(pixel: tuple[int, int], seen: _Seen) -> None:
    if not all(0 <= place < side for place, side in zip(pixel, seen.size, strict=True)):
        raise InputError(
            "--pixel",
            f"row {pixel[0]}, column {pixel[1]}",
            f"a row below {seen.size[0]} and a column below {seen.size[1]} in {seen.path}",
            "correct it",
        )


def _anchors(model: Any, dataset: Any, names: Sequence[str], run: Path | None) -> PixelAnchors:
    """Those of the model, found once and kept in its run folder."""
    own = model.decode_head.classifier.centroids.cpu()
    path = None if run is None else run / CACHE
    if path is not None and path.is_file():
        state = checkpoints.load(path)
        if torch.equal(state["of"], own):
            kept = PixelAnchors.from_plain(state)
            device = model.decode_head.classifier.centroids.device
            return PixelAnchors(kept.anchors, kept.centroids.to(device), kept.active.to(device))
    found = find_anchors(model, dataset, names)
    if path is not None:
        checkpoint.save({**found.to_plain(), "of": own}, path)
    return found
