"""Pictures as a page holds them: within the file, and no larger than they are drawn."""

import base64
import io
import struct
from typing import NamedTuple

from PIL import Image

TINY = 64  # pixels; pictures up to this size are enlarged with their pixels kept sharp
PNG = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    """What an `img` needs: its data as a URI, and its size in pixels."""

    uri: str
    width: int
    height: int
    is_tiny: bool


def inline(png: bytes, side: int) -> Picture:
    """A PNG with its longer side reduced to at most `side` pixels.

    Raises: ValueError where it is no PNG.
    """
    if not png.startswith(PNG) or len(png) < 24:
        raise ValueError(f"image: got {len(png)} bytes that are no PNG, expected a PNG file's")
    width, height = struct.unpack(">II", png[16:24])
    if max(width, height) > side:
        with Image.open(io.BytesIO(png)) as image:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            png, (width, height) = buffer.getvalue(), image.size
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Picture(uri, width, height, max(width, height) <= TINY)
