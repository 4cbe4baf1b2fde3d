"""The Python interface: images of any kind and size in, results in their own pixels out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import yolop_mtl
from shared_utils.errors import InputError, MissingFileError
from yolop_mtl import model_io, packed, predictor
from yolop_mtl.geometry import Letterbox
from yolop_mtl.packed import PackedConv
from yolop_mtl.predictor import Predictor, choose_device

from .deployed import NAMES, SIZE, save_network
from .known_network import raw_maps, two_classes

NATIVE = [(720, 1280), (1080, 1920), (333, 500), (1280, 720), (1, 1)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def found(network: Path) -> Predictor:
    return yolop_mtl.load(network, device="cpu")


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def known_outputs(letterboxes: Sequence[Letterbox]) -> dict[str, Any]:
    """Of a network that sees in the middle of each image a box, a road below it, a lane left."""
    parts: dict[str, list[Any]] = {"detection": [], "drivable": [], "lane": []}
    for box in letterboxes:
        height, width = box.size
        truth = np.array([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
        maps = raw_maps(torch.from_numpy(box.boxes(truth)).float(), [0.9], [1], len(NAMES))
        below, left = torch.zeros(2, *SIZE)
        below[box.top + box.inner[0] // 2 :] = 1
        left[:, : box.left + box.inner[1] // 2] = 1
        parts["detection"].append(maps)
        parts["drivable"].append(two_classes(below, 20.0))
        parts["lane"].append((left * 40 - 20)[None])
    detection = [torch.stack(maps) for maps in zip(*parts["detection"], strict=True)]
    return {"detection": detection} | {
        name: torch.stack(parts[name]) for name in ("drivable", "lane")
    }


def test_everything_comes_back_in_the_pixels_of_each_image(found: Predictor) -> None:
    images = [picture(size) for size in NATIVE]
    batch, letterboxes = found.prepare(images)
    assert (batch.shape, batch.dtype) == ((len(NATIVE), 3, *SIZE), torch.uint8)
    results = found.finish(known_outputs(letterboxes), letterboxes, images)
    for size, image, result in zip(NATIVE, images, results, strict=True):
        height, width = size
        assert result.image is image
        assert result.drivable is not None
        assert result.lanes is not None
        assert result.drivable.shape == result.lanes.shape == size
        assert result.drivable.dtype == result.lanes.dtype == np.bool_
        expected = np.array([[width, height, 3 * width, 3 * height]]) / 4
        assert np.allclose(result.boxes_xyxy, expected, atol=max(width, height) / 500)
        assert (result.labels.tolist(), result.names) == ([1], ["truck"])
        assert result.scores.tolist() == pytest.approx([0.9], abs=1e-4)
        if size != (1, 1):
            # To a pixel of the input.
            step = max(height / 54, width / 54)
            edge = result.drivable[:, width // 2].argmax(), result.lanes[height // 2].sum()
            assert edge == pytest.approx((height / 2, width / 2), abs=step)
            assert result.drivable[-1].all()
            assert result.lanes[:, 0].all()


@pytest.mark.parametrize("size", NATIVE)
def test_any_size_and_any_kind_of_image(found: Predictor, size: tuple[int, int]) -> None:
    found.conf = 0.01
    pixels = picture(size)
    result = found(pixels)
    assert result.drivable is not None
    assert result.lanes is not None
    assert result.drivable.shape == result.lanes.shape == size
    assert (result.boxes_xyxy >= 0).all()
    assert (result.boxes_xyxy <= np.array([size[1], size[0]] * 2)).all()
    assert (result.boxes_xyxy.dtype, result.scores.dtype) == (np.float32, np.float32)
    assert result.plot().shape == pixels.shape
    assert json.loads(json.dumps(result.to_dict()))["width"] == size[1]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    others = found(
        [Image.fromarray(pixels), tensor, tensor.float() / 255, pixels[:, ::-1][:, ::-1]]
    )
    for other in others:
        assert (other.image == pixels).all()
        assert np.allclose(other.boxes_xyxy, result.boxes_xyxy, atol=1e-2)
        assert np.mean(other.drivable != result.drivable) < 1e-3
    found.conf = 0.3


def test_a_batch_of_mixed_sizes_equals_the_images_alone(found: Predictor) -> None:
    images = [picture(size, seed) for seed, size in enumerate(NATIVE)]
    assert found([]) == []
    for image, together in zip(images, found(images), strict=True):
        alone = found(image)
        assert np.allclose(alone.boxes_xyxy, together.boxes_xyxy, atol=1e-2)
        assert np.mean(alone.drivable != together.drivable) < 1e-3
        assert np.mean(alone.lanes != together.lanes) < 1e-3


def test_the_longer_side_alone_follows_the_images(network: Path) -> None:
    one = yolop_mtl.load(network, img_size=128, device="cpu")
    assert (one.img_size, one.long_side) == ((96, 128), 128)
    wide, tall = picture((40, 80)), picture((90, 30))
    assert one.prepare([wide])[0].shape[2:] == (64, 128)
    assert one.prepare([tall])[0].shape[2:] == (128, 64)
    assert one.prepare([wide, tall])[0].shape[2:] == (128, 128)
    both = yolop_mtl.load(network, img_size=(64, 96), device="cpu")
    assert both.prepare([wide, tall])[0].shape[2:] == both.img_size == (64, 96)


def test_files_are_turned_as_their_exif_entry_says(found: Predictor, tmp_path: Path) -> None:
    pixels = np.full((40, 80, 3), 30, dtype=np.uint8)
    pixels[:, 60:] = 220
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as opened:
        results = found([tmp_path / "turned.jpg", str(tmp_path / "turned.jpg"), opened])
    for result in results:
        assert result.image.shape == (80, 40, 3)
        assert (result.image[65:] > 180).all()
        assert (result.image[:55] < 80).all()
        assert result.drivable.shape == (80, 40)


def test_folding_and_16_bit_weights_keep_what_is_found(network: Path, tmp_path: Path) -> None:
    stored = model_io.load(network).model
    image = picture(SIZE, 3)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = stored(batch.float() / 255)
    whole = yolop_mtl.load(network, device="cpu").forward(batch)
    half = yolop_mtl.load(save_network(tmp_path, is_half=True), device="cpu").forward(batch)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.62 * (
        network / "model.safetensors"
    ).stat().st_size
    for name in ("drivable", "lane"):
        assert torch.allclose(whole[name], expected[name], rtol=1e-3, atol=1e-3)
        scale = expected[name].abs().max().item()
        assert torch.allclose(half[name], expected[name], atol=0.02 * scale)
    for one, other in zip(whole["detection"], expected["detection"], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_weights_beyond_16_bits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.half
    monkeypatch.setattr(torch.Tensor, "half", lambda x: real(x * 1e9))
    with pytest.raises(InputError, match=r"conv\.weight: got .*, expected weights up to 65504; "):
        save_network(tmp_path, is_half=True)
    assert not list(tmp_path.iterdir())


def test_bf16_is_that_of_autocast(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where convolutions are not packed, as on a GPU."""
    monkeypatch.setattr(predictor.packed, "is_available", lambda: False)
    one = yolop_mtl.load(network, precision="bf16-mixed", device="cpu")
    batch, _ = one.prepare([picture(SIZE)])
    raw = one.forward(batch)
    plain = yolop_mtl.load(network, device="cpu").model
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        images = batch.contiguous(memory_format=torch.channels_last).float() / 255
        expected = plain(images.contiguous(memory_format=torch.channels_last))
    assert raw["lane"].dtype == torch.bfloat16
    assert torch.equal(raw["lane"], expected["lane"])
    assert torch.equal(raw["drivable"], expected["drivable"])
    assert one(picture((70, 90))).lanes.shape == (70, 90)


