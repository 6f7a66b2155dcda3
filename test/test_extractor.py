"""The extractor from the outside: shapes, invariances, options, and images without features."""

import copy
import pickle
import warnings

import cv2
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scfeat_ros.errors import ScfeatError
from scfeat_ros.extractor import Extractor, fusion_normalize, select_device
from scfeat_ros.matcher import match
from scfeat_ros.model.scfeat import load_model
from scfeat_ros.selection import is_local_maximum, subpixel_offsets


def textured_image(width, height, seed=0):
    """Rectangles, discs and smooth noise: corners and blobs at all places, no symmetry."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(width * height // 1500):
        x, y = random.integers(0, width), random.integers(0, height)
        colour = tuple(int(c) for c in random.integers(0, 256, 3))
        if random.random() < 0.5:
            w, h = random.integers(4, 30, 2)
            cv2.rectangle(image, (x, y), (x + w, y + h), colour, -1)
        else:
            cv2.circle(image, (x, y), int(random.integers(2, 12)), colour, -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), 0.8)


@pytest.fixture(scope="module")
def extractor():
    return Extractor.from_pretrained("scfeat-s", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def make():
    return lambda **options: Extractor.from_pretrained(
        "scfeat-s", device="cpu", precision="fp32", **options
    )


def check_invariants(features, size, dim):
    n = len(features)
    assert features.keypoints.shape == (n, 2) and features.keypoints.dtype == np.float32
    assert features.scores.shape == (n,) and features.scores.dtype == np.float32
    assert features.descriptors.shape == (n, dim) and features.descriptors.dtype == np.float32
    assert features.image_size == size
    for array in (features.keypoints, features.scores, features.descriptors):
        assert np.isfinite(array).all()
    assert (np.diff(features.scores) <= 0).all()
    if n:
        assert (features.keypoints >= -0.5).all()
        assert (features.keypoints <= np.array(size) - 0.5).all()
        np.testing.assert_allclose(np.linalg.norm(features.descriptors, axis=1), 1, atol=1e-4)


def nearest(a, b):
    """Distance from each point of a to its nearest in b."""
    return np.linalg.norm(a[:, None] - b[None], axis=2).min(axis=1)


@pytest.mark.parametrize(
    ("size", "fewest"), [((641, 479), 20), ((1241, 376), 20), ((320, 240), 20), ((50, 33), 5)]
)
def test_odd_sizes(extractor, size, fewest):
    features = extractor(textured_image(*size))
    check_invariants(features, size, extractor.descriptor_dim)
    assert len(features) > fewest


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((480, 640, 3), np.uint8),
        np.full((480, 640, 3), 255, np.uint8),
        np.full((240, 320), 128, np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.full((1, 1), 77, np.uint8),
        np.zeros((1, 300), np.uint8),
        np.zeros((0, 20, 3), np.uint8),
    ],
)
def test_images_with_nothing_in_them_give_empty_features(extractor, image):
    features = extractor(image)
    assert len(features) == 0
    check_invariants(features, image.shape[1::-1], extractor.descriptor_dim)
    assert len(match(features, features)) == 0


def test_grey_equals_the_same_image_in_rgb(extractor):
    grey = cv2.cvtColor(textured_image(200, 160), cv2.COLOR_RGB2GRAY)
    a, b = extractor(grey), extractor(np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(a.keypoints, b.keypoints)


@pytest.mark.parametrize("sampling", ["pooled", "bilinear"])
def test_batch_of_four_equals_single_images(make, sampling):
    extractor = make(descriptor_sampling=sampling)
    images = [textured_image(160, 120, seed) for seed in range(4)]
    for alone, together in zip(
        map(extractor, images), extractor.extract_batch(images), strict=True
    ):
        # sums may run in another order, so a tie may fall the other way
        common = nearest(alone.keypoints, together.keypoints) < 0.05
        assert common.mean() > 0.99
        matches = match(alone, together)
        distance = (
            alone.keypoints[matches.indices[:, 0]] - together.keypoints[matches.indices[:, 1]]
        )
        assert (np.linalg.norm(distance, axis=1) < 0.05).mean() > 0.99


def test_batch_and_masks_as_one_array(extractor):
    images = np.stack([textured_image(96, 64, seed) for seed in range(2)])
    masks = np.zeros(images.shape[:3], bool)
    masks[0, :, :48] = masks[1, :32] = True
    first, second = extractor.extract_batch(images, masks)
    assert 0 < first.keypoints[:, 0].max() < 49 and 0 < second.keypoints[:, 1].max() < 33
    for features, image in zip(extractor.extract_batch(images), images, strict=True):
        np.testing.assert_array_equal(features.keypoints, extractor(image).keypoints)
    assert extractor.extract_batch(images[:0]) == []


def test_a_read_only_image_is_taken_without_a_warning(extractor):
    """As Pillow's and those of messages are."""
    image = textured_image(96, 64)
    image.setflags(write=False)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(extractor(image)) > 5
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles_find_the_same(make, copied):
    extractor, image = make(max_keypoints=30, nms_radius=2), textured_image(96, 64)
    features = extractor(image)
    extractor.set_options(max_keypoints=20)
    other = copied(extractor)
    assert other.options == extractor.options and str(other.network) == str(extractor.network)
    np.testing.assert_array_equal(other(image).keypoints, features.keypoints[:20])
    np.testing.assert_array_equal(other(image).descriptors, features.descriptors[:20])


