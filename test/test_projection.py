"""The projection from samples to descriptors: its fit, on its own and by the command."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from test_train import data  # noqa: F401 - a fixture

from scfeat_ros.model.scfeat import find_weights, load_model, read_metadata
from scfeat_training.projection import Scatter, discriminant
from scfeat_training.train import main


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
    rows = discriminant(mixing[-1], scatter.between(), scatter.within(), 3)
    assert rows.shape == (3, 12) and np.abs(rows).max() == 1
    share = np.linalg.norm(rows @ mixing[:3].T) / np.linalg.norm(rows)
    assert share > 0.99, share
    found = [view @ rows.T for view in views]
    nearest = np.linalg.norm(found[0][:200, None] - found[1][None, :200], axis=2).argmin(axis=1)
    raw = np.linalg.norm(views[0][:200, None] - views[1][None, :200], axis=2).argmin(axis=1)
    assert (nearest == np.arange(200)).mean() > 0.7 > 0.3 > (raw == np.arange(200)).mean()


def test_project_writes_weights_that_differ_in_the_projection_alone(data, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "model.safetensors"
    arguments = ["project", "scfeat-s", "--data", str(data), "-o", str(output)]
    arguments += ["--size", "160", "112"]
    assert main([*arguments, "--pairs", "1"]) == 1
    assert "give more pairs" in capsys.readouterr().err and not output.exists()
    assert main([*arguments, "--pairs", "40"]) == 0
    before, after = load_file(find_weights("scfeat-s")), load_file(output)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"projection.matrix"}
    assert all(after[key].isfinite().all() and after[key].abs().max() == 1 for key in changed)
    made = read_metadata(output)["provenance"]
    assert made["projection"]["scenes"] == ["wall"] and made["projection"]["pairs"] == 40
    assert made["history"] == read_metadata(find_weights("scfeat-s"))["provenance"]["history"]
    assert main([*arguments, "--pairs", "40"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_weights_from_before_there_was_a_projection(tmp_path):
    tensors = load_file(find_weights("scfeat-s"))
    older = {key: value for key, value in tensors.items() if not key.startswith("projection.")}
    metadata = read_metadata(find_weights("scfeat-s"))
    path = tmp_path / "older.safetensors"
    save_file(older, path, {"format": "scfeat", "config": json.dumps(metadata["config"])})
    found = load_model(path).projection
    assert torch.equal(found.matrix, found.unfitted().matrix)


def test_published_weights_have_a_fitted_projection():
    published = load_model("scfeat-s").projection
    assert not torch.equal(published.matrix, published.unfitted().matrix)


def test_three_tenths_are_left_of_what_all_samples_have_in_common():
    mean, other = np.random.default_rng(0).normal(size=(2, 8))
    other -= mean * (other @ mean) / (mean @ mean)
    covariances = np.diag(np.arange(8.0)), np.eye(8)
    # in the first direction the four best have no part: nothing is taken away
    whole, rows = (discriminant(common, *covariances, 4) for common in (np.eye(8)[0], mean))
    np.testing.assert_allclose(rows @ mean / (rows @ other), 0.3 * (whole @ mean) / (whole @ other))
