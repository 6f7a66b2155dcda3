"""A small renderer: textured planar faces, exact depth, filtered textures, sun and shadows.

A face is a parallelogram or a triangle, so a pinhole camera maps it to the image by a
homography, and its inverse depth is linear in the pixel coordinates. That makes visibility a
few array operations per face, and depth exact. Colour comes after visibility, once per sample:
the texture coordinate is looked up in a rip map (a mip map with one level per axis, which keeps
roads and facades sharp at grazing angles), blended between levels.

Coordinates are those of geometry.py; the world has z up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from scfeat_training.geometry import intrinsic_matrix

NEAR = 0.05  # nothing nearer than this is drawn, in world units
_STRIP = 64  # rows shaded at a time, so that the arrays stay in the cache


@dataclass(frozen=True)
class Camera:
    """A pinhole: K (3, 3), world-to-camera R (3, 3) and t (3,), size (width, height)."""

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    size: tuple[int, int]

    @property
    def centre(self) -> np.ndarray:
        """Position in the world, (3,)."""
        return -self.R.T @ self.t

    @staticmethod
    def look_at(
        eye: np.ndarray, target: np.ndarray, K: np.ndarray, size: tuple[int, int], roll: float = 0.0
    ) -> Camera:
        """A camera at `eye` whose axis meets `target`, upright but for `roll` (radians)."""
        forward = np.asarray(target, float) - eye
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        if np.linalg.norm(right) < 1e-6:  # straight up or down
            right = np.array([1.0, 0.0, 0.0])
        right = right / np.linalg.norm(right)
        down = np.cross(forward, right)
        c, s = np.cos(roll), np.sin(roll)
        R = np.stack([c * right + s * down, -s * right + c * down, forward])
        return Camera(K, R, -R @ eye, size)

    def scaled(self, factor: int) -> Camera:
        """The same view with `factor` times the pixels along each axis."""
        K = self.K.copy()
        K[:2] *= factor
        K[:2, 2] += (factor - 1) / 2
        return Camera(K, self.R, self.t, (self.size[0] * factor, self.size[1] * factor))


class Atlas:
    """All textures with their rip maps in one image.

    Level (i, j) of a texture is it averaged by 2^i along x and 2^j along y. Levels of a texture
    form a grid of blocks, so that i alone gives the column and j alone the row. Each block has a
    border of one texel, taken from the opposite side: textures repeat.
    """

    def __init__(self, textures: Sequence[np.ndarray], width: int = 8192) -> None:
        """textures: (h, w, 3) RGB or (h, w, 4) RGB and alpha (cut out below 128), uint8."""
        chains = [_rip_map(texture[..., :3]) for texture in textures]
        self.levels = 1 + max(max(len(rows), len(rows[0])) for rows in chains)
        count = len(textures)
        shape = (count, self.levels + 1)
        self.column, self.row = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.width, self.height = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.last = np.zeros((count, 2), np.float32)  # last level along x and y
        self.size = np.array([texture.shape[1::-1] for texture in textures], np.float32)
        self.alpha = [_alpha_chain(texture) for texture in textures]

        blocks = [
            (sum(r[0].shape[0] + 2 for r in rows), sum(c.shape[1] + 2 for c in rows[0]))
            for rows in chains
        ]
        width = max(width, max(block[1] for block in blocks))
        at, shelf, bottom, places = 0, 0, 0, {}
        for index in sorted(range(count), key=lambda k: -blocks[k][0]):
            high, wide = blocks[index]
            if at + wide > width:
                at, shelf = 0, bottom
            places[index] = (at, shelf)
            at += wide
            bottom = max(bottom, shelf + high)
        if bottom > 32000:
            raise ValueError(f"textures need an atlas of {width}x{bottom}, at most 32000 high")
        self.image = np.zeros((bottom, width, 3), np.uint8)
        for index, rows in enumerate(chains):
            left, top = places[index]
            y = top
            for j in range(self.levels + 1):
                row = rows[min(j, len(rows) - 1)]
                x = left
                high = row[0].shape[0]
                if j < len(rows):
                    self.row[index, j], self.height[index, j] = y + 1, high
                else:
                    self.row[index, j] = self.row[index, j - 1]
                    self.height[index, j] = self.height[index, j - 1]
                for i in range(self.levels + 1):
                    if i < len(row):
                        level = row[i]
                        wide = level.shape[1]
                        if j < len(rows):
                            self.image[y : y + high + 2, x : x + wide + 2] = np.pad(
                                level, ((1, 1), (1, 1), (0, 0)), "wrap"
                            )
                        self.column[index, i], self.width[index, i] = x + 1, wide
                        x += wide + 2
                    else:
                        self.column[index, i] = self.column[index, i - 1]
                        self.width[index, i] = self.width[index, i - 1]
                y += high + 2 if j < len(rows) else 0
            self.last[index] = len(rows[0]) - 1, len(rows) - 1


def _rip_map(texture: np.ndarray) -> list[list[np.ndarray]]:
    """levels[j][i]: averaged by 2^i along x and 2^j along y, down to 4 texels a side."""
    rows = [texture]
    while rows[-1].shape[0] >= 8:
        h, w = rows[-1].shape[:2]
        rows.append(cv2.resize(rows[-1], (w, h // 2), interpolation=cv2.INTER_AREA))
    levels = []
    for row in rows:
        chain = [row]
        while chain[-1].shape[1] >= 8:
            h, w = chain[-1].shape[:2]
            chain.append(cv2.resize(chain[-1], (w // 2, h), interpolation=cv2.INTER_AREA))
        levels.append(chain)
    return levels


def _alpha_chain(texture: np.ndarray) -> list[np.ndarray] | None:
    if texture.shape[2] == 3:
        return None
    chain = [np.ascontiguousarray(texture[..., 3])]
    while min(chain[-1].shape) >= 16:
        h, w = chain[-1].shape
        chain.append(cv2.resize(chain[-1], (w // 2, h // 2), interpolation=cv2.INTER_AREA))
    return chain


@dataclass
class Light:
    """Sun direction (towards the sun), its strength, and the light of the sky.

    Colours are factors of the texture's. `haze` is the distance over which 63 % of the colour
    is lost to `haze_colour`; inf for clear air. `shadow_reach`: radius about `shadow_centre`
    within which shadows are cast, 0 for none.
    """

    sun: np.ndarray = field(default_factory=lambda: np.array([0.4, -0.5, 0.77]))
    sun_colour: tuple[float, float, float] = (0.72, 0.68, 0.6)
    sky_colour: tuple[float, float, float] = (0.42, 0.45, 0.52)
    haze: float = np.inf
    haze_colour: tuple[float, float, float] = (196.0, 208.0, 222.0)
    shadow_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shadow_reach: float = 0.0


class World:
    """Faces with textures; add them, then `render` and `depth` from any camera."""

    def __init__(self, atlas: Atlas, light: Light | None = None) -> None:
        self.atlas = atlas
        self.light = light or Light()
        self._faces: list[tuple] = []
        self._arrays: _Faces | None = None
        self._shadow: tuple[Camera, np.ndarray] | None = None

    def add_face(
        self,
        origin: Sequence[float],
        edge_u: Sequence[float],
        edge_v: Sequence[float],
        texture: int,
        st: Sequence[float] = (0, 0, 1, 1),
        triangle: bool = False,
        lit: bool = True,
        tint: Sequence[float] = (1, 1, 1),
        swap: bool = False,
        normal: Sequence[float] | None = None,
    ) -> None:
        """Add origin + u edge_u + v edge_v with u, v in [0, 1] (u + v <= 1 for a triangle).

        From the side that the light counts for, edge_v is clockwise of edge_u (right and down).

        st = (s0, t0, s1, t1): u = 0..1 runs over s0..s1 and v over t0..t1 of the texture (1 is
        its whole width or height; beyond that it repeats); `swap` lets u run along t instead.
        An unlit face shows its texture as it is. `normal` (outwards) replaces the face's own for
        the light, as for a leaf that stands for many.
        """
        s0, t0, s1, t1 = st
        small = 1e-4  # keeps the edge of a texture from showing the opposite one
        s0, s1 = s0 + small * (s1 - s0), s1 - small * (s1 - s0)
        t0, t1 = t0 + small * (t1 - t0), t1 - small * (t1 - t0)
        uv = [[s1 - s0, 0, s0], [0, t1 - t0, t0]]
        if swap:
            uv = [[0, s1 - s0, s0], [t1 - t0, 0, t0]]
        self._faces.append(
            (origin, edge_u, edge_v, texture, [*uv, [0, 0, 1]], triangle, lit, tint, normal)
        )
        self._arrays = None
        self._shadow = None

    def add_box(
        self,
        centre: Sequence[float],
        axes: np.ndarray,
        textures: Sequence[int],
        sts: Sequence[Sequence[float]] | None = None,
        tint: Sequence[float] = (1, 1, 1),
    ) -> None:
        """Add a box: axes (3, 3), rows are the half-edges along its x, y, z.

        textures: of the faces +x, -x, +y, -y, +z, -z; -1 leaves one out. Sides have the
        texture's top towards +z. sts: texture windows of the six, the whole texture otherwise.
        """
        x, y, z = np.asarray(axes, float)
        centre = np.asarray(centre, float)
        corners = [  # top left corner as seen from outside, edge to the right, edge down
            (centre + x - y + z, 2 * y, -2 * z),
            (centre - x + y + z, -2 * y, -2 * z),
            (centre + y + x + z, -2 * x, -2 * z),
            (centre - y - x + z, 2 * x, -2 * z),
            (centre + z - x + y, 2 * x, -2 * y),
            (centre - z - x - y, 2 * x, 2 * y),
        ]
        for side, (corner, across, down) in enumerate(corners):
            if textures[side] >= 0:
                st = (0, 0, 1, 1) if sts is None else sts[side]
                self.add_face(corner, across, down, textures[side], st, tint=tint)

    def add_height_field(
        self,
        origin: Sequence[float],
        edge_u: np.ndarray,
        edge_v: np.ndarray,
        heights: np.ndarray,
        texture: int,
        tint: Sequence[float] = (1, 1, 1),
    ) -> None:
        """Add a surface over a parallelogram: heights (n, m) along its normal at grid points."""
        edge_u, edge_v = np.asarray(edge_u, float), np.asarray(edge_v, float)
        normal = np.cross(edge_u, edge_v)
        normal = normal / np.linalg.norm(normal)
        n, m = heights.shape
        u, v = np.meshgrid(np.linspace(0, 1, m), np.linspace(0, 1, n))
        grid = origin + u[..., None] * edge_u + v[..., None] * edge_v + heights[..., None] * normal
        for i in range(n - 1):
            for j in range(m - 1):
                a, b = grid[i, j], grid[i, j + 1]
                c, d = grid[i + 1, j], grid[i + 1, j + 1]
                s0, s1, t0, t1 = u[i, j], u[i, j + 1], v[i, j], v[i + 1, j]
                self.add_face(a, c - a, b - a, texture, (s0, t0, s1, t1), True, True, tint, True)
                self.add_face(d, b - d, c - d, texture, (s1, t1, s0, t0), True, True, tint, True)

    @property
    def faces(self) -> _Faces:
        """All faces as arrays."""
        if self._arrays is None:
            if not self._faces:
                raise ValueError("the world is empty: add a face first")
            self._arrays = _Faces(self._faces, self.light)
        return self._arrays

    def depth(self, camera: Camera) -> np.ndarray:
        """Exact z (H, W) float64 at the pixel centres; inf where there is nothing."""
        projected = _project(self.faces, camera)
        face, _ = _visible(self.faces, projected, camera.size, self.atlas)
        return _exact_depth(face, projected.inverse_depth)

    def render(self, camera: Camera, supersample: int = 2) -> np.ndarray:
        """The picture (H, W, 3) uint8 RGB, supersample^2 samples a pixel."""
        if self.light.shadow_reach and self._shadow is None:
            self._shadow = self._shadow_map()
        fine = camera.scaled(supersample)
        projected = _project(self.faces, fine)
        face, w = _visible(self.faces, projected, fine.size, self.atlas)
        image = np.empty((fine.size[1], fine.size[0], 3), np.uint8)
        for top in range(0, fine.size[1], _STRIP):
            rows = slice(top, min(top + _STRIP, fine.size[1]))
            image[rows] = self._shade(fine, projected, face[rows], w[rows], top)
        if supersample == 1:
            return image
        return cv2.resize(image, camera.size, interpolation=cv2.INTER_AREA)

    def _shade(
        self, camera: Camera, projected: _Projected, face: np.ndarray, w: np.ndarray, top: int
    ) -> np.ndarray:
        """Colours (h, W, 3) uint8 of a strip, from its face numbers and inverse depths."""
        faces, atlas = self.faces, self.atlas
        empty = face < 0
        face = np.where(empty, 0, face)
        x = np.arange(face.shape[1], dtype=np.float32)[None]
        y = np.arange(top, top + face.shape[0], dtype=np.float32)[:, None]
        z = 1 / np.where(empty, 1, w)
        texture = faces.texture[face]
        maps, weights = [], []
        tables = ((atlas.column, atlas.width), (atlas.row, atlas.height))
        m2 = [projected.matrix[:, 2, k][face] for k in (0, 1)]
        for axis, (place, extent) in enumerate(tables):
            m = [projected.matrix[:, axis, k][face] for k in range(3)]
            s = (m[0] * x + m[1] * y + m[2]) * z
            dx = (m[0] - s * m2[0]) * z
            dy = (m[1] - s * m2[1]) * z
            foot = np.sqrt(dx * dx + dy * dy) * atlas.size[:, axis][texture]
            lod = np.log2(np.maximum(foot, 1))
            lod = np.minimum(lod, atlas.last[:, axis][texture])
            low = lod.astype(np.int32)
            weights.append(lod - low.astype(np.float32))
            s -= np.floor(s)
            at = texture * place.shape[1] + low
            flat_place, flat_extent = place.ravel(), extent.ravel()
            maps.append(
                [flat_place[at + k] + s * flat_extent[at + k] - np.float32(0.5) for k in (0, 1)]
            )
        fx, fy = weights
        rows = []
        for map_y in maps[1]:
            low, high = (
                cv2.remap(atlas.image, map_x, map_y, cv2.INTER_LINEAR) for map_x in maps[0]
            )
            rows.append(cv2.blendLinear(low, high, 1 - fx, fx))
        colour = cv2.blendLinear(rows[0], rows[1], 1 - fy, fy)
        return self._light_strip(camera, colour, face, z, empty, x, y)

    def _light_strip(
        self,
        camera: Camera,
        colour: np.ndarray,
        face: np.ndarray,
        z: np.ndarray,
        empty: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
    ) -> np.ndarray:
        faces, light = self.faces, self.light
        sunny = None
        if self._shadow is not None:
            sunny = _sunlit(*self._shadow, camera, z, x, y)
        fog = None
        if np.isfinite(light.haze):
            fog = np.where(faces.lit[face], 1 - np.exp(-z / np.float32(light.haze)), 0)
            fog = fog.astype(np.float32)
        result = np.empty_like(colour)
        for channel in range(3):
            direct = faces.direct[:, channel][face]
            if sunny is not None:
                direct *= sunny
            value = colour[..., channel] * (direct + faces.ambient[:, channel][face])
            if fog is not None:
                value += fog * (np.float32(light.haze_colour[channel]) - value)
            result[..., channel] = np.clip(value, 0, 255)
        result[empty] = np.array(light.haze_colour)
        return result

    def _shadow_map(self, pixels: int = 3072) -> tuple[Camera, np.ndarray]:
        """The sun as a far camera, and its depth map (float32)."""
        light = self.light
        sun = np.asarray(light.sun, float) / np.linalg.norm(light.sun)
        distance = 20 * light.shadow_reach
        centre = np.asarray(light.shadow_centre, float)
        focal = pixels / 2 * distance / light.shadow_reach
        K = intrinsic_matrix(focal, focal, pixels / 2, pixels / 2)
        camera = Camera.look_at(centre + distance * sun, centre, K, (pixels, pixels))
        # Unlit faces (the sky) cast no shadow.
        casting = self.faces.select(self.faces.lit)
        _, w = _visible(casting, _project(casting, camera), camera.size, self.atlas)
        with np.errstate(divide="ignore"):
            depth = np.where(w > 0, 1 / w, np.inf)
        return camera, depth.astype(np.float32)


class _Faces:
    """The faces of a world as arrays, with what the light makes of each."""

    def __init__(self, faces: list[tuple], light: Light) -> None:
        columns = list(zip(*faces, strict=True))
        self.origin, self.edge_u, self.edge_v = (np.array(c, dtype=float) for c in columns[:3])
        self.texture = np.array(columns[3], dtype=np.int32)
        self.uv = np.array(columns[4], dtype=float)
        self.triangle = np.array(columns[5], dtype=bool)
        self.lit = np.array(columns[6], dtype=bool)
        tint = np.array(columns[7], dtype=float)
        # Edges run right and down as seen from outside, so their product points inwards.
        normal = -np.cross(self.edge_u, self.edge_v)
        for index, given in enumerate(columns[8]):
            if given is not None:
                normal[index] = given
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        sun = np.asarray(light.sun, float) / np.linalg.norm(light.sun)
        facing = np.clip(normal @ sun, 0, None)
        up = 0.5 + 0.5 * normal[:, 2]
        direct = facing[:, None] * np.array(light.sun_colour) * tint
        ambient = (0.75 + 0.25 * up)[:, None] * np.array(light.sky_colour) * tint
        self.direct = np.where(self.lit[:, None], direct, 0).astype(np.float32)
        self.ambient = np.where(self.lit[:, None], ambient, 1).astype(np.float32)

    def select(self, keep: np.ndarray) -> _Faces:
        """The faces where `keep` (N,) is true."""
        chosen = object.__new__(_Faces)
        for name, value in vars(self).items():
            setattr(chosen, name, value[keep])
        return chosen


@dataclass
class _Projected:
    """Faces as seen by a camera.

    inverse: (N, 3, 3) float32, pixel to (u, v, 1) / z of the face; its last row is the inverse
    depth. matrix: the same to (s, t, 1) / z of the texture. box: (N, 4) int, x0, y0, x1, y1 of
    the pixels that the face can cover; x1 <= x0 where it cannot be seen.
    inverse_depth: (N, 3) float64.
    """

    inverse: np.ndarray
    matrix: np.ndarray
    box: np.ndarray
    inverse_depth: np.ndarray


def _project(faces: _Faces, camera: Camera) -> _Projected:
    width, height = camera.size
    o = faces.origin @ camera.R.T + camera.t
    a = faces.edge_u @ camera.R.T
    b = faces.edge_v @ camera.R.T
    to_image = camera.K @ np.stack([a, b, o], -1)
    # Seen edge on, a face has no area and no inverse.
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    flat = abs(np.linalg.det(np.stack([a, b, o], -1))) < 1e-9 * scale
    to_image[flat] = np.eye(3)
    inverse = np.linalg.inv(to_image)

    # Bounding box of the part in front of the near plane: cut each edge there.
    last = np.where(faces.triangle[:, None], a, a + b)
    corners = np.stack([o, o + a, o + last, o + b], 1)
    following = np.roll(corners, -1, axis=1)
    z0, z1 = corners[..., 2:], following[..., 2:]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (NEAR - z0) / (z1 - z0)
        cut = corners + share * (following - corners)
    crosses = (z0 - NEAR) * (z1 - NEAR) < 0
    points = np.concatenate([corners, np.where(crosses, cut, corners)], 1)
    in_front = points[..., 2] >= NEAR * 0.999
    pixels = points @ camera.K.T
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = pixels[..., :2] / pixels[..., 2:]
    low = np.where(in_front[..., None], pixels, np.inf).min(1)
    high = np.where(in_front[..., None], pixels, -np.inf).max(1)
    limit = np.array([width, height])
    box = np.concatenate(
        [np.floor(low).clip(0, limit), (np.floor(high) + 1).clip(0, limit)], 1
    ).astype(int)
    box[flat] = 0
    matrix = faces.uv @ inverse
    return _Projected(
        inverse.astype(np.float32), matrix.astype(np.float32), box, inverse[:, 2].copy()
    )


def _visible(
    faces: _Faces, projected: _Projected, size: tuple[int, int], atlas: Atlas
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest face (H, W) int32 (-1: none) and its inverse depth (H, W) float32."""
    width, height = size
    nearest = np.zeros((height, width), np.float32)
    number = np.full((height, width), -1, np.int32)
    xs = np.arange(width, dtype=np.float32)
    ys = np.arange(height, dtype=np.float32)[:, None]
    farthest = np.float32(1 / NEAR)
    boxes = projected.box
    for index in np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])):
        x0, y0, x1, y1 = boxes[index]
        g = projected.inverse[index]
        x, y = xs[x0:x1], ys[y0:y1]
        w = g[2, 0] * x + (g[2, 1] * y + g[2, 2])
        target = nearest[y0:y1, x0:x1]
        mask = w > target
        u = g[0, 0] * x + (g[0, 1] * y + g[0, 2])
        v = g[1, 0] * x + (g[1, 1] * y + g[1, 2])
        mask &= u >= 0
        mask &= v >= 0
        if faces.triangle[index]:
            mask &= u + v <= w
        else:
            mask &= u <= w
            mask &= v <= w
        mask &= w < farthest
        alpha = atlas.alpha[faces.texture[index]]
        if alpha is not None and mask.any():
            mask &= _opaque(alpha, projected.matrix[index], w, mask, x, y)
        np.copyto(target, w, where=mask)
        number[y0:y1, x0:x1][mask] = index
    return number, nearest


