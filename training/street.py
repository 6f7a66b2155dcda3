"""A street in a town, and a drive through it: the scene of the sample camera bag.

The street runs along +x and meets another at a junction, where the drive turns left into it.
Units are metres, z is up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from scfeat_training import textures as tx
from scfeat_training.render import Atlas, Camera, Light, World

ROAD = 5.2  # half width of the carriageway
WALK = 8.4  # half width between the fronts
LANE = 1.7  # distance of a lane's middle from the road's
CURB = 0.14
TEXELS = 64  # texels per metre of facades and roads
EYE = 1.55  # height of the camera
NEAR_END, FAR_END = -14.0, 96.0  # of the first street
SIDE_END = 62.0  # of the second one, both ways


@dataclass(frozen=True)
class Drive:
    """Camera poses over time: world-to-camera R (N, 3, 3), t (N, 3), times (N,) in seconds."""

    R: np.ndarray
    t: np.ndarray
    times: np.ndarray


def drive(seconds: float = 10.0, rate: float = 15.0) -> Drive:
    """A drive that weaves a little, slows down, turns left and speeds up again."""
    fine = 1 / 600
    times = np.arange(0, seconds + fine, fine)
    phase = times / seconds
    # Metres per second: slow in the turn.
    speed = 6.6 - 3.1 * np.exp(-(((phase - 0.66) / 0.16) ** 2)) + 0.5 * np.sin(5 * phase)
    way = np.cumsum(speed) * fine
    turn_start, turn_length = 0.53, 0.29
    ramp = np.clip((phase - turn_start) / turn_length, 0, 1)
    heading = np.pi / 2 * (ramp**3 * (ramp * (6 * ramp - 15) + 10))  # no jump in acceleration
    heading += 0.05 * np.sin(2 * np.pi * way / 24) * (1 - ramp)
    step = np.diff(way, prepend=0)
    x = np.cumsum(np.cos(heading) * step)
    y = -LANE + np.cumsum(np.sin(heading) * step)

    frames = np.round(np.arange(0, seconds, 1 / rate) / fine).astype(int)
    yaw_rate = np.gradient(heading, fine)
    R, t = [], []
    for i in frames:
        s = times[i]
        z = EYE + 0.012 * np.sin(2 * np.pi * 1.3 * s) + 0.006 * np.sin(2 * np.pi * 3.1 * s + 1)
        pitch = 0.006 * np.sin(2 * np.pi * 0.9 * s) + 0.004 * np.sin(2 * np.pi * 2.3 * s)
        roll = 0.012 * np.sin(2 * np.pi * 0.35 * s + 0.5) + 0.035 * yaw_rate[i]
        look = heading[i] + 0.03 * np.sin(2 * np.pi * 0.21 * s) + 0.22 * yaw_rate[i]
        eye = np.array([x[i], y[i], z])
        ahead = eye + np.array([np.cos(look), np.sin(look), 0.02 + pitch])
        camera = Camera.look_at(eye, ahead, np.eye(3), (1, 1), roll)
        R.append(camera.R)
        t.append(camera.t)
    return Drive(np.array(R), np.array(t), times[frames])


def junction(trip: Drive) -> float:
    """The x of the second street's middle, such that the drive ends in its right-hand lane."""
    end = -trip.R[-1].T @ trip.t[-1]
    return float(end[0] - LANE)


@dataclass
class _Builder:
    rng: np.random.Generator
    textures: list[np.ndarray] = field(default_factory=list)
    faces: list[tuple] = field(default_factory=list)

    def texture(self, image: np.ndarray) -> int:
        self.textures.append(image)
        return len(self.textures) - 1

    def face(self, *args: object, **options: object) -> None:
        self.faces.append(("add_face", args, options))

    def box(
        self,
        low: tuple[float, float, float],
        high: tuple[float, float, float],
        sides: list[int],
        turn: float = 0.0,
        tint: tuple[float, float, float] = (1, 1, 1),
        sts: list | None = None,
    ) -> None:
        """A box between two corners, turned about its vertical axis."""
        low_, high_ = np.array(low, float), np.array(high, float)
        half = (high_ - low_) / 2
        c, s = np.cos(turn), np.sin(turn)
        axes = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) * half[:, None]
        self.faces.append(("add_box", ((low_ + high_) / 2, axes, sides, sts, tint), {}))


def street(seed: int, trip: Drive) -> World:
    """Build the street around a drive. The same seed gives the same street."""
    b = _Builder(np.random.default_rng((seed, 7)))
    cross = junction(trip)
    _sky(b)
    _ground(b, cross)
    _buildings(b, cross)
    _furniture(b, cross)
    light = Light(
        sun=np.array([-0.42, -0.5, 0.72]),
        sun_colour=(0.95, 0.88, 0.76),
        sky_colour=(0.55, 0.59, 0.67),
        haze=420.0,
        shadow_centre=(40.0, 4.0, 0.0),
        shadow_reach=90.0,
    )
    world = World(Atlas(b.textures, 16384), light)
    for method, args, options in b.faces:
        getattr(world, method)(*args, **options)
    return world


