"""Images that carry their own features, so that an evaluation's answer is known exactly.

The first rows of such an image hold its keypoints as bytes, with a number for each that says which
point of the world it shows; the method `encoded` reads them back. This file is given to
`scfeat evaluate` as `--adapter`.
"""

from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from scfeat_training.evaluation.methods import Method, register, to_features

DESCRIPTORS = np.random.default_rng(7).normal(size=(6000, 64))


def encode(points, ids, size=(640, 480)):
    """(H, W, 3) uint8 image of (width, height) that holds (N, 2) points and (N,) numbers."""
    table = np.zeros((len(points) + 1, 3), np.float32)
    table[0, 0] = len(points)
    table[1:, :2], table[1:, 2] = points, ids
    content = table.tobytes()
    image = np.zeros(size[0] * size[1] * 3, np.uint8)
    image[: len(content)] = np.frombuffer(content, np.uint8)
    return image.reshape(size[1], size[0], 3)


def decode(image):
    """Points and numbers of an image that `encode` made."""
    content = np.ascontiguousarray(image).tobytes()
    count = int(np.frombuffer(content[:4], np.float32)[0])
    table = np.frombuffer(content[: 12 * (count + 1)], np.float32).reshape(-1, 3)
    return table[1:, :2], table[1:, 2].astype(int)


def write(path, points, ids, size=(640, 480)):
    """Write such an image losslessly."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), encode(points, ids, size)[..., ::-1])


@register("encoded")
class Encoded(Method):
    """Gives back what the image holds."""

    def extract(self, image):
        points, ids = decode(image)
        kept = slice(self.max_keypoints)
        return to_features(
            points[kept], np.linspace(1, 0.5, len(points))[kept], DESCRIPTORS[ids][kept], image
        )


class World:
    """Cameras on an arc that look at random points; every point is seen by every camera."""

    def __init__(self, cameras=8, points=300, noise=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.size = (640, 480)
        self.K = np.array([[500.0, 0, 310], [0, 505, 245], [0, 0, 1]])
        self.points = rng.uniform([-1.5, -1, -1], [1.5, 1, 1], (points, 3))
        self.R, self.t = [], []
        for angle in np.linspace(-0.6, 0.6, cameras):
            centre = np.array([6 * np.sin(angle), 0.4 * np.cos(5 * angle), -6 * np.cos(angle)])
            forward = -centre / np.linalg.norm(centre)
            right = np.cross([0, 1, 0], forward)
            right /= np.linalg.norm(right)
            R = np.stack([right, np.cross(forward, right), forward])
            self.R.append(R)
            self.t.append(-R @ centre)
        self.R, self.t = np.array(self.R), np.array(self.t)
        self.images = []
        for R, t in zip(self.R, self.t, strict=True):
            x = (self.points @ R.T + t) @ self.K.T
            self.images.append(x[:, :2] / x[:, 2:] + rng.normal(scale=noise, size=(points, 2)))

    @property
    def poses(self):
        """(N, 4, 4) camera to world."""
        poses = np.tile(np.eye(4), (len(self.R), 1, 1))
        poses[:, :3, :3] = self.R.transpose(0, 2, 1)
        poses[:, :3, 3] = -np.einsum("nji,nj->ni", self.R, self.t)
        return poses

    def write_images(self, folder, names):
        for name, points in zip(names, self.images, strict=True):
            write(Path(folder) / name, points, np.arange(len(points)), self.size)

    def write_colmap(self, folder):
        """A COLMAP project, as text: images/ and sparse/0."""
        names = [f"{i:03d}.png" for i in range(len(self.R))]
        self.write_images(Path(folder) / "images", names)
        model = Path(folder) / "sparse/0"
        model.mkdir(parents=True)
        (fx, _, cx), (_, fy, cy), _ = self.K  # COLMAP counts from the corner of the first pixel
        (model / "cameras.txt").write_text(f"1 PINHOLE 640 480 {fx} {fy} {cx + 0.5} {cy + 0.5}\n")
        lines = []
        for i, (R, t, points) in enumerate(zip(self.R, self.t, self.images, strict=True), 1):
            x, y, z, w = Rotation.from_matrix(R).as_quat()
            lines.append(" ".join(map(str, (i, w, x, y, z, *t, 1, names[i - 1]))))
            lines.append(" ".join(f"{u + 0.5} {v + 0.5} {k}" for k, (u, v) in enumerate(points)))
        (model / "images.txt").write_text("\n".join(lines) + "\n")
        track = {k: " ".join(f"{i + 1} {k}" for i in range(len(names))) for k in range(len(points))}
        lines = [f"{k} {x} {y} {z} 0 0 0 0 {track[k]}" for k, (x, y, z) in enumerate(self.points)]
        (model / "points3D.txt").write_text("\n".join(lines) + "\n")
        return Path(folder)

    def write_scene(self, folder):
        """The scene format: images/ and scene.npz."""
        count = len(self.R)
        names = [f"{i:03d}.png" for i in range(count)]
        self.write_images(Path(folder) / "images", names)
        pairs = np.array([(i, j) for i in range(count) for j in range(i + 1, count)])
        np.savez(
            Path(folder) / "scene.npz",
            names=names,
            K=np.tile(self.K, (count, 1, 1)),
            R=self.R,
            t=self.t,
            size_wh=np.tile(self.size, (count, 1)),
            pairs=pairs,
            overlap=np.full(len(pairs), 0.5),
        )
        return Path(folder)
