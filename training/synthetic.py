"""Endless posed pairs from random 3D scenes, with exact pose, depth and intrinsics.

python -m scfeat_training.synthetic bag OUT      writes the sample camera bag
python -m scfeat_training.synthetic pairs OUT    writes pictures of some pairs, to look at
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from scfeat_ros.errors import InputError, ScfeatError
from scfeat_training import textures as tx
from scfeat_training.datasets import ImageCache, PosedPairs, curriculum, two_view_sample
from scfeat_training.geometry import (
    back_project,
    intrinsic_matrix,
    pixel_affinity,
    project,
    relative_pose,
    rotation_angle,
)
from scfeat_training.image_files import write_image
from scfeat_training.photometric import Photometric, augment
from scfeat_training.render import Atlas, Camera, Light, World


@dataclass(frozen=True)
class SyntheticPairsConfig:
    """What `SyntheticPairs` draws.

    size: (width, height). rotation: largest relative rotation in degrees at the first sample and
    after `curriculum` samples. overlap: range of the share of image 1 that image 2 sees.
    focal: range of the focal length over the width. roll: largest roll of a camera in degrees.
    textures: pictures in use at a time, of `texture_size` pixels square; all are drawn anew
    every `refresh` samples. supersample^2 samples a pixel. photometric: None for none. tracks:
    rows of the sample's `tracks`; 0 for none.
    """

    size: tuple[int, int] = (320, 240)
    length: int = 1_000_000
    seed: int = 0
    tracks: int = 0
    rotation: tuple[float, float] = (20.0, 60.0)
    curriculum: int = 20_000
    overlap: tuple[float, float] = (0.25, 0.95)
    focal: tuple[float, float] = (0.7, 1.5)
    roll: float = 12.0
    textures: int = 40
    texture_size: int = 384
    refresh: int = 4_000
    supersample: int = 2
    photometric: Photometric | None = field(default_factory=Photometric)


class SyntheticPairs(Dataset):
    """Pairs of views of random scenes; sample i depends on (seed, i) and the photos alone.

    A sample is that of `datasets.PosedPairs`, `tracks` included, which are spread over image 1
    here, and with `depth` also depth1, depth2: (H, W) float32, exact z at the pixel centres.
    Textures are crops of `photos` and, one in three, procedural; without photos all are. A photo
    that cannot be read raises InputError; with skip_bad a procedural texture takes its place.
    """

    def __init__(
        self,
        config: SyntheticPairsConfig | None = None,
        photos: Sequence[str | Path] = (),
        depth: bool = False,
        images: ImageCache | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.config = config or SyntheticPairsConfig()
        self.skip_bad = skip_bad
        self.photos = [Path(photo) for photo in photos]
        self.depth = depth
        self.images = images or ImageCache(256 << 20)
        self._atlas: tuple[int, Atlas] | None = None

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        config = self.config
        rng = np.random.default_rng((config.seed, 3, index))
        limit = curriculum(index, *config.rotation, config.curriculum)
        atlas = self._textures(index // config.refresh)
        for _ in range(50):
            world = random_world(atlas, rng)
            for _ in range(6):
                cameras = random_cameras(rng, config, limit)
                if self._usable(world, cameras):
                    return self._sample(world, cameras, rng, index)
        raise InputError(
            f"sample {index}: 300 draws gave no pair with an overlap of {config.overlap[0]} to "
            f"{config.overlap[1]}; widen the range"
        )

    def _textures(self, batch: int) -> Atlas:
        """The pictures of the samples batch * refresh and after; the last ones are kept."""
        if self._atlas is None or self._atlas[0] != batch:
            rng = np.random.default_rng((self.config.seed, 4, batch))
            side = self.config.texture_size
            pictures = []
            for number in range(self.config.textures):
                picture = self._photo_crop(rng) if self.photos and number % 3 else None
                if picture is None:
                    picture = tx.photo_like(rng, (side, side))
                pictures.append(picture)
            self._atlas = batch, Atlas(pictures)
        return self._atlas[1]

    def _photo_crop(self, rng: np.random.Generator) -> np.ndarray | None:
        """A square part of a random photo, None if it is skipped as unreadable."""
        try:
            photo = self.images(self.photos[rng.integers(len(self.photos))])
        except InputError:
            if not self.skip_bad:
                raise
            return None
        return _square_crop(photo, self.config.texture_size, rng)

    def _usable(self, world: World, cameras: list[Camera]) -> bool:
        """Whether both cameras are clear of things and see enough of the same."""
        small = [
            Camera(pixel_affinity(0.125, 0.125) @ c.K, c.R, c.t, (c.size[0] // 8, c.size[1] // 8))
            for c in cameras
        ]
        depths = [world.depth(camera) for camera in small]
        for depth in depths:
            if np.isinf(depth).mean() > 0.2 or (depth < 0.4).mean() > 0.02:
                return False
        low, high = self.config.overlap
        for first, second in ((0, 1), (1, 0)):
            one, other = small[first], small[second]
            R, t = relative_pose(one.R, one.t, other.R, other.t)
            grid = _pixels(*one.size)
            _, visible = correspondences(
                grid, depths[first], depths[second], one.K, other.K, R, t, tolerance=0.05
            )
            if not low <= visible.mean() <= high:
                return False
        return True

    def _sample(
        self, world: World, cameras: list[Camera], rng: np.random.Generator, index: int
    ) -> dict[str, Any]:
        config = self.config
        images, depths, ranges = [], [], []
        for camera in cameras:
            image = world.render(camera, config.supersample)
            if config.photometric is not None:
                image = augment(image, rng, config.photometric)
            images.append(image)
            if self.depth or config.tracks:
                depth = world.depth(camera)
            else:  # a coarse one will do for the range
                K = pixel_affinity(0.25, 0.25) @ camera.K
                size = camera.size[0] // 4, camera.size[1] // 4
                depth = world.depth(Camera(K, camera.R, camera.t, size))
            depths.append(depth)
            solid = depth[np.isfinite(depth)]
            ranges.append((0.8 * solid.min(), 1.25 * solid.max()))
        first, second = cameras
        R, t = relative_pose(first.R, first.t, second.R, second.t)
        names = (f"synthetic/{index:08d}_1", f"synthetic/{index:08d}_2")
        sample = two_view_sample(images, (first.K, second.K), R, t, ranges, names)
        if config.tracks:
            points = rng.uniform(0, 1, (6 * config.tracks, 2)) * (np.array(config.size) - 1)
            points2, visible = correspondences(points, *depths, first.K, second.K, R, t)
            both = np.hstack([points, points2])[visible][: config.tracks]
            rows = np.full((config.tracks, 4), np.nan, np.float32)
            rows[: len(both)] = both
            sample["tracks"] = torch.from_numpy(rows)
        if self.depth:
            for number, depth in enumerate(depths, start=1):
                sample[f"depth{number}"] = torch.from_numpy(depth.astype(np.float32))
        return sample


class WithSynthetic(Dataset):
    """Posed pairs of which a share is replaced by synthetic ones.

    Whether sample i is synthetic depends on (seed, i) alone. `config` is that of the posed pairs.
    """

    def __init__(self, posed: PosedPairs, synthetic: SyntheticPairs, share: float) -> None:
        self.posed = posed
        self.synthetic = synthetic
        self.share = share
        self.config = posed.config

    def __len__(self) -> int:
        return len(self.posed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = np.random.default_rng((self.config.seed, 5, index)).random()
        return (self.synthetic if chance < self.share else self.posed)[index]


def correspondences(
    points1: np.ndarray,
    depth1: np.ndarray,
    depth2: np.ndarray,
    K1: np.ndarray,
    K2: np.ndarray,
    R: np.ndarray,
    t: np.ndarray,
    tolerance: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Where points of image 1 are in image 2, and which of them are seen there.

    points1: (N, 2) pixels. depth1, depth2: (H, W) z. Returns points2 (N, 2) float64 and visible
    (N,) bool: inside image 2 and no nearer thing in front (depths agree within `tolerance`, a
    share of the depth).
    """
    z1 = _sample_depth(depth1, points1)
    known = np.isfinite(z1)
    in_first = back_project(np.asarray(K1, float), points1, np.where(known, z1, 1.0))
    points2, z2 = project(np.asarray(K2, float), np.asarray(R, float), np.asarray(t), in_first)
    height, width = depth2.shape
    inside = (points2 > -0.5).all(1) & (points2 < (width - 0.5, height - 0.5)).all(1) & (z2 > 0)
    seen = _sample_depth(depth2, np.where(inside[:, None], points2, 0.0))
    with np.errstate(invalid="ignore"):
        agrees = abs(seen - z2) <= tolerance * z2
    return points2, known & inside & agrees


