"""Nearest neighbours among descriptors, in C++."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scfeat_ros.native.library import ask, call


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
    """Whether the CPU multiplies by AMX's tiles of bf16."""
    return bool(ask("has_tiles"))


def has_shorts() -> bool:
    """Whether it is faster with products of integers of 16 bits than with those of fp32."""
    return bool(ask("has_shorts"))


def way() -> str:
    """How `nearest` multiplies where it need not be exact: bf16, int16 or fp32."""
    if has_tiles():
        return "bf16, in two parts"
    return "int16" if has_shorts() else "fp32"


def nearest(a: np.ndarray, b: np.ndarray, exact: bool = False) -> Nearest:
    """Of (N, D) and (M, D) float32, neither empty, by inner product.

    Args:
        a, b: the vectors.
        exact: multiply in fp32 everywhere. Else neighbours are found by what the CPU multiplies
            fastest: AMX's tiles, with every factor as the sum of two numbers of bf16; or integers
            of 16 bits. Inner products of unit vectors are then within 2e-5 as a
            rule (within sqrt(D) of that where all values are rounded alike), and so near ones may
            change places; `similarity` is computed in fp32 for those that are found.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    found = Nearest(
        *(np.empty(len(a), dtype) for dtype in (np.int64, np.float32, np.float32)),
        *(np.empty(len(b), dtype) for dtype in (np.int64, np.float32)),
    )
    call("nearest", None, a, len(a), b, len(b), a.shape[1], exact, *found)
    return found
