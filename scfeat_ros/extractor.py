"""Image -> Features: the network, the selection of keypoints, their descriptors (Sec. III-E)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scfeat_ros import preprocessing, pyramid, selection
from scfeat_ros.acceleration import Network, choose
from scfeat_ros.cuda_graphs import CudaGraphs
from scfeat_ros.errors import OptionError, ScfeatError
from scfeat_ros.features import Features
from scfeat_ros.model.descriptors import Maps, Projection
from scfeat_ros.model.sampling import sample_one
from scfeat_ros.model.scfeat import DESCRIPTOR_STRIDE, SCFeat, SCFeatOutput, load_model
from scfeat_ros.native import descriptors as native_descriptors
from scfeat_ros.native.awake import cores_awake
from scfeat_ros.onnx_export import OnnxSCFeat
from scfeat_ros.openmp import release_threads
from scfeat_ros.parameters import ExtractorOptions, validate
from scfeat_ros.selection import Selected

LOG = logging.getLogger(__name__)

FUSION_WEIGHTS = (1.0, 2.0, 3.0, 4.0)
"""k_1 ... k_4 of the paper's fusion normalization (Eq. 25)."""


def select_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is a working CUDA device if there is one, else the CPU.

    A CUDA device has a number: "cuda" means another one in a thread that has chosen another.

    Raises:
        ScfeatError: the device is unknown, not available or does not work.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return select_device("cuda")
        except ScfeatError as error:
            LOG.warning("%s. Running on the CPU instead", error)
            return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ScfeatError(f"device '{device}': unknown; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ScfeatError(f"device '{device}': only auto, cpu, cuda and cuda:N are possible")
    if not torch.cuda.is_available():
        raise ScfeatError(
            f"device '{device}' was asked for, but this PyTorch ({torch.__version__}) finds no "
            "CUDA device: use device 'cpu' or 'auto', or install a CUDA build of PyTorch"
        )
    count = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= count:
        raise ScfeatError(
            f"device '{device}' was asked for, but there are {count}: use cuda:0 to "
            f"cuda:{count - 1}, 'cpu' or 'auto'"
        )
    try:
        # a convolution, which takes cuDNN, too
        result = F.conv2d(*torch.ones(2, 1, 1, 3, 3, device=chosen))
        result.item()
    except (RuntimeError, AssertionError) as error:  # e.g. the GPU is too old for this PyTorch
        raise ScfeatError(
            f"device '{device}' does not work with this PyTorch ({torch.__version__}): "
            f"{str(error).splitlines()[0]}"
        ) from error
    return result.device


class _Found(NamedTuple):
    """Keypoints of one image with descriptors, on the network's device; see `Selected`."""

    points: torch.Tensor
    scores: torch.Tensor
    descriptors: torch.Tensor


@dataclass(frozen=True)
class _Finder:
    """Finds keypoints and descriptors in the network's output for one image; see `Maps`."""

    options: ExtractorOptions
    projection: Projection
    select: Callable[..., Selected]
    """`selection.on_cpu` or `selection.on_device`."""
    describe: Callable[..., torch.Tensor]
    """`Projection.forward`, or as it."""
    l2_normalize: Callable[[torch.Tensor], torch.Tensor]

    def __call__(
        self,
        scores: torch.Tensor,
        image: np.ndarray | torch.Tensor,
        bridged: torch.Tensor,
        layer2: torch.Tensor,
        layer3: torch.Tensor,
        mask: np.ndarray | torch.Tensor | None = None,
    ) -> _Found:
        """Scores, image and mask as for `select`; on a GPU without synchronization."""
        selected = self.select(scores, image, mask, self.options)
        return self._describe(selected, Maps(bridged, layer2, layer3))

    def _describe(self, selected: Selected, maps: Maps) -> _Found:
        points, scores = selected
        if self.options.descriptor_sampling == "bilinear":
            sampled = sample_one(maps.bridged, points, DESCRIPTOR_STRIDE)
        else:
            sampled = self.describe(self.projection, maps, points, self.options.descriptor_dim)
        normalize = self.l2_normalize if self.options.descriptor_norm == "l2" else fusion_normalize
        return _Found(points, scores, normalize(sampled))


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
        network: what runs in place of the model, see `acceleration.choose`.

    Raises:
        OptionError: an option outside its range.
        TypeError: an unknown option.
        ScfeatError: the device is not available.
    """

    def __init__(
        self, model: SCFeat | OnnxSCFeat, device: str | torch.device = "auto", **options: object
    ) -> None:
        self.options = ExtractorOptions(**options)
        validate(self.options)
        _check_descriptor_dim(self.options, model)
        if device == "auto" and isinstance(model, OnnxSCFeat):
            device = model.default_device
        self.device = select_device(device)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        _set_threads(self.options.threads)
        self.network = self._choose_network(self.options)
        self._find = self._choose_find()

    def __copy__(self) -> Extractor:
        """An extractor with options of its own, on the same network."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> tuple:
        """Deep copy and pickle by the constructor's arguments: the copy chooses its own network."""
        return partial(type(self), **asdict(self.options)), (self.model, self.device)

    def _choose_network(self, options: ExtractorOptions) -> Network:
        with torch.autocast(self.device.type, enabled=False):
            network = choose(self.model, self.device, options.precision, options.compile)
        release_threads()  # extraction may run on another thread
        LOG.info("the network runs in %s", network)
        return network

    def _choose_find(self) -> Callable[..., _Found]:
        """The function that finds keypoints and descriptors, for the current options."""
        projection = self.model.projection
        if not _fitted(self.options):
            projection = projection.unfitted()
        select, describe, normalize = selection.on_device, Projection.__call__, l2_normalize
        if self.device.type == "cpu":
            select = partial(selection.on_cpu, compiled=self.network.compiled)
        if self.network.compiled:
            describe, normalize = native_descriptors.describe, native_descriptors.l2_normalize
        elif self.network.in_triton:
            from scfeat_ros.model import triton_kernels

            select, describe = triton_kernels.select, triton_kernels.describe
        find = _Finder(self.options, projection, select, describe, normalize)
        return CudaGraphs(find) if self.network.graphed else find

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
        if not _fitted(self.options):
            return self.model.config.descriptor_dim
        return self.options.descriptor_dim or len(self.model.projection.matrix)

    def set_options(self, **changes: object) -> None:
        """Change options; the next image is processed with them.

        Raises:
            OptionError: a value outside its range; nothing is changed then.
        """
        options = replace(self.options, **changes)
        validate(options)
        _check_descriptor_dim(options, self.model)
        new, old = ((o.threads, o.precision, o.compile) for o in (options, self.options))
        if options.threads != self.options.threads:
            _set_threads(options.threads)
        if new != old:
            self.network = self._choose_network(options)
        self.options = options
        self._find = self._choose_find()

    def clear(self) -> None:
        """Free the memory that is kept for the image sizes seen so far."""
        self.network.clear()
        self._find = self._choose_find()

    def warm_up(self, size: tuple[int, int]) -> None:
        """Run once on noise of a (width, height), so that the first image is not delayed."""
        width, height = size
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        self(noise)

    def __call__(self, image: np.ndarray, mask: np.ndarray | None = None) -> Features:
        """Extract features from one image.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8 grey, of any size.
            mask: (H, W) bool or uint8; keypoints lie only where it is non-zero.

        Returns:
            Features in pixels of `image`; may be empty.

        Raises:
            ValueError: the image or the mask has another shape or dtype.
        """
        return self.extract_batch([image], None if mask is None else [mask])[0]

    def extract_batch(
        self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] | None = None
    ) -> list[Features]:
        """Extract features from several images of one size in one pass; see `__call__`."""
        images = [_check_image(image) for image in images]
        if not images:
            return []
        sizes = {image.shape[1::-1] for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of a batch must be of one size, got {sorted(sizes)}")
        masks = [None] * len(images) if masks is None else masks
        if len(masks) != len(images):
            raise ValueError(f"got {len(masks)} masks for {len(images)} images")
        off = torch.autocast(self.device.type, enabled=False)  # the network has its own precision
        with torch.inference_mode(), off, cores_awake(self.device):
            return self._extract(images, masks)

    def _extract(
        self, images: list[np.ndarray], masks: Sequence[np.ndarray | None]
    ) -> list[Features]:
        size = images[0].shape[1::-1]
        if min(size) == 0:
            return [Features.empty(self.descriptor_dim, size) for _ in images]
        largest = preprocessing.working_size(size, self.options.max_size)
        levels = [
            self._extract_at(images, masks, level)
            for level in pyramid.level_sizes(largest, self.options.levels)
        ]
        if len(levels) == 1:
            return levels[0]
        radius = round(self.options.nms_radius * size[0] / largest[0])
        count = self.options.max_keypoints
        return [pyramid.merge(found, count, radius) for found in zip(*levels, strict=True)]

    def _extract_at(
        self, images: list[np.ndarray], masks: Sequence[np.ndarray | None], new: tuple[int, int]
    ) -> list[Features]:
        """Features of images that are resized to the (width, height) `new`."""
        size = images[0].shape[1::-1]
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            tensor = preprocessing.on_cpu(images, new)
        else:
            tensor = preprocessing.on_device(images, new, self.device)
        output = self.network.run(tensor)
        width, height = new
        scores, pixels = output.scores[:, 0, :height, :width], tensor[:, :, :height, :width]
        features = []
        for i, mask in enumerate(masks):
            mask = _working_mask(mask, size, new)
            image = pixels[i]
            if on_cpu:
                image = image.permute(1, 2, 0).numpy()
            elif mask is not None:
                mask = preprocessing.upload(mask, self.device) != 0
            masked = [] if mask is None else [mask]
            found = self._find(scores[i], image, *self._maps(output, i), *masked)
            features.append(_on_host(found, size, new))
        return features

    def _maps(self, output: SCFeatOutput, i: int) -> Maps:
        """The maps from which descriptors of image `i` of the batch are made."""
        source = output.bridged
        if self.options.descriptor_source == "backbone":
            source = output.descriptors
        return Maps(source[i], output.layer2[i], output.layer3[i])


_threads_before: int | None = None
"""PyTorch's number of threads before an extractor changed it; None if none has."""


def _set_threads(threads: int) -> None:
    """Set PyTorch's number of threads; 0 restores the one from before extractors changed it.

    The number applies to the whole process: the latest extractor decides.
    """
    global _threads_before
    if threads:
        _threads_before = _threads_before or torch.get_num_threads()
        torch.set_num_threads(threads)
    elif _threads_before:
        torch.set_num_threads(_threads_before)
        _threads_before = None


def _fitted(options: ExtractorOptions) -> bool:
    """Whether descriptors are made by the fitted projection."""
    return (options.descriptor_source, options.descriptor_sampling) == ("bridge", "pooled")


def _check_descriptor_dim(options: ExtractorOptions, model: SCFeat | OnnxSCFeat) -> None:
    """Check that descriptors can have the length `descriptor_dim`.

    Raises:
        OptionError: they cannot.
    """
    dim = options.descriptor_dim
    if dim and not _fitted(options):
        raise OptionError(
            f"descriptor_dim {dim}: only descriptors of descriptor_source 'bridge' and "
            "descriptor_sampling 'pooled' can be shortened; use 0"
        )
    if dim > len(model.projection.matrix):
        raise OptionError(
            f"descriptor_dim {dim}: this network's descriptors have "
            f"{len(model.projection.matrix)} values; use 0 for all of them"
        )


def _on_host(found: _Found, size: tuple[int, int], working: tuple[int, int]) -> Features:
    """Features in host memory and in pixels of an image of `size` that was resized to `working`."""
    if found.points.device.type == "cpu":
        points, scores, descriptors = (part.numpy() for part in found)
    else:  # one copy to the host; rows without a keypoint are dropped
        rows = torch.cat([found.points, found.scores[:, None], found.descriptors], dim=1)
        rows = rows.cpu().numpy()
        rows = rows[np.isfinite(rows[:, 2])]
        parts = rows[:, :2], rows[:, 2], rows[:, 3:]
        points, scores, descriptors = (np.ascontiguousarray(part) for part in parts)
    # working pixel x covers [x - 0.5, x + 0.5]; the same holds in the original
    if size != working:
        factor = np.float32([size[0] / working[0], size[1] / working[1]])
        points = (points + np.float32(0.5)) * factor - np.float32(0.5)
    return Features(points, scores, descriptors, size)


def l2_normalize(descriptors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> unit L2 norm (Eq. 22)."""
    return F.normalize(descriptors, dim=1)


def fusion_normalize(descriptors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> weighted sum of the L1 to L4 normalized vectors (Eq. 25).

    The norms are taken over magnitudes: without them the paper's formula is no norm for odd p.
    Every term is a multiple of the same vector, so this changes a descriptor's length but not its
    direction: flat descriptors get shorter than peaked ones, and lose to them in a matcher that
    compares inner products.
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


def _working_mask(
    mask: np.ndarray | None, size: tuple[int, int], working: tuple[int, int]
) -> np.ndarray | None:
    """(h, w) uint8 of the `working` (width, height) from a mask of an image of `size`.

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
    mask = (mask != 0).astype(np.uint8)
    if size != working:
        mask = cv2.resize(mask, working, interpolation=cv2.INTER_NEAREST)
    return mask
