"""Image -> Features: the network, then NMS, threshold, top-K, sub-pixel (Sec. III-E)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros.acceleration import Network, choose
from scfeat_ros.errors import ScfeatError
from scfeat_ros.features import Features
from scfeat_ros.model.sampling import sample_few
from scfeat_ros.model.scfeat import DESCRIPTOR_STRIDE, STRIDE, SCFeat, load_model
from scfeat_ros.onnx_export import OnnxSCFeat
from scfeat_ros.parameters import ExtractorOptions, validate

LOG = logging.getLogger(__name__)

FUSION_WEIGHTS = (1.0, 2.0, 3.0, 4.0)
"""k_1 ... k_4 of the paper's fusion normalization (Eq. 25)."""


def select_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ScfeatError: the device is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ScfeatError(f"device '{device}': unknown; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ScfeatError(
            f"device '{device}' was asked for, but this PyTorch ({torch.__version__}) finds no "
            "CUDA device: use device 'cpu' or 'auto', or install a CUDA build of PyTorch"
        )
    return chosen


class Extractor:
    """Extracts SCFeat local features from images.

    Example:
        >>> extractor = Extractor.from_pretrained("scfeat-s", max_keypoints=1000)
        >>> features = extractor(cv2.imread("image.jpg")[..., ::-1])

    Args:
        model: the network; it is moved to the device and set to evaluation mode.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        **options: fields of `parameters.ExtractorOptions`.

    Attributes:
        model, device, options: as given.
        network: what runs in the model's place, see `acceleration.choose`.

    Raises:
        ValueError: an option outside its range.
        TypeError: an unknown option.
        ScfeatError: the device is not there.
    """

    def __init__(
        self, model: SCFeat | OnnxSCFeat, device: str | torch.device = "auto", **options: object
    ) -> None:
        self.options = ExtractorOptions(**options)
        validate(self.options)
        self.device = select_device(device)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.network = self._choose_network(self.options)

    def _choose_network(self, options: ExtractorOptions) -> Network:
        network = choose(self.model, self.device, options.precision, options.compile)
        LOG.info("the network runs in %s", network)
        return network

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "scfeat-s",
        device: str | torch.device = "auto",
        **options: object,
    ) -> Extractor:
        """Load an installed model by name, a .safetensors file, or an exported .onnx file.

        Raises:
            ModelError: see `load_model` and `OnnxSCFeat`.
        """
        if os.fspath(name_or_path).endswith(".onnx"):
            return cls(OnnxSCFeat(name_or_path), device, **options)
        return cls(load_model(name_or_path), device, **options)

    @property
    def descriptor_dim(self) -> int:
        """Length of a descriptor."""
        return self.model.config.descriptor_dim

    def set_options(self, **changes: object) -> None:
        """Change options; the next image is processed with them.

        Raises:
            ValueError: a value outside its range; nothing is changed then.
        """
        options = replace(self.options, **changes)
        validate(options)
        if (options.precision, options.compile) != (self.options.precision, self.options.compile):
            self.network = self._choose_network(options)
        self.options = options

    def warm_up(self, size: tuple[int, int]) -> None:
        """Run once on noise of a (width, height), so that the first image does not wait."""
        width, height = size
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        self(noise)

    def __call__(self, image: np.ndarray, mask: np.ndarray | None = None) -> Features:
        """Extract features from one image.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8 grey, of any size.
            mask: (H, W) bool or uint8; keypoints lie only where it is non-zero.

        Returns:
            Features in pixels of `image`; empty where there is nothing to find.

        Raises:
            ValueError: the image or the mask has another shape or dtype.
        """
        return self.extract_batch([image], None if mask is None else [mask])[0]

    @torch.inference_mode()
    def extract_batch(
        self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] | None = None
    ) -> list[Features]:
        """Extract features from several images of one size in one pass; see `__call__`."""
        if not images:
            return []
        images = [_check_image(image) for image in images]
        sizes = {image.shape[1::-1] for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of a batch must be of one size, got {sorted(sizes)}")
        masks = masks or [None] * len(images)
        size = images[0].shape[1::-1]
        if min(size) == 0:
            return [Features.empty(self.descriptor_dim, size) for _ in images]
        working, scale = _resize(images, self.options.max_size)
        tensor = self._to_tensor(working)
        output = self.network.run(tensor)
        height, width = working[0].shape[:2]
        source = (
            output.descriptors if self.options.descriptor_source == "backbone" else output.bridged
        )
        return [
            self._select(
                output.scores[i : i + 1, :, :height, :width],
                source[i : i + 1],
                working[i],
                _check_mask(masks[i], size),
                size,
                scale,
            )
            for i in range(len(images))
        ]

    def _to_tensor(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(B, 3, H', W') uint8, padded at right and bottom to multiples of the stride."""
        height, width = images[0].shape[:2]
        if width % STRIDE or height % STRIDE:
            padding = (0, -height % STRIDE, 0, -width % STRIDE)
            images = [cv2.copyMakeBorder(i, *padding, cv2.BORDER_REPLICATE) for i in images]
        batch = np.stack(images) if len(images) > 1 else np.ascontiguousarray(images[0])[None]
        return torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)

    def _select(
        self,
        scores: torch.Tensor,
        descriptors: torch.Tensor,
        image: np.ndarray,
        mask: np.ndarray | None,
        size: tuple[int, int],
        scale: tuple[float, float],
    ) -> Features:
        """Score map (1, 1, h, w) and descriptor map of one working image -> Features."""
        options = self.options
        scores = scores.contiguous()
        places = is_local_maximum(scores, options.nms_radius).flatten().nonzero()[:, 0]
        values = scores.flatten()[places].float().cpu().numpy()
        places = places.cpu().numpy()
        keep = (values > options.score_threshold) & np.isfinite(values)
        keep &= _allowed(image, mask, options.border, places)
        places, values = places[keep], values[keep]
        if not len(values):
            return Features.empty(self.descriptor_dim, size)
        if len(values) > options.max_keypoints:
            # only what can be among the best is put in order
            least = len(values) - options.max_keypoints
            enough = values >= np.partition(values, least)[least]
            places, values = places[enough], values[enough]
        # stable, so that equal scores come in image order on every device
        order = np.argsort(-values, kind="stable")[: options.max_keypoints]
        best = torch.from_numpy(places[order]).to(self.device)
        rows, columns = best // scores.shape[-1], best % scores.shape[-1]
        points = torch.stack([columns, rows], dim=1).float()
        if options.subpixel:
            points += subpixel_offsets(scores[0, 0], rows, columns)
        sampled = sample_few(descriptors[0], points, DESCRIPTOR_STRIDE)
        normalize = l2_normalize if options.descriptor_norm == "l2" else fusion_normalize
        # working pixel x covers [x - 0.5, x + 0.5]; the same holds in the original
        factors = torch.tensor(scale, device=self.device)
        points = (points + 0.5) * factors - 0.5
        return Features(
            keypoints=points.cpu().numpy(),
            scores=values[order],
            descriptors=normalize(sampled).cpu().numpy(),
            image_size=size,
        )


def is_local_maximum(scores: torch.Tensor, radius: int) -> torch.Tensor:
    """Non-maximum suppression in a (2 * radius + 1)^2 window: (B, 1, H, W) scores -> bool.

    A pixel survives if none in its window is larger and at least one is smaller, so a plateau
    gives nothing. Radius 0 keeps all.
    """
    if radius == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    window = 2 * radius + 1
    if scores.device.type == "cpu":  # OpenCV's filters are many times faster than max_pool2d
        kernel = np.ones((window, window), np.uint8)
        found = np.empty(scores.shape, bool)
        for one, keep in zip(scores[:, 0].numpy(), found[:, 0], strict=True):
            np.equal(one, cv2.dilate(one, kernel), out=keep)
            keep &= one > cv2.erode(one, kernel)
        return torch.from_numpy(found)
    largest = F.max_pool2d(scores, window, stride=1, padding=radius)
    smallest = -F.max_pool2d(-scores, window, stride=1, padding=radius)
    return (scores == largest) & (scores > smallest)


def subpixel_offsets(
    scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """(N, 2) x, y offsets: the score-weighted mean position of each 3x3 neighbourhood.

    The neighbourhood's smallest score is subtracted first; else the weights of a flat
    neighbourhood would pull every keypoint to its pixel's centre.
    """
    height, width = scores.shape
    steps = torch.tensor([-1, 0, 1], device=scores.device)
    y = (rows[:, None, None] + steps[None, :, None]).clamp(0, height - 1)
    x = (columns[:, None, None] + steps[None, None, :]).clamp(0, width - 1)
    weights = scores[y, x].float()
    weights = weights - weights.amin(dim=(1, 2), keepdim=True)
    weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    offset_x = (weights * (x - columns[:, None, None])).sum(dim=(1, 2))
    offset_y = (weights * (y - rows[:, None, None])).sum(dim=(1, 2))
    return torch.stack([offset_x, offset_y], dim=1)


def l2_normalize(descriptors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> unit L2 norm (Eq. 22)."""
    return F.normalize(descriptors, dim=1)


def fusion_normalize(descriptors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> weighted sum of the L1 to L4 normalized vectors (Eq. 25).

    The norms are taken over magnitudes: the paper's formula without them is no norm for odd p.
    Every term is the same vector times a number, so this changes a descriptor's length and not
    its direction: flat descriptors come out shorter than peaked ones, and lose to them in a
    matcher that compares inner products.
    """
    total = sum(
        weight * F.normalize(descriptors, p=p, dim=1)
        for p, weight in enumerate(FUSION_WEIGHTS, start=1)
    )
    return total / sum(range(1, len(FUSION_WEIGHTS) + 1))


def _check_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 from a valid image.

    Raises:
        ValueError: see `Extractor.__call__`.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(f"image must be uint8, got {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be of shape (H, W, 3) or (H, W), got {image.shape}")
    return image


def _resize(
    images: Sequence[np.ndarray], max_size: int
) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Images shrunk to a longer side of at most `max_size`, and original / working size."""
    height, width = images[0].shape[:2]
    if not max_size or max(height, width) <= max_size:
        return list(images), (1.0, 1.0)
    factor = max_size / max(height, width)
    new = max(1, round(width * factor)), max(1, round(height * factor))
    resized = [cv2.resize(image, new, interpolation=cv2.INTER_AREA) for image in images]
    return resized, (width / new[0], height / new[1])


def _check_mask(mask: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) uint8 from a valid mask of an image of (width, height) `size`.

    Raises:
        ValueError: the mask has another size.
    """
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != (size[1], size[0]):
        raise ValueError(
            f"mask must be of the image's shape {(size[1], size[0])}, got {mask.shape}"
        )
    return (mask != 0).astype(np.uint8)


def _allowed(
    image: np.ndarray, mask: np.ndarray | None, border: int, places: np.ndarray
) -> np.ndarray:
    """(N,) bool: at which places (row * width + column) of a working image keypoints may lie.

    Not in the border, not where the mask (of the original image) is 0, and not where the 5x5
    neighbourhood has a single value: black or saturated areas have nothing to localize.
    """
    height, width = image.shape[:2]
    textured = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8))
    red, green, blue = textured.reshape(-1, 3)[places].T
    allowed = (red | green | blue) != 0
    if mask is not None:
        if mask.shape != (height, width):
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        allowed &= mask.reshape(-1)[places] != 0
    if border:
        rows, columns = np.divmod(places, width)
        allowed &= (rows >= border) & (rows < height - border)
        allowed &= (columns >= border) & (columns < width - border)
    return allowed
