"""Which samples a step takes, and randomness that belongs to a sample.

Sample i of step s has the number s * batch + i, whatever the number of processes and however
often the run was interrupted; and random numbers come from (seed, number). So a resumed run, and
a run on several processes, see the same data and the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler


class StepSampler(Sampler[list[int]]):
    """Batches of sample numbers for the steps from `start` to `end`.

    Args:
        start, end: first step, and the one after the last.
        batch: pairs a step over all processes.
        rank, world: this process and the number of processes; `world` divides `batch`.
    """

    def __init__(self, start: int, end: int, batch: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise ValueError(f"batch {batch} cannot be split over {world} processes")
        self.start, self.end, self.batch = start, end, batch
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.world
        for step in range(self.start, self.end):
            first = step * self.batch + self.rank * share
            yield list(range(first, first + share))


class Numbered(Dataset):
    """Adds `index`, the sample's number, to the samples of a dataset."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.pairs[index], "index": index}


def generator_of(seed: int, index: int) -> torch.Generator:
    """A CPU generator that depends on (seed, index) alone."""
    generator = torch.Generator()
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63)
    return generator


def uniform(seed: int, indices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape) numbers uniform in [0, 1), row b depending on (seed, indices[b]) alone."""
    rows = [torch.rand(shape, generator=generator_of(seed, int(index))) for index in indices]
    return torch.stack(rows)