def test_a_shallow_copy_has_options_of_its_own_on_the_same_network(make):
    extractor, image = make(max_keypoints=30), textured_image(96, 64)
    other = copy.copy(extractor)
    other.set_options(max_keypoints=20)
    assert other.network is extractor.network
    assert len(extractor(image)) == 30
    np.testing.assert_array_equal(other(image).keypoints, extractor(image).keypoints[:20])


@pytest.mark.parametrize("compile", ["auto", "off"])
def test_what_the_process_makes_of_pytorch_does_not_matter(make, compile):
    """Geometry is often computed with fp64 as the default, and networks trained under autocast."""
    extractor, image = make(compile=compile), textured_image(96, 64)
    expected = extractor(image)

    def check(extractor):
        found = extractor(image)
        check_invariants(found, (96, 64), extractor.descriptor_dim)
        np.testing.assert_array_equal(found.keypoints, expected.keypoints)
        np.testing.assert_array_equal(found.descriptors, expected.descriptors)

    with torch.autocast("cpu", torch.bfloat16):
        check(extractor)
        check(make(compile=compile))
    torch.set_default_dtype(torch.float64)
    try:
        check(extractor)
        check(make(compile=compile))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (16, 0)])
def test_shifted_image_gives_shifted_keypoints(make, shift):
    large = textured_image(336, 256)
    dx, dy = shift
    extractor = make(max_keypoints=300, border=24)
    a = extractor(large[:240, :320]).keypoints
    b = extractor(large[dy : dy + 240, dx : dx + 320]).keypoints
    distance = nearest(b + np.array(shift), a)
    close = distance < 1.0
    assert close.mean() > 0.8  # of noise; of photos it is nine in ten
    assert np.median(distance) < (0.1 if dx == 16 else 0.35)


@pytest.mark.parametrize("axis", [0, 1])
def test_flipped_image_gives_flipped_keypoints(make, axis):
    """Where a keypoint has a flipped twin, the two agree without a bias.

    The trained detector prefers one side of an edge, so not every keypoint has one; the share is
    held against that of points flipped the wrong way. (The exact statement, on a network without
    such preferences, is in test_model.py.)
    """
    image = textured_image(320, 240)
    extractor = make(max_keypoints=300, border=24)
    a = extractor(image).keypoints
    b = extractor(np.ascontiguousarray(np.flip(image, axis=axis))).keypoints
    chance = (nearest(a, b) < 1.5).mean()
    coordinate = 1 - axis
    b[:, coordinate] = (image.shape[axis] - 1) - b[:, coordinate]
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    close = distance.min(axis=1) < 1.5
    assert close.mean() > 1.5 * chance
    # a pixel-centre convention off by one would show as a constant along the flipped axis
    bias = (a - b[distance.argmin(axis=1)])[close].mean(axis=0)
    assert np.abs(bias).max() < 0.6


