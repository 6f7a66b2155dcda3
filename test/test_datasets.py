"""Scenes of every layout, and the pairs drawn from them."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scfeat_ros.errors import InputError
from scfeat_training.config import TrainConfig
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    ImageCache,
    PosedPairs,
    PosedPairsConfig,
    match_errors,
    validation_pairs,
)
from scfeat_training.geometry import (
    epipolar_distance,
    epipolar_lines,
    lines_hit_image,
    project,
    rotation_angle,
    transform_points,
)
from scfeat_training.image_files import image_size, read_image
from scfeat_training.photometric import Photometric, augment
from scfeat_training.scenes import (
    photo_paths,
    read_caps,
    read_colmap,
    read_scene,
    read_scenes,
    split_scenes,
)
from scfeat_training.stages import homography_pairs

WIDTH, HEIGHT = 200, 150
K = np.array([[180.0, 0, 99.5], [0, 184, 74.5], [0, 0, 1]])


def coordinate_picture():
    """A picture whose red is x and whose green is y: a pixel tells where it is from."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return np.dstack([x, y, np.full_like(x, 128)]).astype(np.uint8)


def cameras(count):
    """Poses on an arc about a cloud of points, and the cloud."""
    rng = np.random.default_rng(3)
    points = rng.uniform(-1.2, 1.2, (400, 3)) * (1, 0.8, 0.6)
    R, t = [], []
    for turn in np.linspace(-0.5, 0.5, count):
        R.append(cv2.Rodrigues(np.array([0.05 * turn, turn, 0.1 * turn]))[0])
        # not right at the points, or a turn about the axis would leave t as it is
        t.append(np.array([0.1 + 0.2 * turn, 0.15 * turn - 0.1, 4.0 - 0.2 * turn]))
    return np.array(R), np.array(t), points


def write_images(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        cv2.imwrite(str(folder / name), cv2.cvtColor(coordinate_picture(), cv2.COLOR_RGB2BGR))


def write_scene(folder, count=6, with_points=True):
    """A scene in the scene.npz layout; images are lossless coordinate pictures."""
    R, t, points = cameras(count)
    names = [f"{i:03d}.png" for i in range(count)]
    write_images(folder / "images", names)
    pairs = np.array([(i, j) for i in range(count) for j in range(i + 1, count)])
    np.savez(
        folder / "scene.npz",
        names=names,
        K=np.tile(K, (count, 1, 1)),
        R=R,
        t=t,
        size_wh=np.tile((WIDTH, HEIGHT), (count, 1)),
        pairs=pairs,
        overlap=np.full(len(pairs), 0.6),
    )
    if with_points:
        seen = []
        for i in range(count):
            xy, _ = project(K, R[i], t[i], points)
            inside = ((xy > 0) & (xy < (WIDTH - 1, HEIGHT - 1))).all(1)
            for point in np.flatnonzero(inside):
                seen.append((i, point, *xy[point]))
        seen = np.array(seen)
        np.savez(
            folder / "points.npz",
            xyz=points,
            obs_image=seen[:, 0].astype(int),
            obs_point=seen[:, 1].astype(int),
            obs_xy=seen[:, 2:],
        )
    return folder


def change(folder, file="scene.npz", **arrays):
    """Replace arrays of a scene's file; functions get the old one."""
    path = folder / file
    with np.load(path) as data:
        values = dict(data)
    for key, value in arrays.items():
        values[key] = value(values[key].copy())
    np.savez(path, **values)


def put(index, value):
    def replaced(array):
        array[index] = value
        return array

    return replaced


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scenes") / "arc")


@pytest.fixture(scope="module")
def scene(scene_folder):
    return read_scene(scene_folder)


def plain(**options):
    options = {"size": (96, 64), "photometric": None, "rotation": (60, 60), **options}
    return PosedPairsConfig(**options)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key].nan_to_num(), b[key].nan_to_num()), key
        else:
            assert a[key] == b[key]


# --- pairs with poses ---------------------------------------------------------------------------


def test_posed_sample_has_the_documented_form(scene):
    sample = PosedPairs([scene], PosedPairsConfig(size=(96, 64)))[0]
    for number in "12":
        assert sample[f"image{number}"].shape == (3, 64, 96)
        assert sample[f"image{number}"].dtype == torch.uint8
        assert sample[f"K{number}"].shape == (3, 3)
        near, far = sample[f"depth_range{number}"]
        assert 0 < near < 4 < far  # the points are about 4 away
        assert sample[f"name{number}"].startswith("arc/")
    assert sample["R"].shape == (3, 3) and sample["t"].shape == (3,)
    assert sample["F"].shape == (3, 3) and sample["F"].norm() == pytest.approx(1)


