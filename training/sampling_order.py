"""Deterministic sample order and random numbers, independent of interruptions and processes.

Sample i of step s has the number s * batch + i, and its random numbers depend on (seed, number)
alone. So a resumed run, and a run on several processes, see the same data and the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from scfeat_ros.errors import ScfeatError
from scfeat_training.datasets import ImageCache


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
    """A dataset as the training loop reads it, in the main process or in data workers.

    Samples have in addition index, the sample's number, and left_out, lines about files that were
    found to be bad since the previous sample. A ScfeatError is returned instead of raised, as the
    DataLoader would replace it by the text of a traceback.

    Args:
        pairs: of a stage.
        images: the pairs' source of images.
    """

    def __init__(self, pairs: Dataset, images: ImageCache) -> None:
        self.pairs = pairs
        self.images = images
        self._told = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any] | ScfeatError:
        try:
            sample = self.pairs[index]
        except ScfeatError as error:
            return error
        lines = list(self.images.bad.values())[self._told :]
        self._told += len(lines)
        return {**sample, "index": index, "left_out": "\n".join(lines)}


def collate(samples: list[dict[str, Any] | ScfeatError]) -> dict[str, Any] | ScfeatError:
    """A batch of the samples of `Numbered`, or the first error among them."""
    errors = [sample for sample in samples if isinstance(sample, ScfeatError)]
    return errors[0] if errors else default_collate(samples)


def generator_of(seed: int, index: int) -> torch.Generator:
    """A CPU generator that depends on (seed, index) alone."""
    generator = torch.Generator()
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63)
    return generator


def uniform(seed: int, indices: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, *shape) numbers uniform in [0, 1), row b depending on (seed, indices[b]) alone."""
    rows = [torch.rand(shape, generator=generator_of(seed, int(index))) for index in indices]
    return torch.stack(rows)
