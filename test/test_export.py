"""Features and matches for other tools."""

from __future__ import annotations

import resource
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pycolmap
import pytest
from sample_bags import sequence

from scfeat_ros.errors import InputError, OutputExistsError
from scfeat_ros.export import (
    ColmapOptions,
    exhaustive_pairs,
    export,
    read_pairs,
    sequential_pairs,
)
from scfeat_ros.matcher import match
from scfeat_ros.parameters import MatcherOptions

NAMES = ["a1.png", "a2.png", "a10.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "images"
    path.mkdir()
    for name, image in zip(NAMES, sequence(3), strict=True):
        cv2.imwrite(str(path / name), image)
    return path


@pytest.fixture(scope="module")
def expected(folder, tiny_extractor):
    """Features by name, straight from the extractor."""
    return {
        name: tiny_extractor(cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)) for name in NAMES
    }


def test_pairs():
    assert exhaustive_pairs(list("abc")) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert sequential_pairs(list("abcd"), 2) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    ]
    with pytest.raises(InputError, match="--sequential"):
        sequential_pairs(list("ab"), 0)


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("# comment\na b\n\n b  c \nb a\n")
    assert read_pairs(path, list("abc")) == [("a", "b"), ("b", "c")]
    path.write_text("a b\na x\n")
    with pytest.raises(InputError, match="line 2: there is no image 'x'"):
        read_pairs(path, list("ab"))
    wrong = {"a b c": "expected two names", "a": "expected two names", "a a": "with itself"}
    for line, reason in wrong.items():
        path.write_text(f"{line}\n")
        with pytest.raises(InputError, match=f"line 1: .*{reason}"):
            read_pairs(path, list("abc"))
    path.write_text("# a b\n")
    with pytest.raises(InputError, match="there is no pair in it"):
        read_pairs(path, list("ab"))
    with pytest.raises(InputError, match=r"none\.txt"):
        read_pairs(tmp_path / "none.txt", [])


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (".npz", "File too large"),
        (".h5", "File too large"),
        (".db", "COLMAP cannot write it (No registered database factory succeeded.)"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, folder, ending, reason):
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    output = tmp_path / f"out{ending}"
    command = [sys.executable, "-m", "scfeat_ros", "export", folder, "-o", output]
    options = ["--weights", "scfeat-s", "--device", "cpu", "--compile", "off", "--quiet"]
    found = subprocess.run(
        [*command, *options], preexec_fn=limit_files, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(f"scfeat: error: {output}: {reason}")
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_npz(tmp_path, folder, expected, tiny_extractor):
    result = export(folder, tmp_path / "out.npz", tiny_extractor, progress=False)
    assert (result.images, result.pairs) == (3, 3)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as data:
        for name, features in expected.items():
            np.testing.assert_array_equal(data[f"{name}/keypoints"], features.keypoints)
            np.testing.assert_array_equal(data[f"{name}/scores"], features.scores)
            np.testing.assert_array_equal(data[f"{name}/descriptors"], features.descriptors)
            assert tuple(data[f"{name}/image_size"]) == (160, 120)
        matches = match(expected["a1.png"], expected["a10.png"])
        key = "matches/a1.png/a10.png"
        np.testing.assert_array_equal(data[f"{key}/indices"], matches.indices)
        np.testing.assert_allclose(data[f"{key}/similarity"], matches.similarity, atol=1e-6)
        assert result.matches == sum(
            len(data[name]) for name in data.files if name.endswith("/indices")
        )


def test_hloc(tmp_path, folder, expected, tiny_extractor):
    def pairs(names):
        return sequential_pairs(names, 1)

    result = export(folder, tmp_path / "out.h5", tiny_extractor, pairs, progress=False)
    assert [f.name for f in result.files] == ["out.h5", "out-matches.h5", "out-pairs.txt"]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in result.files)
    with h5py.File(tmp_path / "out.h5") as file:
        assert sorted(file) == sorted(NAMES)
        group = file["a2.png"]
        features = expected["a2.png"]
        np.testing.assert_array_equal(group["keypoints"], features.keypoints)
        assert group["keypoints"].attrs["uncertainty"] == 1.0
        np.testing.assert_array_equal(group["descriptors"], features.descriptors.T)
        np.testing.assert_array_equal(group["scores"], features.scores)
        np.testing.assert_array_equal(group["image_size"], [160, 120])
    with h5py.File(tmp_path / "out-matches.h5") as file:
        # "a1.png/a2.png", as hloc's names_to_pair has it
        group = file["a1.png/a2.png"]
        matches = match(expected["a1.png"], expected["a2.png"])
        matches0 = group["matches0"][:]
        assert len(matches0) == len(expected["a1.png"])
        found = np.stack([np.flatnonzero(matches0 >= 0), matches0[matches0 >= 0]], axis=1)
        np.testing.assert_array_equal(found, matches.indices)
        scores = group["matching_scores0"][:][matches0 >= 0]
        np.testing.assert_allclose(scores, matches.similarity, atol=1e-3)
        assert "a10.png" not in file["a1.png"]
    text = (tmp_path / "out-pairs.txt").read_text()
    assert text == "a1.png a2.png\na2.png a10.png\n"