def _sky(b: _Builder, reach: float = 2500.0, pixels: int = 512) -> None:
    """Five sides of a cube with a sky that is brighter at the horizon, and clouds."""
    clouds = tx.noise(b.rng, (1024, 1024), (3, 3), 7, 0.55)
    centre = np.array([40.0, 0.0, 0.0])
    sides = [  # middle of the side, right, down
        ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
        ((-1, 0, 0), (0, 1, 0), (0, 0, -1)),
        ((0, 1, 0), (1, 0, 0), (0, 0, -1)),
        ((0, -1, 0), (-1, 0, 0), (0, 0, -1)),
        ((0, 0, 1), (1, 0, 0), (0, 1, 0)),
    ]
    at = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    for middle, right, down in sides:
        ray = (
            np.array(middle)
            + at[None, :, None] * np.array(right)
            + at[:, None, None] * np.array(down)
        )
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        up = ray[..., 2].clip(0, 1)
        blue = np.array([104, 152, 214]) * (1 - 0.2 * up[..., None])
        low = np.array([214, 224, 232])
        mix = np.exp(-4.5 * up)[..., None]
        colour = blue * (1 - mix) + low * mix
        # Clouds lie in a plane above: looked up where the ray meets it.
        plane = ray[..., :2] / (up[..., None] + 0.12)
        u = ((plane[..., 0] * 190) % 1023).astype(np.float32)
        v = ((plane[..., 1] * 190) % 1023).astype(np.float32)
        density = cv2.remap(clouds, u, v, cv2.INTER_LINEAR)
        cover = 1 / (1 + np.exp(-3.2 * (density - 0.35)))
        cover *= (1 - np.exp(-9 * up)) * 0.9
        shade = 246 - 26 * np.clip(density - 0.6, 0, 2)
        white = np.stack([shade, shade * 1.0, shade * 1.01], -1)
        colour = colour * (1 - cover[..., None]) + white * cover[..., None]
        texture = b.texture(tx.to_bytes(colour))
        corner = centre + reach * (np.array(middle) - right - np.array(down))
        b.face(corner, 2 * reach * np.array(right), 2 * reach * np.array(down), texture, lit=False)


def _asphalt(b: _Builder, length: float, width: float) -> np.ndarray:
    """Asphalt (h, w, 3) float32, x along the road: grain, wheel tracks, patches, cracks, oil."""
    rng = b.rng
    size = (round(length * TEXELS), round(width * TEXELS))
    grain = rng.normal(0, 1, size[::-1]).astype(np.float32)
    grain = grain + 1.2 * cv2.GaussianBlur(grain, (0, 0), 1.3) * 2
    image = tx.coloured(0.09 * grain + 0.07 * tx.noise(rng, size, (8, 4), 6, 0.6), (98, 98, 100), 1)
    y = (np.arange(size[1]) + 0.5) / TEXELS - width / 2
    tracks = sum(np.exp(-(((abs(y) - LANE - d) / 0.28) ** 2)) for d in (-0.75, 0.75))
    image *= (1 - 0.1 * tracks)[:, None, None]
    for _ in range(5):  # mended places
        w, h = (rng.uniform(0.5, 2.6, 2) * TEXELS).astype(int)
        left, top = int(rng.integers(0, size[0] - w)), int(rng.integers(0, max(size[1] - h, 1)))
        part = image[top : top + h, left : left + w]
        part *= rng.uniform(0.66, 0.86)
        cv2.rectangle(image, (left, top), (left + w, top + h), (52, 52, 54), 2)
    for _ in range(9):  # cracks
        place = rng.random(2) * size
        heading = rng.uniform(0, 2 * np.pi)
        points = [place]
        for _ in range(40):
            heading += rng.normal(0, 0.5)
            points.append(points[-1] + 5 * np.array([np.cos(heading), np.sin(heading)]))
        line = np.array(points, np.int32)
        cv2.polylines(image, [line], False, (46, 46, 48), 1, cv2.LINE_AA)
    for _ in range(10):  # oil and gum
        place = (rng.random(2) * size).astype(int)
        radius = int(rng.gamma(2, 3) + 2)
        tone = rng.uniform(50, 128)
        cv2.circle(image, place.tolist(), radius, (tone, tone, tone), -1, cv2.LINE_AA)
    lid = (rng.uniform(0.2, 0.8, 2) * size).astype(int)  # a manhole
    radius = int(0.33 * TEXELS)
    cv2.circle(image, lid.tolist(), radius + 4, (62, 60, 58), -1, cv2.LINE_AA)
    cv2.circle(image, lid.tolist(), radius, (92, 84, 78), -1, cv2.LINE_AA)
    for k in range(-3, 4):
        reach = int(np.sqrt(max(radius**2 - (k * 6) ** 2, 0)) * 0.85)
        start, end = (lid[0] - reach, lid[1] + k * 6), (lid[0] + reach, lid[1] + k * 6)
        cv2.line(image, start, end, (54, 50, 48), 2)
    return image


