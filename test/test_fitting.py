"""Projection and reliability: how they are fitted, on their own and by the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import damage_pixels, data  # noqa: F401 - a fixture

from scfeat_ros.errors import InputError
from scfeat_ros.features import Features
from scfeat_ros.model.scfeat import available_models, find_weights, load_model, read_metadata
from scfeat_training import projection, reliability
from scfeat_training.projection import Scatter, discriminant
from scfeat_training.train import main

RELIABILITY = {"detector.reliability.weight", "detector.reliability.bias"}


def test_discriminant_finds_what_tells_places_apart():
    random = np.random.default_rng(0)
    mixing = np.linalg.qr(random.normal(size=(12, 12)))[0]
    place = random.normal(size=(4000, 3))  # what differs between places, in few directions
    views = []
    for _ in range(2):
        values = np.zeros((4000, 12))
        values[:, :3] = place + 0.1 * random.normal(size=place.shape)
        values[:, 3:] = random.normal(size=(4000, 9))  # chance, in many
        views.append((values @ mixing).astype(np.float32))
    rows = np.arange(4000)
    scatter = Scatter()
    scatter.add(*views, np.stack([rows, rows], axis=1), np.stack([rows - 1, rows - 2], axis=1))
    difference = views[0] - views[1]
    np.testing.assert_allclose(scatter.within(), difference.T @ difference / 4000, atol=1e-4)
    np.testing.assert_allclose(np.trace(scatter.between()), 2 * (9 + 3 * 1.01), rtol=0.05)
    twice = Scatter()
    for part in (slice(0, 1000), slice(1000, 4000)):
        halves = [view[part] for view in views]
        own = np.arange(len(halves[0]))
        twice.add(*halves, np.stack([own, own], axis=1), own[:, None] - 1)
    np.testing.assert_allclose(twice.within(), scatter.within(), atol=1e-9)
    np.testing.assert_allclose(twice.mean(), scatter.mean(), atol=1e-9)
    rows = discriminant(mixing[-1], scatter.between(), scatter.within(), 3)
    assert rows.shape == (3, 12) and np.abs(rows).max() == 1
    share = np.linalg.norm(rows @ mixing[:3].T) / np.linalg.norm(rows)
    assert share > 0.99, share
    found = [view @ rows.T for view in views]
    nearest = np.linalg.norm(found[0][:200, None] - found[1][None, :200], axis=2).argmin(axis=1)
    raw = np.linalg.norm(views[0][:200, None] - views[1][None, :200], axis=2).argmin(axis=1)
    assert (nearest == np.arange(200)).mean() > 0.7 > 0.3 > (raw == np.arange(200)).mean()


def test_the_first_directions_tell_most_and_are_the_longest():
    rows = discriminant(np.eye(4)[3], np.diag([9.0, 1, 4, 0.5]), np.eye(4), 3)
    expected = np.zeros((3, 4))
    expected[[0, 1, 2], [0, 2, 1]] = (np.array([9, 4, 1]) / 9) ** projection.EMPHASIS
    np.testing.assert_allclose(np.abs(rows), expected, atol=1e-12)


def features(keypoints, descriptors):
    keypoints = np.array(keypoints, np.float32)
    descriptors = np.array(descriptors, np.float32)
    return Features(keypoints, np.ones(len(keypoints), np.float32), descriptors, (320, 240))


def test_one_place_is_what_is_near_under_a_homography_or_matches_on_the_line():
    first = features([[10, 10], [50, 50], [90, 20]], np.eye(3))
    moved = features([[93, 20], [13, 11.4], [53, 51.6]], np.roll(np.eye(3), 1, axis=0))
    H = torch.tensor([[1.0, 0, 3], [0, 1, 0], [0, 0, 1]])
    assert projection._same(first, moved, {"H": H}).tolist() == [[0, 1], [2, 0]]
    # a camera that moves to the right sees the same place in the same row
    seen = features([[93, 20.9], [23, 10], [83, 51.1]], np.roll(np.eye(3), 1, axis=0))
    F = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert projection._same(first, seen, {"F": F}).tolist() == [[0, 1], [2, 0]]


def test_look_alikes_are_the_most_similar_of_other_places():
    similarity = np.array([0.9, 1, 0.8, 0.1, 0.7, 0.6, 0.2, 0.5])
    first = features([[0, 0]], [[1, 0]])
    second = features(
        [[100, 0], [107, 0], [108.5, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]],
        np.stack([similarity, np.sqrt(1 - similarity**2)], axis=1),
    )
    # beside the right place, (100, 0), there is one that looks even more like it
    found = projection._look_alikes(first, second, np.array([[0, 0]]))
    assert found.tolist() == [[2, 4, 5, 7, 6]]


def test_reliability_tells_right_from_wrong():
    random = np.random.default_rng(0)
    values = random.normal(size=(6000, 12)) * np.linspace(0.1, 2, 12)
    right = values[:, 0] / 0.1 + 0.5 * values[:, 11] / 2 + random.normal(size=6000) > 0.4
    direction = reliability.discriminant(values, right)
    share = np.abs(direction * values.std(axis=0))
    assert share.argsort()[::-1][:2].tolist() == [0, 11] and share[0] > 1.5 * share[11]
    best = (values @ direction).argsort()[-2000:]
    assert right[best].mean() > 0.75 > 0.45 > right.mean()
    with pytest.raises(InputError, match="90 right and 10 wrong matches are too few"):
        reliability.discriminant(values[:100], np.arange(100) < 90)


def test_fit_changes_what_is_fitted_alone(data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "model.safetensors"
    arguments = ["fit", "scfeat-s", "--data", str(data), "-o", str(output)]
    arguments += ["--size", "160", "112"]
    assert main([*arguments, "--pairs", "12"]) == 1
    error = capsys.readouterr().err
    assert "are needed; give more pairs, --pairs " in error and not output.exists()
    assert 30 < int(error.split("--pairs ")[1].split()[0]) < 90
    assert main([*arguments, "--pairs", "60"]) == 0
    before, after = load_file(find_weights("scfeat-s")), load_file(output)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"projection.matrix", *RELIABILITY}
    assert all(after[key].isfinite().all() for key in changed)
    assert after["projection.matrix"].abs().max() == 1
    assert len(after["projection.matrix"]) == 128
    made = read_metadata(output)["provenance"]
    assert made["fitted"]["scenes"] == ["wall"] and made["fitted"]["pairs"] == 60
    assert made["history"] == read_metadata(find_weights("scfeat-s"))["provenance"]["history"]
    assert main([*arguments, "--pairs", "60"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_fit_finds_early_what_it_cannot_do(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    def never(*_):
        raise AssertionError("features were extracted")

    monkeypatch.setattr("scfeat_training.fitting.Extractor.__call__", never)
    arguments = ["fit", "scfeat-s", "--data", str(data), "--size", "160", "112", "-o"]
    output = tmp_path / "new" / "folder" / "model.safetensors"
    assert main([*arguments, str(output), "--pairs", "1"]) == 1
    error = capsys.readouterr().err
    assert "at most 1000 places" in error and "give more pairs, --pairs " in error
    assert output.parent.is_dir()
    (tmp_path / "file").write_text("")
    assert main([*arguments, str(tmp_path / "file" / "model.safetensors")]) == 1
    assert "model.safetensors: cannot be written" in capsys.readouterr().err
    assert main([*arguments, str(output), "--scenes", "fern"]) == 1
    assert "all scenes are held out for validation" in capsys.readouterr().err
    assert main([*arguments, str(output), "--scenes", "moon"]) == 1
    assert "has no scene 'moon'; it has ['fern', 'wall']" in capsys.readouterr().err
    for wrong in (["--pairs", "0"], ["--size", "0", "64"]):
        assert main([*arguments, str(output), *wrong]) == 1
        assert "must be at least 1" in capsys.readouterr().err


def test_fit_goes_on_without_damaged_images(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    def drawn(model, kinds):
        assert sum(1 for kind in kinds for _ in kind) == 24
        return model.projection

    monkeypatch.setattr("scfeat_training.projection.fit_projection", drawn)
    monkeypatch.setattr(
        "scfeat_training.reliability.fit_reliability", lambda model, _: model.detector.reliability
    )
    monkeypatch.setattr("scfeat_training.fitting.Extractor.__call__", lambda *_: None)
    shutil.copytree(data, tmp_path / "data")
    damage_pixels(tmp_path / "data/wall/images/2.png")
    (tmp_path / "data/wall/images/3.png").write_bytes(b"no image")
    output = tmp_path / "model.safetensors"
    arguments = ["fit", "scfeat-s", "--data", str(tmp_path / "data"), "-o", str(output)]
    arguments += ["--size", "160", "112", "--pairs", "12"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3.png: no image" in error and "--skip-bad" in error
    assert main([*arguments, "--skip-bad"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 2
    assert printed.out == f"wrote {output}, 2 bad inputs left out\n"


def test_older_weights_without_what_is_fitted(tmp_path):
    tensors = load_file(find_weights("scfeat-s"))
    fitted = {"projection.matrix", *RELIABILITY}
    assert fitted < tensors.keys()
    older = {key: value for key, value in tensors.items() if key not in fitted}
    metadata = read_metadata(find_weights("scfeat-s"))
    path = tmp_path / "older.safetensors"
    save_file(older, path, {"format": "scfeat", "config": json.dumps(metadata["config"])})
    found = load_model(path)
    assert torch.equal(found.projection.matrix, found.projection.unfitted().matrix)
    assert torch.equal(found.detector.reliability(torch.rand(1, 64, 4, 5)), torch.ones(1, 1, 4, 5))


@pytest.mark.parametrize("name", available_models())
def test_published_weights_are_fitted(name):
    published = load_model(name)
    assert not torch.equal(published.projection.matrix, published.projection.unfitted().matrix)
    assert published.detector.reliability.weight.norm() > 1


def test_three_tenths_are_left_of_what_all_samples_have_in_common():
    mean, other = np.random.default_rng(0).normal(size=(2, 8))
    other -= mean * (other @ mean) / (mean @ mean)
    covariances = np.diag(np.arange(8.0)), np.eye(8)
    # in the first direction the four best have no part: nothing is taken away
    whole, rows = (discriminant(common, *covariances, 4) for common in (np.eye(8)[0], mean))
    np.testing.assert_allclose(rows @ mean / (rows @ other), 0.3 * (whole @ mean) / (whole @ other))
