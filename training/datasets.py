"""Datasets of image pairs with known geometry, drawn from posed scenes and from photos.

`PosedPairs` gives pairs of one scene with their relative pose (stages 1 and 2 of the training),
`HomographyPairs` gives two views of one photo (stage 0). Both draw sample i from (seed, i)
alone, so that a run resumes to the exact step, and both take all curricula from i.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from scfeat_ros.errors import InputError
from scfeat_training.geometry import (
    back_project,
    epipolar_lines,
    fundamental_from_pose,
    lines_hit_image,
    pixel_affinity,
    project,
    relative_pose,
    rotation_angle,
    symmetric_epipolar_distance,
    transform_points,
)
from scfeat_training.image_files import read_image
from scfeat_training.photometric import Photometric, augment
from scfeat_training.scenes import Scene, has_pairs


class ImageCache:
    """Decoded RGB images by path, the least recently used dropped beyond `max_bytes`.

    Attributes:
        bad: error messages of files that could not be read, by path; they are not tried again.
    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        self.max_bytes = max_bytes
        self.bad: dict[Path, str] = {}
        self._bytes = 0
        self._images: OrderedDict[Path, np.ndarray] = OrderedDict()

    def __call__(self, path: Path) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB; do not write to it. Raises InputError if unreadable."""
        image = self._images.get(path)
        if image is not None:
            self._images.move_to_end(path)
            return image
        if path in self.bad:
            raise InputError(self.bad[path])
        try:
            image = read_image(path)
        except InputError as error:
            self.bad[path] = str(error)
            raise
        self._images[path] = image
        self._bytes += image.nbytes
        while self._bytes > self.max_bytes and len(self._images) > 1:
            self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


def warp(
    image: np.ndarray, H: np.ndarray, size: tuple[int, int], fill: Sequence[int] = (0, 0, 0)
) -> np.ndarray:
    """Resample an image under the pixel homography H (3, 3) to size (width, height).

    Where H shrinks the image it is area-averaged first, so that nothing aliases.
    """
    width, height = size
    centre = np.linalg.inv(H) @ ((width - 1) / 2, (height - 1) / 2, 1)
    x, y = centre[:2] / centre[2]
    # Local scale at the middle of the result, from the Jacobian's determinant.
    w = H[2] @ (x, y, 1)
    scale = np.sqrt(abs(np.linalg.det(H) / w**3))
    if scale < 0.75:
        shrunk = (np.array(image.shape[1::-1]) * min(1.25 * scale, 1)).astype(int).clip(8)
        factors = shrunk / image.shape[1::-1]
        image = cv2.resize(image, shrunk.tolist(), interpolation=cv2.INTER_AREA)
        H = H @ np.linalg.inv(pixel_affinity(*factors))
    return cv2.warpPerspective(
        image, H, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )


def curriculum(index: int, start: float, end: float, samples: int) -> float:
    """A value that is linear from `start` at sample 0 to `end` at sample `samples` and after."""
    return end if index >= samples else start + (end - start) * index / samples


@dataclass(frozen=True)
class PosedPairsConfig:
    """What `PosedPairs` draws.

    size: (width, height) of both crops. length: samples of an epoch, any number. overlap: range
    of covisibility. rotation: largest relative rotation in degrees at the first sample and after
    `curriculum` samples. roll: largest in-plane turn of each crop in degrees. scale: range of
    the crop's resize factor (a crop never exceeds its image, which may force a larger one).
    lines_inside: least share of epipolar lines that must cross the other crop. photometric: None
    for no change of the pixels. tracks: rows of the sample's `tracks`; 0 for none.
    """

    size: tuple[int, int] = (320, 240)
    length: int = 1_000_000
    seed: int = 0
    tracks: int = 0
    overlap: tuple[float, float] = (0.1, 0.95)
    rotation: tuple[float, float] = (20.0, 60.0)
    curriculum: int = 20_000
    roll: float = 10.0
    scale: tuple[float, float] = (0.5, 1.2)
    lines_inside: float = 0.5
    photometric: Photometric | None = field(default_factory=Photometric)


class PosedPairs(Dataset):
    """Pairs of crops of one scene with their exact relative geometry.

    Sample i is a dict of tensors and strings:
    image1, image2: (3, H, W) uint8 RGB. K1, K2: (3, 3) float32 of the crops. R (3, 3), t (3,):
    float32, x2 = R x1 + t, t in the scene's unit. F: (3, 3) float32, unit norm,
    x2^T F x1 = 0 for pixels of the crops. depth_range1, depth_range2: (2,) float32 near and far
    z, (0, inf) where unknown. name1, name2: "scene/file". With `tracks` in the configuration,
    tracks: (tracks, 4) float32 x1, y1, x2, y2 of 3D points that both crops show, in random order,
    NaN in the rows that are left.

    A crop may be turned about its optical axis, which leaves a pinhole camera and is part of R.
    An image that cannot be read raises InputError, or with skip_bad is drawn no more:
    `images.bad` has such files. Draws that depend on a broken file are the one exception to
    "sample i from (seed, i) alone".
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        config: PosedPairsConfig | None = None,
        images: ImageCache | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.config = config or PosedPairsConfig()
        self.images = images or ImageCache()
        self.skip_bad = skip_bad
        self.scenes: list[Scene] = []
        self._pairs: list[np.ndarray] = []  # of each scene, sorted by relative rotation
        self._angles: list[np.ndarray] = []
        low, high = self.config.overlap
        for scene in scenes:
            keep = (scene.overlap >= low) & (scene.overlap <= high)
            pairs = scene.pairs[keep]
            if not len(pairs):
                continue
            R = scene.R[pairs[:, 1]] @ scene.R[pairs[:, 0]].swapaxes(-1, -2)
            angles = rotation_angle(R)
            order = np.argsort(angles, kind="stable")
            self.scenes.append(scene)
            self._pairs.append(pairs[order])
            self._angles.append(angles[order])
        if not self.scenes:
            if not has_pairs(scenes):
                raise InputError(
                    "no scene has covisible pairs of images, which posed pairs are drawn from; "
                    "set posed_share: 0 where the stage allows it, or give scenes with pairs"
                )
            raise InputError(
                f"no scene has pairs with an overlap of {low} to {high}; widen the range"
            )
        self._weights = np.array([s.weight * np.sqrt(len(s)) for s in self.scenes])
        self._least_rotation = min(angles[0] for angles in self._angles)

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.config.seed, 1, index))
        for _ in range(200):
            sample = self._draw(rng, self.max_rotation(index))
            if sample is not None:
                return sample
        raise InputError(
            "200 draws gave no usable pair: poses or K of the scenes disagree with the images, "
            "or overlap, rotation and lines_inside leave nothing"
        )

    def max_rotation(self, index: int) -> float:
        """Largest relative rotation in degrees that sample `index` may have before roll."""
        limit = curriculum(index, *self.config.rotation, self.config.curriculum)
        return max(limit, float(self._least_rotation))

    def _draw(self, rng: np.random.Generator, max_rotation: float) -> dict[str, Any] | None:
        allowed = [np.searchsorted(angles, max_rotation, "right") for angles in self._angles]
        weights = self._weights * (np.array(allowed) > 0)
        which = rng.choice(len(self.scenes), p=weights / weights.sum())
        scene = self.scenes[which]
        i, j = self._pairs[which][rng.integers(allowed[which])]
        if rng.random() < 0.5:
            i, j = j, i
        images = []
        for path in (scene.paths[i], scene.paths[j]):
            try:
                images.append(self.images(path))
            except InputError:
                if not self.skip_bad:
                    raise
                return None
        return self._crop_pair(scene, int(i), int(j), images, rng)

    def _crop_pair(
        self, scene: Scene, i: int, j: int, images: list[np.ndarray], rng: np.random.Generator
    ) -> dict[str, Any] | None:
        config = self.config
        views = [
            _View.draw(scene.K[index], scene.R[index], scene.t[index], image, config, rng)
            for index, image in zip((i, j), images, strict=True)
        ]
        points = scene.shared_points(i, j)
        if len(points[0]) < 8:
            points = proxy_points(scene, i, j)
        if not _place_crops(views, points, config.size, rng):
            return None
        first, second = views
        R, t = relative_pose(first.R, first.t, second.R, second.t)
        if np.linalg.norm(t) < 1e-9:
            return None  # a pure rotation has no epipolar geometry
        F = fundamental_from_pose(first.K, second.K, R, t)
        width, height = config.size
        if min(_share_hit(F, width, height), _share_hit(F.T, width, height)) < config.lines_inside:
            return None
        crops = []
        for view, image in zip(views, images, strict=True):
            crop = warp(image, view.affinity, config.size)
            if config.photometric is not None:
                crop = augment(crop, rng, config.photometric)
            crops.append(crop)
        names = [f"{scene.name}/{scene.names[index]}" for index in (i, j)]
        depths = scene.depth_range[[i, j]]
        sample = two_view_sample(crops, (first.K, second.K), R, t, depths, names)
        if config.tracks:
            shared = scene.shared_points(i, j)
            sample["tracks"] = _float32(_visible_tracks(shared, views, config, rng))
        return sample


