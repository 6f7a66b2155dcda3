"""The methods under evaluation and the cache."""

import sys

import cv2
import numpy as np
import pytest
import torch

from scfeat_ros.errors import InputError, ScfeatError
from scfeat_ros.features import Features
from scfeat_ros.model.scfeat import CONFIGS, SCFeat, save_model
from scfeat_training.evaluation.cache import Cache, CorruptImageError
from scfeat_training.evaluation.estimators import POSE_ESTIMATORS, estimate_pose_poselib
from scfeat_training.evaluation.methods import (
    REGISTRY,
    Method,
    create_methods,
    from_bits,
    load_adapter,
    to_features,
)
from scfeat_training.evaluation.metrics import rotation_error


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
    return cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_model(SCFeat(CONFIGS["scfeat-s"]), path, {})
    return path


@pytest.mark.parametrize("name", ["orb", "sift", "rootsift", "akaze"])
def test_opencv_methods_keep_to_the_limit_and_to_unit_norm(name, image):
    (method,) = create_methods(name, 100)
    features = method.extract(image)
    assert 20 < len(features) <= 100
    assert features.image_size == (320, 240)
    assert (np.diff(features.scores) <= 0).all()
    assert np.linalg.norm(features.descriptors, axis=1) == pytest.approx(1, abs=1e-5)
    empty = method.extract(np.zeros_like(image))
    assert len(empty) == 0
    assert empty.descriptors.shape[1] == features.descriptors.shape[1]


def test_cosines_of_binary_descriptors_are_hamming_distances():
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (30, 32), np.uint8)
    cosines = from_bits(packed) @ from_bits(packed).T
    hamming = np.unpackbits(packed[:, None] ^ packed[None], axis=2).sum(axis=2)
    assert cosines == pytest.approx(1 - 2 * hamming / 256, abs=1e-5)


def test_scfeat_by_path_with_options(weights, image):
    methods = create_methods(f"{weights},{weights}:nms_radius=4:subpixel=false", 200)
    plain, sparse = methods
    assert plain.label == "random"
    assert sparse.label == "random:nms_radius=4:subpixel=false"
    assert plain.fingerprint() != sparse.fingerprint()
    keypoints = sparse.extract(image).keypoints
    assert (keypoints == keypoints.round()).all()
    assert len(plain.extract(image)) <= 200
    # a protocol's values give way to those that the user named
    assert create_methods(f"{weights}:compile=off", 200)[0].extractor.options.compile == "off"
    changed = sparse.with_options(nms_radius=2, score_threshold=1.0)
    assert changed.extractor.options.nms_radius == 4
    assert changed.extractor.options.score_threshold == 1.0
    assert sparse.extractor.options.score_threshold == 0.0


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path, weights):
    files = [
        tmp_path / "x" / "a" / "model.safetensors",
        tmp_path / "x" / "b" / "model.safetensors",
        tmp_path / "y" / "b" / "model.safetensors",
        tmp_path / "orb.safetensors",
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(weights.read_bytes())
    methods = create_methods(",".join(map(str, files[:2])), 100)
    assert [m.label for m in methods] == ["a/model", "b/model"]
    methods = create_methods(f"{files[0]}:nms_radius=3,{files[0]}", 100)
    assert [m.label for m in methods] == ["model:nms_radius=3", "model"]
    methods = create_methods(",".join(map(str, files)) + ",orb", 100)
    parent = f"{tmp_path.name}/orb"
    assert [m.label for m in methods] == ["a/model", "x/b/model", "y/b/model", parent, "orb"]
    with pytest.raises(InputError, match="twice"):
        create_methods(f"{files[0]},{files[0].parent}/./model.safetensors", 100)


def test_ablation_with_pruning_changes_descriptors_alone(weights, image):
    plain, pruned = create_methods(f"{weights},{weights}:descriptor_source=backbone", 100)
    a, b = plain.extract(image), pruned.extract(image)
    assert np.array_equal(a.keypoints, b.keypoints)
    assert not np.allclose(a.descriptors, b.descriptors)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ("nothing", "unknown"),
        ("orb,orb", "twice"),
        ("orb:a", "option=value"),
        ("orb:a=1", "'a'"),
        ("scfeat-s:levels=[", r"'scfeat-s:levels=\[': '\[' is not a valid value"),
        ("orb:max_keypoints=9", "given by --max-keypoints"),
        ("scfeat-s:weights=a.safetensors", "file's path in place of the name"),
        ("nowhere.safetensors", "nowhere.safetensors"),
        (" , ", "empty"),
        ("superpoint", "lightglue"),
    ],
)
def test_methods_that_cannot_be_had(methods, reason):
    try:
        import lightglue  # noqa: F401

        if methods == "superpoint":
            pytest.skip("it is installed")
    except ImportError:
        pass
    with pytest.raises(ScfeatError, match=reason):
        create_methods(methods, 100)


