"""The renderer, synthetic pairs and the sample bag against exact geometry."""

import cv2
import numpy as np
import pytest
import torch
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_training import synthetic
from scfeat_training.geometry import (
    epipolar_distance,
    fundamental_from_pose,
    relative_pose,
    rotation_angle,
)
from scfeat_training.render import Atlas, Camera, Light, World
from scfeat_training.sample_bag import intrinsics, quaternion, write_sample_bag
from scfeat_training.street import drive, street
from scfeat_training.synthetic import SyntheticPairs, SyntheticPairsConfig, correspondences

SIZE = (160, 120)
K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
LIGHT = Light(sun_colour=(0, 0, 0), sky_colour=(1, 1, 1))  # the same from all sides


def noise_picture(seed, side=128):
    """A smooth picture, so that small differences of position are small ones of colour."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def camera_at(x, y=-4.0, z=1.0, target=(0.0, 0.0, 1.0), roll=0.0):
    return Camera.look_at(np.array([x, y, z]), np.array(target), K, SIZE, roll)


def box_before_wall():
    """A wall in the plane y = 2 and a box of half a metre before it."""
    world = World(Atlas([noise_picture(1), noise_picture(2)]), LIGHT)
    world.add_face((-6, 2, 5), (12, 0, 0), (0, 0, -8), 0)
    world.add_box((0, 0, 1), np.eye(3) * 0.5, [1] * 6)
    return world


def sampled(image, points):
    points = points.astype(np.float32)
    image = image.astype(np.float32)
    return cv2.remap(image, points[:, 0], points[:, 1], cv2.INTER_LINEAR)[:, 0]


def grid(size, margin=3, step=3):
    x, y = np.meshgrid(
        np.arange(margin, size[0] - margin, step), np.arange(margin, size[1] - margin, step)
    )
    return np.stack([x.ravel(), y.ravel()], -1).astype(float)


# --- renderer -----------------------------------------------------------------------------------


def test_depth_is_that_of_the_planes():
    world = box_before_wall()
    camera = camera_at(0.3, roll=0.2)
    depth = world.depth(camera)
    # Cast each pixel's ray by hand at the wall and at the box.
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T @ camera.R
    eye = camera.centre
    wall = (2 - eye[1]) / rays[..., 1]
    with np.errstate(divide="ignore"):
        low = (np.array([-0.5, -0.5, 0.5]) - eye) / rays
        high = (np.array([0.5, 0.5, 1.5]) - eye) / rays
    enter = np.minimum(low, high).max(-1)
    leave = np.maximum(low, high).min(-1)
    expected = np.where(enter < leave, np.minimum(enter, wall), wall)
    # A pixel exactly on an edge may fall to either side.
    on_edge = abs(enter - leave) < 1e-3
    np.testing.assert_allclose(depth[~on_edge], expected[~on_edge], rtol=1e-9)
    assert (enter < leave).sum() > 500 and on_edge.sum() < 50


def test_nothing_is_drawn_behind_the_camera():
    world = World(Atlas([noise_picture(1)]), LIGHT)
    world.add_face((-50, -50, 0), (100, 0, 0), (0, 100, 0), 0)  # ground, also behind and below
    camera = camera_at(0, target=(0, 0, 0.9))
    depth = world.depth(camera)
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T @ camera.R
    with np.errstate(divide="ignore"):
        ground = -1.0 / rays[..., 2]
    hit = (ground > 0) & (ground < 40)
    np.testing.assert_allclose(depth[hit], ground[hit], rtol=1e-9)
    assert np.isinf(depth[ground < 0]).all() and (ground < 0).any()


def test_texture_lands_where_it_should():
    """A face filled by a picture of its own coordinates shows the coordinates of each point."""
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    picture = np.dstack([x, y, np.full_like(x, 9)]).astype(np.uint8)
    world = World(Atlas([picture]), LIGHT)
    world.add_face((-1, 0, 2), (2, 0, 0), (0, 0, -2), 0, lit=False)
    camera = camera_at(0.8, y=-2.2)
    image = world.render(camera, supersample=3)
    depth = world.depth(camera)
    points = grid(SIZE, 2, 5)
    z = depth[points[:, 1].astype(int), points[:, 0].astype(int)]
    on_face = np.isfinite(z)
    points, z = points[on_face], z[on_face]
    rays = np.c_[points, np.ones(len(points))] @ np.linalg.inv(K).T
    world_points = (rays * z[:, None] - camera.t) @ camera.R
    expected = np.c_[(world_points[:, 0] + 1) / 2, (2 - world_points[:, 2]) / 2] * 256 - 0.5
    inner = ((expected > 6) & (expected < 249)).all(1)
    shown = image[points[:, 1].astype(int), points[:, 0].astype(int), :2]
    assert inner.sum() > 200
    error = shown[inner] - expected[inner]
    assert abs(error).max() < 1.6 and abs(error.mean(0)).max() < 0.1


def test_distant_textures_do_not_alias():
    checks = (np.indices((128, 128)).sum(0) // 2 % 2 * 255).astype(np.uint8)
    world = World(Atlas([np.dstack([checks] * 3)]), LIGHT)
    world.add_face((-500, 60, 200), (1000, 0, 0), (0, 0, -400), 0, (0, 0, 300, 120), lit=False)
    far = world.render(camera_at(0), supersample=1).astype(float)
    assert far.std() < 12 and far.mean() == pytest.approx(127, abs=8)
    near = world.render(camera_at(0, y=59.8, target=(0, 60, 1)), supersample=1).astype(float)
    assert near.std() > 70  # from near the same wall shows its squares


def test_cut_outs_show_what_is_behind():
    leaf = np.zeros((64, 64, 4), np.uint8)
    leaf[:, :32] = (250, 10, 10, 255)
    world = World(Atlas([np.full((8, 8, 3), 60, np.uint8), leaf]), LIGHT)
    world.add_face((-6, 2, 5), (12, 0, 0), (0, 0, -8), 0, lit=False)
    world.add_face((-1, 0, 2), (2, 0, 0), (0, 0, -2), 1, lit=False)
    camera = camera_at(0)
    image, depth = world.render(camera), world.depth(camera)
    assert depth[60, 60] == pytest.approx(4) and depth[60, 100] == pytest.approx(6)
    assert image[60, 60, 0] > 200 and image[60, 100, 0] == 60


def test_shadows_fall_away_from_the_sun():
    light = Light(
        sun=np.array([-1.0, 0, 1.0]),
        sun_colour=(0.8, 0.8, 0.8),
        sky_colour=(0.2, 0.2, 0.2),
        shadow_reach=8,
    )
    world = World(Atlas([np.full((8, 8, 3), 200, np.uint8)]), light)
    world.add_face((-9, 9, 0), (18, 0, 0), (0, -18, 0), 0)
    world.add_box((0, 0, 0.5), np.eye(3) * 0.5, [0] * 6)
    top = Camera.look_at(np.array([0, 0.01, 9.0]), np.zeros(3), K, SIZE)
    image = world.render(top)[..., 0].astype(float)

    def at(x, y):
        pixel = K @ (top.R @ (x, y, 0) + top.t)
        u, v = np.round(pixel[:2] / pixel[2]).astype(int)
        return image[v, u]

    assert at(1.0, 0) < 0.5 * at(-1.0, 0)  # the shadow is a metre long, towards +x
    assert at(2.0, 0) == pytest.approx(at(-1.0, 0), abs=2)
    assert at(0, 1.0) == pytest.approx(at(-1.0, 0), abs=2)


def test_height_fields_are_where_their_heights_say():
    world = World(Atlas([noise_picture(3)]), LIGHT)
    heights = np.random.default_rng(0).uniform(0, 0.5, (6, 6))
    world.add_height_field((-2, -2, 0), (4, 0, 0), (0, 4, 0), heights, 0)
    camera = Camera.look_at(np.array([0.1, 0.05, 6.0]), np.zeros(3), K, SIZE)
    depth = world.depth(camera)
    for i, j in ((1, 1), (2, 3), (4, 2)):
        corner = np.array([-2 + 0.8 * j, -2 + 0.8 * i, heights[i, j]])
        in_camera = camera.R @ corner + camera.t
        u, v = (K @ in_camera)[:2] / in_camera[2]
        patch = depth[int(v) : int(v) + 2, int(u) : int(u) + 2]
        assert patch.mean() == pytest.approx(in_camera[2], abs=0.02)


# --- correspondences and pairs ------------------------------------------------------------------


def test_correspondences_know_what_is_hidden():
    world = box_before_wall()
    first, second = camera_at(-1.2), camera_at(1.2)
    R, t = relative_pose(first.R, first.t, second.R, second.t)
    depths = [world.depth(camera) for camera in (first, second)]
    points = grid(SIZE, 1, 1)
    points2, visible = correspondences(points, *depths, K, K, R, t)
    # By hand: a point is hidden if the segment to the second camera meets the box.
    z = depths[0][points[:, 1].astype(int), points[:, 0].astype(int)]
    rays = np.c_[points, np.ones(len(points))] @ np.linalg.inv(K).T
    world_points = (rays * z[:, None] - first.t) @ first.R
    way = second.centre - world_points
    start = world_points + 1e-6 * way
    with np.errstate(divide="ignore"):
        low = (np.array([-0.5, -0.5, 0.5]) - start) / way
        high = (np.array([0.5, 0.5, 1.5]) - start) / way
    enter = np.minimum(low, high).max(1).clip(0)
    leave = np.maximum(low, high).min(1).clip(None, 1)
    hidden = enter < leave
    inside = ((points2 > 2) & (points2 < (157, 117))).all(1)
    assert (hidden & inside).sum() > 100
    assert (visible & hidden).sum() < 0.01 * hidden.sum() + 5
    assert visible[inside & ~hidden].mean() > 0.95  # all but the pixels along edges
    assert not visible[~((points2 > -0.5) & (points2 < (159.5, 119.5))).all(1)].any()


@pytest.fixture(scope="module")
def pairs():
    config = SyntheticPairsConfig(
        size=SIZE, textures=8, texture_size=128, photometric=None, rotation=(40, 40), supersample=3
    )
    return SyntheticPairs(config, depth=True)


def test_synthetic_pairs_are_exact(pairs):
    """Where depth and pose say that a point is, there is its colour and its epipolar line."""
    differences, elsewhere = [], []
    for index in range(6):
        sample = pairs[index]
        K1, K2, R, t, F = (sample[key].double().numpy() for key in ("K1", "K2", "R", "t", "F"))
        depth1, depth2 = (sample[key].numpy() for key in ("depth1", "depth2"))
        points = grid(SIZE)
        points2, visible = correspondences(points, depth1, depth2, K1, K2, R, t)
        assert visible.sum() > 60
        points, points2 = points[visible], points2[visible]
        assert epipolar_distance(F, points, points2).max() < 1e-3
        assert epipolar_distance(F.T, points2, points).max() < 1e-3
        views = [sample[key].permute(1, 2, 0).numpy() for key in ("image1", "image2")]
        colour = sampled(views[0], points)
        differences.append(abs(colour - sampled(views[1], points2)).mean(1))
        away = (points2 + np.array([9, 7])) % (150, 110)
        elsewhere.append(abs(colour - sampled(views[1], away)).mean(1))
        for k, depth in ((1, depth1), (2, depth2)):
            near, far = sample[f"depth_range{k}"]
            assert near < depth.min() and depth[np.isfinite(depth)].max() < far
    differences, elsewhere = np.concatenate(differences), np.concatenate(elsewhere)
    assert np.median(differences) < 6  # what the two views' sampling of textures leaves
    assert np.median(elsewhere) > 3 * np.median(differences)


def test_synthetic_samples_depend_on_seed_and_index_alone(pairs):
    again = SyntheticPairs(pairs.config, depth=True)
    for index in (4, 1):
        one, other = pairs[index], again[index]
        for key in one:
            if isinstance(one[key], torch.Tensor):
                assert torch.equal(one[key], other[key]), key
    assert not torch.equal(pairs[1]["F"], pairs[2]["F"])
    other = SyntheticPairs(SyntheticPairsConfig(size=SIZE, textures=4, texture_size=64, seed=5))[1]
    assert not torch.equal(pairs[1]["F"], other["F"])


def test_synthetic_samples_are_those_of_posed_pairs(pairs):
    config = SyntheticPairsConfig(
        size=SIZE,
        textures=4,
        texture_size=64,
        rotation=(10.0, 10.0),
        overlap=(0.5, 1.0),
        tracks=50,
    )
    photo_free = SyntheticPairs(config)
    for index in range(3):
        sample = photo_free[index]
        assert sample["image1"].shape == (3, 120, 160) and sample["image1"].dtype == torch.uint8
        assert rotation_angle(sample["R"].double()) <= 10.01
        F = fundamental_from_pose(*(sample[key].double() for key in ("K1", "K2", "R", "t")))
        assert (F - sample["F"]).abs().max() < 1e-5
        assert "depth1" not in sample
        tracks = sample["tracks"].double()
        assert tracks.shape == (50, 4) and tracks.isfinite().all()
        assert epipolar_distance(F, tracks[:, :2], tracks[:, 2:]).max() < 1e-3
        assert tracks[:, 0].std() > 25 and tracks[:, 1].std() > 15  # spread over the image


def test_textures_come_from_photos(tmp_path):
    photo = np.zeros((80, 100, 3), np.uint8)
    photo[..., 2] = 255  # OpenCV's order: pure red
    cv2.imwrite(str(tmp_path / "red.png"), photo)
    config = SyntheticPairsConfig(size=SIZE, textures=3, texture_size=64, photometric=None)
    with_photo = SyntheticPairs(config, [tmp_path / "red.png"])[0]["image1"].float()
    pure = (with_photo[0] > 20) & (with_photo[1] < 2) & (with_photo[2] < 2)
    assert pure.float().mean() > 0.1
    with pytest.raises(InputError, match=r"gone\.png"):
        SyntheticPairs(config, [tmp_path / "gone.png"])[0]
    assert SyntheticPairs(config, [tmp_path / "gone.png"], skip_bad=True)[0]["image1"].any()


def test_a_share_of_posed_pairs_is_synthetic():
    class Posed(list):
        config = SyntheticPairsConfig(seed=3)

    mixed = synthetic.WithSynthetic(Posed(["posed"] * 400), ["synthetic"] * 400, 0.25)
    kinds = [mixed[i] for i in range(len(mixed))]
    assert kinds == [mixed[i] for i in range(len(mixed))]
    assert 70 < kinds.count("synthetic") < 130
    # the share is as large among every second sample, so that shares multiply
    assert 25 < kinds[::2].count("synthetic") < 75


# --- the street and the sample bag --------------------------------------------------------------


def test_the_drive_is_smooth_and_turns():
    trip = drive(10, 15)
    assert len(trip.times) == 150
    centres = -np.einsum("nji,nj->ni", trip.R, trip.t)
    speed = np.linalg.norm(np.diff(centres, axis=0), axis=1) * 15
    assert 2 < speed.min() < 5 < speed.max() < 9
    assert abs(np.diff(speed)).max() < 0.6
    step = rotation_angle(trip.R[1:] @ trip.R[:-1].swapaxes(-1, -2))
    assert step.max() < 5
    assert 80 < rotation_angle(trip.R[-1] @ trip.R[0].T) < 100


def test_quaternions_are_those_of_the_rotations():
    rng = np.random.default_rng(0)
    turns = [np.zeros(3), (np.pi, 0, 0), (0, np.pi, 0), (0, 0, np.pi), *rng.normal(0, 1.5, (20, 3))]
    for turn in turns:
        R = cv2.Rodrigues(np.array(turn, float))[0]
        x, y, z, w = quaternion(R)
        v = np.array([x, y, z])
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rebuilt = np.eye(3) * (w * w - v @ v) + 2 * np.outer(v, v) + 2 * w * cross
        np.testing.assert_allclose(rebuilt, R, atol=1e-12)
        assert w >= 0 or w == pytest.approx(0)


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A bag of two frames, over an older one and what a killed run has left."""
    out = tmp_path_factory.mktemp("bag") / "sample"
    for folder in (out, out.parent / ".sample.scfeat-partial/sample"):
        folder.mkdir(parents=True)
        (folder / "metadata.yaml").write_text("old")
        (folder / "old.mcap").write_text("old")
    arguments = "--seconds 0.4 --rate 5 --size 128x96 --workers 1 --overwrite".split()
    assert synthetic.main(["bag", str(out), *arguments]) == 0
    return out


