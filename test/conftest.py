"""Fixtures: a small network with random weights, and short bags."""

from __future__ import annotations

import os

import numpy as np
import pytest
import sample_bags
import torch

from scfeat_ros.extractor import Extractor
from scfeat_ros.model.scfeat import SCFeat, SCFeatConfig, save_model

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels run on the CPU

TINY = SCFeatConfig("tiny", "resnet10", (32, 32), 32, (8, 8, 8))


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """File of a small network with random weights: fast, and good enough to match a shift."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(SCFeat(TINY), path, {"made": "at random, for tests"})
    return path


@pytest.fixture(scope="session")
def tiny_extractor(tiny_weights):
    # more threads than free cores would wait for each other most of the time
    return Extractor.from_pretrained(tiny_weights, device="cpu", max_keypoints=150, threads=1)


@pytest.fixture(scope="session")
def images():
    """Six grey 160x120 images of a camera that slides to the right."""
    return sample_bags.sequence()


@pytest.fixture(scope="session")
def intrinsics():
    return np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]])


@pytest.fixture(scope="session")
def camera_bag(tmp_path_factory, images, intrinsics):
    """A bag (mcap) with the images and their CameraInfo; not to be changed."""
    path = tmp_path_factory.mktemp("bags") / "drive"
    return sample_bags.write_bag(path, sample_bags.camera_messages(images, intrinsics))


@pytest.fixture(params=["real", "simulated"])
def gpu(request):
    """A CUDA device, if there is one, and a simulated one."""
    if request.param == "simulated":
        from simulated_gpu import simulated_gpu

        with simulated_gpu() as device:
            yield device
    elif torch.cuda.is_available():
        yield torch.device("cuda:0")
    else:
        pytest.skip("needs a CUDA device")