def test_crops_keep_the_geometry(scene):
    """Points that both crops show lie on each other's epipolar lines, whatever crop and roll."""
    pairs = PosedPairs([scene], plain(tracks=40, roll=25.0, scale=(0.5, 1.5)))
    checked = 0
    for index in range(12):
        sample = pairs[index]
        tracks = sample["tracks"].double()
        tracks = tracks[tracks.isfinite().all(1)]
        F = sample["F"].double()
        distance = epipolar_distance(F, tracks[:, :2], tracks[:, 2:])
        assert distance.max() < 1e-3
        # F is that of K1, K2, R, t, and R is a rotation.
        R, t = sample["R"].double(), sample["t"].double()
        assert (R @ R.T - torch.eye(3).double()).abs().max() < 1e-6
        rays = [
            torch.linalg.inv(sample[f"K{k}"].double()) @ torch.cat([x, torch.ones(1).double()])
            for k, x in ((1, tracks[0, :2]), (2, tracks[0, 2:]))
        ]
        coplanar = torch.linalg.det(torch.stack([rays[1], R @ rays[0], t]))
        assert abs(coplanar) < 1e-5
        checked += len(tracks)
    assert checked > 100


def test_crops_show_what_their_cameras_say(scene):
    """The pixel of a point in a crop is the one that shows it, to half a pixel of the source."""
    pairs = PosedPairs([scene], plain(tracks=20, roll=20.0))
    index_of = {path.name: i for i, path in enumerate(scene.paths)}
    for number in range(6):
        sample = pairs[number]
        for k, columns in ((1, slice(0, 2)), (2, slice(2, 4))):
            points = sample["tracks"][:, columns].numpy()
            points = points[np.isfinite(points).all(1)]
            image = sample[f"image{k}"].permute(1, 2, 0).numpy().astype(np.float32)
            shown = cv2.remap(image, points[:, 0], points[:, 1], cv2.INTER_LINEAR)[:, 0, :2]
            image_number = index_of[sample[f"name{k}"].split("/")[1]]
            known = scene.tracks[image_number][1]
            assert sample[f"depth_range{k}"].numpy() == pytest.approx(
                scene.depth_range[image_number]
            )
            nearest = np.linalg.norm(shown[:, None] - known[None], axis=-1).min(1)
            inner = (points > 2).all(1) & (points < (93, 61)).all(1)
            assert inner.sum() > 3
            assert nearest[inner].max() < 0.8


def test_crops_lie_inside_their_images(scene):
    pairs = PosedPairs([scene], plain(roll=30.0))
    for index in range(8):
        sample = pairs[index]
        for k in "12":  # outside it would be black; blue is 128 everywhere inside
            assert (sample[f"image{k}"][2] == 128).float().mean() > 0.99


def test_posed_samples_depend_on_seed_and_index_alone(scene):
    config = PosedPairsConfig(size=(96, 64))
    first, again = PosedPairs([scene], config), PosedPairs([scene], config)
    samples = [first[i] for i in (0, 1, 2)]
    for index in (2, 0, 1):  # another order
        same(again[index], samples[index])
    other = PosedPairs([scene], PosedPairsConfig(size=(96, 64), seed=1))[0]
    assert not torch.equal(other["F"], samples[0]["F"])
    assert not torch.equal(samples[0]["F"], samples[1]["F"])


def test_rotation_grows_with_the_index(scene):
    pairs = PosedPairs([scene], plain(rotation=(15.0, 60.0), curriculum=1000, roll=0.0))
    early = [float(rotation_angle(pairs[i]["R"].double())) for i in range(15)]
    late = [float(rotation_angle(pairs[i]["R"].double())) for i in range(2000, 2030)]
    assert max(early) <= 15.5
    assert 30 < max(late) <= 60
    assert pairs.max_rotation(500) == pytest.approx(37.5)


def test_posed_pairs_want_pairs(scene):
    alone = replace(scene, pairs=scene.pairs[:0], overlap=scene.overlap[:0])
    with pytest.raises(InputError, match="no scene has covisible pairs"):
        PosedPairs([alone], plain())


def test_overlap_limits_the_pairs(tmp_path):
    folder = write_scene(tmp_path / "s", count=4)
    change(folder, overlap=lambda overlap: np.linspace(0.05, 0.9, len(overlap)))
    scene = read_scene(folder)
    wanted = scene.pairs[(scene.overlap >= 0.3) & (scene.overlap <= 0.6)]
    pairs = PosedPairs([scene], plain(overlap=(0.3, 0.6)))
    names = {frozenset({pairs[i][k].split("/")[1] for k in ("name1", "name2")}) for i in range(30)}
    assert names == {frozenset(scene.paths[i].name for i in pair) for pair in wanted}
    with pytest.raises(InputError, match="overlap"):
        PosedPairs([scene], plain(overlap=(0.95, 1.0)))


