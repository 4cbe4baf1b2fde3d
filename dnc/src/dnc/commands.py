"""What `dnc evaluate` and `dnc explain` do with a run folder."""

import glob
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dnc import model_io
from dnc.anchors import NONE, Anchors, content_hash
from dnc.classifier import NearestCentroidHead
from dnc.config import RunConfig, TrainConfig
from dnc.data import DataSplits, ImageSet, load_data, load_other
from dnc.devices import launch_fabric
from dnc.evaluate import embed_set, evaluate, unknown_auroc
from dnc.explain import explain_features, explainable, num_comparisons
from dnc.fit_config import FitConfig
from dnc.model import NearestCentroidClassifier
from dnc.page import LARGE, Anchor, Explanation, explanation_dict, pictured, render_explanations
from dnc.sources import to_rgb
from shared_utils.checkpoint import reading, write_text
from shared_utils.config import load_json
from shared_utils.errors import InputError, MissingFileError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


def evaluate_run(
    run: Path, split: str, *, source: str = "", unknown: str = "", accelerator: Any = "auto"
) -> dict[str, float]:
    """Metrics of a run's deployed classifier on a split, by name with the split as prefix.

    Args:
        run: its folder.
        split: train, val or test.
        source: other data than its own: that split of it where it has any, otherwise all of it.
        unknown: images of none of its classes, likewise the test split or all. Adds
            `auroc_cosine`, of the cosine to the nearest sub-centroid (with a head that has any),
            and `auroc_softmax`, of the largest probability, as scores that known images exceed
            unknown ones in.
        accelerator: what to run on.

    Raises: InputError for a split or classes that are not there.
    """
    cfg = _config(run)
    classifier = model_io.load(run)
    fabric = launch_fabric(RunConfig(accelerator=accelerator, precision=cfg.run.precision))
    classifier.to(fabric.device)
    if source:
        images = load_other(cfg.data, source, split)
    else:
        images = _part(load_data(cfg.data, seed=cfg.run.seed), split)
    names = images.pool.class_names
    if names != classifier.class_names:
        raise InputError(
            "source",
            f"classes {', '.join(names[:5])}...",
            "those of the run",
            "evaluate on data with the same class names",
        )
    parts = (fabric, classifier.encoder, classifier.head)
    found = evaluate(*parts, images, cfg.data, len(names))
    scores = {f"{split}_{name}": value for name, value in found.items()}
    if unknown:
        others = load_other(replace(cfg.data, groups=None), unknown, "test")
        known, _ = embed_set(*parts, images, cfg.data)
        strange, _ = embed_set(*parts, others, cfg.data)
        scores |= _aurocs(classifier.head, known.to(fabric.device), strange.to(fabric.device))
    return scores


def explain_run(
    run: Path, images: Sequence[str], output: Path, *, from_test: int = 0, top: int = 5
) -> int:
    """Write the page and the JSON file that explain decisions of a run.

    Args:
        run: its folder.
        images: files, folders and patterns.
        output: the page; the JSON file has its name.
        from_test: explain images of the run's test split instead, wrong decisions first.
        top: classes to name.

    Returns: how many images are explained.
    Raises: InputError where the run cannot be explained, its training images have changed, or an
        image cannot be read; nothing is written then.
    """
    cfg = _config(run)
    classifier = model_io.load(run)
    anchors = explainable(classifier)
    splits = load_data(cfg.data, seed=cfg.run.seed)
    train = splits.train.plain()
    _require_unchanged(anchors, train)
    pictures: dict[int, bytes] = {}

    def picture(index: int) -> bytes:
        if index not in pictures:
            pictures[index] = _png(train.image(index))
        return pictures[index]

    found: list[Explanation] = []
    if from_test:
        own = _part(splits, "test").plain()
        for index in _wrong_first(classifier, own, from_test):
            found.append(
                explain_features(
                    classifier,
                    classifier.embed(own[index][0][None])[0],
                    image=_png(own.image(index)),
                    source=own.path(index),
                    picture=picture,
                    top=top,
                    true_class=classifier.class_names[int(own.labels[index])],
                )
            )
    for path in image_files(images):
        with reading(path, "an image"), Image.open(path) as opened:
            image = to_rgb(opened)
        found.append(
            explain_features(
                classifier,
                classifier.embed([image])[0],
                image=_png(image),
                source=str(path),
                picture=picture,
                top=top,
            )
        )
    counts = [sum(index != NONE for index in row) for row in anchors.indices]
    shown = pictured(found, counts)
    classes = [
        (name, _class_anchors(classifier, anchors, c, picture if c in shown else lambda index: b""))
        for c, name in enumerate(classifier.class_names)
    ]
    about = f"{cfg.model.encoder} with {classifier.head.num_centroids} sub-centroids per class"
    about += f", trained on {len(train):,} images of {splits.name}."
    page = render_explanations(found, classes, f"Why {run.name} decides as it does", about)
    data = [
        explanation_dict(e, num_comparisons(classifier, e.predicted.class_index)) for e in found
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(data, indent=1) + "\n", output.with_suffix(".json"))
    write_text(page, output)
    return len(found)