def _mark(b: _Builder, image: np.ndarray, x: float, y: float, w: float, h: float) -> None:
    """Worn white paint on a box in metres from the top left of a road texture."""
    left, right, top, bottom = (round(v * TEXELS) for v in (x, x + w, y, y + h))
    part = image[top:bottom, left:right]
    if part.size:
        worn = tx.noise(b.rng, part.shape[1::-1], (6, 2), 5, 0.8)[..., None]
        paint = np.clip(0.86 - 0.25 * (worn > 1.1) - 0.06 * worn, 0, 1)
        part[:] = part * (1 - paint) + 214 * paint


def _ground(b: _Builder, cross: float) -> None:
    """Carriageways with markings, the junction, sidewalks with curbs."""
    rng = b.rng
    width = 2 * ROAD
    tiles = []
    for _ in range(3):
        image = _asphalt(b, 14.0, width)
        for x in (0.5, 5.17, 9.83):  # dashes of the middle line
            _mark(b, image, x, ROAD - 0.07, 2.4, 0.14)
        for y in (ROAD - 3.35, ROAD + 3.25):  # parking bays
            _mark(b, image, 0, y, 14.0, 0.1)
            _mark(b, image, 4.0, 0.1 if y < ROAD else y, 0.1, ROAD - 3.35)
        tiles.append(b.texture(tx.to_bytes(image)))
    stop = _asphalt(b, 7.0, width)
    for k in range(10):  # a crosswalk, and the line to stop at
        _mark(b, stop, 2.6, 0.35 + k * 1.0, 3.0, 0.5)
    _mark(b, stop, 1.4, ROAD + 0.1, 0.45, ROAD - 0.4)
    stop_texture = b.texture(tx.to_bytes(stop))
    middle = _asphalt(b, width, width)
    middle_texture = b.texture(tx.to_bytes(middle))

    def strip(start: np.ndarray, ahead: np.ndarray, length: float) -> None:
        """A road from `start` (its middle) away from the junction, crosswalk first."""
        left = np.array([-ahead[1], ahead[0], 0])
        # u runs towards the junction and v to the right of who drives there.
        b.face(start + ahead * 7.0 - left * ROAD, -ahead * 7.0, left * width, stop_texture)
        at, k = 7.0, int(rng.integers(3))
        while at < length:
            piece = min(14.0, length - at)
            corner = start + ahead * (at + piece) - left * ROAD
            b.face(corner, -ahead * piece, left * width, tiles[k % 3], (0, 0, piece / 14.0, 1))
            at, k = at + piece, k + 1

    x0, x1 = cross - ROAD, cross + ROAD
    east, north = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    strip(np.array([x0, 0, 0]), -east, x0 - NEAR_END)
    strip(np.array([x1, 0, 0]), east, FAR_END - x1)
    strip(np.array([cross, ROAD, 0]), north, SIDE_END - ROAD)
    strip(np.array([cross, -ROAD, 0]), -north, SIDE_END - ROAD)
    b.face((x0, ROAD, 0), (width, 0, 0), (0, -width, 0), middle_texture)

    slab = [
        b.texture(tx.to_bytes(tx.bricks(rng, (512, 256), colour, (32, 32), (112, 108, 104))))
        for colour in ((164, 160, 154), (150, 144, 140), (172, 160, 148))
    ]
    stone = b.texture(tx.to_bytes(tx.bricks(rng, (512, 64), (150, 150, 148), (64, 64))))
    blocks = [  # the four corners of the junction: x from, x to, y from, y to
        (NEAR_END, x0, ROAD, SIDE_END),
        (NEAR_END, x0, -SIDE_END, -ROAD),
        (x1, FAR_END, ROAD, SIDE_END),
        (x1, FAR_END, -SIDE_END, -ROAD),
    ]
    deep = WALK - ROAD
    for left, right, low, high in blocks:
        near_x = right - deep if right == x0 else left  # sidewalk along the second street
        near_y = low if low == ROAD else high - deep
        for bx0, bx1, by0, by1 in (
            (left, right, near_y, near_y + deep),
            (near_x, near_x + deep, low, high),
        ):
            # In pieces, so that slabs differ in shade from piece to piece.
            long_x = bx1 - bx0 > by1 - by0
            span = (bx1 - bx0) if long_x else (by1 - by0)
            count = max(1, round(span / 8))
            for k in range(count):
                p0, p1 = k / count, (k + 1) / count
                piece = [bx0, bx1, by0, by1]
                if long_x:
                    piece[:2] = bx0 + p0 * span, bx0 + p1 * span
                else:
                    piece[2:] = by0 + p0 * span, by0 + p1 * span
                top = slab[int(rng.integers(3))]
                shade = float(rng.uniform(0.9, 1.06))
                wide, tall = piece[1] - piece[0], piece[3] - piece[2]
                across = (0, 0, wide / 6.4, 0.12)
                down = (0, 0, tall / 6.4, 0.12)
                b.box(
                    (piece[0], piece[2], -0.3),
                    (piece[1], piece[3], CURB),
                    [stone, stone, stone, stone, top, -1],
                    tint=(shade, shade, shade),
                    sts=[down, down, across, across, (0, 0, wide / 6.4, tall / 3.2), across],
                )
    lawn = b.texture(tx.foliage(rng, (256, 256)))
    b.face((-600, 600, -0.4), (1200, 0, 0), (0, -1200, 0), lawn, (0, 0, 150, 150))


