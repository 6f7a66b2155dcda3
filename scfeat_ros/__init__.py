"""SCFeat learned local features for ROS 2 and offline use."""

import os

__version__ = "0.1.0"

# Read by OpenMP when PyTorch is loaded: its threads sleep between two operations instead of
# spinning. On a machine with other work spinning threads cost three times the time of a frame.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
