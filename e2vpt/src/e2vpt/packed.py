"""Packed image sets: one `.npz` with the encoded bytes of all images one after another.

Keys: `jpeg` (bytes, any format Pillow reads), `offsets` (N + 1, int64), `label` (N,), `classes`
(names of the classes) and optionally `names`, `words`. Image i is
`jpeg[offsets[i]:offsets[i + 1]]`.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from e2vpt.images import decode_image
from shared_utils.errors import InputError, MissingFileError


class PackedImages:
    """Lazily decoded images of a packed file; the encoded bytes stay in memory."""

    def __init__(self, path: Path) -> None:
        """Read and check the file. Raises: MissingFileError, InputError naming the file."""
        if not path.is_file():
            raise MissingFileError(
                "data", f"'{path}', which is not there", "a packed .npz file", "check the path"
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in getattr(archive, "files", ())}
        except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                str(path), f"no readable .npz ({error})", "a packed image set", "pack it again"
            ) from error
        for key in ("jpeg", "offsets", "label", "classes"):
            if key not in arrays:
                raise InputError(
                    str(path), f"no array '{key}'", "jpeg, offsets, label, classes", "pack it again"
                )
        if arrays["label"].dtype.kind not in "iu" or arrays["offsets"].dtype.kind not in "iu":
            types = f"label {arrays['label'].dtype}, offsets {arrays['offsets'].dtype}"
            raise InputError(str(path), types, "whole numbers", "pack it again")
        self.path = path
        self.labels: list[int] = arrays["label"].astype(np.int64).tolist()
        self.classes: list[str] = [str(name) for name in arrays["classes"]]
        self._bytes, self._offsets = arrays["jpeg"], arrays["offsets"]
        if len(self._offsets) != len(self.labels) + 1:
            raise InputError(
                str(path),
                f"{len(self._offsets)} offsets for {len(self.labels)} labels",
                "one offset more than labels",
                "pack it again",
            )
        for i, label in enumerate(self.labels):
            if not 0 <= label < len(self.classes):
                raise InputError(
                    str(path),
                    f"label {label} of image {i}",
                    f"0 to {len(self.classes) - 1}, as there are {len(self.classes)} classes",
                    "correct the labels and pack it again",
                )
        ends = self._offsets.astype(np.int64)
        if (np.diff(ends) < 0).any() or not 0 <= ends[0] <= ends[-1] <= len(self._bytes):
            raise InputError(
                str(path),
                "offsets that leave its bytes or go back",
                "growing positions inside them",
                "pack it again",
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """The file bytes of one image."""
        start, end = self._offsets[index], self._offsets[index + 1]
        data: bytes = self._bytes[start:end].tobytes()
        return data

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Some images, at least one, as one uint8 tensor (N, 3, H, W); they must have one size.

        Raises: UnreadableImage; InputError naming an image of another size.
        """
        first = decode_image(self.encoded(indices[0]), f"{self.path} image {indices[0]}")
        out = torch.empty(len(indices), 3, first.height, first.width, dtype=torch.uint8)
        for row, i in enumerate(indices):
            image = decode_image(self.encoded(i), f"{self.path} image {i}")
            if image.size != first.size:
                raise InputError(
                    f"{self.path} image {i}",
                    f"size {image.size}",
                    f"{first.size}",
                    "pack images of one size",
                )
            out[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return out