def _sample_depth(depth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Depth at real-valued pixels; inverse depth is linear on a plane, so that is interpolated."""
    height, width = depth.shape
    x = np.clip(points[:, 0], 0, width - 1)
    y = np.clip(points[:, 1], 0, height - 1)
    left = np.minimum(np.floor(x).astype(int), max(width - 2, 0))
    top = np.minimum(np.floor(y).astype(int), max(height - 2, 0))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = x - left, y - top
    with np.errstate(divide="ignore"):
        inverse = 1 / np.asarray(depth, float)
        upper = inverse[top, left] * (1 - fx) + inverse[top, right] * fx
        lower = inverse[bottom, left] * (1 - fx) + inverse[bottom, right] * fx
        return 1 / (upper * (1 - fy) + lower * fy)


def _pixels(width: int, height: int) -> np.ndarray:
    """All pixel centres of an image, (width * height, 2) float64."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) * 1.0


def _square_crop(photo: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    height, width = photo.shape[:2]
    edge = int(min(height, width) * rng.uniform(0.5, 1))
    top, left = int(rng.integers(height - edge + 1)), int(rng.integers(width - edge + 1))
    crop = photo[top : top + edge, left : left + edge]
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)


def random_cameras(
    rng: np.random.Generator, config: SyntheticPairsConfig, max_rotation: float
) -> list[Camera]:
    """Two cameras about the middle of a random scene, turned against each other within a limit."""
    target = rng.normal(0, 0.8, 3) * (1, 1, 0.4) + (0, 0, 1.2)
    distance = rng.uniform(2.5, 5.5)
    azimuth = rng.uniform(-0.9, 0.9) - np.pi / 2  # the scenes are open towards -y
    elevation = rng.uniform(-0.1, 0.45)
    limit = np.radians(max_rotation)
    while True:
        # Orbit, dolly and look elsewhere, in any mixture; the limit holds for their sum.
        swing = rng.uniform(-limit, limit)
        tilt = rng.uniform(-0.3, 0.3) * limit
        cameras = []
        for k, shift in enumerate((0.0, 1.0)):
            around = azimuth + shift * swing
            up = elevation + shift * tilt
            far = distance * (np.exp(rng.uniform(-0.45, 0.45)) if k else 1.0)
            out = np.array([np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)])
            eye = target + far * out
            eye[2] = max(eye[2], 0.25)
            at = target + rng.normal(0, 0.3, 3) * shift
            focal = config.size[0] * np.exp(rng.uniform(*np.log(config.focal)))
            centre = (np.array(config.size) - 1) / 2 + rng.normal(0, 4, 2)
            K = intrinsic_matrix(focal, focal, *centre)
            roll = np.radians(rng.uniform(-config.roll, config.roll))
            cameras.append(Camera.look_at(eye, at, K, config.size, roll))
        first, second = cameras
        baseline = np.linalg.norm(first.centre - second.centre)
        if rotation_angle(second.R @ first.R.T) <= max_rotation and baseline > 0.15:
            return cameras


