"""Generated scenes, third part: sky, ground, road and solids painted on an image, far to near.

Besides the image there is a map of numbers: what stands on the ground hides what is behind it, and
the map says what is seen at each pixel.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolop_mtl.synth_road import FARTHEST, HORIZON, Camera, Road, Time, Weather
from yolop_mtl.synth_solids import Colour, Polygons

Floats = NDArray[np.float64]
Image = NDArray[np.uint8]

SHIFT = 3  # bits of a pixel's fraction in OpenCV's coordinates
MARGIN = 256  # pixels by which noise is moved
OBSTACLE = 255  # number of what hides and is no vehicle
# Colour of the sky at its top and at the horizon, light by channel, metres of sight.
SKIES: dict[str, tuple[Colour, Colour, Colour, float]] = {
    "clear": ((78, 132, 200), (198, 216, 232), (1.0, 1.0, 0.97), 420),
    "partly cloudy": ((92, 140, 198), (204, 216, 226), (0.95, 0.96, 0.96), 380),
    "overcast": ((170, 177, 185), (208, 211, 214), (0.82, 0.84, 0.86), 260),
    "rainy": ((118, 124, 132), (166, 171, 176), (0.66, 0.69, 0.73), 120),
    "dawn/dusk": ((76, 92, 140), (238, 182, 132), (0.66, 0.57, 0.55), 300),
    "night": ((8, 10, 20), (38, 36, 42), (0.21, 0.21, 0.25), 160),
}
BEAM = (2.4, 16.0)  # how much brighter headlights make things at night, and metres they reach
ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
ROUND = np.stack([0.86 * np.cos(ANGLES), np.sin(ANGLES)], 1)  # outline of a crown
LOBES = 0.1 * np.sin(3 * ANGLES)


class Light(NamedTuple):
    """Colours of the sky, light by channel, colour and metres of haze, and whether it is night."""

    top: Colour
    bottom: Colour
    ambient: Floats
    visibility: float
    is_night: bool

    def shade(self, colours: Floats, depth: Floats | float) -> Floats:
        """Colours (..., 3) as they are seen over some metres (...)."""
        away = np.asarray(depth, dtype=np.float64)[..., None]
        gain = 1 + BEAM[0] * np.exp(-away / BEAM[1]) if self.is_night else 1.0
        clear = np.exp(-away / self.visibility)
        shaded: Floats = (colours * self.ambient * gain).clip(0, 255) * clear
        shaded += np.array(self.bottom) * (1 - clear)
        return shaded


def find_light(weather: Weather, time: Time) -> Light:
    """The light of a weather at a time of day."""
    top, bottom, ambient, visibility = SKIES[weather if time == "daytime" else time]
    if weather == "rainy":
        visibility = min(visibility, SKIES["rainy"][3])
    return Light(top, bottom, np.array(ambient), visibility, time == "night")


@cache
def grain() -> Image:
    """A fixed (1024, 1024) field of noise around 128, of deviation 40: what textures are from."""
    noise = np.random.default_rng(0).normal(128, 40, (1024, 1024))
    return noise.clip(0, 255).astype(np.uint8)


@cache
def _grey_grain(size: tuple[int, int]) -> Image:
    """The same, (H, W, 3), for images of a size, with room to begin elsewhere."""
    field = grain()
    rows, columns = ((side + MARGIN) // len(field) + 1 for side in size)
    wide = np.tile(field, (rows, columns))[: size[0] + MARGIN, : size[1] + MARGIN]
    return np.repeat(wide[..., None], 3, axis=2)


class Canvas:
    """An image in the making.

    Attributes:
        camera: projects.
        light: colours.
        image: (H, W, 3) uint8 RGB.
        numbers: (H, W) uint8; what is seen: 0 ground and sky, OBSTACLE, else a vehicle's number.
    """

    def __init__(self, camera: Camera, light: Light) -> None:
        self.camera, self.light = camera, light
        self.image: Image = np.zeros((*camera.size, 3), dtype=np.uint8)
        self.numbers: Image = np.zeros(camera.size, dtype=np.uint8)

    def pixels(self, points: Floats) -> NDArray[np.int32]:
        """World points (..., 3) -> OpenCV's fixed-point pixels (..., 2)."""
        limit = 4.0 * max(self.camera.size)
        # OpenCV counts from the centre of a pixel, everything here from its corner.
        at = self.camera.project(points).clip(-limit, limit) - 0.5
        return np.round(at * (1 << SHIFT)).astype(np.int32)

    def ground(self, outlines: Sequence[Floats], colour: Colour, *, is_flat: bool = True) -> None:
        """Fill outlines (n, 3) in one colour; those that are not flat hide what is behind."""
        for outline in outlines:
            corners = self.pixels(outline)
            depth = float(outline[:, 2].mean())
            shaded = self.light.shade(np.array(colour), depth)
            cv2.fillPoly(self.image, [corners], shaded.tolist(), cv2.LINE_AA, SHIFT)
            if not is_flat:
                cv2.fillPoly(self.numbers, [corners], OBSTACLE, cv2.LINE_8, SHIFT)

    def solid(self, polygons: Polygons, world: Floats, number: int) -> None:
        """Paint a solid.

        Args:
            polygons: colours, and which are lit.
            world: (n, CORNERS, 3) their corners.
            number: goes into the map.
        """
        corners = self.pixels(world)
        x, y = corners[..., 0].astype(np.float64), corners[..., 1].astype(np.float64)
        area = (x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)
        colours = self.light.shade(polygons.colours, world[..., 2].mean(1))
        colours[polygons.is_lit] = polygons.colours[polygons.is_lit]
        # Details of less than a pixel are left out.
        least = 1 << 2 * SHIFT
        for row in np.flatnonzero(area < -least).tolist():
            outline = corners[row]
            cv2.fillConvexPoly(self.image, outline, colours[row].tolist(), cv2.LINE_AA, SHIFT)
            cv2.fillConvexPoly(self.numbers, outline, number, cv2.LINE_8, SHIFT)

    def leaves(
        self, random: Generator, centre: Floats, radius: float, colour: Colour, depth: float
    ) -> None:
        """Part of a tree's crown around a pixel (x, y), with a radius in pixels; it hides."""
        rough = 1 + 0.16 * random.uniform(-1, 1, len(ROUND)) + LOBES
        outline = centre - 0.5 + ROUND * (radius * rough[:, None])
        corners = np.round(outline * (1 << SHIFT)).astype(np.int32)
        shaded = self.light.shade(np.array(colour), depth)
        cv2.fillPoly(self.image, [corners], shaded.tolist(), cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.numbers, [corners], OBSTACLE, cv2.LINE_8, SHIFT)


