"""Procedural textures that look like photos: walls, facades, roads, signs, leaves.

Every function draws from the given generator and returns (h, w, 3) uint8 RGB, or (h, w, 4) with
alpha for cut-outs. Sizes are in pixels; `scale` is pixels per metre where things have a size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import cv2
import numpy as np

Colour = Sequence[float]

PAINTS = (
    (44, 66, 84),
    (84, 34, 34),
    (38, 62, 46),
    (52, 50, 52),
    (120, 88, 48),
    (92, 60, 40),
    (60, 92, 104),
    (150, 138, 112),
    (30, 40, 62),
)
WORDS = (
    "BAKERY CAFE BOOKS HOTEL PIZZA FLORIST OPTIK MARKET TAILOR BANK APOTHEKE SHOES TEA ROOM "
    "BIKES MUSIC TOYS DELI BARBER KIOSK TOOLS FRUIT PAINT PHOTO WINE CINEMA TABAC GARAGE"
).split()
WALLS = (
    (178, 92, 70),
    (205, 190, 160),
    (168, 164, 155),
    (196, 160, 104),
    (150, 120, 104),
    (214, 206, 196),
    (140, 150, 158),
    (186, 132, 110),
    (226, 214, 178),
)
FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
)


def noise(
    rng: np.random.Generator,
    size: tuple[int, int],
    cells: tuple[int, int] = (4, 4),
    octaves: int = 6,
    persistence: float = 0.55,
) -> np.ndarray:
    """Smooth noise of several octaves, (h, w) float32 of mean about 0 and deviation 1; repeats.

    cells: cells along x and y of the first octave; each octave has twice as many.
    """
    width, height = size
    total = np.zeros((height, width), np.float32)
    # Octaves without fine detail are summed at a quarter of the size: a tenth of the work.
    small = (max(width // 4, 1), max(height // 4, 1))
    coarse = np.zeros(small[::-1], np.float32)
    amplitude = 1.0
    for octave in range(octaves):
        nx, ny = (min(c << octave, s) for c, s in zip(cells, size, strict=True))
        grid = rng.standard_normal((ny, nx), dtype=np.float32)
        if nx * 2 <= small[0] and ny * 2 <= small[1]:
            coarse += amplitude * _enlarge(grid, small)
        else:
            total += amplitude * _enlarge(grid, size)
        if nx == width and ny == height:
            break
        amplitude *= persistence
    total += _enlarge(coarse, size)
    return total / max(float(total.std()), 1e-6)


def _enlarge(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolate a grid (n, m) that repeats to `size` (width, height), at least its own."""
    (width, height), (ny, nx) = size, grid.shape
    if (nx, ny) == size:
        return grid
    fine = cv2.resize(
        np.pad(grid, 2, "wrap"),
        (round(width * (nx + 4) / nx), round(height * (ny + 4) / ny)),
        interpolation=cv2.INTER_CUBIC,
    )
    left, top = round(2 * width / nx), round(2 * height / ny)
    return fine[top : top + height, left : left + width]


def coloured(
    field: np.ndarray, colour: Colour, contrast: float, hue: np.ndarray | None = None
) -> np.ndarray:
    """A field (h, w) as shades of a colour: colour * (1 + contrast * field), float32.

    hue: a second field that shifts red against blue a little.
    """
    image = np.asarray(colour, np.float32) * (1 + np.float32(contrast) * field[..., None])
    if hue is not None:
        image[..., 0] *= 1 + np.float32(0.03) * hue
        image[..., 2] *= 1 - np.float32(0.03) * hue
    return image


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Clip to 0..255 and round to uint8."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator) -> np.ndarray:
    """A colour that people paint shops in, (3,) float."""
    return np.asarray(PAINTS[rng.integers(len(PAINTS))], float) * rng.uniform(0.8, 1.3)


def _ink(rng: np.random.Generator) -> np.ndarray:
    """A printed colour: any hue, seldom a pure one, (3,) float."""
    grey, colour = rng.uniform(15, 245), rng.integers(0, 256, 3)
    return grey + rng.uniform(0.1, 0.7) * (colour - grey)