def test_max_keypoints_keeps_the_best(make):
    image = textured_image(320, 240)
    many, few = make(max_keypoints=500)(image), make(max_keypoints=50)(image)
    assert len(few) == 50
    np.testing.assert_array_equal(few.keypoints, many.keypoints[:50])


def test_score_threshold(make):
    image = textured_image(320, 240)
    scores = make()(image).scores
    middle = float(np.median(scores))
    kept = make(score_threshold=middle)(image).scores
    np.testing.assert_array_equal(kept, scores[scores > middle])


def test_nms_radius_keeps_keypoints_apart(make):
    points = make(nms_radius=5, subpixel=False)(textured_image(320, 240)).keypoints
    distance = np.abs(points[:, None] - points[None]).max(axis=2)
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 5


def test_border_and_mask(make):
    image = textured_image(320, 240)
    points = make(border=40)(image).keypoints
    assert points.min() > 39 and (points < np.array([280, 200])).all()
    mask = np.ones((240, 320), bool)
    mask[150:] = False  # the robot's own hood
    masked = make()(image, mask=mask).keypoints
    assert len(masked) and masked[:, 1].max() < 150.5
    assert (make()(image).keypoints[:, 1] > 160).any()


def test_max_size_gives_keypoints_in_pixels_of_the_original(make):
    image = textured_image(640, 480)
    full, shrunk = make(max_keypoints=2000)(image), make(max_size=320, max_keypoints=300)(image)
    assert shrunk.image_size == (640, 480)
    assert shrunk.keypoints[:, 0].max() > 500 and shrunk.keypoints[:, 1].max() > 380
    check_invariants(shrunk, (640, 480), shrunk.descriptors.shape[1])
    assert np.median(nearest(shrunk.keypoints, full.keypoints)) < 3
    mask = np.zeros((480, 640), np.uint8)
    mask[:, :320] = 255
    assert make(max_size=320)(image, mask=mask).keypoints[:, 0].max() < 321


def test_descriptor_options_change_descriptors_but_not_keypoints(make):
    image = textured_image(200, 160)
    plain = make()(image)
    pruned = make(descriptor_source="backbone")(image)
    check_invariants(pruned, (200, 160), 64)
    fusion = make(descriptor_norm="fusion")(image)
    bilinear = make(descriptor_sampling="bilinear")(image)
    check_invariants(bilinear, (200, 160), 64)
    for other in (pruned, fusion, bilinear):
        np.testing.assert_array_equal(other.keypoints, plain.keypoints)
    assert np.abs(pruned.descriptors - bilinear.descriptors).max() > 1e-2
    assert np.abs(fusion.descriptors - plain.descriptors).max() > 1e-2


def test_shorter_descriptors_are_the_first_values(make):
    image = textured_image(200, 160)
    whole, short = make()(image), make(descriptor_dim=40)
    assert whole.descriptors.shape[1] > 64 and short.descriptor_dim == 40
    found = short(image)
    check_invariants(found, (200, 160), 40)
    np.testing.assert_array_equal(found.keypoints, whole.keypoints)
    first = whole.descriptors[:, :40] / np.linalg.norm(
        whole.descriptors[:, :40], axis=1, keepdims=True
    )
    np.testing.assert_allclose(found.descriptors, first, atol=1e-4)
    assert short(np.zeros((0, 0), np.uint8)).descriptors.shape == (0, 40)


