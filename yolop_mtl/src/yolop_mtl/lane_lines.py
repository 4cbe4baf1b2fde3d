"""Lane pixels to lines: instances told apart, each a polyline in the image.

Nothing is drawn where there is no lane: every vertex, and what lies between two of them, is within
`TOLERANCE` pixels of the mask, unless dashes are bridged.

A mask is read along its rows where lanes are steep and along its columns where they are flat: the
middle of each run of pixels is a point of a lane, runs that touch from row to row are one strand,
and a strand ends where lanes meet or part. Strands that continue one another are joined, also
across a crossing. Differs from fits in a bird's-eye view, which need a calibrated camera and a
number of lanes, and draw lanes through traffic and over the horizon.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Points = NDArray[np.float64]  # (n, 2) x, y
Line = NDArray[np.float32]  # (m, 2) x, y

TOLERANCE = 2.0  # pixels that a line may lie away from the mask
SHORTEST = 0.02  # of the image's longer side: what is shorter is no line
SPACING = 0.0125  # of the longer side, from vertex to vertex
OTHER_WAY = 2.5  # runs so much longer are read across although the lane as a whole is not
WINDOW = 15  # pixels over which the direction of a lane is judged
MAX_TURN = np.cos(np.radians(25))  # cosine of the angle at a joint
MAX_GAP = 0.15  # of the longer side that dashes are bridged over
DEGREE = 3  # of the polynomial through a strand


class Runs(NamedTuple):
    """Runs of pixels along rows, in order.

    Attributes:
        rows: (n,) of each.
        first: (n,) its first column.
        last: (n,) its last column.
    """

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Pixels of each."""
        return self.last - self.first + 1

    def mostly(self, chosen: Mask) -> "Runs":
        """Those of which more than half is chosen; `chosen` is of all their pixels, in order."""
        if not len(self.rows):
            return self
        lengths = self.lengths
        counts = np.add.reduceat(chosen.astype(np.int64), np.cumsum(lengths) - lengths)
        return Runs(*(column[2 * counts > lengths] for column in self))


class Strand(NamedTuple):
    """Points along a lane, in order, and its width.

    Attributes:
        points: (n, 2) x, y in pixels.
        width: pixels across it, the median.
    """

    points: Points
    width: float


def find_lane_lines(mask: Mask, *, bridge_dashes: bool = False) -> list[Line]:
    """The lane lines of a mask, each as a polyline.

    Args:
        mask: (h, w) bool, unchanged.
        bridge_dashes: make one line of dashes that continue one another, straight over the gaps
            between them, where no lane pixel is; without it each dash is a line.

    Returns: (m, 2) float32 each, m >= 2: x, y in pixels, whole numbers in the middle of a pixel;
        steep ones from the lower end up, flat ones (below 20 degrees) from left to right; ordered
        from left to right by the first point.
    """
    side = max(mask.shape)
    shortest = max(4.0, SHORTEST * side)
    labels, place = _components(mask, shortest / 2)  # parts of a line may be shorter than a line
    kept = labels > 0
    if not kept.any():
        return []
    strands = [x for x in _strands(kept, labels) if _length(x.points) >= max(2.0, 0.5 * x.width)]
    near = _near(kept, TOLERANCE)
    strands = _join(strands, near, max_gap=MAX_GAP * side if bridge_dashes else 0.0)
    lines = []
    for strand in strands:
        # A blob, e.g. of a crosswalk, is as wide as it is long.
        if _length(strand.points) < max(shortest, 2 * strand.width):
            continue
        fitted = _fit(strand, max(3.0, SPACING * side))
        pieces = [fitted] if bridge_dashes else _supported(fitted, near)
        lines += [_turned(x) for x in pieces if _length(x) >= shortest]
    lines.sort(key=lambda line: (line[0, 0], line[0, 1]))
    return [(line + place).astype(np.float32) for line in lines]


# ---- pixels to strands ---------------------------------------------------------------------------