def two_view_sample(
    images: Sequence[np.ndarray],
    K: Sequence[np.ndarray],
    R: np.ndarray,
    t: np.ndarray,
    depth_ranges: Sequence[Sequence[float]] | np.ndarray,
    names: Sequence[str],
) -> dict[str, Any]:
    """The dict of a sample, as `PosedPairs` describes it, from two images (H, W, 3) uint8."""
    sample: dict[str, Any] = {"R": _float32(R), "t": _float32(t)}
    sample["F"] = _float32(fundamental_from_pose(K[0], K[1], R, t))
    for k in (0, 1):
        sample[f"image{k + 1}"] = torch.from_numpy(images[k].transpose(2, 0, 1).copy())
        sample[f"K{k + 1}"] = _float32(K[k])
        sample[f"depth_range{k + 1}"] = _float32(depth_ranges[k])
        sample[f"name{k + 1}"] = names[k]
    return sample


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


@dataclass
class _View:
    """A crop of an image: the camera after the turn, and the map of its pixels."""

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    affinity: np.ndarray  # (3, 3): source pixels to crop pixels
    source: tuple[int, int]  # width, height

    @staticmethod
    def draw(
        K: np.ndarray,
        R: np.ndarray,
        t: np.ndarray,
        image: np.ndarray,
        config: PosedPairsConfig,
        rng: np.random.Generator,
    ) -> _View:
        """Draw roll and scale; the crop's place comes later.

        Turning the camera by Z about its axis turns pixels by K Z K^-1; then they are scaled.
        """
        roll = np.radians(rng.uniform(-config.roll, config.roll))
        c, s = np.cos(roll), np.sin(roll)
        Z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        source = image.shape[1], image.shape[0]
        # The turned crop must lie inside the image: its bounding box must.
        width, height = config.size
        box = width * abs(c) + height * abs(s), width * abs(s) + height * abs(c)
        least = max(box[0] / source[0], box[1] / source[1])
        low, high = config.scale
        scale = max(float(np.exp(rng.uniform(np.log(low), np.log(high)))), least * 1.0001)
        scaling = pixel_affinity(scale, scale)
        return _View(scaling @ K, Z @ R, Z @ t, scaling @ K @ Z @ np.linalg.inv(K), source)

    def move(self, source_point: np.ndarray, size: tuple[int, int]) -> None:
        """Put a source pixel at the crop's middle, or as near to it as the image allows."""
        width, height = size
        # Where the crop's middle may be, in source pixels: its corners must stay inside.
        inverse = np.linalg.inv(self.affinity[:2, :2])
        half = abs(inverse) @ (width / 2, height / 2)
        low, high = half - 0.5, np.array(self.source) - half - 0.5
        centre = np.clip(source_point, np.minimum(low, high), np.maximum(low, high))
        at = (self.affinity @ (*centre, 1))[:2]
        shift = np.eye(3)
        shift[:2, 2] = ((width - 1) / 2, (height - 1) / 2) - at
        self.K = shift @ self.K
        self.affinity = shift @ self.affinity

    def inside(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Which source pixels (N, 2) the crop shows, (N,) bool."""
        at = transform_points(self.affinity, points)
        return ((at > -0.5) & (at < np.array(size) - 0.5)).all(1)


def _visible_tracks(
    points: tuple[np.ndarray, np.ndarray],
    views: list[_View],
    config: PosedPairsConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """(tracks, 4) crop pixels of the points that both crops show; NaN in the rows that are left."""
    rows = np.full((config.tracks, 4), np.nan)
    both = np.ones(len(points[0]), bool)
    for view, source in zip(views, points, strict=True):
        both &= view.inside(source, config.size)
    chosen = rng.permutation(np.flatnonzero(both))[: config.tracks]
    for number, (view, source) in enumerate(zip(views, points, strict=True)):
        at = transform_points(view.affinity, source[chosen])
        rows[: len(chosen), 2 * number : 2 * number + 2] = at
    return rows


def _place_crops(
    views: list[_View],
    points: tuple[np.ndarray, np.ndarray],
    size: tuple[int, int],
    rng: np.random.Generator,
    tries: int = 8,
    enough: float = 0.5,
) -> bool:
    """Place both crops on the same part of the scene, at random.

    The first place with the share `enough` of each crop's points in the other one is taken, else
    the best of all tries; False when that has fewer than eight points or a tenth.
    """
    points1, points2 = points
    if not len(points1):
        return False
    best, best_places = 0.0, None
    jitter = 0.15 * np.array(size)
    for _ in range(tries):
        anchor = points1[rng.integers(len(points1))] + rng.normal(size=2) * jitter
        offset = rng.normal(size=2) * jitter
        views[0].move(anchor, size)
        inside1 = views[0].inside(points1, size)
        if not inside1.any():
            continue
        partner = np.median(points2[inside1], 0) + offset
        views[1].move(partner, size)
        inside2 = views[1].inside(points2, size)
        both = (inside1 & inside2).sum()
        share = both / max(inside1.sum(), inside2.sum()) if both >= 8 else 0.0
        if share >= enough:
            return True
        if share > best:
            best, best_places = share, (anchor, partner)
    if best_places is None or best < 0.1:
        return False
    for view, place in zip(views, best_places, strict=True):
        view.move(place, size)
    return True


def proxy_points(scene: Scene, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Roughly corresponding pixels (n, 2), (n, 2) of two images without known 3D points.

    The scene is approximated by the point nearest to both optical axes: a grid of image i is placed
    at its depth, or at infinity if it is behind a camera.
    """
    depth = _axes_depth(scene.R[[i, j]], scene.t[[i, j]])
    width, height = scene.size_wh[i]
    grid = _grid((width, height), 16, 12)
    R, t = relative_pose(scene.R[i], scene.t[i], scene.R[j], scene.t[j])
    if depth is None:
        depth, t = 1.0, 0 * t
    in_first = back_project(scene.K[i], grid, np.full(len(grid), depth))
    in_second, z = project(scene.K[j], R, t, in_first)
    seen = (z > 0) & (in_second > 0).all(1) & (in_second < scene.size_wh[j] - 1).all(1)
    return grid[seen], in_second[seen]


def _axes_depth(R: np.ndarray, t: np.ndarray) -> float | None:
    """Depth in the first camera of the point nearest to all optical axes; None if not ahead."""
    axes = R[:, 2]  # third row: the optical axis in the world
    centres = -(R.swapaxes(-1, -2) @ t[..., None])[..., 0]
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    total = across.sum(0)
    if np.linalg.cond(total) > 1e6:
        return None
    focus = np.linalg.solve(total, (across @ centres[..., None]).sum(0)[..., 0])
    depths = (R @ focus + t)[:, 2]
    return float(depths[0]) if (depths > 0).all() else None


def _grid(size: tuple[int, int], columns: int, rows: int) -> np.ndarray:
    """(columns * rows, 2) points spread evenly over an image of a (width, height), pixels."""
    x, y = (np.linspace(0, s - 1, n) for s, n in zip(size, (columns, rows), strict=True))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _share_hit(F: np.ndarray, width: int, height: int) -> float:
    """Share of a grid of points in one image whose epipolar lines cross the other one."""
    grid = _grid((width, height), 8, 6)
    return float(lines_hit_image(epipolar_lines(F, grid), width, height).mean())


def validation_pairs(
    scenes: Sequence[Scene],
    count: int = 200,
    size: tuple[int, int] = (320, 240),
    images: ImageCache | None = None,
    skip_bad: bool = False,
) -> PosedPairs:
    """A fixed list of `count` plain pairs of the held-out scenes (`split_scenes` gives them).

    No photometric change, no roll, crops as large as the images allow; overlap of 0.1 to 0.7 and
    rotations up to 60 degrees: about what pose benchmarks ask. Where no pair overlaps so, as of a
    video's neighbours, any overlap will do.
    """
    low, high = 0.1, 0.7
    if not any(((s.overlap >= low) & (s.overlap <= high)).any() for s in scenes):
        low, high = 0.0, 1.0
    config = PosedPairsConfig(
        size=size,
        length=count,
        seed=20_000,
        overlap=(low, high),
        rotation=(60.0, 60.0),
        roll=0.0,
        scale=(0.5, 0.5),
        photometric=None,
    )
    return PosedPairs(scenes, config, images, skip_bad)


@dataclass(frozen=True)
class HomographyPairsConfig:
    """What `HomographyPairs` draws.

    size: (width, height). rotation: largest in-plane rotation in degrees at the first sample and
    after `curriculum` samples. scale: range of the scale between the two views. perspective: how
    far corners move, as a share of the side. crop_scale: range of the first view's resize
    factor. overlap: least share of one view that the other shows. mirror: probability that the
    photo is mirrored first, which both views show then.
    """

    size: tuple[int, int] = (320, 240)
    length: int = 1_000_000
    seed: int = 0
    rotation: tuple[float, float] = (15.0, 60.0)
    curriculum: int = 20_000
    scale: tuple[float, float] = (0.5, 2.0)
    perspective: float = 0.2
    translation: float = 0.2
    crop_scale: tuple[float, float] = (0.5, 1.2)
    overlap: float = 0.4
    filled: float = 0.85
    mirror: float = 0.0
    photometric: Photometric | None = field(default_factory=Photometric)


class HomographyPairs(Dataset):
    """Two views of one photo under a random homography.

    Sample i is a dict: image1, image2: (3, H, W) uint8 RGB; H: (3, 3) float32, pixels of image1
    to pixels of image2, H[2, 2] = 1; name: the photo's path. All of image1 is photo; image2 may
    have plain margins (a share of 1 - filled at most), where no pixel of image1 goes.
    """

    def __init__(
        self,
        photos: Sequence[str | Path],
        config: HomographyPairsConfig | None = None,
        images: ImageCache | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.config = config or HomographyPairsConfig()
        self.photos = [Path(photo) for photo in photos]
        if not self.photos:
            raise InputError("no photos to draw homography pairs from")
        # A large folder counts by the square root of its size, like a scene of `PosedPairs`.
        folders = Counter(photo.parent for photo in self.photos)
        weights = np.array([folders[photo.parent] ** -0.5 for photo in self.photos])
        self._cumulative = np.cumsum(weights / weights.sum())
        self.images = images or ImageCache()
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return self.config.length

    def max_rotation(self, index: int) -> float:
        """Largest in-plane rotation in degrees of sample `index`."""
        return curriculum(index, *self.config.rotation, self.config.curriculum)

    def __getitem__(self, index: int) -> dict[str, Any]:
        config = self.config
        rng = np.random.default_rng((config.seed, 2, index))
        for _ in range(100):
            path = self.photos[self._pick(rng)]
            try:
                photo = self.images(path)
                break
            except InputError:
                if not self.skip_bad:
                    raise
        else:
            raise InputError("100 photos in a row cannot be read")
        if config.mirror and rng.random() < config.mirror:
            photo = photo[:, ::-1]
        first, H = self._draw(photo.shape[1::-1], self.max_rotation(index), rng)
        fill = [int(rng.integers(0, 256))] * 3
        views = [warp(photo, first, config.size), warp(photo, H @ first, config.size, fill)]
        if config.photometric is not None:
            views = [augment(view, rng, config.photometric) for view in views]
        image1, image2 = (torch.from_numpy(view.transpose(2, 0, 1).copy()) for view in views)
        return {
            "image1": image1,
            "image2": image2,
            "H": _float32(H / H[2, 2]),
            "name": str(path),
        }

    def _pick(self, rng: np.random.Generator) -> int:
        at = np.searchsorted(self._cumulative, rng.random(), "right")
        return min(int(at), len(self.photos) - 1)

    def _draw(
        self, photo: tuple[int, int], max_rotation: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first view's place in the photo and the homography to the second, both (3, 3)."""
        config = self.config
        size = np.array(config.size)
        low, high = config.crop_scale
        least = max(size / photo)
        crop_scale = max(float(np.exp(rng.uniform(np.log(low), np.log(high)))), least)
        room = np.array(photo) - size / crop_scale
        first = pixel_affinity(crop_scale, crop_scale, *(rng.random(2) * room.clip(0)))
        to_photo = np.linalg.inv(first)
        grid = _grid(config.size, 12, 12)
        # Wide draws may show too little of the same or leave the photo; each try is milder.
        for attempt in range(30):
            H = self._homography(max_rotation, 0.93**attempt, rng)
            forward = transform_points(H, grid)
            backward = transform_points(np.linalg.inv(H), grid)
            shown = [((p > -0.5) & (p < size - 0.5)).all(1).mean() for p in (forward, backward)]
            source = transform_points(to_photo, backward)
            filled = ((source > -0.5) & (source < np.array(photo) - 0.5)).all(1).mean()
            if max(shown) >= config.overlap and filled >= config.filled:
                return first, H
        return first, np.eye(3)

    def _homography(
        self, max_rotation: float, strength: float, rng: np.random.Generator
    ) -> np.ndarray:
        config = self.config
        width, height = config.size
        middle = np.array([(width - 1) / 2, (height - 1) / 2])
        corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])
        angle = np.radians(rng.uniform(-max_rotation, max_rotation)) * strength
        low, high = np.log(config.scale) * strength
        scale = np.exp(rng.uniform(low, high))
        c, s = scale * np.cos(angle), scale * np.sin(angle)
        shift = rng.uniform(-1, 1, 2) * config.translation * strength * (width, height)
        moved = (corners - middle) @ np.array([[c, s], [-s, c]]) + middle + shift
        bend = rng.uniform(-1, 1, (4, 2)) * config.perspective * strength
        moved += bend * scale * (width / 2, height / 2)
        return cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32))


def pair_images(pair: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both images of a pair of `PosedPairs` or `HomographyPairs`, (H, W, 3) uint8 RGB."""
    first, second = (
        np.ascontiguousarray(pair[key].permute(1, 2, 0).numpy()) for key in ("image1", "image2")
    )
    return first, second


def match_errors(pair: dict[str, Any], points1: np.ndarray, points2: np.ndarray) -> np.ndarray:
    """(N,) errors of matches of (N, 2) points of a pair's images, pixels.

    Under a homography the distance from the true place in image 2, with known poses the larger of
    the distances of both points from each other's epipolar lines.
    """
    points1, points2 = points1.astype(np.float64), points2.astype(np.float64)
    if "H" in pair:
        true = transform_points(pair["H"].double().numpy(), points1)
        return np.linalg.norm(true - points2, axis=1)
    return symmetric_epipolar_distance(pair["F"].double().numpy(), points1, points2)
