"""Keypoints out of a score map: every way gives what OpenCV's operators on the CPU give.

`on_device` has no step that only a GPU has, so it is held against `on_cpu` here on the CPU; where
there is a GPU, there as well.
"""

import time

import numpy as np
import pytest
import torch
from test_extractor import textured_image
from test_fused import kernels_device, needs_compiler, needs_triton, triton_kernels

from scfeat_ros import selection
from scfeat_ros.parameters import ExtractorOptions

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]

WAYS = [
    pytest.param("compiled", marks=needs_compiler),
    pytest.param("triton", marks=needs_triton),
    *DEVICES,
]


def both(scores, image, mask, way, **options):
    """Selected by OpenCV's operators, and by a way or by `on_device` on a device.

    Empty rows are taken away.
    """
    options = ExtractorOptions(**options)
    expected = selection.on_cpu(scores, image, mask, options)
    if way == "compiled":
        return expected, selection.on_cpu(scores, image, mask, options, compiled=True)
    device, select = way, selection.on_device
    if way == "triton":
        device, select = kernels_device(triton_kernels), triton_kernels.select
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)
    mask = None if mask is None else torch.from_numpy(mask).to(device) != 0
    found = select(scores.to(device), pixels, mask, options)
    filled = found.scores > -torch.inf
    assert filled.sum() == filled.cumprod(0).sum(), "keypoints come before empty rows"
    return expected, selection.Selected(*(part[filled].cpu() for part in found))


@pytest.fixture
def scores():
    random = np.random.default_rng(1)
    # many equal scores: their order must be that of the image
    return torch.from_numpy(random.integers(0, 40, (90, 130)).astype(np.float32) / 10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_keypoints": 50},
        {"max_keypoints": 100_000, "nms_radius": 0},
        {"score_threshold": 3.0, "border": 11},
        {"nms_radius": 4, "subpixel": False, "border": 0},
        {"border": 60},
    ],
    ids=str,
)
def test_both_ways_select_the_same(scores, way, options):
    image = textured_image(130, 90)
    image[20:40, 30:70] = 7  # nothing to localize
    mask = np.ones((90, 130), np.uint8)
    mask[60:, :50] = 0
    expected, found = both(scores, image, mask, way, **options)
    torch.testing.assert_close(found.points, expected.points, atol=1e-5, rtol=0)
    assert torch.equal(found.scores, expected.scores)
    assert (len(expected.scores) == 0) == (options == {"border": 60})
    x, y = expected.points.T
    # the 5x5 neighbourhood and the sub-pixel offset reach over the edge of the plain area
    assert not ((x > 33) & (x < 66) & (y > 23) & (y < 36)).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 49, 50])
def test_of_different_scores_as_many_as_wanted_are_kept(way, count):
    scores = torch.from_numpy(np.random.default_rng(2).random((40, 60), np.float32))
    expected, found = both(scores, textured_image(60, 40), None, way, max_keypoints=count)
    every, _ = both(scores, textured_image(60, 40), None, way)
    assert len(every.scores) > 50
    for selected in (expected, found):
        assert torch.equal(selected.scores, every.scores[:count])


@pytest.mark.parametrize("way", WAYS)
def test_scores_that_are_no_numbers_are_left_out(way):
    scores = torch.zeros(40, 40)
    scores[10, 10], scores[20, 20], scores[30, 30] = torch.nan, torch.inf, 1.0
    expected, found = both(scores, textured_image(40, 40), None, way, subpixel=False)
    for selected in (expected, found):
        assert selected.points.tolist() == [[30, 30]]


@needs_compiler
def test_a_plain_image_is_quick_whatever_the_radius():
    """Its scores are a plateau: no pixel's neighbourhood has a larger one to stop the search at."""
    scores, image = torch.full((240, 320), 0.5), np.full((240, 320, 3), 9, np.uint8)

    def seconds(radius):
        options, times = ExtractorOptions(nms_radius=radius), []
        for _ in range(5):
            started = time.perf_counter()
            assert not len(selection.on_cpu(scores, image, None, options, compiled=True).points)
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds(64) < 10 * seconds(1) + 0.01