def _opaque(
    chain: list[np.ndarray],
    matrix: np.ndarray,
    w: np.ndarray,
    mask: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Where a face with alpha is solid, (h, w) bool."""
    z = 1 / np.where(mask, w, 1)
    s = (matrix[0, 0] * x + (matrix[0, 1] * y + matrix[0, 2])) * z
    t = (matrix[1, 0] * x + (matrix[1, 1] * y + matrix[1, 2])) * z
    # One level for the face: the area of texture over the area of image that it covers.
    height, width = chain[0].shape
    jacobian = abs(np.linalg.det(matrix.astype(float))) * np.median(z[mask]) ** 3
    level = int(np.clip(np.log2(max(jacobian * width * height, 1)) / 2, 0, len(chain) - 1))
    height, width = chain[level].shape
    map_x = (s * width - np.float32(0.5)).clip(-1, width)
    map_y = (t * height - np.float32(0.5)).clip(-1, height)
    return cv2.remap(chain[level], map_x, map_y, cv2.INTER_LINEAR) >= 128


def _exact_depth(face: np.ndarray, inverse_depth: np.ndarray) -> np.ndarray:
    height, width = face.shape
    x = np.arange(width, dtype=float)[None]
    y = np.arange(height, dtype=float)[:, None]
    row = inverse_depth[np.where(face < 0, 0, face)]
    w = row[..., 0] * x + row[..., 1] * y + row[..., 2]
    with np.errstate(divide="ignore"):
        return np.where(face < 0, np.inf, 1 / w)


def _sunlit(
    sun: Camera, depth: np.ndarray, camera: Camera, z: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Share of the sun that reaches each sample, (h, w) float32."""
    turn = sun.K @ sun.R @ camera.R.T
    A = (turn @ np.linalg.inv(camera.K)).astype(np.float32)
    b = (sun.K @ sun.t - turn @ camera.t).astype(np.float32)
    at = [(A[k, 0] * x + (A[k, 1] * y + A[k, 2])) * z + b[k] for k in range(3)]
    size = depth.shape[0]
    map_x, map_y = at[0] / at[2], at[1] / at[2]
    outside = (map_x < 2) | (map_y < 2) | (map_x > size - 3) | (map_y > size - 3)
    reach = at[2] - np.float32(0.12)  # a surface must not shade itself
    share = np.zeros_like(z)
    for dx, dy in ((-0.8, -0.3), (0.3, -0.8), (0.8, 0.3), (-0.3, 0.8)):
        blocker = cv2.remap(
            depth, map_x + np.float32(dx), map_y + np.float32(dy), cv2.INTER_NEAREST
        )
        share += blocker > reach
    share *= 0.25
    share[outside] = 1
    return share