def random_world(atlas: Atlas, rng: np.random.Generator) -> World:
    """A random scene of about 10 m: ground, walls, boxes, panels and height fields in between.

    Textures are drawn from the atlas with windows, turns and tints of their own.
    """
    sun = rng.normal(size=3) + np.array([0, -0.6, 1.2])
    strength = rng.uniform(0.2, 0.8)
    light = Light(
        sun=sun,
        sun_colour=tuple(strength * rng.uniform(0.9, 1.1, 3)),
        sky_colour=tuple((1 - 0.5 * strength) * rng.uniform(0.85, 1.05, 3)),
    )
    world = World(atlas, light)
    decorate = _Decorator(world, rng)
    far = rng.uniform(2.5, 7.0)
    wide = far + rng.uniform(4, 9)
    # The ground: flat or rough.
    if rng.random() < 0.35:
        rough = _hills(rng, 10, rng.uniform(0.05, 0.3))
        corner = (-wide, wide, -0.1)
        world.add_height_field(
            corner, (0, -2 * wide, 0), (2 * wide, 0, 0), rough, decorate.any(), decorate.tint()
        )
    else:
        decorate.quad((-wide, far + 6, 0), (2 * wide, 0, 0), (0, -far - 18, 0), repeat=3)
    # Walls at the back: one, a corner, or a row at several depths.
    high = rng.uniform(5, 10)
    turn = rng.normal(0, 0.25)
    along = np.array([np.cos(turn), np.sin(turn), 0])
    start = np.array([0, far, high]) - along * wide
    if rng.random() < 0.3:
        relief = _hills(rng, 9, rng.uniform(0.2, 0.7))
        field_start = start - (0, 0, high)
        world.add_height_field(
            field_start, 2 * wide * along, (0, 0, high), relief, decorate.any(), decorate.tint()
        )
    else:
        decorate.quad(start, 2 * wide * along, (0, 0, -high), repeat=3)
    for side in (-1, 1):
        if rng.random() < 0.75:
            depth = rng.uniform(2.5, wide)
            if side < 0:
                decorate.quad((-depth, far - 14, high), (0, 20, 0), (0, 0, -high), repeat=3)
            else:
                decorate.quad((depth, far + 6, high), (0, -20, 0), (0, 0, -high), repeat=3)
    # A distant backdrop, so that nothing is empty.
    decorate.quad((-60, 40, 40), (120, 0, 0), (0, 0, -60), repeat=2)
    decorate.quad((-40, -60, 40), (0, 120, 0), (0, 0, -60), repeat=2)
    decorate.quad((40, 60, 40), (0, -120, 0), (0, 0, -60), repeat=2)
    if rng.random() < 0.5:
        decorate.quad((-wide, -20, high), (2 * wide, 0, 0), (0, 40, 0), repeat=3)  # a ceiling

    for _ in range(int(rng.integers(3, 12))):
        size = np.exp(rng.normal(-0.6, 0.5, 3))
        place = rng.normal(0, 1.6, 3) * (1.2, 1, 0)
        if rng.random() < 0.7:  # on the ground, turned about the vertical
            angle = rng.uniform(0, np.pi)
            c, s = np.cos(angle), np.sin(angle)
            turned = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
            place[2] = size[2]
        else:  # anyhow, in the air
            turned = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            turned *= np.linalg.det(turned)
            place[2] = rng.uniform(0.5, 3)
        decorate.box(place, turned * size[:, None])
    for _ in range(int(rng.integers(0, 6))):  # panels
        right = rng.normal(size=3) * (1, 1, 0.3)
        right *= rng.uniform(0.5, 2) / np.linalg.norm(right)
        down = np.cross(right, rng.normal(size=3) * (1, 1, 0.3))
        down *= rng.uniform(0.5, 2) / np.linalg.norm(down)
        place = rng.normal(0, 1.7, 3) * (1.2, 1, 0.5) + (0, 0, 1.5)
        decorate.quad(place, right, down if down[2] < 0 else -down)
    return world