def test_epipolar_lines_cross_the_other_crop(scene):
    pairs = PosedPairs([scene], plain(scale=(1.0, 1.5), lines_inside=0.8))
    x, y = np.meshgrid(np.linspace(0, 95, 8), np.linspace(0, 63, 6))
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], -1))
    for index in range(10):
        F = pairs[index]["F"].double()
        for matrix in (F, F.T):
            assert lines_hit_image(epipolar_lines(matrix, grid), 96, 64).double().mean() >= 0.8
    with pytest.raises(InputError, match="no usable pair"):
        PosedPairs([scene], plain(lines_inside=1.1))[0]


def test_scenes_without_points_are_cropped_by_geometry(tmp_path):
    scene = read_scene(write_scene(tmp_path / "bare", with_points=False))
    assert scene.tracks is None and np.isinf(scene.depth_range[:, 1]).all()
    reference = read_scene(write_scene(tmp_path / "full"))
    pairs = PosedPairs([scene], plain())
    seen = 0
    for index in range(8):
        sample = pairs[index]
        K1, K2, R, t = (sample[key].double().numpy() for key in ("K1", "K2", "R", "t"))
        # Points of the cloud are seen by both crops, though the dataset does not know of them.
        name = sample["name1"].split("/")[1]
        i = [path.name for path in reference.paths].index(name)
        _, _, cloud = cameras(6)
        in_first = cloud @ reference.R[i].T + reference.t[i]
        # undo the roll: the sample's first camera is turned about its axis
        x1 = in_first @ K1.T
        x1 = x1[:, :2] / x1[:, 2:]
        seen += ((x1 > 0) & (x1 < (96, 64))).all(1).sum()
        assert np.isfinite(K2).all() and np.isfinite(R).all() and np.isfinite(t).all()
    assert seen > 100


def test_validation_pairs_are_fixed_and_plain(scene):
    first, again = (validation_pairs([scene], 5, (96, 64)) for _ in range(2))
    assert len(first) == 5
    for index in range(5):
        same(first[index], again[index])
        for k in "12":  # neither noise nor roll: the third channel stays as it was drawn
            assert (first[index][f"image{k}"][2] == 128).all()


def test_validation_takes_the_pairs_there_are(scene):
    near = replace(scene, overlap=np.full(len(scene.pairs), 0.85))  # neighbours in a video
    assert len(validation_pairs([near], 5, (96, 64))[0]) > 5
    mixed = replace(scene, overlap=np.where(np.arange(len(scene.pairs)) < 3, 0.5, 0.85))
    pairs = validation_pairs([mixed], 5, (96, 64))
    wanted = {frozenset(scene.paths[i].name for i in pair) for pair in scene.pairs[:3]}
    names = [{pairs[i][k].split("/")[1] for k in ("name1", "name2")} for i in range(9)]
    assert {frozenset(both) for both in names} <= wanted


# --- homography pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_homography_maps_the_first_view_to_the_second(scene_folder, mirror):
    photos = photo_paths([read_scene(scene_folder)])
    config = HomographyPairsConfig(
        size=(96, 64), rotation=(90, 90), mirror=mirror, photometric=None
    )
    pairs = HomographyPairs(photos, config)
    x, y = np.meshgrid(np.arange(4, 92, 8.0), np.arange(4, 60, 8.0))
    grid = np.stack([x.ravel(), y.ravel()], -1)
    for index in range(12):
        sample = pairs[index]
        H = sample["H"].double().numpy()
        assert H[2, 2] == 1
        mapped = transform_points(H, grid)
        inside = ((mapped > 2) & (mapped < (93, 61))).all(1)
        views = [sample[f"image{k}"].permute(1, 2, 0).numpy().astype(np.float32) for k in (1, 2)]
        shown = [
            cv2.remap(
                view,
                p[inside, 0].astype(np.float32),
                p[inside, 1].astype(np.float32),
                cv2.INTER_LINEAR,
            )[:, 0, :2]
            for view, p in zip(views, (grid, mapped), strict=True)
        ]
        assert abs(shown[0] - shown[1]).max() < 2.5  # the coordinate in the photo, in its pixels
        across = views[0][32, 90, 0] - views[0][32, 5, 0]  # of the first view, which is not turned
        assert across < 0 if mirror else across > 0


