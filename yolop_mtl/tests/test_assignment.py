"""Which predictions answer for which box: cases worked by hand, and OTA against a plain loop."""

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from yolop_mtl.assignment import Candidates, find_candidates, take_all, take_cheapest
from yolop_mtl.boxes import COCO_ANCHORS, build_grid, decode_boxes, encode_boxes

STRIDES = (8, 16, 32)
ANCHORS = torch.tensor(COCO_ANCHORS, dtype=torch.float32)
SIZES = [(48, 80), (24, 40), (12, 20)]  # 384 x 640 pixels
GRID = build_grid(SIZES, STRIDES, ANCHORS)


def places(candidates: Candidates, box: int = 0) -> list[set[tuple[int, int, int]]]:
    """Of a box, per scale: (anchor, column, row)."""
    found: list[set[tuple[int, int, int]]] = [set(), set(), set()]
    for index in candidates.places[box][candidates.valid[box]].tolist():
        scale = int(GRID.scales[index])
        anchor = COCO_ANCHORS[scale].index(tuple(GRID.anchors[index].int().tolist()))
        column, row = GRID.cells[index].int().tolist()
        found[scale].add((anchor, column, row))
    assert sum(map(len, found)) == candidates.valid[box].sum()
    return found


def find(*boxes: tuple[float, ...]) -> Candidates:
    return find_candidates(torch.tensor(boxes), SIZES, STRIDES, ANCHORS)


@pytest.mark.parametrize(
    ("box", "counts"),
    [
        ((102, 203, 40, 28), [9, 6, 3]),
        ((102, 203, 8, 8), [3, 0, 0]),
        ((5, 5, 10, 10), [6, 0, 0]),
        ((320.5, 190.5, 300, 200), [0, 3, 9]),
        ((102, 203, 2, 3), [0, 0, 0]),
    ],
)
def test_number_of_candidates(box: tuple[float], counts: list[int]) -> None:
    candidates = find(tuple(map(float, box)))
    assert [len(x) for x in places(candidates)] == counts
    assert len(take_all(candidates).places) == sum(counts)


def test_candidates_of_a_box() -> None:
    small, middle, large = places(find((102.0, 203.0, 40.0, 28.0)))
    cells = [(12, 25), (12, 24), (13, 25)]
    assert small == {(anchor, *cell) for anchor in range(3) for cell in cells}
    cells = [(6, 12), (5, 12), (6, 13)]
    assert middle == {(anchor, *cell) for anchor in range(2) for cell in cells}
    assert large == {(0, 3, 6), (0, 2, 6), (0, 3, 5)}


def test_neighbours_outside_the_grid_are_dropped() -> None:
    small, _, _ = places(find((5.0, 5.0, 10.0, 10.0)))
    assert small == {(a, *cell) for a in (0, 1) for cell in ((0, 0), (1, 0), (0, 1))}
    # First halves in the first cell, and second halves in the last: no neighbour in the grid.
    for x, y, cell in ((2.0, 2.0, (0, 0)), (638.0, 382.0, (79, 47))):
        assert places(find((x, y, 12.0, 16.0)))[0] == {(0, *cell), (1, *cell), (2, *cell)}


def test_a_box_whose_centre_is_outside_has_no_candidates() -> None:
    outside = find((-1.0, 5.0, 40.0, 40.0), (640.0, 5.0, 40.0, 40.0), (5.0, 384.5, 40.0, 40.0))
    assert not outside.valid.any()


def test_in_the_very_middle_of_a_cell_the_neighbours_are_right_and_down() -> None:
    small, _, _ = places(find((84.0, 84.0, 12.0, 16.0)))
    assert {cell[1:] for cell in small} == {(10, 10), (11, 10), (10, 11)}


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([640.0, 384.0])
    return torch.cat([centre, torch.rand(count, 2, generator=generator) * 200 + 2], 1)


