"""What the network gets to see: the way for a GPU gives what the one for the CPU gives."""

import cv2
import numpy as np
import pytest
import torch
from test_extractor import textured_image
from test_selection import DEVICES

from scfeat_ros import preprocessing


@pytest.mark.parametrize("new", [(160, 120), (213, 160), (301, 77), (97, 240)])
def test_shrinking_is_opencvs_area_averaging(new):
    image = textured_image(320, 240)
    expected = cv2.resize(image, new, interpolation=cv2.INTER_AREA)
    found = preprocessing.shrink(torch.from_numpy(image).permute(2, 0, 1)[None], new)
    found = found[0].permute(1, 2, 0).numpy()
    difference = np.abs(found.astype(int) - expected)
    # means of 2x2 pixels are halves in one case of four, which OpenCV rounds up and we to even
    assert difference.max() <= 1
    assert (difference == 0).mean() > (0.85 if new == (160, 120) else 0.98)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("new", [(97, 70), (48, 40)])
def test_both_ways_shrink_and_pad_alike(device, new):
    images = [textured_image(97, 70, seed) for seed in range(2)]
    expected = preprocessing.on_cpu(images, new)
    found = preprocessing.on_device(images, new, torch.device(device)).cpu()
    assert found.shape == expected.shape and found.dtype == torch.uint8
    assert all(side % 16 == 0 for side in found.shape[2:])
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (0 if new == (97, 70) else 1)


def test_working_size():
    assert preprocessing.working_size((1920, 1080), 640) == (640, 360)
    assert preprocessing.working_size((1920, 1080), 0) == (1920, 1080)
    assert preprocessing.working_size((5000, 2), 100) == (100, 1)