def test_photos_without_poses_are_homographies_too(scene_folder, tmp_path):
    scene = read_scene(scene_folder)
    (tmp_path / "more/street").mkdir(parents=True)
    photo = tmp_path / "more/street/one.JPG"
    shutil.copy(scene.paths[0], photo)
    (tmp_path / "more/notes.txt").write_text("no photo")
    config = TrainConfig("warmup", photos=[str(tmp_path / "more")])
    assert homography_pairs(config, [scene], False).photos == [*scene.paths, photo]
    (tmp_path / "empty").mkdir()
    for folder, problem in (("empty", r"no images here \(\.jpg"), ("nowhere", "no such folder")):
        config = TrainConfig("warmup", photos=[str(tmp_path / folder)])
        with pytest.raises(InputError, match=f"{folder}: {problem}"):
            homography_pairs(config, [scene], False)


@pytest.mark.parametrize("overlap", [0.4, 0.9])
def test_homography_views_overlap(scene_folder, overlap):
    pairs = HomographyPairs(
        photo_paths([read_scene(scene_folder)]),
        HomographyPairsConfig(size=(96, 64), overlap=overlap, photometric=None),
    )
    x, y = np.meshgrid(np.arange(96.0), np.arange(64.0))
    grid = np.stack([x.ravel(), y.ravel()], -1)
    for index in range(20):
        H = pairs[index]["H"].double().numpy()
        shares = []
        for matrix in (H, np.linalg.inv(H)):
            at = transform_points(matrix, grid)
            shares.append(((at > -0.5) & (at < (95.5, 63.5))).all(1).mean())
        assert max(shares) >= overlap - 0.04  # it is drawn by a coarser grid


def test_photos_of_a_large_folder_count_less_each(tmp_path):
    """A folder counts by the square root of its size: one photo as a fifth of one and sixteen."""
    photos = [tmp_path / "one" / "0.jpg", *(tmp_path / "many" / f"{n}.jpg" for n in range(16))]
    pairs, rng = HomographyPairs(photos), np.random.default_rng(0)
    drawn = [pairs._pick(rng) for _ in range(4000)]
    assert set(drawn) == set(range(17))
    assert drawn.count(0) / 4000 == pytest.approx(0.2, abs=0.02)


def test_scenes_count_by_their_weight(scene):
    pairs = PosedPairs([replace(scene, name="never", weight=0.0), scene], plain())
    assert {pairs[index]["name1"].split("/")[0] for index in range(8)} == {"arc"}


def test_matches_are_off_by_pixels_of_the_second_image():
    first, second = np.array([[10.0, 10], [30, 5]]), np.array([[20.0, 23], [60, 10]])
    H = torch.diag(torch.tensor([2.0, 2, 1]))
    assert match_errors({"H": H}, first, second) == pytest.approx([3, 0])
    sideways = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert match_errors({"F": sideways}, first, second) == pytest.approx([13, 5])


def test_homography_samples_depend_on_seed_and_index_alone(scene_folder):
    photos = photo_paths([read_scene(scene_folder)])
    first, again = (HomographyPairs(photos) for _ in range(2))
    samples = {i: first[i] for i in (3, 50_000)}
    for index in (50_000, 3):
        same(again[index], samples[index])
    other = HomographyPairs(photos, HomographyPairsConfig(seed=9))[3]
    assert not torch.equal(other["H"], samples[3]["H"])


# --- photometric augmentation -------------------------------------------------------------------


def test_photometric_changes_move_nothing():
    image = np.full((41, 41, 3), 40, np.uint8)
    cv2.circle(image, (20, 20), 3, (220, 220, 220), -1)
    y, x = np.mgrid[:41, :41]
    options = Photometric(probability=1.0, shadow=0.0, noise=0.0, grey=0.0, jpeg=94)
    for seed in range(10):
        changed = augment(image, np.random.default_rng(seed), options)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        weight = changed[..., 1].astype(float)
        weight = np.clip(weight - np.median(weight) - 3, 0, None)
        if weight.sum() > 100:  # a dark tone can swallow the dot
            assert (x * weight).sum() / weight.sum() == pytest.approx(20, abs=0.25)
            assert (y * weight).sum() / weight.sum() == pytest.approx(20, abs=0.25)


def test_what_is_set_to_0_is_off():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    off = Photometric(*[0.0] * 4, grey=0.0, noise=0.0, blur=0.0, motion=0, jpeg=0, shadow=0.0,
                      probability=1.0)  # fmt: skip
    for seed in range(5):
        assert (augment(image, np.random.default_rng(seed), off) == image).all()


def test_uneven_light_is_smooth():
    image = np.full((120, 160, 3), 90, np.uint8)
    still = Photometric(0.0, 0.0, 0.0, 0.0, grey=0.0, probability=1.0, shadow=0.0, noise=0.0)
    for seed in range(5):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        even = augment(image, rngs[0], still).astype(int)
        lit = augment(image, rngs[1], replace(still, light=0.7)).astype(int)
        assert np.ptp(even) < 10  # what noise of the codec leaves
        assert np.ptp(lit) > 20
        assert np.abs(np.diff(lit, axis=1)).max() < 15
        assert np.abs(np.diff(lit, axis=0)).max() < 15