def test_descriptors_that_cannot_be_cut(make):
    extractor = make()
    with pytest.raises(ValueError, match="descriptor_dim 500: this network's descriptors have 128"):
        make(descriptor_dim=500)
    with pytest.raises(ValueError, match="descriptor_dim 40: only descriptors of"):
        extractor.set_options(descriptor_dim=40, descriptor_sampling="bilinear")
    with pytest.raises(ValueError, match="descriptor_dim 40: only descriptors of"):
        make(descriptor_dim=40, descriptor_source="backbone")
    assert extractor.options.descriptor_dim == 0


def test_surroundings_tell_places_apart_that_look_alike(make):
    scene, motif = textured_image(480, 360, 1), textured_image(32, 32, 5)
    for gap in (48, 64):
        for y in range(8, 320, gap):
            for x in range(8, 440, gap):
                scene[y : y + 32, x : x + 32] = motif
    H = np.array([[0.94, 0.08, 20], [-0.06, 0.97, 25], [1e-4, 5e-5, 1]])
    other = cv2.warpPerspective(scene, H, (480, 360), borderMode=cv2.BORDER_REFLECT)
    right = {}
    for name in ("bilinear", "unfitted", "pooled"):
        sampling = "bilinear" if name == "bilinear" else "pooled"
        extractor = make(descriptor_sampling=sampling, max_keypoints=1000)
        if name == "unfitted":
            model = copy.deepcopy(extractor.model)
            model.projection = model.projection.unfitted()
            extractor = Extractor(model, "cpu", max_keypoints=1000)
        first, second = extractor(scene), extractor(other)
        i, j = match(first, second).indices.T
        true = cv2.perspectiveTransform(first.keypoints[i][:, None].astype(float), H)[:, 0]
        right[name] = np.sum(np.linalg.norm(true - second.keypoints[j], axis=1) < 3)
    assert right["pooled"] > 1.03 * right["unfitted"] > 1.06 * right["bilinear"]


@pytest.mark.parametrize(
    ("name", "contrast", "least", "times"), [("scfeat-m", 3, 6, 3), ("scfeat-s", 2, 15, 1.5)]
)
def test_reliability_prefers_what_stays_to_noise(name, contrast, least, times):
    """Half of each view is noise of its own, as leaves or water nearly are."""
    scene = textured_image(480, 360, 1)
    H = np.array([[0.94, 0.08, 20], [-0.06, 0.97, 25], [1e-4, 5e-5, 1]])
    views = [scene, cv2.warpPerspective(scene, H, (480, 360), borderMode=cv2.BORDER_REFLECT)]
    random = np.random.default_rng(0)
    for view in views:
        noise = cv2.GaussianBlur(random.integers(0, 256, (360, 240, 3), np.uint8), (0, 0), 1.2)
        view[:, 240:] = np.clip(contrast * (noise.astype(int) - 128) + 128, 0, 255)
    right = {}
    for fitted in (False, True):
        model = load_model(name)
        if not fitted:
            model.detector.reliability = model.detector.reliability.unfitted()
        extractor = Extractor(model, "cpu", precision="fp32", max_keypoints=400)
        first, second = map(extractor, views)
        i, j = match(first, second).indices.T
        true = cv2.perspectiveTransform(first.keypoints[i][:, None].astype(float), H)[:, 0]
        right[fitted] = np.sum(np.linalg.norm(true - second.keypoints[j], axis=1) < 3)
    assert right[True] > least and right[True] > times * right[False]


