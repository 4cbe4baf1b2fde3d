"""Decoding to exact pixels, and preprocessing against torchvision."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from e2vpt.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    UnreadableImage,
    decode_image,
    probe_image,
)
from shared_utils.errors import InputError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[list[int]]:
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_rgb_is_kept_from_path_text_and_bytes(tmp_path: Path) -> None:
    image = noise(3, 5)
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes()):
        decoded = decode_image(source)
        assert decoded.size == (5, 3)
        assert pixels(decoded) == pixels(image)


def test_grey_becomes_three_equal_channels() -> None:
    grey = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8))
    assert pixels(decode_image(encoded(grey))) == [[0] * 3, [7] * 3, [255] * 3]


def test_bilevel_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[False, True]]))
    assert image.mode == "1"
    assert pixels(decode_image(encoded(image))) == [[0] * 3, [255] * 3]


def test_transparency_is_laid_over_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (255, 0, 0, 128)]):
        rgba.putpixel((x, 0), value)
    got = pixels(decode_image(encoded(rgba)))
    assert got == [[10, 20, 30], [255, 255, 255], [255, 127, 127]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert pixels(decode_image(encoded(image))) == [[40] * 3, [255] * 3]


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(transparent: bool) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 10, 200])
    image.putpixel((1, 0), 1)
    options = {"transparency": 1} if transparent else {}
    second = [255, 255, 255] if transparent else [10, 10, 200]
    assert pixels(decode_image(encoded(image, **options))) == [[200, 10, 10], second]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_cut(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], dtype=np.uint16)
    got = pixels(decode_image(encoded(Image.fromarray(values), kind)))
    # v * 255 / 65535 = v / 257, rounded: 128 / 257 is below a half, 65407 / 257 = 254.5 above.
    assert got == [[v] * 3 for v in (0, 0, 1, 1, 128, 255, 255)]


def test_big_endian_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert pixels(decode_image(encoded(image, "TIFF"))) == [[0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "grey values outside 0 to 65535"),
        (np.array([[0.0, 1.0]], dtype=np.float32), "float grey values"),
    ],
)
def test_grey_of_unknown_range_is_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(encoded(Image.fromarray(values), "TIFF"), "a.tif")


def test_cmyk_without_ink_is_white() -> None:
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert pixels(decode_image(encoded(image, "JPEG", quality=100))) == [[255] * 3] * 64
    full = Image.new("CMYK", (1, 1), (255, 0, 0, 0))
    assert pixels(decode_image(encoded(full, "TIFF"))) == [[0, 255, 255]]


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_270),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_exif_orientation_is_applied(orientation: int, undo: Image.Transpose | None) -> None:
    stored = noise(2, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode_image(encoded(stored, exif=exif))
    expected = stored if undo is None else stored.transpose(undo)
    assert got.size == expected.size
    assert pixels(got) == pixels(expected)


def test_exif_rotated_jpeg_by_hand() -> None:
    # 6: the camera was turned; what is stored as the left column is the top row of the picture.
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode_image(encoded(stored, "JPEG", exif=exif, quality=100))
    assert got.size == (16, 32)
    values = np.asarray(got)
    assert (values[:16] == 255).all()
    assert (values[16:] == 0).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_gives_its_first_frame(kind: str) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert pixels(decode_image(data)) == [[255, 0, 0]] * 16


def test_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(noise(64, 64), "JPEG")[:1000])
    with pytest.raises(UnreadableImage, match=r"image '.*cut\.jpg': got .*truncated"):
        decode_image(path)
    probe_image(path)  # its header is whole


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\nrubbish"])
def test_what_is_no_image_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    for read in (decode_image, probe_image):
        with pytest.raises(UnreadableImage, match=r"image '.*bad\.png': got .+, expected"):
            read(path)


def test_broken_pixels_of_a_png_are_named() -> None:
    data = bytearray(encoded(noise(64, 64)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnreadableImage, match=r"image 'x\.png'"):
        decode_image(bytes(data), "x.png")


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"none\.png': got no such file"):
        decode_image(tmp_path / "none.png")


def test_unreadable_image_survives_pickling() -> None:
    error = UnreadableImage("a.png", "truncated")
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.reason, str(again)) == ("a.png", "truncated", str(error))


def prep(resize: str = "squash", size: tuple[int, int] = (32, 32)) -> Preprocessing:
    return Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, resize)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (100, 57), (57, 100), (1, 9), (500, 333)])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_preprocessing_equals_torchvision(shape: tuple[int, int], resize: str) -> None:
    image = noise(*shape)
    steps = [v2.Resize((32, 32))] if resize == "squash" else [v2.Resize(37), v2.CenterCrop(32)]
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    reference = v2.Compose([*steps, *to_float, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(image)
    got = prep(resize)(image)
    assert got.dtype == torch.float32
    assert got.shape == (3, 32, 32)
    torch.testing.assert_close(got, reference, atol=2e-6, rtol=0)


def test_short_side_of_224_is_256_and_sizes_are_height_first() -> None:
    assert prep("crop", (224, 224)).resized(noise(300, 400)).shape == (3, 256, 341)
    assert prep("squash", (16, 24)).resized(noise(30, 40)).shape == (3, 16, 24)
    # 16 x 24 asks for a cover of 18 x 27; a 30 x 40 image covers it with 27 / 40 of its size.
    assert prep("crop", (16, 24)).resized(noise(30, 40)).shape == (3, 20, 27)
    assert prep("crop", (16, 24))(noise(30, 40)).shape == (3, 16, 24)


def test_normalized_by_hand_leaves_its_argument() -> None:
    given = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2).expand(3, 1, 2).clone()
    plain = Preprocessing((1, 2), (0.0, 0.5, 0.25), (1.0, 0.5, 0.25))
    expected = torch.tensor([[0.0, 1.0], [-1.0, 1.0], [-1.0, 3.0]]).view(3, 1, 2)
    torch.testing.assert_close(plain.normalized(given), expected, atol=1e-6, rtol=0)
    assert given[0].tolist() == [[0, 255]]


def test_preprocessing_comes_back_from_json() -> None:
    first = prep("crop", (48, 32))
    again = Preprocessing.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    image = noise(60, 50)
    assert torch.equal(again(image), first(image))
    assert pickle.loads(pickle.dumps(first)) == first


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"imgsize": [1, 1]}, r"preprocessing\.imgsize.*did you mean 'img_size'"),
        ({"img_size": [0, 32]}, r"preprocessing\.img_size: got \(0, 32\)"),
        ({"img_size": [32]}, r"preprocessing\.img_size: got \(32,\)"),
        ({"std": [1.0, 1.0]}, r"preprocessing\.mean and std"),
        ({"std": [1.0, 1.0, 0.0]}, "std above 0"),
        ({"resize": "pad"}, r"preprocessing\.resize.*squash, crop"),
    ],
)
def test_wrong_stored_preprocessing_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Preprocessing.from_dict({**prep().to_dict(), **change})


def test_augmentation_stays_within_its_kind() -> None:
    given = torch.arange(3 * 37 * 40).remainder(251).to(torch.uint8).view(3, 37, 40)
    crop = prep("crop")
    center = crop.center_crop(given)
    rng = np.random.default_rng(0)
    assert torch.equal(crop.augmented(given, "none", rng), center)
    flips = [crop.augmented(given, "flip", rng) for _ in range(40)]
    mirrored = sum(torch.equal(image, center.flip(-1)) for image in flips)
    assert mirrored + sum(torch.equal(image, center) for image in flips) == 40
    assert 8 <= mirrored <= 32
    windows = {
        window.numpy().tobytes(): (top, left, flip)
        for top in range(6)
        for left in range(9)
        for flip, window in enumerate(
            (given[:, top : top + 32, left : left + 32],
             given[:, top : top + 32, left : left + 32].flip(-1))
        )
    }  # fmt: skip
    drawn = {windows[crop.augmented(given, "crop-flip", rng).numpy().tobytes()] for _ in range(600)}
    tops, lefts, mirror = (set(values) for values in zip(*drawn, strict=True))
    assert tops == set(range(6))
    assert lefts == set(range(9))
    assert mirror == {0, 1}
