"""Training and evaluation of SCFeat; robots that only extract features do not need it."""

import os

# Read by OpenMP when PyTorch is loaded: its threads sleep between two operations instead of
# spinning, which would take the time of the data workers beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