def test_fusion_normalization_follows_equation_25():
    d = torch.tensor([[3.0, -4.0, 1.0]])
    expected = np.zeros(3)
    for p, k in ((1, 1), (2, 2), (3, 3), (4, 4)):
        expected += k * d[0].numpy() / (np.abs(d[0].numpy()) ** p).sum() ** (1 / p)
    expected /= 1 + 2 + 3 + 4
    actual = fusion_normalize(d)[0].numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_local_maximum_ignores_plateaus():
    scores = torch.zeros(1, 1, 7, 7)
    assert not is_local_maximum(scores, 1).any()
    scores[0, 0, 3, 4] = 1
    assert is_local_maximum(scores, 1).nonzero().tolist() == [[0, 0, 3, 4]]


def test_subpixel_finds_the_centre_of_a_blob():
    y, x = np.mgrid[0:9, 0:9]
    scores = torch.from_numpy(np.exp(-((x - 4.2) ** 2 + (y - 3.9) ** 2) / 2)).float()
    offset = subpixel_offsets(scores, torch.tensor([4]), torch.tensor([4]))[0]
    assert 0.05 < offset[0] < 0.25 and -0.15 < offset[1] < -0.02


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)],
)
def test_wrong_images_are_refused(extractor, image):
    with pytest.raises(ValueError, match="image must be"):
        extractor(image)


def test_wrong_options_are_refused(make, extractor):
    with pytest.raises(ValueError, match="max_keypoints must lie between 1"):
        make(max_keypoints=0)
    with pytest.raises(ValueError, match="descriptor_norm must be one of"):
        make(descriptor_norm="l3")
    with pytest.raises(TypeError, match="keypoints"):
        make(keypoints=3)
    before = extractor.options
    with pytest.raises(ValueError, match="nms_radius"):
        extractor.set_options(nms_radius=-1)
    assert extractor.options == before
    with pytest.raises(ValueError, match="mask must be"):
        extractor(np.zeros((8, 8), np.uint8), mask=np.ones((4, 8), bool))
    with pytest.raises(ValueError, match="got 1 masks for 2 images"):
        extractor.extract_batch([np.zeros((8, 8), np.uint8)] * 2, [None])


def test_threads_go_back_to_those_that_pytorch_had(tiny_weights, monkeypatch):
    monkeypatch.setattr("scfeat_ros.extractor._threads_before", None)
    before = torch.get_num_threads()

    def make(threads):
        plain = {
            "precision": "fp32",
            "compile": "off",
        }  # nothing runs: more threads than cores wait
        return Extractor.from_pretrained(tiny_weights, "cpu", threads=threads, **plain)

    try:
        for threads, expected in ((0, before), (before + 1, before + 1), (0, before)):
            make(threads=threads)
            assert torch.get_num_threads() == expected
        extractor = make(threads=1)
        for threads, expected in ((before + 1, before + 1), (0, before)):
            extractor.set_options(threads=threads)
            assert torch.get_num_threads() == expected
        # a number that somebody else chooses afterwards holds
        torch.set_num_threads(before + 2)
        make(threads=0)
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


def test_a_gpu_that_does_not_work_is_named_or_left_aside(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("old")))
    with pytest.raises(ScfeatError, match="there are 2: use cuda:0 to cuda:1"):
        select_device("cuda:2")
    with pytest.raises(ScfeatError, match=r"'cuda:1' does not work with this PyTorch .*: old"):
        select_device("cuda:1")
    assert select_device("auto") == torch.device("cpu")
    assert "Running on the CPU instead" in caplog.text


def test_a_gpu_without_cudnn_is_left_aside(monkeypatch, caplog):
    def conv2d(*_):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    with FakeTensorMode():
        assert select_device("auto") == torch.device("cpu")
    assert "cuDNN error" in caplog.text


def test_a_cuda_device_has_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: 2.0)
    with FakeTensorMode():
        assert [select_device(name).index for name in ("auto", "cuda", "cuda:0")] == [0, 0, 0]


def test_missing_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(ScfeatError, match="finds no CUDA device"):
        Extractor.from_pretrained("scfeat-s", device="cuda")
    with pytest.raises(ScfeatError, match="unknown"):
        Extractor.from_pretrained("scfeat-s", device="toaster")
