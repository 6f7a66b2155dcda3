"""Nearest neighbours among descriptors, in C++."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scfeat_ros.native.library import call, query

KERNELS = {
    "bf16, in two parts": "nearest_by_tiles",
    "int8": "nearest_by_integers",
    "int16": "nearest_by_integers",
    "fp32": "nearest",
}
"""By their arithmetic."""


class Nearest(NamedTuple):
    """Nearest neighbours both ways between (N, D) and (M, D); the first of equally near ones."""

    of_row: np.ndarray
    """(N,) int64"""
    similarity: np.ndarray
    """(N,) float32, of the nearest."""
    second: np.ndarray | None
    """(N,) float32, the second largest similarity; hugely negative if there is none."""
    of_column: np.ndarray
    """(M,) int64"""
    second_of_column: np.ndarray | None
    """(M,) float32"""


def has_tiles() -> bool:
    """Whether the CPU has AMX for bf16."""
    return bool(query("has_tiles"))


def arithmetic() -> str:
    """How `nearest` multiplies if it need not be exact: bf16 in two parts, int8, int16 or fp32."""
    if has_tiles():
        return "bf16, in two parts"
    bits = query("integer_bits")
    return f"int{bits}" if bits else "fp32"


def nearest(a: np.ndarray, b: np.ndarray, seconds: bool = True, exact: bool = False) -> Nearest:
    """Of (N, D) and (M, D) float32, neither empty, by inner product.

    Args:
        a, b: the vectors.
        seconds: whether to find the second largest similarities, which takes a little longer.
        exact: multiply in fp32. Otherwise the CPU's fastest arithmetic finds candidates. With 8- or
            16-bit integers, fp32 products decide between close candidates, and all similarities are
            fp32; rarely (one neighbour in 10,000, one second neighbour in 1,000) the true one is
            not a candidate, and another, almost as near, is returned. With AMX every factor is the
            sum of two bf16 numbers: inner products of unit vectors are accurate to 2e-5, so one of
            two neighbours that are closer than that may be taken for the other; `similarity` is
            computed in fp32.
    """
    a, b = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    found = Nearest(
        np.empty(len(a), np.int64),
        np.empty(len(a), np.float32),
        np.empty(len(a), np.float32) if seconds else None,
        np.empty(len(b), np.int64),
        np.empty(len(b), np.float32) if seconds else None,
    )
    kernel = KERNELS["fp32" if exact else arithmetic()]
    call(kernel, None, a, len(a), b, len(b), a.shape[1], *found)
    return found