def _config(run: Path) -> TrainConfig:
    """Of `dnc train` or `dnc fit`."""
    path = run / "config.json"
    with reading(path, "a run folder's config.json"):
        is_fit = "fit" in json.loads(path.read_text())
    return load_json(FitConfig if is_fit else TrainConfig, path)


def _part(splits: DataSplits, name: str) -> ImageSet:
    images: ImageSet | None = getattr(splits, name)
    if images is None:
        raise InputError("split", f"'{name}', which {splits.name} has not", "another", "name it")
    return images


def _aurocs(head: Any, known: torch.Tensor, strange: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        softmax = [head(part).float().softmax(dim=1).amax(dim=1).cpu() for part in (known, strange)]
        found = {"auroc_softmax": unknown_auroc(*softmax)}
        if isinstance(head, NearestCentroidHead):
            cosines = [head.scores(part).cosines.amax(dim=1).cpu() for part in (known, strange)]
            found["auroc_cosine"] = unknown_auroc(*cosines)
    return found


def _require_unchanged(anchors: Anchors, train: ImageSet) -> None:
    for c, k, index in anchors.places():
        if index >= len(train) or content_hash(train[index][0]) != anchors.hashes[c][k]:
            raise InputError(
                "data.source",
                f"another training image {index} than the one the run was anchored to",
                "the images it was trained on",
                "restore them, or anchor the classifier anew",
            )


def _wrong_first(classifier: NearestCentroidClassifier, images: ImageSet, count: int) -> list[int]:
    """Places of images, those decided wrongly first, otherwise in order."""
    wrong: list[int] = []
    right: list[int] = []
    for start in range(0, len(images), 64):
        places = range(start, min(start + 64, len(images)))
        z = classifier.embed(torch.stack([images[i][0] for i in places]))
        answers = classifier.head.scores(z).cosines.argmax(dim=1).tolist()
        for place, answer in zip(places, answers, strict=True):
            (right if answer == int(images.labels[place]) else wrong).append(place)
    half = count // 2
    return (wrong[: max(half, count - len(right))] + right)[:count]


def _class_anchors(
    classifier: NearestCentroidClassifier, anchors: Anchors, c: int, picture: Any
) -> list[Anchor]:
    return [
        Anchor(c, classifier.class_names[c], k, index, anchors.paths[c][k], 1.0, picture(index))
        for k, index in enumerate(anchors.indices[c])
        if index != NONE
    ]


def image_files(words: Sequence[str]) -> list[Path]:
    """Files, what lies below folders, and what patterns match.  Raises: MissingFileError."""
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(word, recursive=True))]
        if not matches:
            raise MissingFileError(word, "no image", "a file, folder or pattern", "check the path")
        found += matches
    return found


def _png(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((LARGE, LARGE))  # the page draws none larger
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
