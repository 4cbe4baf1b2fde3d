"""From raw outputs to boxes and masks of an image of any size."""

import warnings

import numpy as np
import pytest
import torch

from yolop_mtl import postprocess
from yolop_mtl.boxes import Detections, decode, suppress
from yolop_mtl.geometry import fit
from yolop_mtl.postprocess import detect, native_detections, native_drivable, native_lane

from .known_network import SIZE as SMALL
from .known_network import raw_maps
from .raw_outputs import ANCHORS, STRIDES, outputs

SIZES = [(720, 1280), (1080, 1920), (333, 500), (1280, 720), (1, 1)]


def test_boxes_come_back_with_scores_and_labels() -> None:
    boxes = torch.tensor([[10.0, 12, 50, 40], [80, 30, 150, 90], [12, 60, 24, 90]])
    maps = raw_maps(boxes, [0.6, 0.9, 0.7], [1, 0, 1], 2)
    found = detect([x[None] for x in maps], ANCHORS)[0]
    assert torch.allclose(found.boxes_xyxy, boxes[[1, 2, 0]], atol=1e-3)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6], abs=1e-5)
    assert found.labels.tolist() == [0, 1, 1]
    assert [len(x.scores) for x in detect([x[None] for x in maps], ANCHORS, conf=0.65)] == [2]
    assert len(detect([x[None] for x in maps], ANCHORS, max_det=1)[0].scores) == 1


@pytest.mark.parametrize("is_multi_label", [False, True])
@pytest.mark.parametrize("max_det", [3, 40, 1000])
def test_looking_at_the_best_first_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, is_multi_label: bool, max_det: int
) -> None:
    monkeypatch.setattr(postprocess, "FIRST_LOOK", 8)
    maps = outputs(num_classes=3)["detection"]
    found = detect(
        maps, ANCHORS, conf=0.05, iou=0.5, max_det=max_det, is_multi_label=is_multi_label
    )
    expected = suppress(
        decode(maps, ANCHORS, STRIDES),
        conf_threshold=0.05,
        iou_threshold=0.5,
        max_detections=max_det,
        is_multi_label=is_multi_label,
    )
    for one, other in zip(found, expected, strict=True):
        assert len(one.scores) > 2
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.boxes_xyxy, other.boxes_xyxy)


def test_a_cap_is_said_once_and_only_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "FIRST_LOOK", 8)
    monkeypatch.setattr(postprocess, "MAX_CANDIDATES", 16)
    maps = outputs()["detection"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            found = detect(maps, ANCHORS, conf=0.001)
    assert [str(warning.message) for warning in caught] == [
        "more than 16 boxes of an image pass conf 0.001: only the best so many are looked at"
    ]
    assert all(0 < len(x.scores) <= 16 for x in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect(maps, ANCHORS, conf=0.001, max_det=2)


def test_nothing_found() -> None:
    maps = outputs(fill=-20.0)["detection"]
    found = detect(maps, ANCHORS)
    assert [(x.boxes_xyxy.shape, x.scores.shape, x.labels.shape) for x in found] == [
        ((0, 4), (0,), (0,))
    ] * 2
    box = fit((720, 1280), (64, 96))
    assert native_detections(found[0], box).boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("outer", [(384, 640), (96, 160)])
def test_native_boxes_lie_in_the_image(size: tuple[int, int], outer: tuple[int, int]) -> None:
    box = fit(size, outer)
    height, width = size
    corners = np.sort(np.random.default_rng(0).random((20, 2, 2)), axis=1).reshape(20, 4)
    native = corners * [width, height, width, height]
    inside = torch.from_numpy(box.boxes(native)).float()
    outside = torch.tensor([[-9.0, -9, -1, -1], [0, 0, *outer[::-1]]])
    found = native_detections(
        Detections(torch.cat([inside, outside]), torch.rand(22), torch.arange(22)), box
    )
    # The one that lies outside of the input is gone, the one around all is the image.
    assert found.labels.tolist() == [*range(20), 21]
    assert np.allclose(found.boxes_xyxy[:-1].numpy(), native, atol=1e-3 * max(1, width / 640))
    assert found.boxes_xyxy[-1].tolist() == [0, 0, width, height]
    assert found.boxes_xyxy.dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_classes", [2, 3])
def test_native_masks_have_the_images_size(size: tuple[int, int], num_classes: int) -> None:
    box = fit(size, SMALL)
    logits = torch.full((num_classes, *SMALL), -6.0)
    middle = box.left + box.inner[1] // 2
    logits[0, :, :middle] = 6.0
    logits[-1, :, middle:] = 6.0
    area = native_drivable(logits, box)
    lane = native_lane(logits[-1:], box)
    assert area.shape == lane.shape == size
    assert (area.dtype, lane.dtype) == (np.uint8, np.bool_)
    assert set(np.unique(area)) <= {0, num_classes - 1}
    if size != (1, 1):
        # Half the image, to a pixel of the input.
        share = (middle - box.left) / box.inner[1]
        border = (1 - (area > 0).mean(), 1 - lane.mean())
        assert border == pytest.approx((share, share), abs=1 / box.inner[1])
        assert ((area > 0) == lane).all()


def test_native_lanes_follow_the_threshold() -> None:
    box = fit(SMALL, SMALL)
    logits = torch.logit(torch.tensor([0.3, 0.6, 0.9]))[None, None].repeat_interleave(10, -1)
    logits = torch.nn.functional.pad(logits.expand(1, 96, 30), (0, 130), value=-9.0)
    found = [int(native_lane(logits, box, threshold).sum()) for threshold in (0.2, 0.5, 0.8)]
    assert found == [30 * 96, 20 * 96, 10 * 96]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 60), (41, 200), (20, 90), (7, 5), (1, 1)])
def test_maps_are_scaled_as_torch_does(channels: int, size: tuple[int, int]) -> None:
    maps = torch.rand(channels, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        maps[None], size, mode="bilinear", align_corners=False, antialias=True
    )
    assert torch.allclose(postprocess._resize(maps, size), expected[0], atol=1e-4)
