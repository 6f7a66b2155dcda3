"""SCFeat learned local features for ROS 2 and offline use."""

import os

__version__ = "0.1.0"

# Read by OpenMP when PyTorch is loaded: its threads spin for some 50 microseconds between two
# operations and then sleep. On a busy machine, as a robot's is, threads that spin longer take the
# cores that the frame needs: ten times as long costs a third of a frame's time, spinning on and on
# makes some frames ten times as long. On an idle one it gains a tenth: its cores stay awake during
# a frame anyway (native/awake.cpp).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
