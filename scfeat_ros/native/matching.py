"""Nearest neighbours among descriptors, in C++."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scfeat_ros.native.library import call


class Nearest(NamedTuple):
    """Nearest neighbours both ways between (N, D) and (M, D); of equally near ones the first."""

    of_row: np.ndarray
    """(N,) int64"""
    similarity: np.ndarray
    """(N,) float32, of the nearest."""
    second: np.ndarray
    """(N,) float32, the second largest similarity; hugely negative where there is none."""
    of_column: np.ndarray
    """(M,) int64"""
    second_of_column: np.ndarray
    """(M,) float32"""


def has_tiles() -> bool:
    """Whether `nearest` can multiply by AMX's tiles of bf16."""
    return bool(call("has_tiles", None))


def nearest(a: np.ndarray, b: np.ndarray, by_tiles: bool = True) -> Nearest:
    """Of (N, D) and (M, D) float32, neither empty, by inner product.

    Args:
        a, b: the vectors.
        by_tiles: multiply by AMX's tiles where the CPU has them. Every factor is then the sum of
            two numbers of bf16; inner products of unit vectors are within 2e-5.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    found = Nearest(
        *(np.empty(len(a), dtype) for dtype in (np.int64, np.float32, np.float32)),
        *(np.empty(len(b), dtype) for dtype in (np.int64, np.float32)),
    )
    call("nearest", None, a, len(a), b, len(b), a.shape[1], by_tiles, *found)
    return found
