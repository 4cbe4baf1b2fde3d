"""Where images come from: scikit-learn's digits, torchvision's CIFAR files, folders, packed files.

A pool is a list of images with labels; `load_pools` gives those that a source has, by split.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import datasets

from shared_utils.checkpoint import reading
from shared_utils.errors import InputError, MissingFileError

DIGITS = (800, 200, 797)  # training, validation, test
PACKED = ("jpeg", "offsets", "label", "classes")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Pool:
    """Images with labels.

    Attributes:
        labels: (N,) int64 in [0, C).
        class_names: C of them.
        read: place -> the image as it is stored.
        name: place -> how a user finds it: a path, or the file and the number in it.
    """

    labels: np.ndarray
    class_names: list[str]
    read: Callable[[int], Image.Image]
    name: Callable[[int], str]

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def image(self, place: int) -> Image.Image:
        """In RGB, upright, over white.  Raises: InputError naming an image that cannot be read."""
        try:
            return to_rgb(self.read(place))
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError) as error:
            got = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                self.name(place), got, "an image", "remove it or give --data.skip-bad"
            ) from error

    def some(self, places: np.ndarray) -> "Pool":
        """These images alone, in this order."""
        own = np.asarray(places, dtype=np.int64)
        return replace(
            self,
            labels=self.labels[own],
            read=lambda i: self.read(int(own[i])),
            name=lambda i: self.name(int(own[i])),
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """First frame, upright by its EXIF note, 16 bits scaled to 8, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_pools(source: str, root: Path) -> dict[str, Pool]:
    """The splits that a source has: `train`, and `val` and `test` where they are told apart.

    Args:
        source: `digits`, `cifar10`, `cifar100`, a folder with a folder of images per class or with
            `train`, `val` and `test` of that form, or a packed `.npz`.
        root: folder of torchvision's CIFAR files.

    Raises: MissingFileError, or InputError for what is there and cannot be used.
    """
    if source == "digits":
        return _digits()
    if source in ("cifar10", "cifar100"):
        return _cifar(source, root)
    path = Path(source)
    if path.is_dir():
        parts = [name for name in SPLITS if (path / name).is_dir()]
        if "train" in parts:
            pools = {name: _folder(path / name) for name in parts}
        else:
            pools = {"train": _folder(path)}
    elif path.suffix == ".npz":
        pools = {"train": _packed(path)}
    else:
        raise MissingFileError(
            "data.source",
            source,
            "digits, cifar10, cifar100, a folder of images or an .npz file",
            "check the path",
        )
    for name, pool in pools.items():
        if pool.class_names != pools["train"].class_names:
            odd = sorted(set(pool.class_names) ^ set(pools["train"].class_names))
            raise InputError(
                f"data.source {name}",
                f"other classes than train ({', '.join(odd[:3])})",
                "the same folders in each",
                "rename or add them",
            )
    return pools


def _digits() -> dict[str, Pool]:
    from sklearn.datasets import load_digits  # slow to import

    bunch: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    pool = Pool(
        bunch.target.astype(np.int64),
        [str(name) for name in bunch.target_names],
        lambda i: Image.fromarray(pixels[i]),
        lambda i: f"digits[{i}]",
    )
    ends = np.cumsum(DIGITS)
    parts = np.split(order, ends[:-1])
    return {name: pool.some(part) for name, part in zip(SPLITS, parts, strict=True)}


def _cifar(name: str, root: Path) -> dict[str, Pool]:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    pools = {}
    for split in ("train", "test"):
        try:
            data = kind(str(root), train=split == "train", download=False)
        except RuntimeError as error:
            file = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
            raise MissingFileError(
                "data.root",
                f"{root}, without an intact {kind.base_folder}",
                f"what {file[name]} unpacks to",
                f"fetch it from cs.toronto.edu/~kriz and unpack it in {root}",
            ) from error
        pools[split] = _of_arrays(data.data, data.targets, data.classes, f"{name}/{split}")
    return pools


def _of_arrays(pixels: np.ndarray, labels: list[int], names: list[str], where: str) -> Pool:
    return Pool(
        np.array(labels, dtype=np.int64),
        list(names),
        lambda i: Image.fromarray(pixels[i]),
        lambda i: f"{where}[{i}]",
    )


def _folder(path: Path) -> Pool:
    try:
        data = datasets.ImageFolder(str(path))
    except FileNotFoundError as error:
        raise MissingFileError(
            "data.source",
            f"{path} ({str(error).splitlines()[0]})",
            "a folder of images for each class",
            "check the path",
        ) from error
    paths = [file for file, _ in data.samples]
    return Pool(
        np.array(data.targets, dtype=np.int64),
        list(data.classes),
        lambda i: Image.open(paths[i]),
        lambda i: paths[i],
    )


def _packed(path: Path) -> Pool:
    with reading(path, f"an .npz with {', '.join(PACKED)}"), np.load(path) as file:
        jpeg, offsets, label, classes = (file[key] for key in PACKED)
    if len(offsets) != len(label) + 1 or offsets[-1] != len(jpeg):
        raise InputError(
            str(path),
            f"{len(label)} labels, {len(offsets)} offsets up to {offsets[-1]}",
            f"one offset more than labels, up to {len(jpeg)}",
            "pack it again",
        )
    if len(label) and not 0 <= label.min() <= label.max() < len(classes):
        raise InputError(
            str(path),
            f"labels {label.min()} to {label.max()}",
            f"0 to {len(classes) - 1}",
            "pack it again",
        )
    return Pool(
        label.astype(np.int64),
        [str(name) for name in classes],
        lambda i: Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())),
        lambda i: f"{path}[{i}]",
    )