def plaster(rng: np.random.Generator, size: tuple[int, int], colour: Colour) -> np.ndarray:
    """A rendered wall with grain, blotches and streaks of rain."""
    image = coloured(noise(rng, size, (3, 3), 8, 0.7), colour, 0.05, noise(rng, size, (2, 2), 3))
    streaks = noise(rng, size, (40, 2), 3, 0.6)
    image *= (1 - 0.045 * np.clip(streaks, 0, 3))[..., None]
    return image + rng.normal(0, 3, image.shape[:2]).astype(np.float32)[..., None]


def bricks(
    rng: np.random.Generator,
    size: tuple[int, int],
    colour: Colour,
    brick: tuple[float, float] = (16, 6),
    mortar: Colour = (176, 168, 156),
) -> np.ndarray:
    """A wall in running bond, float32; brick (width, height) in pixels with its joint."""
    width, height = size
    rows = max(2, 2 * round(height / brick[1] / 2))
    columns = max(2, round(width / brick[0]))
    y = np.arange(height, dtype=np.float32)[:, None] * (rows / height)
    x = np.arange(width, dtype=np.float32)[None] * (columns / width)
    row = np.floor(y).astype(int)
    x = x + 0.5 * (row % 2)
    column = np.floor(x).astype(int) % columns
    across, down = x % 1, y % 1
    shade = rng.normal(1, 0.11, (rows, columns)).astype(np.float32)
    warm = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    row = np.broadcast_to(row, column.shape)
    image = coloured(noise(rng, size, (8, 8), 7, 0.8), colour, 0.06, warm[row, column])
    image *= shade[row, column][..., None]
    # Joints: one pixel or a tenth of the brick, with a shadow above each brick's lower edge.
    joint_x, joint_y = max(1 / brick[0], 0.05), max(1 / brick[1], 0.12)
    joint = (across < joint_x) | (down < joint_y)
    grout = coloured(noise(rng, size, (16, 16), 5), mortar, 0.06)
    image = np.where(joint[..., None], grout, image)
    image *= np.where((down > 1 - joint_y) & ~joint, 0.86, 1)[..., None].astype(np.float32)
    image *= (1 + 0.05 * noise(rng, size, (2, 2), 3))[..., None]
    return image


def stone_blocks(rng: np.random.Generator, size: tuple[int, int], colour: Colour) -> np.ndarray:
    """Ashlar: large blocks of one colour with narrow dark joints, float32."""
    block = float(rng.uniform(34, 60))
    colour = 0.45 * np.asarray(colour, float) + 0.55 * np.array((168, 162, 150))
    return bricks(rng, size, colour, (block, block * 0.5), tuple(0.62 * c for c in colour))


def gravel(
    rng: np.random.Generator, size: tuple[int, int], colour: Colour = (128, 124, 118)
) -> np.ndarray:
    """Stones of many sizes, uint8."""
    width, height = size
    image = np.empty((height, width, 3), np.float32)
    image[:] = np.asarray(colour, np.float32) * 0.35
    count = width * height // 60
    centres = rng.uniform(0, 1, (count, 2)) * (width, height)
    radii = rng.gamma(3, 1.2, count) + 1
    shades = np.clip(rng.normal(0.95, 0.25, (count, 1)) + rng.normal(0, 0.05, (count, 3)), 0.3, 1.8)
    turns = rng.uniform(0, 180, count)
    for centre, radius, shade, turn in zip(centres, radii, shades, turns, strict=True):
        at = (int(centre[0]), int(centre[1]))
        axes = (int(radius + 1), int(0.7 * radius + 1))
        tone = np.asarray(colour) * shade
        cv2.ellipse(image, at, axes, turn, 0, 360, (tone * 0.7).tolist(), -1, cv2.LINE_AA)
        at = (at[0] - 1, at[1] - 1)
        axes = (max(axes[0] - 1, 1), max(axes[1] - 1, 1))
        cv2.ellipse(image, at, axes, turn, 0, 360, tone.tolist(), -1, cv2.LINE_AA)
    image *= (1 + 0.08 * noise(rng, size, (32, 32), 5, 0.9))[..., None]
    return to_bytes(image)