# --- broken input -------------------------------------------------------------------------------


def break_missing(folder):
    (folder / "images/002.png").unlink()


def break_rotation(folder):
    change(folder, R=put(2, np.diag([1.0, 1.0, 0.0])))


def break_mirror(folder):
    change(folder, R=put(2, np.diag([1.0, 1.0, -1.0])))


def break_focal(folder):
    change(folder, K=put((2, 0, 0), -180.0))


def break_row(folder):
    change(folder, K=put((2, 2), (0, 0, 2)))


def break_nan(folder):
    change(folder, t=put((2, 1), np.nan))


def break_content(folder):
    (folder / "images/002.png").write_bytes(b"no image" * 100)


def break_end(folder):
    path = folder / "images/002.png"
    path.write_bytes(path.read_bytes()[:-100])


def break_size(folder):
    cv2.imwrite(str(folder / "images/002.png"), np.zeros((75, 100, 3), np.uint8))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_missing, "missing"),
        (break_content, "no image that can be decoded"),
        (break_end, "ends too early"),
        (break_size, "is 100x75, but its K is for 200x150"),
        (break_rotation, "rotation"),
        (break_mirror, "rotation"),
        (break_focal, "K is not an intrinsic"),
        (break_row, "K is not an intrinsic"),
        (break_nan, "not finite"),
    ],
)
def test_a_bad_image_is_named_or_skipped(tmp_path, damage, says):
    folder = write_scene(tmp_path / "s")
    damage(folder)
    with pytest.raises(InputError, match=rf"002\.png.*{says}") as caught:
        read_scene(folder)
    assert "\n" not in str(caught.value) and "--skip-bad" in str(caught.value)
    lines = []
    scene = read_scene(folder, skip_bad=True, on_bad=lines.append)
    assert len(scene) == 5 and len(lines) == 1 and "002.png" in lines[0]
    assert "002.png" not in [path.name for path in scene.paths]
    # what is left still belongs together
    pairs = PosedPairs([scene], plain(tracks=10))
    tracks = pairs[0]["tracks"].double()
    tracks = tracks[tracks.isfinite().all(1)]
    assert epipolar_distance(pairs[0]["F"].double(), tracks[:, :2], tracks[:, 2:]).max() < 1e-3


def test_images_found_unreadable_while_drawing_are_named_or_skipped(tmp_path):
    folder = write_scene(tmp_path / "s")
    scene = read_scene(folder)
    bad = folder / "images/001.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(InputError, match=r"001\.png"):
        for index in range(40):
            PosedPairs([scene], plain())[index]
    pairs = PosedPairs([scene], plain(), skip_bad=True)
    names = {pairs[i][k] for i in range(40) for k in ("name1", "name2")}
    assert "s/001.png" not in names and len(names) == 5
    assert list(pairs.images.bad) == [bad]
    with pytest.raises(InputError, match=r"001\.png"):
        for index in range(40):
            HomographyPairs(photo_paths([scene]))[index]
    photos = HomographyPairs(photo_paths([scene]), skip_bad=True)
    assert all(photos[i]["name"] != str(bad) for i in range(40))
    assert list(photos.images.bad) == [bad]


def test_of_images_those_used_last_stay_in_memory(tmp_path, monkeypatch):
    read = []

    def read_and_note(path):
        read.append(path.name)
        return np.zeros((10, 10, 3), np.uint8)

    monkeypatch.setattr("scfeat_training.datasets.read_image", read_and_note)
    images = ImageCache(max_bytes=700)  # two of 300 bytes
    for name in "abacab":
        images(tmp_path / name)
    assert read == ["a", "b", "c", "b"]
    # one that is too large alone is kept while it is the last
    small = ImageCache(max_bytes=1)
    for name in "xx":
        small(tmp_path / name)
    assert read[4:] == ["x"]