def test_the_bag_holds_images_cameras_and_poses(bag):
    trip = drive(0.4, 5)
    K_bag = intrinsics((128, 96))
    with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        assert {c.topic: c.msgcount for c in reader.connections} == {
            "/camera/image_raw/compressed": 2,
            "/camera/camera_info": 2,
            "/ground_truth/pose": 2,
        }
        messages = [
            (c.topic, stamp, reader.deserialize(data, c.msgtype))
            for c, stamp, data in reader.messages()
        ]
    stamps = sorted({stamp for _, stamp, _ in messages})
    assert np.diff(stamps).tolist() == [200_000_000]
    for topic, stamp, message in messages:
        at = message.header.stamp
        assert at.sec * 10**9 + at.nanosec == stamp
        index = stamps.index(stamp)
        if topic.endswith("compressed"):
            image = cv2.imdecode(message.data, cv2.IMREAD_COLOR)
            assert image.shape == (96, 128, 3) and image.std() > 20
            assert message.header.frame_id == "camera_optical_frame"
        elif topic.endswith("info"):
            np.testing.assert_array_equal(message.k.reshape(3, 3), K_bag)
            assert (message.width, message.height) == (128, 96)
        else:
            assert message.header.frame_id == "world"
            p = message.pose.position
            np.testing.assert_allclose((p.x, p.y, p.z), -trip.R[index].T @ trip.t[index])
    assert sorted(path.name for path in bag.iterdir()) == ["metadata.yaml", "sample.mcap"]
    assert not list(bag.parent.glob(".*"))  # nothing is left beside it