def test_colmap(tmp_path, folder, expected, tiny_extractor):
    options = ColmapOptions("PINHOLE", single_camera=True)
    path = tmp_path / "out.db"
    export(folder, path, tiny_extractor, colmap=options, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["out.db"]
    with pycolmap.Database.open(path) as database:
        ids = {image.name: image.image_id for image in database.read_all_images()}
        assert sorted(ids) == sorted(NAMES)
        (camera,) = database.read_all_cameras()
        assert camera.model.name == "PINHOLE" and (camera.width, camera.height) == (160, 120)
        for name, features in expected.items():
            # COLMAP's origin is the corner of the first pixel
            np.testing.assert_array_equal(
                database.read_keypoints(ids[name])[:, :2], features.keypoints + 0.5
            )
        matches = match(expected["a1.png"], expected["a2.png"])
        stored = database.read_matches(ids["a1.png"], ids["a2.png"])
        np.testing.assert_array_equal(stored, matches.indices)
        geometry = database.read_two_view_geometry(ids["a1.png"], ids["a2.png"])
        assert 10 < len(geometry.inlier_matches) <= len(matches)


@pytest.mark.parametrize("ending", [".npz", ".h5", ".db"])
def test_images_in_folders_are_known_by_their_paths(tmp_path, folder, tiny_extractor, ending):
    root = tmp_path / "cameras"
    for name in NAMES[:2]:
        (root / name[:2]).mkdir(parents=True)
        (root / name[:2] / "0.png").write_bytes((folder / name).read_bytes())
    output = tmp_path / f"out{ending}"
    with pytest.raises(InputError, match="no images here"):
        export(root, output, tiny_extractor, progress=False)
    result = export(root, output, tiny_extractor, progress=False, recursive=True)
    assert result.images == 2 and result.matches > 10
    if ending == ".npz":
        with np.load(output) as data:
            assert "matches/a1/0.png/a2/0.png/indices" in data
    elif ending == ".h5":
        with h5py.File(output) as features, h5py.File(result.files[1]) as matches:
            assert "a1/0.png/keypoints" in features
            assert "a1-0.png/a2-0.png/matches0" in matches
        assert result.files[2].read_text() == "a1/0.png a2/0.png\n"
    else:
        with pycolmap.Database.open(output) as database:
            names = {image.name for image in database.read_all_images()}
        assert names == {"a1/0.png", "a2/0.png"}


def test_images_of_two_sizes_are_of_two_cameras(tmp_path, tiny_extractor):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(sequence(2)):
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), image[:, : 160 - 32 * index])
    path = tmp_path / "out.db"
    export(tmp_path / "images", path, tiny_extractor, progress=False)
    with pycolmap.Database.open(path) as database:
        sizes = {(camera.width, camera.height) for camera in database.read_all_cameras()}
    assert sizes == {(160, 120), (128, 120)}
    with pytest.raises(InputError, match=r"1\.png: COLMAP cannot take .*another size"):
        export(
            tmp_path / "images",
            path,
            tiny_extractor,
            colmap=ColmapOptions(single_camera=True),
            overwrite=True,
            progress=False,
        )
    with pycolmap.Database.open(path) as database:
        assert len(database.read_all_images()) == 2  # as it was


def test_matcher_options_count(tmp_path, folder, tiny_extractor):
    loose = export(folder, tmp_path / "loose.npz", tiny_extractor, progress=False)
    for name, options in (
        ("ratio", MatcherOptions(ratio=0.9)),
        ("epipolar", MatcherOptions(epipolar_threshold=0.5)),
    ):
        strict = export(
            folder, tmp_path / f"{name}.npz", tiny_extractor, matching=options, progress=False
        )
        assert 0 < strict.matches < loose.matches


def test_what_cannot_be_exported_is_refused(tmp_path, folder, tiny_extractor):
    with pytest.raises(InputError, match=r"must end with one of \.npz, \.h5, \.db"):
        export(folder, tmp_path / "out.csv", tiny_extractor)
    with pytest.raises(InputError, match="no such folder"):
        export(tmp_path / "none", tmp_path / "out.npz", tiny_extractor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images here"):
        export(tmp_path / "empty", tmp_path / "out.npz", tiny_extractor)
    with pytest.raises(InputError, match="FANCY"):
        export(
            folder, tmp_path / "out.db", tiny_extractor, colmap=ColmapOptions("FANCY"),
            progress=False,
        )  # fmt: skip
    (tmp_path / "out-matches.h5").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"out-matches\.h5 exists"):
        export(folder, tmp_path / "out.h5", tiny_extractor)
    assert (tmp_path / "out-matches.h5").read_text() == "precious"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"x\.png"):
        export(broken, tmp_path / "out.npz", tiny_extractor, progress=False)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == ["broken", "empty", "out-matches.h5"]


def test_names_with_blanks_are_refused_where_lists_cannot_hold_them(tmp_path, tiny_extractor):
    path = tmp_path / "images"
    path.mkdir()
    for index, image in enumerate(sequence(2)):
        cv2.imwrite(str(path / f"my view {index}.png"), image)
    for ending in ("db", "h5"):
        with pytest.raises(InputError, match=r"my view 0\.png: rename"):
            export(path, tmp_path / f"out.{ending}", tiny_extractor, progress=False)
    result = export(path, tmp_path / "out.npz", tiny_extractor, progress=False)
    assert result.pairs == 1


def test_names_that_hloc_cannot_tell_apart_are_refused(tmp_path, folder, tiny_extractor):
    root = tmp_path / "images"
    (root / "left").mkdir(parents=True)
    for source, name in zip(NAMES, ("left/0.png", "left-0.png"), strict=False):
        (root / name).write_bytes((folder / source).read_bytes())
    with pytest.raises(InputError, match=r"left.0\.png: rename this .* same as .*left.0\.png"):
        export(root, tmp_path / "out.h5", tiny_extractor, progress=False, recursive=True)
    assert [f.name for f in tmp_path.iterdir()] == ["images"]
    result = export(root, tmp_path / "out.npz", tiny_extractor, progress=False, recursive=True)
    assert result.pairs == 1
