"""SCFeat learned local features for ROS 2 and offline use."""

import os

__version__ = "0.1.0"

# Read by OpenMP when PyTorch is loaded: its threads spin for half a millisecond between two
# operations and then sleep. Threads that sleep at once cost a seventh of the time of a frame, those
# that keep spinning three times the time on a machine with other work.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
