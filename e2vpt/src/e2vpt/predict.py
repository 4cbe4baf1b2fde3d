"""Classify image files with a saved model: a CSV and a picture sheet."""

import csv
import glob
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from e2vpt import model_io, pictures
from e2vpt.images import IMAGE_SUFFIXES, Preprocessing, UnreadableImage, decode_image
from e2vpt.model import PromptedModel
from e2vpt.readers import some_of
from shared_utils import checkpoint
from shared_utils.errors import InputError, MissingFileError


class Predictor:
    """A saved model with its preprocessing and class names."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Load a folder that `e2vpt train` or `e2vpt.save` wrote.

        Raises: InputError where it holds no preprocessing or class names, or where the device is
            not there.
        """
        card = model_io.read_card(folder)
        if card["preprocessing"] is None or card["class_names"] is None:
            raise InputError(
                str(folder / model_io.CARD),
                "no preprocessing or class names",
                "both",
                "pass them to e2vpt.save",
            )
        self.preprocessing = Preprocessing.from_dict(card["preprocessing"])
        self.class_names: list[str] = card["class_names"]
        model = model_io.load(folder)
        try:
            self.device = torch.device(device)
            self.model: PromptedModel = model.to(self.device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            got = f"'{device}' ({str(error).splitlines()[0].rstrip('.')})"
            raise InputError("device", got, "one that this machine has", "use cpu") from error

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Probabilities (N, C) float32 on the CPU of RGB images of any size."""
        batch = torch.stack([self.preprocessing(image) for image in images])
        logits: Tensor = self.model(batch.to(self.device))
        return logits.float().softmax(1).cpu()


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files, folders (searched below) and glob patterns -> image files, sorted within each.

    In a folder, files that start with a dot or do not end like an image are passed over.

    Raises: MissingFileError naming an input that matches nothing.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if _is_image(p)]
        elif path.is_file():
            matches = [path]
        else:
            matches = [
                p for p in map(Path, sorted(glob.glob(given, recursive=True))) if p.is_file()
            ]
        if not matches:
            raise MissingFileError(
                "images",
                f"'{given}', which matches no image",
                "files, folders or globs",
                "check the path",
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _is_image(path: Path) -> bool:
    is_named_so = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    return is_named_so and path.is_file()


def predict(
    folder: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    batch_size: int = 64,
    skip_bad: bool = False,
    device: str = "cpu",
) -> tuple[int, list[str]]:
    """Write `predictions.csv` and `predictions.png` into `output`.

    The CSV has a row per image: path, class, probability, and the second and third choice.

    Returns: the number of images and the unreadable ones left out (`skip_bad`).
    Raises: InputError where an image cannot be read and `skip_bad` is off; nothing is written then.
    """
    if output.exists() and not output.is_dir():
        raise InputError("output", f"the file '{output}'", "a folder", "choose another")
    predictor = Predictor(folder, device)
    names = predictor.class_names
    top = min(3, len(names))
    rows: list[list[str]] = []
    shown: list[tuple[Image.Image, str]] = []
    bad: list[UnreadableImage] = []
    for paths, images in _read(find_images(inputs), batch_size, bad):
        values, classes = predictor(images).topk(top, dim=1)
        for path, image, probability, choice in zip(
            paths, images, values.tolist(), classes.tolist(), strict=True
        ):
            row = [str(path)]
            for p, c in zip(probability, choice, strict=True):
                row += [names[c], f"{p:.6f}"]
            rows.append(row)
            if len(shown) < pictures.SHEET_IMAGES:
                shown.append((image, f"{names[choice[0]]} {probability[0]:.2f}"))
    if bad and not skip_bad:
        raise InputError(
            "images",
            f"{len(bad)} unreadable: {some_of([f'{e.name} ({e.reason})' for e in bad])}",
            "readable images",
            "remove them or give --skip-bad",
        )
    if not rows:
        raise InputError("images", "no readable image", "at least one", "check the paths")
    output.mkdir(parents=True, exist_ok=True)
    ranks = [f"{what}{i}" for i in range(1, top + 1) for what in ("class", "probability")]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["path", *ranks], *rows])
    checkpoint.write_text(table.getvalue(), output / "predictions.csv")
    pictures.sheet(
        [image for image, _ in shown],
        [caption for _, caption in shown],
        output / "predictions.png",
        f"{len(shown)} of {len(rows)} images",
    )
    return len(rows), [str(error.name) for error in bad]


def _read(
    paths: Sequence[Path], batch_size: int, bad: list[UnreadableImage]
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    for start in range(0, len(paths), batch_size):
        kept, images = [], []
        for path in paths[start : start + batch_size]:
            try:
                images.append(decode_image(path))
            except UnreadableImage as error:
                bad.append(error)
            else:
                kept.append(path)
        if images:
            yield kept, images
