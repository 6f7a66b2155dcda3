"""Images -> the network's input: shrunk, padded, on the device.

Like the selection of keypoints, this is implemented twice: for the CPU, and for a GPU, where the
upload is asynchronous and the device does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from scfeat_ros.model.scfeat import STRIDE


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """A (width, height) times a factor, in whole pixels, at least one."""
    width, height = size
    return max(1, round(width * factor)), max(1, round(height * factor))


def working_size(size: tuple[int, int], max_size: int) -> tuple[int, int]:
    """(width, height) shrunk to a longer side of at most `max_size`; 0 never shrinks."""
    if not max_size or max(size) <= max_size:
        return size
    return scaled(size, max_size / max(size))


def on_cpu(images: Sequence[np.ndarray], size: tuple[int, int]) -> torch.Tensor:
    """Shrink and pad images.

    Args:
        images: (H, W, 3) uint8, all of one size.
        size: (width, height) to shrink them to.

    Returns:
        (B, 3, H', W') uint8 in channels-last order, padded at right and bottom to multiples of
        the network's stride by replicating the border.
    """
    width, height = size
    if images[0].shape[1::-1] != size:
        images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in images]
    if width % STRIDE or height % STRIDE:
        padding = (0, -height % STRIDE, 0, -width % STRIDE)
        images = [cv2.copyMakeBorder(i, *padding, cv2.BORDER_REPLICATE) for i in images]
    # PyTorch warns of read-only arrays, such as those of Pillow and of messages
    batch = np.stack(images) if len(images) > 1 else np.require(images[0], None, "CW")[None]
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def on_device(
    images: Sequence[np.ndarray], size: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """As `on_cpu`, on a device: only the copy to it is done by the CPU."""
    shape = len(images), *images[0].shape
    batch = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    np.stack(images, out=batch.numpy())
    batch = batch.to(device, non_blocking=True).permute(0, 3, 1, 2)
    width, height = size
    if batch.shape[-2:] != (height, width):
        batch = shrink(batch, size)
    if width % STRIDE or height % STRIDE:
        rows = torch.arange(height + -height % STRIDE, device=device).clamp_max(height - 1)
        columns = torch.arange(width + -width % STRIDE, device=device).clamp_max(width - 1)
        batch = batch[:, :, rows[:, None], columns]
    return batch


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; to a GPU asynchronously, from pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shrink(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Area averaging, as OpenCV's INTER_AREA: (B, C, H, W) uint8 -> (width, height) `size`."""
    width, height = size
    rows = _area_weights(images.shape[2], height, images.device)
    columns = _area_weights(images.shape[3], width, images.device)
    return (rows @ images.float() @ columns.T).round().to(torch.uint8)


def _area_weights(old: int, new: int, device: torch.device) -> torch.Tensor:
    """(new, old) weight of every old pixel in the mean of every new one."""
    edges = torch.arange(new + 1, dtype=torch.float64, device=device) * old / new
    pixels = torch.arange(old, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp_min(0) * new / old).float()