def wood(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Planks with grain along x, uint8."""
    width, height = size
    planks = int(rng.integers(3, 8))
    base = np.array([(150, 104, 62), (120, 84, 56), (176, 138, 92), (138, 120, 100)])[
        rng.integers(4)
    ]
    grain = noise(rng, size, (3, 48), 5, 0.7)
    rings = np.sin(6 * noise(rng, size, (2, 6), 4, 0.4) + 0.5 * grain)
    image = coloured(0.6 * grain + 0.8 * rings, base, 0.11)
    edges = np.linspace(0, height, planks + 1).astype(int)
    for top, bottom in itertools.pairwise(edges):
        image[top:bottom] *= rng.normal(1, 0.1)
        shift = int(rng.integers(width))
        image[top:bottom] = np.roll(image[top:bottom], shift, axis=1)
        image[top : top + 2] *= 0.45
        end = int(rng.integers(width))
        image[top:bottom, end : end + 2] *= 0.5
        for side in (-8, 9):
            cv2.circle(image, ((end + side) % width, (top + bottom) // 2), 2, (60, 56, 52), -1)
    return to_bytes(image)


def foliage(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A hedge: leaves over leaves, uint8."""
    return _leaves(rng, size, np.full(size[::-1], 1.0))[..., :3]


def leaf_clump(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A few twigs full of leaves on a transparent ground, (h, w, 4) uint8."""
    width, height = size
    clump = np.zeros((height, width), np.float32)
    for _ in range(9):
        at = (rng.normal(0, 0.15, 2) + 0.5).clip(0.24, 0.76) * size
        cv2.circle(clump, at.astype(int).tolist(), int(rng.uniform(0.1, 0.2) * width), 1.0, -1)
    clump = cv2.GaussianBlur(clump, (0, 0), width * 0.05)
    clump *= 1 + 0.45 * noise(rng, size, (9, 9), 4)
    return _leaves(rng, size, clump)


def _leaves(rng: np.random.Generator, size: tuple[int, int], where: np.ndarray) -> np.ndarray:
    """Leaves on the places where `where` (h, w) exceeds a half, brighter towards the top."""
    width, height = size
    hue = rng.normal(0, 10, 3)
    base = np.array([92, 122, 52]) + hue
    image = np.zeros((height, width, 4), np.uint8)
    image[..., :3] = to_bytes(np.full((height, width, 3), base * 0.45))
    count = width * height // 10
    at = rng.random((count, 2)) * (width, height)
    at = at[where[at[:, 1].astype(int), at[:, 0].astype(int)] > 0.5]
    order = np.linspace(0, 1, len(at))
    shade = 0.42 + 0.6 * order + rng.normal(0, 0.16, len(at)) - 0.25 * at[:, 1] / height
    tones = base * shade[:, None] + rng.normal(0, 7, (len(at), 3))
    turns = rng.uniform(0, 180, len(at))
    sizes = rng.uniform(1.5, 4.2, len(at)) * width / 320
    for centre, tone, turn, length in zip(at, np.clip(tones, 8, 250), turns, sizes, strict=True):
        place = (int(centre[0]), int(centre[1]))
        axes = (int(length + 1), int(0.5 * length + 1))
        cv2.ellipse(image, place, axes, turn, 0, 360, (*tone.tolist(), 255), -1)
    if where.min() >= 0.5:
        image[..., 3] = 255
    return image


def sign(rng: np.random.Generator, size: tuple[int, int], word: str | None = None) -> np.ndarray:
    """A painted sign with a word, a frame and some dirt, uint8."""
    width, height = size
    ground = _paint(rng) if rng.random() < 0.7 else np.array((226, 218, 196)) * rng.uniform(0.8, 1)
    ink = np.array([245, 240, 226]) if ground.mean() < 130 else rng.integers(10, 80, 3)
    image = coloured(noise(rng, size, (3, 2), 6, 0.6), ground, 0.04)
    word = word or str(rng.choice(WORDS))
    font = FONTS[rng.integers(len(FONTS))]
    (w, h), _ = cv2.getTextSize(word, font, 1.0, 2)
    factor = min(0.86 * width / w, 0.6 * height / h)
    thick = max(1, round(2.6 * factor))
    origin = (int((width - w * factor) / 2), int((height + h * factor) / 2))
    cv2.putText(image, word, origin, font, factor, ink.tolist(), thick, cv2.LINE_AA)
    inset = max(1, height // 16)
    corner = (width - 1 - inset, height - 1 - inset)
    cv2.rectangle(image, (inset, inset), corner, (0.6 * ink + 0.4 * ground).tolist(), inset)
    image *= (1 - 0.05 * np.clip(noise(rng, size, (6, 4), 5), 0, 2))[..., None]
    return to_bytes(image)


def poster(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Shapes and words in all colours, uint8."""
    width, height = size
    image = coloured(noise(rng, size, (2, 2), 8, 0.7), _ink(rng), 0.12)
    for _ in range(int(rng.integers(5, 14))):
        tone = _ink(rng).tolist()
        at = (rng.random(2) * size).astype(int)
        reach = (rng.uniform(0.05, 0.3, 2) * min(size)).astype(int) + 2
        kind = rng.integers(4)
        if kind == 0:
            cv2.circle(image, at.tolist(), int(reach[0]), tone, -1, cv2.LINE_AA)
        elif kind == 1:
            cv2.rectangle(image, (at - reach).tolist(), (at + reach).tolist(), tone, -1)
        elif kind == 2:
            corners = at + rng.normal(0, 1, (int(rng.integers(3, 7)), 2)) * reach
            cv2.fillPoly(image, [corners.astype(np.int32)], tone, cv2.LINE_AA)
        else:
            end = at + (rng.normal(0, 2, 2) * reach).astype(int)
            cv2.line(image, at.tolist(), end.tolist(), tone, int(rng.integers(1, 9)), cv2.LINE_AA)
    for _ in range(int(rng.integers(1, 5))):
        word = str(rng.choice(WORDS))
        at = (rng.random(2) * (0.6 * width, height)).astype(int).tolist()
        tone = _ink(rng).tolist()
        font = FONTS[rng.integers(len(FONTS))]
        factor = rng.uniform(0.4, 2.2) * width / 256
        cv2.putText(image, word, at, font, factor, tone, max(1, round(2 * factor)), cv2.LINE_AA)
    image *= (1 + 0.04 * noise(rng, size, (32, 32), 4, 0.8))[..., None]
    return to_bytes(image)


def printed_page(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A page with headings, columns of text and a picture, uint8."""
    width, height = size
    image = coloured(noise(rng, size, (2, 2), 5), (232, 228, 216), 0.02)
    y = int(0.09 * height)
    ink = (40, 40, 46)
    title = " ".join(rng.choice(WORDS, 2))
    factor = 0.8 * width / cv2.getTextSize(title, FONTS[2], 1.0, 2)[0][0]
    cv2.putText(
        image, title, (int(0.08 * width), y), FONTS[2], factor, ink, max(1, round(2 * factor)),
        cv2.LINE_AA,
    )  # fmt: skip
    step = max(6, height // 40)
    columns = int(rng.integers(1, 4))
    for column in range(columns):
        left = width * (0.08 + 0.86 * column / columns)
        line = y + 2 * step
        while line < 0.95 * height:
            text = "".join(chr(c) for c in rng.integers(97, 123, 60))
            text = "".join(" " if rng.random() < 0.16 else c for c in text)
            room = 0.8 * width / columns * (1 if rng.random() < 0.85 else rng.random())
            size_one = step / 34
            per = cv2.getTextSize("n", FONTS[0], size_one, 1)[0][0]
            cv2.putText(
                image, text[: int(room / max(per, 1))], (int(left), line), FONTS[0], size_one, ink,
                1, cv2.LINE_AA,
            )  # fmt: skip
            line += step
    left, top = int(width * rng.uniform(0.05, 0.5)), int(height * rng.uniform(0.2, 0.6))
    wide, high = int(0.4 * width), int(0.25 * height)
    image[top : top + high, left : left + wide] = poster(rng, (wide, high))
    return to_bytes(image)


def tiles(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Square slabs, each of its own shade, some with a motif, uint8."""
    width, height = size
    count = int(rng.integers(3, 9))
    colour = np.asarray(WALLS[rng.integers(len(WALLS))], float)
    image = bricks(rng, size, colour, (width / count, height / count), tuple(0.5 * colour))
    for _ in range(count):
        column, row = rng.integers(0, count, 2)
        at = (int((column + 0.5) * width / count), int((row + 0.5) * height / count))
        tone = (colour * rng.uniform(0.4, 1.4)).tolist()
        cv2.circle(image, at, width // count // 4, tone, int(rng.integers(1, 6)), cv2.LINE_AA)
    return to_bytes(image)


def rough(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Rock: noise of three colours with cracks, uint8."""
    first, second = (_ink(rng).astype(np.float32) for _ in range(2))
    blend = 1 / (1 + np.exp(-2 * noise(rng, size, (3, 3), 7, 0.65)))[..., None]
    image = first * blend + second * (1 - blend)
    image *= (1 + 0.16 * noise(rng, size, (8, 8), 7, 0.75))[..., None]
    cracks = abs(noise(rng, size, (3, 3), 5, 0.5)) < 0.03
    image[cracks] *= 0.45
    return to_bytes(image)


def facade(
    rng: np.random.Generator,
    width_m: float,
    height_m: float,
    scale: float,
    shop: bool = True,
    colour: Colour | None = None,
) -> np.ndarray:
    """The front of a house: wall, windows by floors, cornices, a shop below; uint8.

    Light comes from the upper left, so every reveal has its shadow at the top and left.
    """
    width, height = round(width_m * scale), round(height_m * scale)
    size = (width, height)
    if colour is None:
        colour = np.asarray(WALLS[rng.integers(len(WALLS))], float) * rng.uniform(0.85, 1.08)
    kind = rng.integers(3)
    if kind == 0:
        image = bricks(rng, size, colour, (0.24 * scale, 0.085 * scale))
    elif kind == 1:
        image = stone_blocks(rng, size, colour)
    else:
        image = plaster(rng, size, colour)
    canvas = _Canvas(image, scale)
    trim = np.clip(np.asarray(colour) * rng.uniform(1.1, 1.4), 0, 238)
    ground = 3.9 if shop else 0.9
    floor = float(rng.uniform(2.9, 3.4))
    floors = max(1, int((height_m - ground - 0.7) / floor))
    floor = (height_m - ground - 0.7) / floors
    columns = max(1, round((width_m - 0.6) / rng.uniform(1.9, 2.9)))
    pitch = width_m / columns
    style = _WindowStyle(rng, pitch, floor, trim)
    for level in range(floors):
        top = 0.7 + level * floor
        if rng.random() < 0.75:  # a band between the floors
            canvas.box(0, top + floor - 0.16, width_m, 0.16, trim * 0.97, rng, shade=True)
        for column in range(columns):
            style.draw(canvas, rng, (column + 0.5) * pitch, top + 0.45 * floor)
    # Cornice with brackets.
    canvas.box(0, 0.12, width_m, 0.36, trim, rng, shade=True)
    for x in np.arange(0.1, width_m, 0.42):
        canvas.box(x, 0.34, 0.16, 0.2, trim * 0.9, rng, shade=True)
    canvas.box(0, 0, width_m, 0.14, trim * 0.72, rng)
    if shop:
        _shop_front(canvas, rng, width_m, height_m, ground)
    else:
        canvas.box(0, height_m - 0.75, width_m, 0.75, np.asarray(colour) * 0.7, rng, shade=True)
    if rng.random() < 0.8:  # a downpipe
        x = 0.12 if rng.random() < 0.5 else width_m - 0.24
        canvas.box(x, 0.4, 0.11, height_m - 0.4, np.array([104, 108, 110.0]), rng, shade=True)
    # Dirt: darker towards the ground and under the cornice.
    y = np.linspace(0, height_m, height, dtype=np.float32)[:, None]
    dirt = 0.16 * np.exp(-(height_m - y) / 0.8) + 0.12 * np.exp(-abs(y - 0.5) / 0.5)
    image *= (1 - dirt * (1 + 0.5 * noise(rng, size, (8, 3), 5)).clip(0, 2))[..., None]
    return to_bytes(image)


class _Canvas:
    """Boxes in metres on a float image; the origin is the top left."""

    def __init__(self, image: np.ndarray, scale: float) -> None:
        self.image = image
        self.scale = scale

    def area(self, x: float, y: float, w: float, h: float) -> np.ndarray:
        """The part of the image under a box, as a view."""
        left, right = (max(0, round(v * self.scale)) for v in (x, x + w))
        top, bottom = (max(0, round(v * self.scale)) for v in (y, y + h))
        return self.image[top:bottom, left:right]

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        colour: np.ndarray,
        rng: np.random.Generator,
        shade: bool = False,
    ) -> None:
        """Fill a box with a grainy colour; with shade it stands out and throws a shadow."""
        if shade:
            self.area(x + 0.02, y + h, w, 0.09)[:] *= 0.68
            self.area(x + w, y + 0.04, 0.05, h)[:] *= 0.76
        part = self.area(x, y, w, h)
        if part.size:
            part[:] = colour * rng.normal(1, 0.025, (*part.shape[:2], 1)).astype(np.float32)
            if shade and part.shape[0] > 2:
                part[0] *= 1.1
                part[-1] *= 0.8

    def pane(self, x: float, y: float, w: float, h: float, rng: np.random.Generator) -> None:
        """Glass: a dark room, the sky's reflection, something behind, a shadow of the reveal."""
        part = self.area(x, y, w, h)
        if not part.size:
            return
        high, wide = part.shape[:2]
        down = np.linspace(0, 1, high, dtype=np.float32)[:, None, None]
        across = np.linspace(0, 1, wide, dtype=np.float32)[None, :, None]
        room = np.array([34, 40, 48]) * rng.uniform(0.7, 1.4)
        sky = np.array([128, 152, 182]) * rng.uniform(0.5, 1.1)
        edge = rng.uniform(0.2, 1.1)
        slant = rng.uniform(-0.6, 0.6)
        reflection = 1 / (1 + np.exp((down + slant * across - edge) * 9))
        part[:] = room + (sky - room) * reflection * rng.uniform(0.35, 0.9)
        kind = rng.random()
        if kind < 0.35:  # curtains at both sides
            cloth = np.array([212, 204, 190]) * rng.uniform(0.6, 1)
            reach = rng.uniform(0.15, 0.4)
            folds = 0.85 + 0.15 * np.sin(across * wide * 0.9)
            mask = (across < reach) | (across > 1 - reach)
            mask = mask & (down >= 0)
            part[:] = np.where(mask, cloth * folds * (0.75 + 0.25 * (1 - down)), part)
        elif kind < 0.6:  # a blind, drawn to some height
            drawn = int(high * rng.uniform(0.15, 0.9))
            slats = 0.82 + 0.18 * (np.arange(drawn) % 4 > 0)
            part[:drawn] = np.array([186, 182, 172]) * slats[:, None, None] * rng.uniform(0.7, 1.1)
        elif kind < 0.7:  # a lamp is on
            part[:] = part * 0.5 + np.array([150, 120, 70]) * np.exp(-3 * abs(across - 0.5))
        part[: max(1, round(0.07 * self.scale))] *= 0.5
        part[:, : max(1, round(0.05 * self.scale))] *= 0.6


class _WindowStyle:
    """One kind of window for a whole facade; curtains and blinds differ from window to window."""

    def __init__(
        self, rng: np.random.Generator, pitch: float, floor: float, trim: np.ndarray
    ) -> None:
        self.width = float(min(rng.uniform(0.95, 1.5), 0.72 * pitch))
        self.height = float(min(rng.uniform(1.5, 1.95), 0.62 * floor))
        self.bars = (int(rng.integers(1, 3)), int(rng.integers(1, 4)))
        self.frame = np.array([(228, 226, 220), (92, 66, 48), (62, 70, 76), (196, 196, 186)])[
            rng.integers(4)
        ].astype(float)
        self.trim = trim
        self.shutters = rng.random() < 0.35 and pitch > 1.75 * self.width
        self.shutter = np.array([(72, 96, 78), (92, 66, 56), (80, 92, 116)])[rng.integers(3)]
        self.lintel = rng.random() < 0.7
        self.rail = rng.random() < 0.3
        self.flowers = rng.random() < 0.4

    def draw(self, canvas: _Canvas, rng: np.random.Generator, x: float, y: float) -> None:
        """Draw one window with its middle at (x, y) metres."""
        w, h = self.width, self.height
        left, top = x - w / 2, y - h / 2
        canvas.box(left - 0.11, top - 0.11, w + 0.22, h + 0.2, self.trim, rng, shade=True)
        if self.lintel:
            canvas.box(left - 0.2, top - 0.27, w + 0.4, 0.17, self.trim * 0.95, rng, shade=True)
        canvas.box(left, top, w, h, self.frame, rng)
        across, down = self.bars
        for i in range(across):
            for j in range(down):
                canvas.pane(
                    left + 0.06 + i * w / across,
                    top + 0.06 + j * h / down,
                    w / across - 0.1,
                    h / down - 0.1,
                    rng,
                )
        canvas.box(left - 0.16, top + h + 0.06, w + 0.32, 0.1, self.trim, rng, shade=True)
        if self.shutters:
            for side in (left - 0.13 - w / 2, left + w + 0.13):
                canvas.box(side, top - 0.04, w / 2, h + 0.08, self.shutter * 1.0, rng, shade=True)
                for slat in np.arange(top + 0.05, top + h - 0.05, 0.12):
                    canvas.area(side + 0.05, slat, w / 2 - 0.1, 0.04)[:] *= 0.66
        if self.rail:
            for bar in np.arange(left - 0.1, left + w + 0.1, 0.11):
                canvas.area(bar, top + 0.55 * h, 0.035, 0.5 * h)[:] = (36, 38, 40)
            canvas.box(left - 0.12, top + 0.54 * h, w + 0.24, 0.05, np.array([36, 38, 40.0]), rng)
        elif self.flowers and rng.random() < 0.6:
            part = canvas.area(left, top + h - 0.14, w, 0.26)
            if part.size:
                dots = rng.random(part.shape[:2])
                part[dots < 0.7] = (52, 92, 40)
                part[dots < 0.2] = np.array([(196, 40, 52), (226, 190, 60), (204, 90, 160)])[
                    rng.integers(3)
                ]


def _shop_front(
    canvas: _Canvas, rng: np.random.Generator, width_m: float, height_m: float, ground: float
) -> None:
    """The ground floor: signboard, awning, display windows, a door."""
    top = height_m - ground
    base = _paint(rng)
    canvas.box(0, top + 0.1, width_m, ground - 0.1, base, rng, shade=True)
    count = max(1, round(width_m / 5.5))
    pitch = width_m / count
    for shop in range(count):
        left = shop * pitch
        board = canvas.area(left + 0.3, top + 0.2, pitch - 0.6, 0.72)
        if board.shape[0] > 8 and board.shape[1] > 8:
            board[:] = sign(rng, board.shape[1::-1])
        canvas.area(left + 0.3, top + 0.92, pitch - 0.6, 0.1)[:] *= 0.6
        door = rng.random() < 0.5
        door_left = left + (0.35 if door else pitch - 1.35)
        panes_left = left + (1.55 if door else 0.35)
        panes = pitch - 1.95
        frame = base * 0.6
        canvas.box(door_left, top + 1.25, 1.0, ground - 1.3, frame, rng, shade=True)
        canvas.pane(door_left + 0.14, top + 1.4, 0.72, 1.45, rng)
        canvas.box(door_left + 0.84, top + 2.5, 0.05, 0.22, np.array([210, 200, 150.0]), rng)
        parts = max(1, round(panes / 1.8))
        for pane in range(parts):
            x, w = panes_left + pane * panes / parts, panes / parts - 0.08
            canvas.box(x, top + 1.25, w, ground - 1.85, frame, rng, shade=True)
            _display(canvas, rng, x + 0.07, top + 1.32, w - 0.14, ground - 2.0)
        canvas.box(left, height_m - 0.5, pitch, 0.5, base * 0.75, rng)
        if rng.random() < 0.6:  # an awning: stripes that fade towards the lower edge
            part = canvas.area(left + 0.25, top + 0.98, pitch - 0.5, 0.62)
            if part.size:
                stripe = np.arange(part.shape[1]) // max(2, round(0.3 * canvas.scale)) % 2
                tone = _paint(rng) * 1.2
                colours = np.where(stripe[:, None] == 0, tone, (232, 226, 212))
                fall = np.linspace(1.05, 0.72, part.shape[0])[:, None, None]
                part[:] = colours[None] * fall
                canvas.area(left + 0.25, top + 1.6, pitch - 0.5, 0.14)[:] *= 0.55


def _display(
    canvas: _Canvas, rng: np.random.Generator, x: float, y: float, w: float, h: float
) -> None:
    """A shop window: shelves of coloured goods behind a faint reflection."""
    part = canvas.area(x, y, w, h)
    if not part.size:
        return
    part[:] = np.array([46, 44, 42]) * rng.uniform(0.6, 1.5)
    shelves = int(rng.integers(2, 5))
    for shelf in range(shelves):
        floor = y + h * (shelf + 1) / shelves - 0.06
        at = x + 0.04
        while at < x + w - 0.1:
            wide = rng.uniform(0.06, 0.28)
            high = rng.uniform(0.1, 0.8 * h / shelves)
            tone = rng.integers(30, 230, 3) * rng.uniform(0.5, 1)
            canvas.area(at, floor - high, min(wide, x + w - at), high)[:] = tone
            canvas.area(at, floor - high * 0.6, min(wide, x + w - at), 0.04)[:] = 255 - tone
            at += wide + rng.uniform(0.01, 0.12)
        canvas.area(x, floor, w, 0.05)[:] = (120, 104, 84)
    high, wide = part.shape[:2]
    down = np.linspace(0, 1, high, dtype=np.float32)[:, None, None]
    part[:] = part * 0.85 + np.array([120, 140, 160]) * 0.28 * (1 - down)
    part[: max(1, round(0.08 * canvas.scale))] *= 0.55


def photo_like(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One of all the kinds, drawn at random, (h, w, 3) uint8."""
    width, height = size

    def wall(kind: Callable) -> np.ndarray:
        return to_bytes(kind(rng, size, WALLS[rng.integers(len(WALLS))]))

    kinds: list[tuple[float, Callable[[], np.ndarray]]] = [
        (3, lambda: facade(rng, 10, 10 * height / width, width / 10, bool(rng.integers(2)))),
        (2, lambda: poster(rng, size)),
        (1, lambda: printed_page(rng, size)),
        (1, lambda: sign(rng, size)),
        (1, lambda: wall(bricks)),
        (1, lambda: wall(stone_blocks)),
        (0.5, lambda: wall(plaster)),
        (1, lambda: gravel(rng, size, WALLS[rng.integers(len(WALLS))])),
        (1, lambda: wood(rng, size)),
        (1, lambda: foliage(rng, size)),
        (1, lambda: tiles(rng, size)),
        (1.5, lambda: rough(rng, size)),
    ]
    weights = np.array([weight for weight, _ in kinds])
    return kinds[rng.choice(len(kinds), p=weights / weights.sum())][1]()