def test_candidates_equal_a_plain_loop() -> None:
    boxes = random_boxes(40, 0)
    candidates = find_candidates(boxes, SIZES, STRIDES, ANCHORS)
    for number, (x, y, width, height) in enumerate(boxes.tolist()):
        expected: list[set[tuple[int, int, int]]] = [set(), set(), set()]
        for scale, stride in enumerate(STRIDES):
            rows, columns = SIZES[scale]
            column, row = int(x // stride), int(y // stride)
            left, up = x / stride % 1 < 0.5, y / stride % 1 < 0.5
            cells = [(column, row), (column + (-1 if left else 1), row)]
            cells.append((column, row + (-1 if up else 1)))
            for anchor, (w, h) in enumerate(COCO_ANCHORS[scale]):
                if max(width / w, w / width, height / h, h / height) < 4:
                    expected[scale] |= {
                        (anchor, c, r) for c, r in cells if 0 <= c < columns and 0 <= r < rows
                    }
        assert places(candidates, number) == expected


def test_every_candidate_can_be_reached_by_decoding() -> None:
    boxes = random_boxes(200, 1)
    number, index = take_all(find_candidates(boxes, SIZES, STRIDES, ANCHORS))
    offset = boxes[number, :2] / GRID.strides[index][:, None] - GRID.cells[index]
    assert offset.min() >= -0.5
    assert offset.max() < 1.5
    assert (boxes[number, 2:] / GRID.anchors[index]).max() < 4


# ---- OTA ------------------------------------------------------------------------------------


def plain_ota(
    candidates: Candidates,
    raw: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    images: torch.Tensor,
) -> set[tuple[int, int]]:
    """Pairs (box, prediction), box by box."""
    claims: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for box in range(len(boxes)):
        own = candidates.places[box][candidates.valid[box]].tolist()
        image, priced, overlaps = int(images[box]), [], []
        for index in own:
            x = raw[image, index]
            found = decode_boxes(x[:4], GRID.cells[index], GRID.strides[index], GRID.anchors[index])
            pair = [box_convert(b[None], "cxcywh", "xyxy") for b in (found, boxes[box])]
            iou = box_iou(*pair).item()
            score = x[4].sigmoid() * (x[5:].sigmoid() if len(x) > 6 else torch.ones(1))
            wanted = torch.zeros(len(x) - 5)
            wanted[labels[box]] = 1
            cost = torch.nn.functional.binary_cross_entropy(
                score.sqrt(), wanted, reduction="sum"
            ).item()
            overlaps.append(iou)
            priced.append((cost - 3 * torch.tensor(iou + 1e-7).log().item(), index))
        count = max(1, int(sum(sorted(overlaps, reverse=True)[:10])))
        for cost, index in sorted(priced)[:count]:
            claims.setdefault((image, index), []).append((cost, box))
    return {(min(rivals)[1], index) for (_, index), rivals in claims.items()}


@pytest.mark.parametrize("num_classes", [1, 3])
def test_ota_equals_a_plain_loop(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    raw = torch.randn(2, len(GRID.scales), 5 + num_classes, generator=generator) / 2
    # Two clusters, so that boxes compete for predictions; some overlap anchors well.
    boxes = torch.tensor([100.0, 100.0, 60.0, 50.0]) + random_boxes(24, 2) / 20
    boxes = torch.cat([boxes, random_boxes(6, 3)])
    labels = torch.randint(num_classes, (30,), generator=generator)
    images = torch.arange(30) % 2
    candidates = find_candidates(boxes, SIZES, STRIDES, ANCHORS)
    found = take_cheapest(candidates, raw, GRID, boxes, labels, images)
    pairs = set(zip(found.boxes.tolist(), found.places.tolist(), strict=True))
    assert pairs == plain_ota(candidates, raw, boxes, labels, images)
    # No more than the candidates, and no prediction twice.
    every = take_all(candidates)
    assert pairs < set(zip(every.boxes.tolist(), every.places.tolist(), strict=True))
    used = [(int(images[box]), index) for box, index in pairs]
    assert len(set(used)) == len(used)


def test_ota_takes_more_places_where_predictions_are_good() -> None:
    box = torch.tensor([[102.0, 203.0, 40.0, 28.0]])
    candidates = find_candidates(box, SIZES, STRIDES, ANCHORS)
    zero = torch.zeros(1, dtype=torch.int64)
    raw = torch.full((1, len(GRID.scales), 6), -9.0)
    assert len(take_cheapest(candidates, raw, GRID, box, zero, zero).places) == 1
    for index in candidates.places[0][candidates.valid[0]]:
        raw[0, index, :4] = encode_boxes(
            box[0], GRID.cells[index], GRID.strides[index], GRID.anchors[index]
        )
    # Ten perfect overlaps make ten, up to rounding down.
    assert len(take_cheapest(candidates, raw, GRID, box, zero, zero).places) in (9, 10)


def test_without_boxes_there_are_no_positives() -> None:
    none = torch.zeros(0, 4)
    candidates = find_candidates(none, SIZES, STRIDES, ANCHORS)
    empty = torch.zeros(0, dtype=torch.int64)
    raw = torch.zeros(1, len(GRID.scales), 6)
    for found in (take_all(candidates), take_cheapest(candidates, raw, GRID, none, empty, empty)):
        assert (found.boxes.shape, found.places.shape) == ((0,), (0,))
    # Boxes without a candidate do not break it either.
    tiny = torch.tensor([[102.0, 203.0, 2.0, 3.0]])
    candidates = find_candidates(tiny, SIZES, STRIDES, ANCHORS)
    zero = torch.zeros(1, dtype=torch.int64)
    assert len(take_cheapest(candidates, raw, GRID, tiny, zero, zero).places) == 0