def _hills(rng: np.random.Generator, count: int, height: float) -> np.ndarray:
    """Heights (count, count) of a rough surface."""
    coarse = rng.normal(0, 1, (4, 4))
    fine = cv2.resize(coarse, (count, count), interpolation=cv2.INTER_CUBIC)
    return height * (fine + 0.25 * rng.normal(size=(count, count)))


class _Decorator:
    """Adds faces with random textures, windows in them, and tints."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world = world
        self.rng = rng

    def any(self) -> int:
        return int(self.rng.integers(len(self.world.atlas.size)))

    def tint(self) -> np.ndarray:
        return self.rng.uniform(0.8, 1.2) * self.rng.uniform(0.93, 1.07, 3)

    def window(self, repeat: float) -> tuple[float, float, float, float]:
        """A part of a texture, `repeat` times it at most; either way round."""
        rng = self.rng
        if repeat > 1:
            s, t = rng.random(2)
            return s, t, s + rng.uniform(1, repeat), t + rng.uniform(1, repeat)
        wide, high = rng.uniform(0.5, 1, 2)
        s, t = rng.random(2) * (1 - wide, 1 - high)
        return (s + wide, t, s, t + high) if rng.random() < 0.5 else (s, t, s + wide, t + high)

    def quad(
        self,
        origin: Sequence[float],
        right: Sequence[float],
        down: Sequence[float],
        repeat: float = 1,
    ) -> None:
        self.world.add_face(
            origin, right, down, self.any(), self.window(repeat), tint=self.tint(),
            swap=self.rng.random() < 0.2,
        )  # fmt: skip

    def box(self, centre: np.ndarray, axes: np.ndarray) -> None:
        sides = [self.any() for _ in range(6)]
        windows = [self.window(1) for _ in range(6)]
        self.world.add_box(centre, axes, sides, windows, tint=self.tint())


def write_pairs(out: Path, count: int, config: SyntheticPairsConfig) -> None:
    """Write side-by-side pictures of the first pairs into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = SyntheticPairs(config)
    for index in range(count):
        sample = pairs[index]
        both = torch.cat([sample["image1"], sample["image2"]], 2).permute(1, 2, 0).numpy()
        write_image(out / f"{index:06d}.jpg", cv2.cvtColor(both, cv2.COLOR_RGB2BGR))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scfeat_training.synthetic", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bag = commands.add_parser("bag", help="write the sample camera bag: a drive through a street")
    bag.add_argument("out", type=Path, help="bag folder to write")
    bag.add_argument("--seconds", type=float, default=10.0)
    bag.add_argument("--rate", type=float, default=15.0, help="frames per second")
    bag.add_argument("--size", default="640x480", help="WIDTHxHEIGHT")
    bag.add_argument("--seed", type=int, default=0)
    bag.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    bag.add_argument("--overwrite", action="store_true")
    pairs = commands.add_parser("pairs", help="write pictures of synthetic training pairs")
    pairs.add_argument("out", type=Path, help="folder to write to")
    pairs.add_argument("--count", type=int, default=12)
    pairs.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        if options.command == "pairs":
            write_pairs(options.out, options.count, SyntheticPairsConfig(seed=options.seed))
            return 0
        from scfeat_training.sample_bag import write_sample_bag

        try:
            width, height = (int(side) for side in options.size.split("x"))
        except ValueError:
            raise InputError(f"--size {options.size}: want WIDTHxHEIGHT, as 640x480") from None
        write_sample_bag(
            options.out,
            seconds=options.seconds,
            rate=options.rate,
            size=(width, height),
            seed=options.seed,
            workers=options.workers,
            overwrite=options.overwrite,
        )
    except ScfeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
