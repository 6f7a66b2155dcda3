"""Training and evaluation of SCFeat; robots that only extract features do not need it."""

import scfeat_ros  # noqa: F401  (tells OpenMP, before PyTorch is imported, not to spin for long)