def _buildings(b: _Builder, cross: float) -> None:
    """Houses along both streets and at the far ends."""
    rng = b.rng
    roof = b.texture(tx.to_bytes(tx.bricks(rng, (256, 256), (112, 70, 58), (22, 14), (72, 48, 42))))
    side_walls = [
        b.texture(tx.facade(rng, 10, 11, 24, shop=False, colour=colour))
        for colour in ((176, 164, 146), (160, 112, 92), (150, 150, 148))
    ]
    stone = b.texture(tx.to_bytes(tx.plaster(rng, (128, 64), (190, 184, 172))))

    def house(start: np.ndarray, along: np.ndarray, width: float, scale: float) -> None:
        """A house whose front runs from `start` to the right as one looks at it."""
        height, depth = float(rng.uniform(8.5, 14.0)), 9.0
        out = np.array([along[1], -along[0], 0])  # towards the viewer
        up = np.array([0, 0, height])
        shop = rng.random() < 0.75
        front = b.texture(tx.facade(rng, width, height, scale, shop=shop))
        start = start + out * float(rng.choice([0, 0, -0.25, 0.2]))
        base = np.array([0, 0, CURB])
        b.face(start + up + base, along * width, -up, front)
        wall = side_walls[int(rng.integers(3))]
        back = -out * depth
        b.face(start + up + base + back, -back, -up, wall)
        b.face(start + along * width + up + base, back, -up, wall)
        b.face(start + along * width + back + up + base, -along * width, -up, wall)
        # A saddle roof along the street, reaching over the front a little.
        ridge = up + base + back / 2 + np.array([0, 0, float(rng.uniform(1.8, 3.2))])
        eave = out * 0.35 + up + base - np.array([0, 0, 0.12])
        tiles = (0, 0, width / 5, 1)
        b.face(start + ridge, along * width, eave - ridge, roof, tiles)
        far = back + up + base
        b.face(start + along * width + ridge, -along * width, far - ridge, roof, tiles)
        for foot in (start, start + along * width):  # gables
            b.face(foot + up + base, back, ridge - up - base, wall, (0, 0.2, 0.9, 0), triangle=True)
        if rng.random() < 0.75:  # a chimney
            at = start + along * width * rng.uniform(0.2, 0.8) + ridge
            low, high = at - np.array([0.35, 0.35, 1.2]), at + np.array([0.35, 0.35, 1.0])
            b.box(tuple(low), tuple(high), [side_walls[1]] * 6)
        if not shop and rng.random() < 0.8:  # steps and a plinth
            at = start + along * width / 2 + out * 0.4
            half = abs(along) * 0.9 + abs(out) * 0.4
            b.box(tuple(at - half), tuple(at + half + (0, 0, CURB + 0.32)), [stone] * 6)
        if rng.random() < 0.7:  # balconies stand out, which a picture of them does not
            for level in range(int((height - 6.5) // 3.2) + 1):
                at = start + along * width * rng.choice([0.28, 0.5, 0.72]) + out * 0.5
                at = at + np.array([0, 0, CURB + 4.3 + 3.2 * level])
                half = abs(along) * 1.1 + abs(out) * 0.5
                b.box(tuple(at - half), tuple(at + half + (0, 0, 0.16)), [stone] * 6)
                rail = [stone if rng.random() < 0.5 else roof] * 6
                front_low = at - half + (0, 0, 0.16) + out.clip(0, 1) * 0.92
                front_high = at + half + (0, 0, 0.95) - (-out).clip(0, 1) * 0.92
                low = np.minimum(front_low, front_high)
                high = np.maximum(front_low, front_high)
                b.box(tuple(low), tuple(high), rail)

    def row(start: np.ndarray, along: np.ndarray, length: float, scale: float = TEXELS) -> None:
        """Houses side by side, an alley here and there; `scale` in texels per metre."""
        at = 0.0
        while length - at > 5.0:
            width = float(rng.uniform(8.5, 13.5))
            if length - at - width < 6.0:
                width = length - at
            width = min(width, 15.0)
            house(start + along * at, along, width, scale)
            at += width + (float(rng.uniform(1.5, 2.6)) if rng.random() < 0.3 else 0.0)

    x0, x1 = cross - WALK, cross + WALK
    east, north = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    row(np.array([NEAR_END, WALK, 0]), east, x0 - NEAR_END)
    row(np.array([x0, -WALK, 0]), -east, x0 - NEAR_END)
    row(np.array([x1, WALK, 0]), east, FAR_END - x1, TEXELS / 2)
    row(np.array([FAR_END, -WALK, 0]), -east, FAR_END - x1, TEXELS / 2)
    row(np.array([x0, WALK + 9, 0]), north, SIDE_END - WALK - 9)
    row(np.array([x1, SIDE_END, 0]), -north, SIDE_END - WALK - 9)
    row(np.array([x0, -SIDE_END, 0]), north, SIDE_END - WALK - 9, TEXELS / 2)
    row(np.array([x1, -WALK - 9, 0]), -north, SIDE_END - WALK - 9, TEXELS / 2)
    # The ends of the streets are closed.
    row(np.array([FAR_END, 12, 0]), -north, 24, TEXELS / 2)
    row(np.array([cross - 12, SIDE_END, 0]), east, 24, TEXELS / 2)


_PROFILE = np.array(  # a car from the side: metres from the middle, metres above the ground
    [(-2.08, 0.32), (-2.16, 0.72), (-2.05, 0.98), (-1.55, 1.02), (-0.95, 1.43), (0.35, 1.44),
     (1.05, 1.0), (1.95, 0.86), (2.14, 0.62), (2.08, 0.32)]
)  # fmt: skip


def _car_side(b: _Builder, paint: np.ndarray) -> np.ndarray:
    """The side of a car, 4.4 m by 1.5 m, on a transparent ground, (h, w, 4) uint8."""
    scale, rng = 96, b.rng
    image = np.zeros((round(1.5 * scale), round(4.4 * scale), 4), np.uint8)

    def points(xy: object) -> np.ndarray:
        xy = np.asarray(xy, float)
        return ((xy * (1, -1) + (2.2, 1.5)) * scale).astype(np.int32)

    body = (*paint.tolist(), 255)
    cv2.fillPoly(image, [points(_PROFILE)], body, cv2.LINE_AA)
    shade = np.linspace(1.1, 0.72, image.shape[0])[:, None, None]
    image[..., :3] = tx.to_bytes(image[..., :3] * shade)
    dark, glass = (28, 28, 30, 255), (52, 62, 74, 255)
    for window in (
        [(-1.4, 1.02), (-0.9, 1.37), (-0.42, 1.38), (-0.42, 1.02)],
        [(-0.34, 1.02), (-0.34, 1.38), (0.3, 1.38), (0.9, 1.02)],
    ):
        cv2.fillPoly(image, [points(window)], glass, cv2.LINE_AA)
        cv2.polylines(image, [points(window)], True, dark, 2, cv2.LINE_AA)
    gleam = [(-0.3, 1.2), (-0.3, 1.36), (0.28, 1.36), (0.5, 1.22)]
    cv2.fillPoly(image, [points(gleam)], (128, 148, 166, 255), cv2.LINE_AA)
    line = (*(0.55 * paint).tolist(), 255)
    for x in (-1.05, -0.38, 0.95):
        cv2.line(image, points((x, 0.98)), points((x - 0.03, 0.4)), line, 2, cv2.LINE_AA)
    cv2.line(image, points((-2.0, 0.66)), points((2.0, 0.62)), line, 2, cv2.LINE_AA)
    for x in (-0.62, 0.22):
        cv2.line(image, points((x, 0.86)), points((x + 0.2, 0.86)), (60, 60, 62, 255), 3)
    cv2.rectangle(image, points((1.86, 0.8)), points((2.1, 0.66)), (228, 228, 214, 255), -1)
    cv2.rectangle(image, points((-2.12, 0.9)), points((-1.95, 0.72)), (176, 28, 26, 255), -1)
    cv2.rectangle(image, points((-2.06, 0.4)), points((2.06, 0.3)), dark, -1)
    for x in (-1.3, 1.32):
        cv2.circle(
            image, points((x, 0.36)), round(0.39 * scale), (20, 20, 22, 255), -1, cv2.LINE_AA
        )
        cv2.circle(
            image, points((x, 0.32)), round(0.31 * scale), (36, 36, 38, 255), -1, cv2.LINE_AA
        )
        cv2.circle(image, points((x, 0.32)), round(0.2 * scale), (166, 168, 172, 255), -1)
        for k in range(5):
            turn = 2 * np.pi * k / 5 + rng.random()
            tip = points((x + 0.19 * np.cos(turn), 0.32 + 0.19 * np.sin(turn)))
            cv2.line(image, points((x, 0.32)), tip, (88, 90, 94, 255), 3, cv2.LINE_AA)
    return image


def _car_end(b: _Builder, paint: np.ndarray, front: bool) -> np.ndarray:
    """Bumper, lamps, number plate and grille or boot, uint8."""
    image = np.empty((72, 172, 3), np.uint8)
    image[:] = (paint * 0.92).astype(np.uint8)
    lamp = (236, 234, 220) if front else (178, 26, 24)
    for left in (6, 134):
        cv2.rectangle(image, (left, 14), (left + 32, 30), lamp, -1)
        cv2.rectangle(image, (left, 14), (left + 32, 30), (40, 40, 42), 2)
    if front:
        cv2.rectangle(image, (46, 12), (126, 30), (32, 32, 34), -1)
        for y in range(15, 30, 4):
            cv2.line(image, (48, y), (124, y), (120, 122, 126), 1)
    cv2.rectangle(image, (0, 56), (171, 71), (34, 34, 36), -1)
    cv2.rectangle(image, (62, 38), (110, 50), (236, 236, 230), -1)
    text = "".join(str(c) for c in b.rng.choice(list("ABCDEFGH123456789"), 6))
    cv2.putText(image, text, (65, 48), cv2.FONT_HERSHEY_SIMPLEX, 0.32, (20, 20, 24), 1, cv2.LINE_AA)
    return image


def _cars(b: _Builder, places: list[tuple[float, float, float]]) -> None:
    """Parked cars at (x, y, heading in radians)."""
    rng = b.rng
    paints = ((150, 26, 30), (36, 62, 116), (196, 198, 200), (46, 48, 50), (218, 216, 208),
              (62, 92, 76), (124, 128, 132), (188, 146, 52))  # fmt: skip
    kinds = []
    for paint in paints:
        colour = np.array(paint, float)
        plain = tx.to_bytes(tx.coloured(tx.noise(rng, (64, 64), (2, 2), 3), colour, 0.03))
        kinds.append(
            (
                b.texture(_car_side(b, colour)),
                b.texture(_car_end(b, colour, True)),
                b.texture(_car_end(b, colour, False)),
                b.texture(plain),
            )
        )
    pane = np.empty((64, 64, 3), np.float32)
    pane[:] = np.linspace(96, 44, 64)[:, None, None] * np.array([0.92, 1.02, 1.14])
    cv2.rectangle(pane, (0, 0), (63, 63), (24, 24, 26), 3)
    glass = b.texture(tx.to_bytes(pane))
    under = b.texture(np.full((16, 16, 3), 14, np.uint8))
    order = rng.permutation(len(kinds))
    for number, (x, y, heading) in enumerate(places):
        side, front, rear, plain = kinds[order[number % len(kinds)]]
        ahead = np.array([np.cos(heading), np.sin(heading), 0])
        left = np.array([-ahead[1], ahead[0], 0])
        up = np.array([0, 0, 1.0])
        at = np.array([x, y, 0.0])
        half = 0.86
        top = at + 1.5 * up
        b.face(top - 2.2 * ahead - half * left, 4.4 * ahead, -1.5 * up, side)
        b.face(top + 2.2 * ahead + half * left, -4.4 * ahead, -1.5 * up, side, (1, 0, 0, 1))
        b.face(at - 2.1 * ahead + half * left + 0.3 * up, 4.2 * ahead, -2 * half * left, under)
        points = [at + u * ahead + z * up for u, z in _PROFILE]
        skins = [rear, rear, plain, glass, plain, glass, plain, front, front]
        for k, skin in enumerate(skins):
            lower, upper = points[k], points[k + 1]
            st = (0, 0, 1, 1)
            if skin in (rear, front):  # the two parts of an end share one picture
                st = {0: (0, 0.5, 1, 1), 1: (0, 0, 1, 0.5), 7: (0, 0, 1, 0.5), 8: (0, 0.5, 1, 1)}[k]
            if k < 5:  # from the back up: seen from behind, right is -left
                b.face(upper + half * left, -2 * half * left, lower - upper, skin, st)
            else:
                b.face(lower - half * left, 2 * half * left, upper - lower, skin, st)


def _furniture(b: _Builder, cross: float) -> None:
    """Cars, trees, lamps, signs, containers, bins."""
    rng = b.rng
    bay = ROAD - 1.05
    cars = []
    for x in np.arange(NEAR_END + 6, cross - WALK - 4, 5.4):
        if rng.random() < 0.72 and x > -4:
            cars.append((x + rng.normal(0, 0.25), -bay, 0.0))
        if rng.random() < 0.78 and abs(x - 15) > 5:
            cars.append((x + rng.normal(0, 0.25), bay, np.pi))
    for y in np.arange(WALK + 6, SIDE_END - 6, 5.6):
        if rng.random() < 0.7:
            cars.append((cross + bay, y, np.pi / 2))
        if rng.random() < 0.7:
            cars.append((cross - bay, y, -np.pi / 2))
    for x in np.arange(cross + WALK + 5, FAR_END - 6, 5.8):
        if rng.random() < 0.7:
            cars.append((x, bay, np.pi))
        if rng.random() < 0.6:
            cars.append((x, -bay, 0.0))
    cars.append((cross + 24.0, LANE, np.pi))
    _cars(b, cars)

    # A container in a parking bay, and a van.
    steel = np.array((42, 98, 132), float)
    wave = (1 + 0.22 * np.sign(np.sin(np.arange(512) * 2 * np.pi / 22)))[None, :, None]
    field_ = tx.noise(rng, (512, 220), (6, 3), 6, 0.7)
    panel = tx.coloured(field_, steel, 0.06) * wave
    panel[:, ::11] *= 0.8
    rust = np.clip(tx.noise(rng, (512, 220), (8, 4), 6, 0.7) - 1.3, 0, 1)[..., None]
    panel = panel * (1 - rust) + np.array([120, 66, 40]) * rust
    cv2.putText(panel, "SC LINE", (60, 96), tx.FONTS[1], 2.2, (232, 232, 226), 7, cv2.LINE_AA)
    cv2.putText(
        panel, "SCFU 260417 4", (270, 196), tx.FONTS[0], 0.8, (232, 232, 226), 2, cv2.LINE_AA
    )
    steel_side = b.texture(tx.to_bytes(panel))
    door = tx.coloured(tx.noise(rng, (220, 220), (4, 3), 6, 0.7), steel, 0.06)
    for x in (40, 90, 130, 180):
        cv2.line(door, (x, 6), (x, 214), (150, 154, 156), 5)
    cv2.line(door, (110, 0), (110, 219), (18, 40, 56), 4)
    cv2.rectangle(door, (2, 2), (217, 217), (24, 56, 76), 5)
    steel_door = b.texture(tx.to_bytes(door))
    b.box(
        (12.0, bay - 1.1, 0.1),
        (18.0, bay + 1.1, 2.6),
        [steel_door, steel_door, steel_side, steel_side, steel_side, -1],
    )

    metal = b.texture(tx.to_bytes(tx.coloured(tx.noise(rng, (32, 128)), (88, 92, 94), 0.06)))
    lamp = b.texture(np.full((16, 16, 3), 228, np.uint8))

    def post(x: float, y: float, height: float, thick: float = 0.07) -> None:
        b.box((x - thick, y - thick, CURB), (x + thick, y + thick, height), [metal] * 6)

    edge = ROAD + 0.55
    for k, x in enumerate(np.arange(-6, cross - WALK, 17.0)):
        y = edge if k % 2 else -edge
        post(x, y, 6.2)
        inward = -np.sign(y)
        b.box((x - 0.05, min(y, y + inward * 1.8), 6.1), (x + 0.05, max(y, y + inward * 1.8), 6.2),
              [metal] * 6)  # fmt: skip
        b.box((x - 0.14, y + inward * 1.8 - 0.35, 6.0), (x + 0.14, y + inward * 1.8 + 0.35, 6.1),
              [lamp] * 6)  # fmt: skip
    for k, y in enumerate(np.arange(WALK + 8, SIDE_END - 4, 15.0)):
        post(cross + (edge if k % 2 else -edge), y, 6.2)

    # Traffic signs at the junction and along the way.
    signs = [_round_sign(text) for text in ("30", "50", "STOP")]
    ids = [b.texture(image) for image in signs]
    for x, y, kind, facing in (
        (cross - WALK + 0.6, -edge, 2, -1),
        (8.0, -edge, 0, -1),
        (24.0, -edge, 1, -1),
        (cross - WALK + 1.0, edge, 0, 1),
    ):
        post(x, y, 2.9, 0.04)
        b.face(
            (x + facing * 0.06, y + facing * -0.38, 3.0),
            (0, facing * 0.76, 0),
            (0, 0, -0.76),
            ids[kind],
            (0, 0, 1, 1),
        )

    # Billboards on posts, as advertising pillars are too thin to see.
    for x, y in ((27.0, edge + 1.2), (cross + WALK + 5, -edge - 1.0)):
        picture = b.texture(tx.poster(rng, (384, 256)))
        b.box((x - 0.08, y - 1.5, 0.9), (x + 0.08, y + 1.5, 2.9),
              [picture, picture, metal, metal, metal, metal])  # fmt: skip
        post(x, y - 1.2, 1.0)
        post(x, y + 1.2, 1.0)

    clumps = [b.texture(tx.leaf_clump(rng, (256, 256))) for _ in range(6)]
    bark = tx.coloured(tx.noise(rng, (32, 128), (6, 3), 5, 0.7), (104, 90, 74), 0.2)
    trunk = b.texture(tx.to_bytes(bark))

    def plant(x: float, y: float, size: float) -> None:
        """A tree: a trunk, and clumps of leaves about the middle of the crown."""
        b.box((x - 0.11, y - 0.11, CURB), (x + 0.11, y + 0.11, 0.62 * size), [trunk] * 6,
              turn=float(rng.uniform(0, 1.5)))  # fmt: skip
        shade = rng.uniform(0.85, 1.15)
        hue = float(rng.uniform(0.9, 1.12))
        for _ in range(22):
            out = rng.normal(size=3)
            out /= np.linalg.norm(out)
            away = rng.uniform(0.35, 1) ** 0.5
            middle = np.array([x, y, 0.66 * size]) + out * away * size * (0.27, 0.27, 0.24)
            right = np.cross(out + 0.7 * rng.normal(size=3), rng.normal(size=3))
            right /= np.linalg.norm(right)
            down = np.cross(out, right)
            down /= np.linalg.norm(down)
            span = size * rng.uniform(0.3, 0.42)
            # The outer clumps and the upper ones catch more light.
            light = shade * (0.72 + 0.2 * away + 0.16 * out[2])
            b.face(
                middle - span / 2 * (right + down), span * right, span * down,
                clumps[int(rng.integers(len(clumps)))],
                tint=(light * hue, light, light * 0.9), normal=out + np.array([0, 0, 0.8]),
            )  # fmt: skip

    for x in np.arange(3.0, cross - WALK - 3, 11.5):
        plant(x, edge + 0.3, float(rng.uniform(4.6, 6.2)))
    for x in np.arange(8.5, cross - WALK - 3, 14.0):
        plant(x, -edge - 0.3, float(rng.uniform(4.2, 5.6)))
    for y in np.arange(WALK + 5, SIDE_END - 4, 12.0):
        plant(cross + edge + 0.3, y, float(rng.uniform(4.6, 6.0)))
        plant(cross - edge - 0.3, y + 6, float(rng.uniform(4.6, 6.0)))
    for x in np.arange(cross + WALK + 3, FAR_END - 4, 12.0):
        plant(x, -edge - 0.3, float(rng.uniform(5, 6.5)))

    crate = b.texture(tx.wood(rng, (160, 160)))
    green = b.texture(tx.to_bytes(tx.coloured(tx.noise(rng, (96, 128)), (44, 84, 58), 0.08)))
    for x, y, size, skin in (
        (5.5, -WALK + 0.6, 0.5, crate),
        (6.6, -WALK + 0.7, 0.4, crate),
        (20.0, WALK - 0.6, 0.55, green),
        (21.2, WALK - 0.6, 0.55, green),
        (31.0, -WALK + 0.6, 0.55, green),
        (cross + WALK - 0.7, WALK + 14, 0.55, green),
        (cross + WALK - 0.7, WALK + 16, 0.45, crate),
    ):
        b.box((x - size, y - size, CURB), (x + size, y + size, CURB + 2 * size), [skin] * 6,
              turn=float(rng.normal(0, 0.2)))  # fmt: skip


def _round_sign(text: str) -> np.ndarray:
    """A traffic sign on a transparent ground, (96, 96, 4) uint8."""
    image = np.zeros((96, 96, 4), np.uint8)
    if text == "STOP":
        turn = np.pi / 8 + np.arange(8) * np.pi / 4
        corners = (48 + 46 * np.stack([np.cos(turn), np.sin(turn)], -1)).astype(np.int32)
        cv2.fillPoly(image, [corners], (236, 236, 232, 255))
        cv2.fillPoly(image, [((corners - 48) * 0.9 + 48).astype(np.int32)], (186, 26, 32, 255))
        ink, factor = (240, 240, 236, 255), 0.82
    else:
        cv2.circle(image, (48, 48), 46, (192, 30, 34, 255), -1)
        cv2.circle(image, (48, 48), 35, (240, 240, 236, 255), -1)
        ink, factor = (24, 24, 28, 255), 1.25
    (w, h), _ = cv2.getTextSize(text, tx.FONTS[1], factor, 3)
    cv2.putText(image, text, (48 - w // 2, 48 + h // 2), tx.FONTS[1], factor, ink, 3, cv2.LINE_AA)
    return image