def paint_sky(canvas: Canvas, random: Generator, weather: Weather) -> None:
    """Sky with clouds, and a line of woods or hills at the horizon."""
    height, width = canvas.camera.size
    horizon, light = round(canvas.camera.horizon), canvas.light
    rows, columns = max(2, horizon // 4), max(2, width // 4)
    share = np.linspace(0, 1, rows)[:, None, None] ** 1.4
    sky = np.array(light.top) * (1 - share) + np.array(light.bottom) * share
    sky = np.repeat(sky, columns, axis=1)
    amount = {"clear": 0.15, "partly cloudy": 0.75, "overcast": 0.5, "rainy": 0.5}[weather]
    if light.is_night:
        amount *= 0.15
    cloud = np.zeros((rows, columns), dtype=np.float32)
    for cells, strength in ((5, 1.0), (11, 0.6), (24, 0.3)):
        field = random.random((cells, 2 * cells), dtype=np.float32)
        cloud += strength * cv2.resize(field, (columns, rows), interpolation=cv2.INTER_CUBIC)
    cover = (amount * ((cloud - 0.9) * 1.6).clip(0, 1))[..., None] * (1 - 0.5 * share)
    white = np.array([236.0, 238, 242]) if weather in ("clear", "partly cloudy") else sky * 0.82
    if light.is_night or light.visibility == SKIES["dawn/dusk"][3]:
        white = sky * 1.25
    sky = sky * (1 - cover) + white * cover
    small = sky.clip(0, 255).astype(np.uint8)
    canvas.image[:horizon] = cv2.resize(small, (width, horizon), interpolation=cv2.INTER_LINEAR)
    count = 60
    x = np.linspace(0, width, count)
    steps = np.cumsum(random.normal(0, 1, count))
    top = (0.028 + 0.006 * (steps - steps.mean()) / max(1.0, steps.std())) * height
    top += random.uniform(0, 0.003, count) * height
    line = np.concatenate(
        [np.stack([x, horizon - top.clip(1)], 1), [[width, horizon + 2.0], [0, horizon + 2.0]]]
    )
    tone = light.shade(np.array([70.0, 88, 70]), 170.0)
    cv2.fillPoly(canvas.image, [line.astype(np.int32)], tone.tolist(), cv2.LINE_AA)


def paint_ground(
    canvas: Canvas, random: Generator, road: Road, *, ground: Colour, asphalt: Colour, is_wet: bool
) -> None:
    """Ground and asphalt with their texture."""
    camera, light = canvas.camera, canvas.light
    height, width = camera.size
    top = round(camera.horizon)
    y = np.arange(top, height) + 0.5 - camera.horizon
    depth = camera.focal * camera.height / y.clip(0.5)
    mask = np.zeros((height, width), dtype=np.uint8)
    strip = road.strip(road.left, road.right, camera.nearest_road, HORIZON, 80)
    cv2.fillPoly(mask, [canvas.pixels(strip)], 255, cv2.LINE_8, SHIFT)
    below = canvas.image[top:]
    for colour, where in ((ground, None), (asphalt, mask[top:])):
        rows = light.shade(np.array(colour), depth)
        if is_wet and where is not None:
            # A wet road mirrors the sky, the more the flatter one looks at it.
            mirror = (0.15 + 0.5 * np.exp(-y / (0.16 * height)))[:, None]
            rows = rows * (1 - mirror) + 0.8 * np.array(light.bottom) * mirror
        filled = np.repeat(rows.clip(0, 255).astype(np.uint8)[:, None], width, axis=1)
        if where is None:
            below[:] = filled
        else:
            cv2.copyTo(filled, where, below)
    _texture(canvas, random, top, strength=0.07 if light.is_night else 0.2)


def _texture(canvas: Canvas, random: Generator, top: int, *, strength: float) -> None:
    """Grain on the ground, drawn out along the road and finer with distance."""
    camera = canvas.camera
    height, width = camera.size
    across, along = 26.0, 8.0  # grains a metre
    shift_x, shift_z = random.uniform(0, 1000, 2)
    wide, far = camera.height * across, camera.focal * camera.height * along
    from_pixels = np.array([
        [wide, shift_x, -camera.centre * wide - shift_x * camera.horizon],
        [0, shift_z, far - shift_z * camera.horizon],
        [0, 1, -camera.horizon],
    ])  # fmt: skip
    rows = slice(min(height - 1, top + max(2, height // 40)), height)
    lower = np.array([[1, 0, 0], [0, 1, rows.start + 0.5], [0, 0, 1]])
    field = cv2.warpPerspective(
        grain(), from_pixels @ lower, (width, height - rows.start),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP,
    )  # fmt: skip
    part = canvas.image[rows]
    coloured = cv2.merge([field, field, field])
    cv2.addWeighted(part, 1.0, coloured, strength, -128 * strength, dst=part)


def paint_markings(canvas: Canvas, road: Road, *, wear: float) -> None:
    """Paint the markings; worn ones are nearer to the asphalt's grey."""
    start = canvas.camera.nearest_road
    edges = (start, 8.0, 14.0, 24.0, 40.0, FARTHEST)
    for marking in road.markings:
        bright = (224, 222, 214) if marking.category == "single white" else (214, 170, 52)
        red, green, blue = (wear * 105 + (1 - wear) * channel for channel in bright)
        if marking.style == "solid":
            for first, last in pairwise(edges):
                canvas.ground(road.paint(marking, first, last), (red, green, blue))
        else:
            canvas.ground(road.paint(marking, start, FARTHEST), (red, green, blue))


def paint_shadows(canvas: Canvas, outlines: Sequence[tuple[Floats, int]]) -> None:
    """Darken the ground inside outlines (n, 3), each by some 255ths, with soft rims."""
    top = round(canvas.camera.horizon)
    dark = np.zeros(canvas.camera.size, dtype=np.uint8)
    for outline, amount in outlines:
        cv2.fillPoly(dark, [canvas.pixels(outline)], amount, cv2.LINE_8, SHIFT)
    part, below = dark[top:], canvas.image[top:]
    side = 2 * round(4 * canvas.camera.scale) + 1
    kept = 255 - cv2.blur(part, (side, side))
    cv2.multiply(below, cv2.merge([kept, kept, kept]), dst=below, scale=1 / 255)


def finish(
    canvas: Canvas, random: Generator, *, is_rainy: bool, noise: float, blur: float
) -> Image:
    """What a camera does to a picture: glow of lamps, rain, blur, noise. Returns: the image."""
    image, light, scale = canvas.image, canvas.light, canvas.camera.scale
    height, width = canvas.camera.size
    if light.is_night or is_rainy:
        quarter = max(1, width // 4), max(1, height // 4)
        small = cv2.resize(image, quarter, interpolation=cv2.INTER_AREA)
        bright = np.asarray(small, dtype=np.uint8).clip(150) - np.uint8(150)
        spread = cv2.GaussianBlur(bright, (0, 0), max(1.0, 7 * scale))
        glow = cv2.resize(spread, (width, height), interpolation=cv2.INTER_LINEAR)
        cv2.addWeighted(image, 1.0, glow, 2.2 if light.is_night else 0.6, 0, dst=image)
    if is_rainy:
        _rain(image, random, scale)
    if blur > 0:
        cv2.GaussianBlur(image, (0, 0), blur, dst=image)
    y, x = (int(random.integers(MARGIN)) for _ in range(2))
    own = _grey_grain(canvas.camera.size)[y : y + height, x : x + width]
    strength = noise / 40
    return np.asarray(cv2.addWeighted(image, 1.0, own, strength, -128 * strength), dtype=np.uint8)


def _rain(image: Image, random: Generator, scale: float) -> None:
    """Streaks of falling drops, and a few drops on the windscreen, in place."""
    height, width = image.shape[:2]
    streaks = np.zeros_like(image)
    count = 260
    starts = random.uniform((0, 0), (width, height), (count, 2))
    lengths = random.uniform(10, 45, count) * scale
    ends = starts + np.stack([lengths * random.normal(0.12, 0.03, count), lengths], 1)
    lines = [pair for pair in np.stack([starts, ends], 1).astype(np.int32)]
    cv2.polylines(streaks, lines, False, (46, 48, 50), 1, cv2.LINE_AA)
    cv2.add(image, streaks, dst=image)
    for _ in range(int(random.integers(6, 22))):
        radius = int(max(2, random.uniform(4, 12) * scale))
        x, y = (int(random.integers(2 * radius, max(2 * radius + 1, side - 2 * radius)))
                for side in (width, height))  # fmt: skip
        part = image[y - radius : y + radius, x - radius : x + radius]
        if part.shape[:2] == (2 * radius, 2 * radius):
            inside = np.zeros((2 * radius, 2 * radius), dtype=np.uint8)
            cv2.circle(inside, (radius, radius), radius - 1, 255, -1, cv2.LINE_AA)
            turned = cv2.GaussianBlur(np.ascontiguousarray(part[::-1]), (0, 0), 0.4 * radius)
            cv2.copyTo(turned, inside, part)