def test_the_bag_matches_its_poses():
    """Frames of the street agree with their poses: colour follows depth from frame to frame."""
    trip = drive(10, 15)
    world = street(0, trip)
    K_street = intrinsics((192, 144))
    views = [Camera(K_street, trip.R[i], trip.t[i], (192, 144)) for i in (30, 33)]
    images = [world.render(view) for view in views]
    depths = [world.depth(view) for view in views]
    R, t = relative_pose(views[0].R, views[0].t, views[1].R, views[1].t)
    points, visible = correspondences(grid((192, 144)), *depths, K_street, K_street, R, t)
    assert visible.mean() > 0.6
    first = sampled(images[0], grid((192, 144))[visible])
    there = abs(first - sampled(images[1], points[visible])).mean()
    unmoved = abs(first - sampled(images[1], grid((192, 144))[visible])).mean()
    assert there < 9 and there < 0.6 * unmoved
    assert all(np.isfinite(depth).all() for depth in depths)  # no hole to nowhere
    again = street(0, trip).render(views[0])
    np.testing.assert_array_equal(again, images[0])


def test_bag_errors(bag, tmp_path, capsys):
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_sample_bag(bag, progress=False)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="is not a bag"):
        write_sample_bag(mine, overwrite=True, progress=False)
    assert (mine / "letter.txt").read_text() == "keep"
    assert synthetic.main(["bag", str(tmp_path / "x"), "--size", "wide"]) == 1
    assert "WIDTHxHEIGHT" in capsys.readouterr().err
    assert synthetic.main(["bag", str(tmp_path / "x"), "--seconds", "0"]) == 1
    assert not (tmp_path / "x").exists()


def test_pictures_of_pairs(tmp_path):
    synthetic.write_pairs(
        tmp_path / "out", 1, SyntheticPairsConfig(size=SIZE, textures=3, texture_size=64)
    )
    assert cv2.imread(str(tmp_path / "out/000000.jpg")).shape == (120, 320, 3)
