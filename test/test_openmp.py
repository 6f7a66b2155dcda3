"""The threads on which PyTorch and the compiled kernels compute."""

import os
import subprocess
import sys

import pytest

LOAD = """
import os
import numpy as np
import torch
from scfeat_ros.extractor import Extractor

image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
torch.set_num_threads(2)
extractor = Extractor.from_pretrained("scfeat-s", "cpu", compile={compile!r})
"""

FORK = """
import multiprocessing

before = extractor(image)

def extract():
    after = extractor(image)
    assert np.array_equal(before.descriptors, after.descriptors) and len(after) > 10

child = multiprocessing.get_context("fork").Process(target=extract, daemon=True)
child.start()
extract()
child.join(60)
assert child.exitcode == 0, child.exitcode
"""

COUNT = """
def threads():
    return len(os.listdir("/proc/self/task"))

from scfeat_ros.openmp import release_threads

loaded = threads()
torch.ones(1 << 20).sum()
assert threads() > loaded, (loaded, threads())
release_threads()
assert threads() == loaded, (loaded, threads())
"""


def succeeds(code):
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return True


@pytest.mark.parametrize("compile", ["auto", "off"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_has_extracted_may_fork(compile):
    assert succeeds(LOAD.format(compile=compile) + FORK)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux tells the threads there")
def test_loading_a_network_leaves_no_threads_behind():
    assert succeeds(LOAD.format(compile="off") + COUNT)