def test_an_image_larger_than_opencv_takes_is_named(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 40000 40000 255 ")
    with pytest.raises(InputError, match=r"a\.ppm: too large to be decoded"):
        read_image(path)


def test_pairs_name_images_in_folders_of_several_cameras(tmp_path):
    folder = write_scene(tmp_path / "s")
    (folder / "images").rename(folder / "left")
    (folder / "images").mkdir()
    (folder / "left").rename(folder / "images/left")
    change(folder, names=lambda names: np.array([f"left/{name}" for name in names]))
    scene = read_scene(folder)
    assert PosedPairs([scene], plain())[0]["name1"].startswith("s/left/00")
    assert Path(HomographyPairs(scene.paths)[0]["name"]) in scene.paths


def test_an_unreadable_image_is_tried_once(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    images = ImageCache()
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.png: no image"):
            images(path)
        cv2.imwrite(str(path), coordinate_picture())
    assert list(images.bad) == [path]


@pytest.mark.parametrize("ending", ["jpg", "progressive.jpg", "png", "bmp", "webp", "ppm", "tif"])
def test_the_size_of_an_image_is_read_from_its_header(tmp_path, ending, monkeypatch):
    path = tmp_path / f"a.{ending}"
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1] if ending.startswith("progressive") else []
    cv2.imwrite(str(path), coordinate_picture(), progressive)
    assert image_size(path) == (WIDTH, HEIGHT)
    content = path.read_bytes()
    path.write_bytes(content + b"what a camera adds")
    assert image_size(path) == (WIDTH, HEIGHT)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\..*replace or remove the file"):
        image_size(path)
    if ending in ("jpg", "progressive.jpg", "png"):
        path.write_bytes(content)
        monkeypatch.setattr("scfeat_training.image_files.read_image", None)
        assert image_size(path) == (WIDTH, HEIGHT)  # without it


def test_a_jpeg_file_with_an_unusual_header_is_decoded(tmp_path):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), coordinate_picture())
    content = path.read_bytes()
    at = content.index(b"\xff\xdb")
    path.write_bytes(content[:at] + b"zz" + content[at:])
    assert read_image(path).shape == (HEIGHT, WIDTH, 3)
    assert image_size(path) == (WIDTH, HEIGHT)


def test_scenes_that_are_not_asked_for_are_not_looked_at(tmp_path):
    write_scene(tmp_path / "good")
    write_caps(tmp_path)
    for name in ("bad", "worse"):
        write_scene(tmp_path / name)
        (tmp_path / name / "scene.npz").write_bytes(b"nothing")
    assert [scene.name for scene in read_scenes(tmp_path, names=["good"])] == ["good"]
    both = read_scenes(tmp_path, names=["0042_dense0", "good"])
    assert [scene.name for scene in both] == ["good", "0042_dense0"]
    with pytest.raises(InputError, match=r"no scene 'better'; it has \['0042_dense0', 'bad', 'go"):
        read_scenes(tmp_path, names=["good", "better"])
    with pytest.raises(InputError, match=r"scene\.npz: unreadable"):
        read_scenes(tmp_path, names=["bad"])


def test_a_scene_is_called_as_its_folder_from_inside_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(write_scene(tmp_path / "fern"))
    (scene,) = read_scenes(".")
    assert scene.name == "fern"
    assert split_scenes([scene]) == ([], [scene])  # one of those that are never trained on


def test_broken_scene_files(tmp_path):
    folder = write_scene(tmp_path / "s")
    content = (folder / "scene.npz").read_bytes()
    (folder / "scene.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"scene\.npz: unreadable"):
        read_scenes(tmp_path)
    np.savez(folder / "scene.npz", names=["a"])
    with pytest.raises(InputError, match=r"scene\.npz: lacks the array"):
        read_scenes(tmp_path)
    write_scene(tmp_path / "t")
    lines = []
    scenes = read_scenes(tmp_path, skip_bad=True, on_bad=lines.append)
    assert [scene.name for scene in scenes] == ["t"] and len(lines) == 1
    change(tmp_path / "t", K=lambda K: K[:2])
    with pytest.raises(InputError, match="K has shape"):
        read_scene(tmp_path / "t")
    with pytest.raises(InputError, match="no scene in it"):
        read_scenes(tmp_path / "s" / "images")
    with pytest.raises(InputError, match="no such folder"):
        read_scenes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "key", "wrong", "message"),
    [
        ("scene.npz", "names", lambda names: names[0], r"names has shape \(\)"),
        ("scene.npz", "K", lambda K: K.astype(str), "K holds <U.*, want numbers"),
        ("scene.npz", "pairs", lambda pairs: pairs.ravel()[:3], r"pairs has shape \(3,\)"),
        ("points.npz", "xyz", lambda xyz: xyz[:, :2], r"xyz has shape \(400, 2\)"),
        ("points.npz", "xyz", lambda xyz: xyz[:9], "obs_point name points beyond the 9"),
        ("points.npz", "obs_image", lambda image: image + 1, "obs_image name images beyond the 6"),
        ("points.npz", "obs_point", lambda point: point - 1, "obs_point name points beyond"),
        ("points.npz", "obs_xy", lambda xy: xy[1:], "obs_xy has shape"),
    ],
)
def test_wrong_arrays_are_named_and_cost_their_scene_alone(tmp_path, file, key, wrong, message):
    for name in "ab":
        write_scene(tmp_path / name)
    change(tmp_path / "a", file, **{key: wrong})
    with pytest.raises(InputError, match=f"a/{file}: {message}"):
        read_scenes(tmp_path)
    assert [scene.name for scene in read_scenes(tmp_path, skip_bad=True)] == ["b"]