def test_scfeat_with_a_bad_option(weights):
    with pytest.raises(InputError, match="nms_radius"):
        create_methods(f"{weights}:nms_radius=-1", 100)


class Middle(Method):
    """One keypoint in the middle of the image that it is given."""

    def extract(self, image):
        height, width, _ = image.shape
        point = np.float32([[(width - 1) / 2, (height - 1) / 2]])
        return Features(point, np.ones(1, np.float32), np.ones((1, 1), np.float32), (width, height))


def test_keypoints_of_shrunk_images_are_in_pixels_of_the_stored_one(tmp_path, image):
    cv2.imwrite(str(tmp_path / "image.png"), image)
    extracted = Cache(tmp_path / "cache", max_size=100).extract(
        Middle("middle", 10, "cpu"), tmp_path / "image.png"
    )
    assert extracted.features.image_size == (320, 240)
    assert extracted.features.keypoints == pytest.approx(np.array([[159.5, 119.5]]), abs=1e-4)


def test_features_of_images_of_another_size_are_others(tmp_path, image):
    cv2.imwrite(str(tmp_path / "image.png"), image)
    (orb,) = create_methods("orb", 50)
    small, full, alone = (
        Cache(tmp_path / folder, size).extract(orb, tmp_path / "image.png").features.keypoints
        for folder, size in (("cache", 100), ("cache", 0), ("other", 0))
    )
    assert np.array_equal(full, alone) and not np.array_equal(full, small)


def test_methods_see_grey_images_in_three_channels(tmp_path, image):
    cv2.imwrite(str(tmp_path / "grey.png"), image[..., 0])
    cache = Cache(tmp_path / "cache")
    extracted = cache.extract(Middle("middle", 10, "cpu"), tmp_path / "grey.png")
    assert len(extracted.features) == 1 and not cache.failures


def test_cache_survives_a_damaged_entry_and_tells_methods_apart(tmp_path, image):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), image)
    few, more = create_methods("orb", 50)[0], create_methods("orb", 80)[0]
    first = Cache(tmp_path / "cache").extract(few, path).features
    (entry,) = (tmp_path / "cache").rglob("*.npz")
    entry.write_bytes(entry.read_bytes()[:100])
    again = Cache(tmp_path / "cache").extract(few, path).features
    assert np.array_equal(first.keypoints, again.keypoints)
    assert np.array_equal(first.descriptors, again.descriptors)
    assert len(Cache(tmp_path / "cache").extract(more, path).features) > len(first)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(CorruptImageError, match=r"broken\.png"):
        Cache(tmp_path / "cache").extract(few, tmp_path / "broken.png")


def test_cache_gives_back_exactly_what_was_extracted(tmp_path, image):
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), image)
    for method in create_methods("orb,akaze,rootsift", 60):
        direct = method.extract(image[..., ::-1])
        Cache(tmp_path / "cache").extract(method, path)
        stored = Cache(tmp_path / "cache").extract(method, path).features
        assert np.array_equal(stored.descriptors, direct.descriptors)
        assert stored.descriptors.dtype == np.float32
        assert np.array_equal(stored.scores, direct.scores)
        assert stored.keypoints == pytest.approx(direct.keypoints, abs=1e-4)


