"""Distillation's start and loss; the stage itself is run in test_train.py."""

import dataclasses

import numpy as np
import pytest
import torch
from test_extractor import textured_image

from scfeat_ros.errors import InputError
from scfeat_ros.extractor import Extractor
from scfeat_ros.model.scfeat import CONFIGS, SCFeat
from scfeat_training.distillation import start_from, unexplained

SMALL, LARGE = CONFIGS["scfeat-s"], CONFIGS["scfeat-m"]


def test_start_keeps_the_channels_that_matter():
    torch.manual_seed(0)
    teacher, student = SCFeat(LARGE).eval(), SCFeat(SMALL).eval()
    teacher.projection.matrix = torch.randn(100, teacher.projection.matrix.shape[1])
    with torch.no_grad():
        for layer in ("layer1", "layer2", "layer3"):
            for block in getattr(teacher.backbone.encoder, layer):
                block.bn1.weight.uniform_(0.5, 1.5)
                block.bn1.running_mean.normal_()
                block.conv2.weight[:, torch.randperm(len(block.bn1.weight))[::2]] *= 1e-9
    start_from(teacher, student)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for own, theirs in zip(student(image), teacher(image), strict=True):
            torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(student.projection.matrix, teacher.projection.matrix)
    count = sum(value.numel() for value in student.parameters())
    assert count < 0.7 * sum(value.numel() for value in teacher.parameters())


def test_start_from_a_network_that_differs_in_more_is_refused():
    teacher = SCFeat(dataclasses.replace(LARGE, decoder_channels=(96, 32))).eval()
    with pytest.raises(InputError, match=r"backbone\.decoder_0"):
        start_from(teacher, SCFeat(SMALL))
    with pytest.raises(InputError, match=r"differs in 'backbone\.encoder"):
        start_from(SCFeat(SMALL).eval(), SCFeat(LARGE))


def test_unexplained_share_is_between_equal_maps_and_their_mean():
    target = torch.randn(2, 3, 8, 10) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 7
    assert torch.equal(unexplained(target, target), torch.zeros(2))
    mean = target.mean(dim=(0, 2, 3), keepdim=True).expand_as(target)
    torch.testing.assert_close(unexplained(mean, target).mean(), torch.tensor(1.0))
    other = target + 0.1 * torch.randn_like(target)
    share = unexplained(other, target)
    assert ((share > 0) & (share < 0.05)).all()
    torch.testing.assert_close(unexplained(10 * other, 10 * target), share)


def test_scfeat_s_gives_what_scfeat_m_gives():
    """So that the one matches what the other has seen."""
    image = textured_image(320, 240)
    options = {"device": "cpu", "precision": "fp32", "max_keypoints": 300}
    large, small = (
        Extractor.from_pretrained(n, **options)(image) for n in ("scfeat-m", "scfeat-s")
    )
    distance = np.linalg.norm(large.keypoints[:, None] - small.keypoints[None], axis=2)
    found, there = distance.min(axis=1) < 1, distance.argmin(axis=1)
    assert found.mean() > 0.8
    cosine = (large.descriptors * small.descriptors[there]).sum(axis=1)[found]
    assert np.median(cosine) > 0.97