# --- splits -------------------------------------------------------------------------------------


def test_held_out_images_are_not_trained_on(tmp_path):
    for name in ("fern", "kitti_seq1", "other"):
        write_scene(tmp_path / name, count=45 if name == "kitti_seq1" else 4)
    train, held_out = split_scenes(read_scenes(tmp_path))
    assert [(s.name, len(s)) for s in train] == [("kitti_seq1", 41), ("other", 4)]
    assert [(s.name, len(s)) for s in held_out] == [("fern", 4), ("kitti_seq1", 4)]
    assert not set(photo_paths(train)) & set(photo_paths(held_out))
    tail = held_out[1]
    assert [path.name for path in tail.paths] == ["041.png", "042.png", "043.png", "044.png"]
    assert len(tail.pairs) == 6 and tail.pairs.max() == 3
    np.testing.assert_array_equal(tail.R, read_scene(tmp_path / "kitti_seq1").R[41:])


def test_unknown_scenes_hold_out_their_last_tenth(tmp_path):
    write_scene(tmp_path / "mine", count=40)
    train, held_out = split_scenes(read_scenes(tmp_path))
    assert [len(s) for s in train] == [36] and [len(s) for s in held_out] == [4]


# --- COLMAP and CAPS ----------------------------------------------------------------------------


def write_colmap(folder, text, model="PINHOLE", distortion=0.1, ending=".png"):
    pycolmap = pytest.importorskip("pycolmap")
    R, t, points = cameras(3)
    names = [f"{i:03d}{ending}" for i in range(3)]
    write_images(folder / "images", names)
    # COLMAP has the centre of the first pixel at a half
    centre = (K[0, 2] + 0.5, K[1, 2] + 0.5)
    params = [K[0, 0], K[1, 1], *centre] if model == "PINHOLE" else [K[0, 0], *centre, distortion]
    reconstruction = pycolmap.Reconstruction()
    reconstruction.add_camera_with_trivial_rig(
        pycolmap.Camera(model=model, width=WIDTH, height=HEIGHT, params=params, camera_id=1)
    )
    ids = [reconstruction.add_point3D(p, pycolmap.Track(), np.zeros(3, np.uint8)) for p in points]
    for i, name in enumerate(names):
        xy, _ = project(K, R[i], t[i], points)
        inside = np.flatnonzero(((xy > 0) & (xy < (WIDTH - 1, HEIGHT - 1))).all(1))
        seen = [pycolmap.Point2D(xy[k] + 0.5) for k in inside]
        image = pycolmap.Image(name=name, points2D=seen, camera_id=1, image_id=i + 1)
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(R[i]), t[i])
        reconstruction.add_image_with_trivial_frame(image, pose)
        for number, k in enumerate(inside):
            reconstruction.add_observation(ids[k], pycolmap.TrackElement(i + 1, number))
    model_folder = folder / "sparse" / "0"
    model_folder.mkdir(parents=True)
    (reconstruction.write_text if text else reconstruction.write_binary)(str(model_folder))
    return folder


@pytest.mark.parametrize("text", [True, False], ids=["text", "binary"])
def test_colmap_model_round_trip(tmp_path, text):
    write_colmap(tmp_path / "model", text)
    reference = read_scene(write_scene(tmp_path / "npz", count=3))
    (scene,) = read_scenes(tmp_path / "model")
    assert [path.name for path in scene.paths] == ["000.png", "001.png", "002.png"]
    np.testing.assert_allclose(scene.K, np.tile(K, (3, 1, 1)), atol=1e-9)
    R, t, _ = cameras(3)
    np.testing.assert_allclose(scene.R, R, atol=1e-9)
    np.testing.assert_allclose(scene.t, t, atol=1e-9)
    assert scene.size_wh.tolist() == [[WIDTH, HEIGHT]] * 3
    assert scene.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    for (i, j), overlap in zip(scene.pairs, scene.overlap, strict=True):
        shared = np.intersect1d(reference.tracks[i][0], reference.tracks[j][0])
        smaller = min(len(reference.tracks[i][0]), len(reference.tracks[j][0]))
        assert overlap == pytest.approx(len(shared) / smaller)
        ours, theirs = scene.shared_points(i, j), reference.shared_points(i, j)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_allclose(scene.depth_range, reference.depth_range, rtol=1e-6)
    tracks = PosedPairs([scene], plain(tracks=20, overlap=(0.1, 1.0)))[0]["tracks"]
    assert tracks.isfinite().all(1).sum() > 5