@pytest.mark.skipif(not packed.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize(("precision", "off"), [("32-true", 1e-4), ("bf16-mixed", 2e-2)])
def test_packed_convolutions_give_the_same(
    network: Path, precision: Any, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = yolop_mtl.load(network, precision=precision, device="cpu")
    batch, _ = fast.prepare([picture(SIZE), picture((70, 90))])
    got = fast.forward(batch)
    monkeypatch.setattr(predictor.packed, "is_available", lambda: False)
    plain = yolop_mtl.load(network, device="cpu")
    expected = plain.forward(batch)
    assert any(isinstance(part, PackedConv) for part in fast.model.modules())
    assert not any(isinstance(part, PackedConv) for part in plain.model.modules())
    assert fast.model.detection.anchors.equal(plain.model.detection.anchors)
    for mine, other in zip(got["detection"], expected["detection"], strict=True):
        shares = [x[:, 4::6].float().sigmoid() for x in (mine, other)]
        torch.testing.assert_close(*shares, rtol=0, atol=off)
    for task in ("drivable", "lane"):
        shares = [x.float().sigmoid() for x in (got[task], expected[task])]
        torch.testing.assert_close(*shares, rtol=0, atol=off)


@pytest.mark.parametrize("tasks", [("lane",), ("detection",), ("drivable",)])
def test_tasks_that_are_off_are_none(tasks: tuple[str, ...], tmp_path: Path) -> None:
    one = yolop_mtl.load(save_network(tmp_path, tasks=tasks), device="cpu")
    result = one(picture((50, 70)))
    assert (result.drivable is None) == ("drivable" not in tasks)
    assert (result.lanes is None) == ("lane" not in tasks)
    assert result.boxes_xyxy.shape[1:] == (4,)
    assert ("detection" in tasks) or not len(result.scores)
    assert (result.lane_lines == []) or "lane" in tasks
    assert set(result.to_dict()) == {
        "height", "width", "boxes_xyxy", "scores", "labels", "names",
        *(["drivable_share"] if "drivable" in tasks else []),
        *(["lane_lines"] if "lane" in tasks else []),
    }  # fmt: skip
    assert result.plot().shape == (50, 70, 3)


def test_three_classes_of_area(tmp_path: Path) -> None:
    one = yolop_mtl.load(save_network(tmp_path, areas="three"), device="cpu")
    raw = one.forward(one.prepare([picture(SIZE)])[0])
    number = torch.zeros(1, 3, *SIZE)
    number[0, 1, :48, :80] = number[0, 2, :48, 80:] = number[0, 0, 48:] = 9
    boxes = one.prepare([picture(SIZE)])[1]
    result = one.finish(raw | {"drivable": number}, boxes, [picture(SIZE)])[0]
    assert result.drivable_class is not None
    assert (result.drivable_class[:48, :80] == 1).all()
    assert (result.drivable_class[:48, 80:] == 2).all()
    assert (result.drivable == (result.drivable_class > 0)).all()


def test_compiled_gives_the_same(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def compiled(model: torch.nn.Module) -> Any:
        def run(images: Tensor) -> Any:
            calls.append(tuple(images.shape))
            return model(images)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    one = yolop_mtl.load(network, compile=True, device="cpu")
    assert calls == [(1, 3, *SIZE)]
    one(picture((40, 40)))
    assert len(calls) == 2

    def broken(model: torch.nn.Module) -> Any:
        raise RuntimeError("no working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    with pytest.raises(InputError, match=r"compile: got 'no working C\+\+ compiler found' from"):
        yolop_mtl.load(network, compile=True, device="cpu")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"image: got an array of shape \(4, 5\), expected \(h, w, 3"),
        (np.zeros((4, 5, 4), np.uint8), r"array of shape \(4, 5, 4\), expected .*cv2\.cvtColor"),
        (np.zeros((0, 5, 3), np.uint8), r"array of shape \(0, 5, 3\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), r"shape \(2, 4, 5, 3\).*; pass a list of images"),
        (np.zeros((4, 5, 3), np.float32), r"an array of float32, expected .*; scale it to 0 to"),
        (torch.zeros(4, 5, 3), r"a tensor of shape \(4, 5, 3\), expected \(3, h, w\)"),
        (torch.zeros(1, 3, 5, 3), r"a tensor of shape .*; pass a list of images"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"a tensor of torch\.int64, expected"),
        (torch.full((3, 4, 4), 255.0), r"values from 255 to 255, expected .*; divide by 255"),
        (torch.full((3, 4, 4), -0.5), r"values from -0\.5 to -0\.5"),
        (torch.full((3, 4, 4), torch.nan), r"values from nan to nan"),
        (7, r"image: got a int, expected an image; pass a path"),
    ],
)
def test_what_is_no_image(found: Predictor, image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        found(image)
    with pytest.raises(InputError, match=message):
        found([picture((4, 4)), image])


def test_files_that_are_no_image(found: Predictor, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.jpg: got no such file, expected an im"):
        found("nowhere.jpg")
    Image.fromarray(picture((60, 80))).save(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with pytest.raises(InputError, match=r"cut\.jpg: got a damaged or unreadable file"):
        found(cut)
    with Image.open(cut) as lazy, pytest.raises(InputError, match=r"a PIL image that cannot be r"):
        found(lazy)


def test_values_that_cannot_be(network: Path) -> None:
    for name in ("conf", "iou", "lane_threshold"):
        with pytest.raises(InputError, match=rf"{name}: got 1\.5, expected 0 to 1; correct it"):
            yolop_mtl.load(network, device="cpu", **{name: 1.5})
    for size, message in (
        (100, r"img_size: got 100, expected a multiple of 32; round it"),
        (0, r"img_size: got 0, expected a multiple of 32; raise it"),
        ((100, 64), r"img_size: got 100 x 64, expected multiples of 32"),
        ((64, 64, 3), r"img_size: got 3 numbers, expected one or two"),
    ):
        with pytest.raises(InputError, match=message):
            yolop_mtl.load(network, device="cpu", img_size=size)
    with pytest.raises(
        InputError, match=r"precision: got 'bf16', expected a known one; there are 16-mixed"
    ):
        yolop_mtl.load(network, device="cpu", precision="bf16")  # type: ignore[arg-type]
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match=rf"device: got '{name}'.*, expected what this mach"):
            choose_device(name)
    assert choose_device("auto").type in ("cpu", "cuda")


def test_where_a_network_is_read_from(network: Path, tmp_path: Path) -> None:
    by_file = yolop_mtl.load(network / "model.safetensors", device="cpu")
    assert (by_file.class_names, by_file.img_size) == (NAMES, SIZE)
    assert repr(by_file) == "Predictor(detection, drivable, lane; 96 x 160; cpu)"
    with pytest.raises(MissingFileError, match=r"model\.json: got no such file"):
        yolop_mtl.load(tmp_path)
    other = tmp_path / "weights.pt"
    other.write_bytes(b"x")
    with pytest.raises(InputError, match=r"file of type '\.pt', expected a run .*import-weights"):
        yolop_mtl.load(other)
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((network / name).read_bytes()[:200])
    with pytest.raises(InputError, match=r"model\.json: got a damaged or unreadable file"):
        yolop_mtl.load(tmp_path)


def test_the_shipped_network(
    network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predictor, "SHIPPED", "assets/nowhere")
    with pytest.raises(InputError, match=r"weights: got none, and no weights come with this inst"):
        yolop_mtl.load()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(predictor, "SHIPPED", str(network))  # an absolute path wins over joining
    assert yolop_mtl.load(device="cpu").class_names == NAMES
    assert capsys.readouterr() == ("", "")


def test_names_of_the_package() -> None:
    assert yolop_mtl.Predictor is Predictor
    with pytest.raises(AttributeError, match=r"module 'yolop_mtl' has no attribute 'laod'"):
        _ = yolop_mtl.laod
