"""Images by number, wherever they lie: files, packed files, arrays in memory.

The forms of data (sources.py, vtab.py, fgvc.py) list what there is as pools of these readers.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from e2vpt.images import decode_image, probe_image
from e2vpt.packed import PackedImages

SHOWN = 5  # names in an error; the rest is counted


class Reader(Protocol):
    """Images by number, decoded on demand."""

    def name(self, index: int) -> str:
        """How the user finds the image: its path, or its file and number."""

    def num_bytes(self, index: int) -> int:
        """Encoded size; 0 where the file is missing."""

    def image(self, index: int) -> Image.Image:
        """Decode to RGB. Raises UnreadableImage."""

    def probe(self, index: int) -> None:
        """Read the header only. Raises UnreadableImage."""


class FileReader:
    """Images in files of their own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]

    def name(self, index: int) -> str:
        """The path."""
        return self._paths[index]

    def num_bytes(self, index: int) -> int:
        """Size of the file, 0 where it is missing."""
        try:
            return os.stat(self._paths[index]).st_size
        except OSError:  # reading it later says why
            return 0

    def image(self, index: int) -> Image.Image:
        """Decode to RGB."""
        return decode_image(self._paths[index])

    def probe(self, index: int) -> None:
        """Read the header only."""
        probe_image(self._paths[index])


class PackedReader:
    """Images of a packed file."""

    def __init__(self, packed: PackedImages) -> None:
        self._packed = packed

    def name(self, index: int) -> str:
        """The packed file and the image's number in it."""
        return f"{self._packed.path} image {index}"

    def num_bytes(self, index: int) -> int:
        """Encoded size."""
        return len(self._packed.encoded(index))

    def image(self, index: int) -> Image.Image:
        """Decode to RGB."""
        return decode_image(self._packed.encoded(index), self.name(index))

    def probe(self, index: int) -> None:
        """Read the header only."""
        probe_image(self._packed.encoded(index), self.name(index))


class ArrayReader:
    """Grey images in memory, uint8 (N, H, W)."""

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        self._name, self._pixels = name, pixels

    def name(self, index: int) -> str:
        """The set's name and the image's number."""
        return f"{self._name} image {index}"

    def num_bytes(self, index: int) -> int:
        """Size of the pixels."""
        return int(self._pixels[index].nbytes)

    def image(self, index: int) -> Image.Image:
        """The image in RGB."""
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def probe(self, index: int) -> None:
        """Pixels in memory cannot be unreadable."""


class JoinedReader:
    """The images of one reader, `num_first` numbers, and then those of another."""

    def __init__(self, first: Reader, num_first: int, second: Reader) -> None:
        self._first, self._num_first, self._second = first, num_first, second

    def _at(self, index: int) -> tuple[Reader, int]:
        if index < self._num_first:
            return self._first, index
        return self._second, index - self._num_first

    def name(self, index: int) -> str:
        """As the reader of that image calls it."""
        reader, own = self._at(index)
        return reader.name(own)

    def num_bytes(self, index: int) -> int:
        """Encoded size."""
        reader, own = self._at(index)
        return reader.num_bytes(own)

    def image(self, index: int) -> Image.Image:
        """Decode to RGB."""
        reader, own = self._at(index)
        return reader.image(own)

    def probe(self, index: int) -> None:
        """Read the header only."""
        reader, own = self._at(index)
        reader.probe(own)


@dataclass(frozen=True)
class Pool:
    """Some images of a reader: `indices` into it and a label for each."""

    reader: Reader
    indices: list[int]
    labels: list[int]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def take(self, positions: Sequence[int]) -> "Pool":
        """The images at these positions, in this order."""
        return Pool(
            self.reader, [self.indices[p] for p in positions], [self.labels[p] for p in positions]
        )

    def joined(self, other: "Pool") -> "Pool":
        """These images and then the other pool's."""
        start = max(self.indices, default=-1) + 1
        reader = JoinedReader(self.reader, start, other.reader)
        indices = [*self.indices, *(start + index for index in other.indices)]
        return Pool(reader, indices, [*self.labels, *other.labels])

    def name(self, position: int) -> str:
        """How the user finds the image."""
        return self.reader.name(self.indices[position])

    def image(self, position: int) -> Image.Image:
        """Decode to RGB. Raises UnreadableImage."""
        return self.reader.image(self.indices[position])


@dataclass(frozen=True)
class Source:
    """A listed source; one that is not split has everything in `train` and `is_split` False."""

    name: str
    class_names: list[str]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    is_split: bool = True
    train_val: Pool | None = None
    """training and validation images together, where the source lists them so itself"""


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