def test_broken_colmap_models(tmp_path):
    folder = write_colmap(tmp_path / "a", text=False)
    (folder / "images/001.png").unlink()
    with pytest.raises(InputError, match=r"001\.png: missing"):
        read_colmap(folder)
    lines = []
    assert len(read_colmap(folder, skip_bad=True, on_bad=lines.append)) == 2 and len(lines) == 1
    for name in ("points3D.bin", "images.bin", "frames.bin", "rigs.bin"):
        path = folder / "sparse/0" / name
        content = path.read_bytes()
        for size in (4, 13, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(InputError, match=rf"{name}: ends too early, at {size} bytes"):
                read_colmap(folder)
        path.write_bytes(content)
    path = folder / "sparse/0/cameras.bin"
    content = path.read_bytes()
    for size in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"cameras\.bin: ends too early, at {size} bytes"):
            read_colmap(folder)
    path.write_bytes(content)
    write_colmap(tmp_path / "c", text=True)
    listing = tmp_path / "c/sparse/0/images.txt"
    listing.write_text(listing.read_text()[:-900])
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_colmap(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value) and "\n" not in str(caught.value)
    (folder / "sparse/0/points3D.bin").unlink()
    with pytest.raises(InputError, match=r"points3D\.bin is missing"):
        read_colmap(folder)
    with pytest.raises(InputError, match="image_undistorter"):
        read_colmap(write_colmap(tmp_path / "b", text=True, model="SIMPLE_RADIAL"))


def test_a_fisheye_camera_of_colmap_is_no_pinhole(tmp_path):
    fisheye = write_colmap(tmp_path / "a", False, "SIMPLE_RADIAL_FISHEYE", distortion=0.0)
    with pytest.raises(InputError, match="SIMPLE_RADIAL_FISHEYE distorts"):
        read_colmap(fisheye)
    assert len(read_colmap(write_colmap(tmp_path / "b", False, "SIMPLE_RADIAL", distortion=0.0)))


def test_names_with_spaces_in_colmap_models(tmp_path):
    assert len(read_colmap(write_colmap(tmp_path / "a", text=False, ending=" left.png"))) == 3
    with pytest.raises(InputError, match=r"images\.txt, line 5: .* no name with spaces"):
        read_colmap(write_colmap(tmp_path / "b", text=True, ending=" left.png"))


def write_caps(root):
    """MegaDepth in the layout of CAPS: two images that are listed as a pair, and a third."""
    folder = root / "train" / "0042" / "dense0" / "aligned"
    R, t, _ = cameras(3)
    names = ["x.png", "y.png", "z.png"]
    write_images(folder / "images", names)
    rows = ["# name w h fx fy cx cy R t"]
    for name, rotation, translation in zip(names, R, t, strict=True):
        numbers = [K[0, 0], K[1, 1], K[0, 2] + 0.5, K[1, 2] + 0.5, *rotation.ravel(), *translation]
        rows.append(" ".join([name, str(WIDTH), str(HEIGHT), *map(repr, map(float, numbers))]))
    (folder / "img_cam.txt").write_text("\n".join(rows) + "\n")
    (folder / "pairs.txt").write_text("y.png x.png\nz.png y.png\n")
    return folder


def test_caps_layout(tmp_path):
    folder = write_caps(tmp_path)
    (scene,) = read_scenes(tmp_path)
    assert scene.name == "0042_dense0" and len(scene) == 3
    R, t, _ = cameras(3)
    np.testing.assert_allclose(scene.K, np.tile(K, (3, 1, 1)))
    np.testing.assert_allclose(scene.R, R)
    np.testing.assert_allclose(scene.t, t)
    assert scene.pairs.tolist() == [[0, 1], [1, 2]]
    sample = PosedPairs([scene], plain())[0]
    assert sample["depth_range1"].tolist() == [4, 400]
    # the list of pairs may be absent
    (folder / "pairs.txt").rename(folder / "kept.txt")
    said = []
    (alone,) = read_scenes(tmp_path, on_bad=said.append)
    assert len(alone) == 3 and len(alone.pairs) == 0
    assert len(said) == 1 and "pairs.txt: is not there" in said[0]
    (folder / "kept.txt").rename(folder / "pairs.txt")
    # errors name file and line
    listing = folder / "img_cam.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join([*lines[:2], lines[2].rsplit(" ", 1)[0], lines[3]]))
    with pytest.raises(InputError, match=r"img_cam\.txt, line 3: 18 columns"):
        read_caps(folder)
    said = []
    assert len(read_caps(folder, skip_bad=True, on_bad=said.append)) == 2
    assert len(said) == 3  # the line, and both pairs with the image