def _components(mask: Mask, shortest: float) -> tuple[NDArray[np.int32], Points]:
    """Numbers of the components of the part of a mask that matters; 0: none, or one too small.

    Returns: the numbers, and where the part's upper left corner lies: x, y.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((1, 1), dtype=np.int32), np.zeros(2)
    top, left = rows[0], columns[0]
    part = np.ascontiguousarray(mask[top : rows[-1] + 1, left : columns[-1] + 1]).view(np.uint8)
    # Holes and gaps of two pixels are closed: they would tear a lane into many strands.
    closed = cv2.morphologyEx(part, cv2.MORPH_CLOSE, np.ones((3, 3), dtype=np.uint8))
    count, labels, table, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    reach = np.hypot(table[:, cv2.CC_STAT_WIDTH], table[:, cv2.CC_STAT_HEIGHT])
    numbers = np.where(reach >= shortest, np.arange(count), 0).astype(np.int32)
    numbers[0] = 0
    return numbers[labels], np.array([left, top], dtype=np.float64)


def _runs(mask: Mask) -> Runs:
    """Runs of True along the rows of a mask, row after row."""
    height, width = mask.shape
    padded = np.zeros((height, width + 1), dtype=np.int8)
    padded[:, :width] = mask
    edges = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    rows, first = np.divmod(starts, width + 1)
    return Runs(rows, first, first + ends - starts)


def _strands(mask: Mask, labels: NDArray[np.int32]) -> list[Strand]:
    """Steep parts read along rows, flat ones along columns."""
    flipped = np.ascontiguousarray(mask.T)
    runs, columns = _runs(mask), _runs(flipped)
    across, down = np.zeros((2, *mask.shape), dtype=np.float32)
    across[mask] = np.repeat(runs.lengths, runs.lengths)
    down.T[flipped] = np.repeat(columns.lengths, columns.lengths)
    # A lane of an angle a has runs of thickness / sin(a) across and of thickness / cos(a) down. One
    # reading for the whole of a lane, lest one of 45 degrees is torn to pieces; the other one only
    # where it clearly runs the other way.
    inside = labels[mask]
    totals = [np.bincount(inside, weights=x[mask]) for x in (across, down)]
    is_steep = (totals[0] <= totals[1])[inside]
    # Smoothed, so that a bend changes from one to the other in one place.
    across, down = (cv2.blur(x, (WINDOW, WINDOW))[mask] for x in (across, down))
    steep = np.zeros_like(mask)
    steep[mask] = np.where(is_steep, across <= OTHER_WAY * down, OTHER_WAY * across < down)
    flat_strands = _chains(columns.mostly(~steep.T[flipped]), mask.shape[0])
    turned = [Strand(strand.points[:, ::-1], strand.width) for strand in flat_strands]
    return _chains(runs.mostly(steep[mask]), mask.shape[1]) + turned


def _chains(runs: Runs, width: int) -> list[Strand]:
    """Strands of runs in a mask of so many columns: runs that touch one another and no third."""
    rows, first, last = runs
    count = len(rows)
    if not count:
        return []
    step = width + 2
    # In row y + 1, corners included, a run touches those that end after its start - 1 and start
    # before its end + 1.
    low = np.searchsorted(rows * step + last, (rows + 1) * step + first - 1, side="left")
    high = np.searchsorted(rows * step + first, (rows + 1) * step + last + 1, side="right")
    below = high - low
    above = np.zeros(count + 1, dtype=np.int64)
    np.add.at(above, low[below > 0], 1)
    np.add.at(above, high[below > 0], -1)
    above = above.cumsum()[:-1]
    follows = np.where((below == 1) & (above[low.clip(max=count - 1)] == 1), low, -1)
    is_start = np.ones(count, dtype=bool)
    is_start[follows[follows >= 0]] = False
    following, middles, widths = follows.tolist(), (first + last) / 2, runs.lengths
    strands = []
    for number in np.flatnonzero(is_start).tolist():
        chain = []
        while number >= 0:
            chain.append(number)
            number = following[number]
        points = np.stack([middles[chain], rows[chain]], 1)
        along = np.gradient(middles[chain]) if len(chain) > 1 else np.zeros(1)
        # Across the lane, not along the row.
        strands.append(Strand(points, float(np.median(widths[chain] / np.hypot(1, along)))))
    return strands


# ---- strands to lines ----------------------------------------------------------------------------


class _End(NamedTuple):
    """An end of a strand: where it is (2,) and the unit vector (2,) that leads out of it."""

    place: Points
    way: Points


def _join(strands: list[Strand], near: Mask, *, max_gap: float) -> list[Strand]:
    """Join strands that continue one another: all over the mask, or over gaps up to `max_gap`."""
    ends = [end for strand in strands for end in _ends(strand)]
    if len(ends) < 4:
        return strands
    places = np.array([end.place for end in ends])
    ways = np.array([end.way for end in ends])
    owners = np.arange(len(ends)) // 2
    widths = np.array([strands[number].width for number in owners])
    apart = places[None] - places[:, None]  # from the first to the second
    gaps = np.hypot(apart[..., 0], apart[..., 1])
    reach = np.maximum(gaps, 1e-9)
    leaving = (apart * ways[:, None]).sum(2) / reach
    arriving = -(apart * ways[None]).sum(2) / reach
    facing = -(ways[:, None] * ways[None]).sum(2)
    # Of ends that nearly touch the direction from one to the other says nothing.
    touch = gaps <= np.minimum(widths[:, None], widths[None])
    straight = np.where(touch, facing, np.minimum(np.minimum(leaving, arriving), facing))
    limit = np.maximum(max_gap, 4 * np.maximum(widths[:, None], widths[None]) + 2 * TOLERANCE)
    fits = (straight >= MAX_TURN) & (gaps <= limit) & (owners[:, None] < owners[None])
    pairs = np.argwhere(fits)
    costs = gaps[fits] / limit[fits] + 4 * (1 - straight[fits])
    partner: dict[int, int] = {}
    for row in np.argsort(costs, kind="stable").tolist():
        one, other = pairs[row].tolist()
        if one in partner or other in partner:
            continue
        is_supported = _is_supported(places[one], places[other], near)
        if is_supported or gaps[one, other] <= max_gap:
            partner[one], partner[other] = other, one
    return _linked(strands, partner)


def _ends(strand: Strand) -> list[_End]:
    """First and last end of a strand of two points or more; they point as what lies before them."""
    points = strand.points
    reach = max(8, round(3 * strand.width))
    found = []
    for part in (points[:reach][::-1], points[-reach:]):
        # The very end is often rounded, or bent towards what it meets.
        body = part[: max(2, len(part) - round(strand.width / 2))]
        x, y, *_ = cv2.fitLine(body.astype(np.float32), cv2.DIST_HUBER, 0, 0.01, 0.01).ravel()
        way = np.array([x, y], dtype=np.float64)
        way *= 1 if way @ (body[-1] - body[0]) >= 0 else -1
        found.append(_End(part[-1], way))
    return found


def _linked(strands: list[Strand], partner: dict[int, int]) -> list[Strand]:
    """Strands whose ends are partners made one; 2 n is the first end of strand n, 2 n + 1 the last.

    A ring is cut at the strand it was begun with.
    """
    done: set[int] = set()
    joined = []
    order = sorted(range(len(strands)), key=lambda n: 2 * n in partner and 2 * n + 1 in partner)
    for number in order:  # those with a free end first
        if number in done:
            continue
        end = 2 * number + (2 * number in partner and 2 * number + 1 not in partner)
        parts, widths = [], []
        while end // 2 not in done:
            current = end // 2
            done.add(current)
            points = strands[current].points
            parts.append(points[::-1] if end % 2 else points)
            widths.append(strands[current].width)
            leave = end ^ 1
            if leave not in partner:
                break
            end = partner[leave]
        lengths = [_length(part) for part in parts]
        width = float(np.average(widths, weights=np.maximum(lengths, 1e-9)))
        joined.append(Strand(np.concatenate(parts), width))
    return joined


def _fit(strand: Strand, spacing: float) -> Points:
    """Vertices along a strand: of a cubic where one fits, otherwise of the strand smoothed."""
    points = strand.points
    along = np.concatenate([[0.0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    count = max(2, round(along[-1] / spacing) + 1)
    share = 2 * along / along[-1] - 1
    wanted = np.linspace(-1, 1, count)
    allowed = max(1.5, 0.35 * strand.width)
    basis = np.polynomial.chebyshev.chebvander(share, min(DEGREE, len(points) - 1))
    weights = np.ones(len(points))
    for _ in range(4):  # of Huber's weights: where lanes meet, middles lie beside the lane
        root = np.sqrt(weights)[:, None]
        solved = np.linalg.lstsq(basis * root, points * root, rcond=None)[0]
        away = np.hypot(*(basis @ solved - points).T)
        weights = np.minimum(1, 0.5 * allowed / np.maximum(away, 1e-9))
    if np.percentile(away, 95) <= allowed:
        fitted: Points = np.polynomial.chebyshev.chebvander(wanted, basis.shape[1] - 1) @ solved
        return fitted
    reach = max(1, round(len(points) * spacing / along[-1]))
    padded = np.pad(points, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    window = np.ones(2 * reach + 1) / (2 * reach + 1)
    smooth = np.stack([np.convolve(x, window, mode="valid") for x in padded.T], 1)
    return np.stack([np.interp(wanted, share, x) for x in smooth.T], 1)


# ---- what is there -------------------------------------------------------------------------------


def _near(mask: Mask, distance: float) -> Mask:
    """Where a pixel of the mask is at most so far."""
    reach = int(distance)
    offsets = np.arange(-reach, reach + 1)
    disk = (np.hypot(*np.meshgrid(offsets, offsets)) <= distance).astype(np.uint8)
    return cv2.dilate(mask.view(np.uint8), disk).astype(bool)


def _looked_up(points: Points, near: Mask) -> Mask:
    """Whether points lie where `near` is True; outside of it they do not."""
    columns, rows = points.round().astype(np.int64).T
    height, width = near.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    result: Mask = inside & near[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    return result


def _is_supported(start: Points, end: Points, near: Mask) -> bool:
    count = max(2, int(np.hypot(*(end - start))) + 1)
    return bool(_looked_up(np.linspace(start, end, count), near).all())


def _supported(line: Points, near: Mask) -> list[Points]:
    """The stretches of a line whose vertices and edges lie on or beside the mask."""
    along = np.concatenate([[0.0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
    steps = np.union1d(np.arange(0, along[-1], 1.0), along)
    dense = np.stack([np.interp(steps, along, x) for x in line.T], 1)
    is_off = ~_looked_up(dense, near)
    # How many of the points up to each vertex are off: an edge is on where none is added.
    before = is_off.cumsum()[np.searchsorted(steps, along)]
    is_on = ~is_off[np.searchsorted(steps, along)]
    breaks = np.flatnonzero(np.diff(before) > 0) + 1
    pieces = np.split(np.arange(len(line)), breaks)
    return [line[piece[is_on[piece]]] for piece in pieces if is_on[piece].sum() > 1]


def _length(points: Points) -> float:
    return float(np.hypot(*np.diff(points, axis=0).T).sum()) if len(points) > 1 else 0.0


def _turned(line: Points) -> Points:
    """From the lower end up, or from left to right where it is flat."""
    across, down = line[-1] - line[0]
    is_flat = abs(down) < np.tan(np.radians(20)) * abs(across)
    is_backwards = across < 0 if is_flat else down > 0
    return line[::-1] if is_backwards else line