def test_extractors_of_lightglues_interface(tmp_path, monkeypatch, image):
    """A package with LightGlue's interface, since its weights cannot be had everywhere."""
    weights = tmp_path / "disk.pth"
    torch.save(torch.ones(3), weights)
    (tmp_path / "lightglue.py").write_text(
        f"import torch\nWEIGHTS = {str(weights)!r}\n"
        "class DISK(torch.nn.Module):\n"
        "    default_conf = {'max_num_keypoints': None, 'nms_window_size': 5}\n"
        "    def __init__(self, **conf):\n"
        "        super().__init__()\n"
        "        self.count, self.window = conf['max_num_keypoints'], conf['nms_window_size']\n"
        "        self.weight = torch.nn.Parameter(torch.load(WEIGHTS))\n"
        "    def extract(self, img, resize=1024):\n"
        "        assert resize is None and img.shape == (3, 240, 320) and img.max() <= 1\n"
        "        points = torch.arange(self.count * 2).float().reshape(1, -1, 2)\n"
        "        return {'keypoints': points, 'keypoint_scores': points[..., 0] + self.window,\n"
        "                'descriptors': points.repeat(1, 1, 4) + 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lightglue", raising=False)
    (method,) = create_methods("disk:nms_window_size=3", 20, "cpu")
    features = method.extract(image)
    assert features.keypoints[0].tolist() == [38, 39]
    assert features.scores[0] == 41
    assert features.descriptors.shape == (20, 8)
    assert np.linalg.norm(features.descriptors, axis=1) == pytest.approx(1)

    with pytest.raises(InputError, match="unknown option 'nms_radius'"):
        create_methods("disk:nms_radius=3", 20, "cpu")
    # its weights are part of what features are cached under: the package has no version
    before = method.fingerprint()
    torch.save(torch.zeros(3), weights)
    assert create_methods("disk:nms_window_size=3", 20, "cpu")[0].fingerprint() != before
    weights.unlink()
    with pytest.raises(InputError, match=r"'disk:nms_window_size=3': its weights.*disk\.pth"):
        create_methods("disk:nms_window_size=3", 20, "cpu")
    monkeypatch.delitem(sys.modules, "lightglue")


def test_a_package_that_lightglue_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "lightglue.py").write_text("import no_such_torchvision\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lightglue", raising=False)
    with pytest.raises(InputError, match="no_such_torchvision"):
        create_methods("disk", 20, "cpu")


def test_adapters_are_told_apart_by_name_and_file(tmp_path):
    file = tmp_path / "mine.py"
    text = (
        "from scfeat_training.evaluation.methods import Method, register, to_features\n"
        "for count in (5, 9):\n"
        "    @register(f'mine{count}')\n"
        "    class Mine(Method):\n"
        "        count = count\n"
        "        def extract(self, image):\n"
        "            points = image[:self.count, :2, 0]\n"
        "            return to_features(points, points[:, 0], points, image)\n"
    )
    file.write_text(text)
    load_adapter(file)
    few, many = create_methods("mine5,mine9", 100)
    assert few.fingerprint() != many.fingerprint()
    load_adapter(file)
    assert create_methods("mine5", 100)[0].fingerprint() == few.fingerprint()
    file.write_text(text.replace("2, 0", "2, 1"))
    load_adapter(file)
    assert create_methods("mine5", 100)[0].fingerprint() != few.fingerprint()


def test_an_adapter_that_cannot_be_set_up_is_named(monkeypatch):
    class WithoutWeights(Method):
        def prepare(self):
            raise KeyError("weights")

        def extract(self, image):
            return None

    class WithoutExtract(Method):
        pass

    monkeypatch.setitem(REGISTRY, "mine", WithoutWeights)
    with pytest.raises(InputError, match=r"'mine': cannot be set up \(KeyError: 'weights'\)"):
        create_methods("mine", 100)
    monkeypatch.setitem(REGISTRY, "mine", WithoutExtract)
    with pytest.raises(InputError, match=r"'mine': cannot be set up \(TypeError: .*'?extract"):
        create_methods("mine", 100)


def test_an_adapter_that_finds_more_than_the_limit_is_cut(tmp_path, image):
    class Corners(Method):
        def extract(self, image):
            y, x = np.mgrid[:5, :6].reshape(2, -1) * 4.0
            return to_features(np.stack([x, y], axis=1), x, np.stack([x, y + 1], axis=1), image)

    cv2.imwrite(str(tmp_path / "image.png"), image)
    for _ in range(2):  # extracted, and from the cache
        extracted = Cache(tmp_path / "cache").extract(
            Corners("corners", 10, "cpu"), tmp_path / "image.png"
        )
        assert set(extracted.features.scores) == {20, 16} and len(extracted.features) == 10


@pytest.mark.parametrize(
    ("name", "degrees"), [("magsac", 0.1), ("magsac-1000", 3), ("poselib", 0.1)]
)
def test_a_pose_between_two_lenses_is_found_among_wrong_matches(name, degrees):
    if name == "poselib":
        pytest.importorskip("poselib")
    random = np.random.default_rng(0)
    K1 = np.array([[500.0, 0, 310], [0, 505, 245], [0, 0, 1]])
    K2 = np.array([[300.0, 0, 150], [0, 290, 220], [0, 0, 1]])
    R, t = cv2.Rodrigues(np.array([0.1, -0.3, 0.05]))[0], np.array([0.8, 0.1, -0.6])
    X = random.uniform([-2, -1.5, 4], [2, 1.5, 8], (200, 3))
    first, second = (x[:, :2] / x[:, 2:] for x in (X @ K1.T, (X @ R.T + t) @ K2.T))
    second[120:] += random.uniform(40, 90, (80, 2)) * random.choice([-1, 1], (80, 2))
    found = POSE_ESTIMATORS[name](first, second, K1, K2, 1.0)
    assert rotation_error(found[0], R) < degrees
    # with its sign
    assert found[1] == pytest.approx(t / np.linalg.norm(t), abs=np.radians(4 * degrees))
    assert found[2][:120].mean() > 0.8 and found[2][120:].mean() < 0.2
    for count in (0, 4):
        assert POSE_ESTIMATORS[name](first[:count], second[:count], K1, K2, 1.0) is None


def test_descriptors_of_another_length_than_before_are_a_failure(tmp_path, image):
    class Growing(Method):
        def extract(self, image):
            points = np.zeros((4, 2))
            return to_features(points, points[:, 0], np.ones((4, image.shape[1])), image)

    cache, method = Cache(tmp_path / "cache"), Growing("growing", 10, "cpu")
    for name, width in (("a", 40), ("b", 40), ("c", 48)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), image[:40, :width])
        cache.extract(method, tmp_path / f"{name}.png")
    (reason,) = cache.failures.values()
    assert "c.png: growing failed (ValueError: descriptors of length 48" in reason


def test_poselibs_translation_has_unit_length(monkeypatch):
    poselib = pytest.importorskip("poselib")
    points, K = np.random.default_rng(0).uniform(0, 400, (30, 2)), np.diag([500.0, 500, 1])

    def found(t):
        pose = poselib.CameraPose()
        pose.t = t
        answer = pose, {"inliers": [True] * 30}
        monkeypatch.setattr(poselib, "estimate_relative_pose", lambda *_: answer)
        return estimate_pose_poselib(points, points, K, K, 1.0)

    assert found([0.0, 3, 4])[1] == pytest.approx([0, 0.6, 0.8])
    assert found([0.0, 0, 0]) is None


def test_arrays_of_an_adapter(image):
    none = to_features(np.zeros((0, 2)), np.zeros(0), np.zeros((0, 16)), image)
    assert len(none) == 0 and none.descriptors.shape == (0, 16)
    two = to_features([[1, 2], [3, 4]], [0.1, 0.9], [[3, 4], [0, 2]], image)
    assert two.keypoints.tolist() == [[3, 4], [1, 2]]
    assert two.descriptors == pytest.approx(np.array([[0, 1], [0.6, 0.8]]))
    with pytest.raises(ValueError, match="descriptors hold NaN or infinity"):
        to_features([[1, 2], [3, 4]], [0.1, 0.9], [[3, 4], [0, np.nan]], image)
    with pytest.raises(ValueError, match="belong together"):
        to_features([[1, 2]], [0.1, 0.9], [[3, 4], [0, 2]], image)
