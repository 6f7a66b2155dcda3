"""The training stages: data, trained parameters and loss of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from scfeat_ros.errors import InputError
from scfeat_ros.model.descriptors import Maps
from scfeat_ros.model.scfeat import SCFeat, SCFeatConfig
from scfeat_ros.sources import list_images
from scfeat_training.adaptation import divergence, seen_from
from scfeat_training.config import TrainConfig, options_of
from scfeat_training.correspondences import CorrespondencePairs, GeometryPairs, MixedPairs
from scfeat_training.datasets import (
    HomographyPairs,
    HomographyPairsConfig,
    ImageCache,
    PosedPairs,
    PosedPairsConfig,
)
from scfeat_training.descriptor_loss import (
    DescriptorOptions,
    View,
    descriptor_loss,
    query_count,
)
from scfeat_training.distillation import Distill, DistillationOptions, start_from, unexplained
from scfeat_training.keypoint_policy import (
    PolicyOptions,
    draw_keypoints,
    epipolar_errors,
    fundamental_matrix_error,
    homography_errors,
    keypoint_loss,
    match_probability,
    mutual_nearest,
    noise_count,
    pair_reward,
)
from scfeat_training.networks import load_network, load_weights
from scfeat_training.photometric import Photometric
from scfeat_training.pictures import pictures_of
from scfeat_training.sampling_order import generator_of, uniform
from scfeat_training.scenes import Scene, photo_paths
from scfeat_training.synthetic import SyntheticPairs, SyntheticPairsConfig, WithSynthetic
from scfeat_training.warmup_loss import WarmupOptions, warmup_loss

POINTS = 1024
"""Corresponding points a pair, of which up to a half come from sparse 3D points."""

Batch = dict[str, Any]
Terms = dict[str, torch.Tensor]


class Stage:
    """Base of the stages.

    Attributes:
        network: the forward pass of this stage as one module, which DistributedDataParallel and
            torch.compile can wrap.
        detects: whether the network has a trained detector, and descriptors that match the
            projection; otherwise it is validated at corners.
        needs_earlier: whether an earlier network is required.
    """

    network: nn.Module
    detects: bool = False
    needs_earlier: bool = False

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        self.config = config
        self.model = model

    def start(self, earlier: SCFeat, where: str) -> None:
        """Initialize with the weights of an earlier network, read from `where`.

        Raises:
            InputError: it has another architecture.
        """
        weights = earlier.state_dict()
        if not self.config.cross_norm:  # an ablation may start from a network that has the bridge
            weights = {k: v for k, v in weights.items() if not k.startswith("bridge.")}
        model = self.model
        load_weights(model, weights, where)
        # what was fitted to the earlier network does not fit after this stage
        model.detector.reliability = model.detector.reliability.unfitted()
        if not self.detects:
            model.projection = model.projection.unfitted()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters with their peak learning rate; all others are frozen here."""
        raise NotImplementedError

    def dataset(
        self, scenes: Sequence[Scene], skip_bad: bool, images: ImageCache | None = None
    ) -> Dataset:
        """Pairs of the training scenes; `images` is their common cache."""
        raise NotImplementedError

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        """Loss (B,) of each pair, and mean terms for the log.

        Args:
            network: the attribute `network`, possibly wrapped.
            batch: samples of `dataset`.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs in addition to the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def pictures(self, model: SCFeat, batch: Batch) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) uint8 for TensorBoard of the batch's first pair of each kind."""
        pictures = {}
        for planar in (True, False):
            of_kind = (batch["planar"].bool() == planar).nonzero()[:, 0].tolist()
            if of_kind:
                i = of_kind[0]
                pair = batch["image1"][i], batch["image2"][i], batch["geometry"][i]
                found = pictures_of(model, *pair, planar, self.detects)
                kind = "planar" if planar else "posed"
                pictures |= {f"{kind}/{name}": picture for name, picture in found.items()}
        return pictures


def images_of(batch: Batch) -> torch.Tensor:
    """Both images of every pair, (2 B, 3, H, W) in [0, 1]: first all image1, then all image2."""
    images = torch.cat([batch["image1"], batch["image2"]]).float().div(255)
    return images.contiguous(memory_format=torch.channels_last)


class Describe(nn.Module):
    """Images -> D_desc and F_cn."""

    def __init__(self, model: SCFeat) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        description = self.model.describe(images)
        return description.descriptors, description.bridged


def description_groups(config: TrainConfig, model: SCFeat) -> list[dict[str, Any]]:
    """Train backbone and bridge, freeze the detector; the encoder has its own learning rate."""
    model.requires_grad_(False)
    encoder = model.backbone.encoder
    for part in (model.backbone, model.bridge):
        part.requires_grad_(True)
    for name in config.frozen:
        if name not in ("stem", "layer1", "layer2", "layer3"):
            raise InputError(f"frozen: '{name}' is none of stem, layer1, layer2, layer3")
        parts = (encoder.conv1, encoder.bn1) if name == "stem" else (getattr(encoder, name),)
        for part in parts:
            part.requires_grad_(False)
    in_encoder = {id(p) for p in encoder.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in in_encoder], "peak": config.lr_encoder},
        {"params": [p for p in trained if id(p) not in in_encoder], "peak": config.lr},
    ]


def detector_groups(config: TrainConfig, model: SCFeat) -> list[dict[str, Any]]:
    """Train the detector, freeze everything else."""
    model.requires_grad_(False)
    model.detector.requires_grad_(True)
    return [{"params": list(model.detector.parameters()), "peak": config.lr}]


def size_of(config: TrainConfig) -> tuple[int, int]:
    return int(config.size[0]), int(config.size[1])


def common_options(config: TrainConfig) -> dict[str, Any]:
    """Options common to all kinds of pairs; the section of a kind may override them."""
    photometric = options_of(Photometric(), config.photometric, "photometric")
    return {"size": list(config.size), "seed": config.seed, "photometric": photometric}


def posed_pairs(
    config: TrainConfig,
    scenes: Sequence[Scene],
    skip_bad: bool,
    tracks: int = 0,
    images: ImageCache | None = None,
) -> PosedPairs | WithSynthetic:
    """Pairs of posed scenes and of synthetic ones as the configuration says."""
    common = {**common_options(config), "tracks": tracks}
    options = options_of(PosedPairsConfig(), {**common, **config.posed}, "posed")
    posed = PosedPairs(scenes, options, images, skip_bad)
    if not config.synthetic_share:
        return posed
    options = options_of(SyntheticPairsConfig(), {**common, **config.synthetic}, "synthetic")
    photos = photo_paths(scenes)
    synthetic = SyntheticPairs(options, photos, images=posed.images, skip_bad=skip_bad)
    return WithSynthetic(posed, synthetic, config.synthetic_share)


def homography_pairs(
    config: TrainConfig,
    scenes: Sequence[Scene],
    skip_bad: bool,
    images: ImageCache | None = None,
) -> HomographyPairs:
    """Pairs of views of single photos as the configuration says."""
    values = {**common_options(config), **config.homography}
    options = options_of(HomographyPairsConfig(), values, "homography")
    photos = photo_paths(scenes)
    for folder in config.photos:
        photos += list_images(Path(folder), recursive=True)
    return HomographyPairs(photos, options, images, skip_bad)


def correspondence_pairs(
    config: TrainConfig,
    scenes: Sequence[Scene],
    posed_scenes: Sequence[Scene],
    skip_bad: bool,
    images: ImageCache | None,
) -> Dataset:
    """Homographies of the photos of `scenes`, and `posed_share` of pairs of `posed_scenes`."""
    homographies = homography_pairs(config, scenes, skip_bad, images)
    pairs = CorrespondencePairs(homographies, POINTS)
    if not config.posed_share:
        return pairs
    posed = posed_pairs(config, posed_scenes, skip_bad, POINTS // 2, homographies.images)
    return MixedPairs(pairs, CorrespondencePairs(posed, POINTS), config.posed_share)


class WarmupStage(Stage):
    """Stage 0: descriptors before and after the bridge, from known correspondences."""

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        self.options = options_of(WarmupOptions(), config.loss, "loss")
        self.network = Describe(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = description_groups(self.config, self.model)
        if not self.options.bridged_weight:  # DistributedDataParallel waits for every gradient
            self.model.bridge.requires_grad_(False)
        return groups

    def dataset(
        self, scenes: Sequence[Scene], skip_bad: bool, images: ImageCache | None = None
    ) -> Dataset:
        tracked = [scene for scene in scenes if scene.tracks is not None]
        if self.config.posed_share and not tracked:
            raise InputError(
                "config: posed_share wants sparse 3D points in stage warmup, and no scene has any; "
                "set posed_share: 0, or give COLMAP models or points.npz"
            )
        return correspondence_pairs(self.config, scenes, tracked, skip_bad, images)

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        before, after = network(images_of(batch))
        points1, points2, valid = batch["points1"], batch["points2"], batch["valid"]
        noise = uniform(self.config.seed, batch["index"], (points1.shape[1], 4)).to(points1)
        options = self.options
        known = points1, points2, valid, noise
        total, parts = warmup_loss(*before.float().chunk(2), *known, options)
        terms = {f"backbone/{key}": value for key, value in parts.items()}
        if options.bridged_weight:
            some = [x[:, : options.bridged_points] for x in known]
            loss, parts = warmup_loss(*after.float().chunk(2), *some, options)
            total = total + options.bridged_weight * loss
            terms |= {f"bridged/{key}": value for key, value in parts.items()}
        return total, terms


class DescriptorStage(Stage):
    """Stage 1: the epipolar loss on F_cn, from camera poses alone.

    With `contrast_weight` the warm-up's loss is added where correspondences are known; then
    1 - `posed_share` of the pairs are homographies, which have no epipolar loss.
    """

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        self.options = options_of(DescriptorOptions(), config.loss, "loss")
        if self.options.contrast_weight == 0 and config.posed_share != 1:
            raise InputError("config: without contrast_weight, posed_share must be 1 in stage 1")
        if not query_count(size_of(config), self.options.cell):
            raise InputError(
                f"config: section 'loss': a cell of {self.options.cell} does not fit into the "
                f"size {config.size}"
            )
        self.contrast = WarmupOptions()
        self.network = Describe(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return description_groups(self.config, self.model)

    def dataset(
        self, scenes: Sequence[Scene], skip_bad: bool, images: ImageCache | None = None
    ) -> Dataset:
        if self.options.contrast_weight == 0:
            return GeometryPairs(posed_pairs(self.config, scenes, skip_bad, images=images))
        return correspondence_pairs(self.config, scenes, scenes, skip_bad, images)

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        before, after = network(images_of(batch))
        map1, map2 = after.float().chunk(2)
        seed, indices = self.config.seed, batch["index"]
        count = query_count(size_of(self.config), self.options.cell)
        cameras = (
            View(batch["K1"], batch["depth_range1"]),
            View(batch["K2"], batch["depth_range2"]),
            batch["R"],
            batch["t"],
        )
        noise = uniform(seed, indices, (count, 8)).to(map1)
        epipolar, used = descriptor_loss(
            map1, map2, batch["geometry"], noise, self.options, cameras
        )
        posed = ~batch["planar"]
        # a homography is no fundamental matrix: where() also keeps its values out of the gradient
        total = torch.where(posed, epipolar, torch.zeros_like(epipolar))
        terms = {}
        if posed.any():  # else there is nothing that a 0 would stand for
            terms = {"epipolar": total.detach()[posed].mean(), "queries_used": used[posed].mean()}
        if self.options.contrast_weight:
            points1, points2, valid = batch["points1"], batch["points2"], batch["valid"]
            noise = uniform(seed + 1, indices, (points1.shape[1], 4)).to(points1)
            maps = before.float().chunk(2)
            loss, parts = warmup_loss(*maps, points1, points2, valid, noise, self.contrast)
            total = total + self.options.contrast_weight * loss
            terms |= {f"backbone/{key}": value for key, value in parts.items()}
        return total, terms


class Detect(nn.Module):
    """Images -> score map, and the maps of descriptors; only the detector is differentiated."""

    def __init__(self, model: SCFeat) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        with torch.no_grad():
            description = self.model.describe(images)
        return self.model.detect(images, description), description.maps


class DetectorStage(Stage):
    """Stage 2: the detector by policy gradient; backbone and bridge are frozen.

    `posed_share` of the pairs have the paper's epipolar reward; the others are homographies, where
    the distance to the true position replaces the distance to the epipolar line.
    """

    detects = True

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        self.options = options_of(PolicyOptions(), config.loss, "loss")
        width, height = size_of(config)
        if width % self.options.cell or height % self.options.cell:
            raise InputError(f"config: size {config.size} is not a multiple of cell")
        self.network = Detect(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return detector_groups(self.config, self.model)

    def dataset(
        self, scenes: Sequence[Scene], skip_bad: bool, images: ImageCache | None = None
    ) -> Dataset:
        images = images or ImageCache()
        share = self.config.posed_share
        if share == 1:
            return GeometryPairs(posed_pairs(self.config, scenes, skip_bad, images=images))
        homographies = GeometryPairs(homography_pairs(self.config, scenes, skip_bad, images))
        if not share:
            return homographies
        posed = GeometryPairs(posed_pairs(self.config, scenes, skip_bad, images=images))
        return MixedPairs(homographies, posed, share)

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        scores, maps = network(images_of(batch))
        pairs = len(batch["index"])
        scores, maps = scores[:, 0].float(), [m.float() for m in maps]
        rows = []
        for i, index in enumerate(batch["index"].tolist()):
            generator = generator_of(self.config.seed, index)
            draws = [
                self._draw(
                    (scores[i], scores[pairs + i]),
                    tuple(Maps(*(m[k] for m in maps)) for k in (i, pairs + i)),
                    batch["geometry"][i],
                    bool(batch["planar"][i]),
                    index // self.config.batch,
                    generator,
                )
                for _ in range(self.options.draws)
            ]
            loss = torch.stack([loss for loss, _ in draws]).mean()
            means = {k: sum(f[k] for _, f in draws) / len(draws) for k in draws[0][1]}
            rows.append((loss, means))
        losses = torch.stack([loss for loss, _ in rows])
        terms = {}
        for key in sorted({key for _, found in rows for key in found}):
            values = [found[key] for _, found in rows if key in found]
            terms[key] = torch.tensor(sum(values) / len(values))
        return losses, terms

    def _draw(
        self,
        scores: tuple[torch.Tensor, torch.Tensor],
        maps: tuple[Maps, Maps],
        geometry: torch.Tensor,
        planar: bool,
        step: int,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of keypoints sampled from both images, and figures for the log."""
        options = self.options
        height, width = scores[0].shape
        drawn, descriptors = [], []
        for score_map, maps_of_image in zip(scores, maps, strict=True):
            noise = torch.rand(noise_count(height, width, options.cell), generator=generator)
            keypoints = draw_keypoints(
                score_map, options.cell, noise.to(score_map), options.sharpness
            )
            drawn.append(keypoints)
            found = self.model.projection(maps_of_image, keypoints.points)
            descriptors.append(F.normalize(found, dim=1))
        first, second = drawn
        with torch.no_grad():
            probability = match_probability(*descriptors, options.temperature)
            measure = homography_errors if planar else epipolar_errors
            errors = measure(geometry, first.points, second.points)
            matches = errors < options.threshold
            chosen = mutual_nearest(probability)
            error = torch.zeros((), dtype=torch.float64)
            if options.fundamental_reward and not planar:
                at1, at2 = (chosen & matches).nonzero(as_tuple=True)
                error = fundamental_matrix_error(
                    first.points[at1],
                    second.points[at2],
                    geometry,
                    (width, height),
                    options.resamples,
                    generator,
                )
            reward = pair_reward(errors.to(probability), error, options, step)
        loss = keypoint_loss(first, second, probability, reward, error, options, step)
        count = len(first.points) + len(second.points)
        figures = {
            "keypoints": count / 2,
            "expected_reward": float((probability * reward).sum()),
            f"precision/{'planar' if planar else 'posed'}": float(
                (chosen & matches).sum() / chosen.sum().clamp_min(1)
            ),
        }
        if not planar:
            figures["fundamental_error"] = float(error)
        return loss, figures


class HomographyStage(Stage):
    """Base of the stages that need homographies of single photos only, and no poses."""

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        if config.posed_share:
            raise InputError(
                f"config: stage {config.stage} takes homographies alone; no posed_share"
            )

    def dataset(
        self, scenes: Sequence[Scene], skip_bad: bool, images: ImageCache | None = None
    ) -> Dataset:
        return GeometryPairs(homography_pairs(self.config, scenes, skip_bad, images))


def _beside(model: SCFeat, teacher: SCFeat) -> SCFeat:
    """A teacher on the device and in the memory format of the network that learns from it."""
    return teacher.to(model.mean.device, memory_format=torch.channels_last)


class DetectTwice(nn.Module):
    """Images -> score maps of the detector, which is trained, and of the one that it learns from.

    Args:
        model: the network.
        teacher: another network to learn from; None for the detector's initial state.
    """

    def __init__(self, model: SCFeat, teacher: SCFeat | None = None) -> None:
        super().__init__()
        self.model = model
        learned_from = copy.deepcopy(model.detector) if teacher is None else teacher
        self.learned_from = learned_from.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            description = self.model.describe(images)
            maps = self.model.normalize(images), description.bridged, description.encoded.stem
            if isinstance(self.learned_from, SCFeat):
                target = self.learned_from(images).scores
            else:
                target = self.learned_from(*maps)
        return self.model.detector(*maps), target


class AdaptationStage(HomographyStage):
    """Stage 3: the detector, by its scores in other views; backbone and bridge are frozen.

    With `teacher` it learns the scores of another network instead.
    """

    detects = True

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        if config.loss:
            raise InputError("config: stage adaptation has no section 'loss'; take it out")
        teacher = None
        if config.teacher:
            teacher = _beside(model, load_network(config.teacher)[0])
        self.network = DetectTwice(model, teacher)

    def start(self, earlier: SCFeat, where: str) -> None:
        super().start(earlier, where)
        learned_from = self.network.learned_from
        if isinstance(learned_from, SCFeat):
            # How peaked and how large scores are depends on this scale and shift above all, and
            # from their initial values Adam would need thousands of steps.
            norm = learned_from.detector.layer2_norm
            self.model.detector.layer2_norm.load_state_dict(norm.state_dict())
        else:
            self.network = DetectTwice(self.model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return detector_groups(self.config, self.model)

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        scores, learned = (maps[:, 0].float() for maps in network(images_of(batch)))
        pairs = len(batch["index"])
        losses, counted = [], []
        for i, H in enumerate(batch["geometry"].double()):
            for own, other, warp in ((i, pairs + i, H), (pairs + i, i, torch.linalg.inv(H))):
                target, counts = seen_from(learned[other], warp)
                losses.append(divergence(scores[own], target, counts))
                counted.append(counts.float().mean())
        losses = torch.stack(losses).view(pairs, 2).mean(dim=1)
        return losses, {"counted": torch.stack(counted).mean()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.network.learned_from.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.network.learned_from.load_state_dict(state)


class DistillationStage(HomographyStage):
    """Distillation from an earlier network, the teacher.

    The detector is trained if `scores` is not 0.
    """

    detects = True
    needs_earlier = True

    def __init__(self, config: TrainConfig, model: SCFeat) -> None:
        super().__init__(config, model)
        self.options = options_of(DistillationOptions(), config.loss, "loss")

    def start(self, earlier: SCFeat, where: str) -> None:
        start_from(earlier, self.model)
        self._set_teacher(earlier)

    def _set_teacher(self, teacher: SCFeat) -> None:
        self.network = Distill(self.model, _beside(self.model, teacher), self.options.scores > 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = description_groups(self.config, self.model)
        if self.options.scores > 0:
            self.model.detector.requires_grad_(True)
            groups.append(
                {"params": list(self.model.detector.parameters()), "peak": self.config.lr}
            )
        return groups

    def losses(self, network: Callable, batch: Batch) -> tuple[torch.Tensor, Terms]:
        maps, target = network(images_of(batch))
        weights = {"bridged": 1.0, "scores": self.options.scores}
        total, terms = 0.0, {}
        for name in target:
            own, theirs = maps[name].float(), target[name].float()
            if name == "scores":
                both = zip(own[:, 0], theirs[:, 0], strict=True)
                loss = torch.stack([divergence(a, b) for a, b in both])
            else:
                loss = unexplained(own, theirs)
            total = total + weights.get(name, self.options.layers) * loss
            terms[name] = loss.detach().mean()
        return total.view(2, -1).mean(dim=0), terms

    def state_dict(self) -> dict[str, Any]:
        teacher = self.network.teacher
        return {"config": asdict(teacher.config), "weights": teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        teacher = SCFeat(SCFeatConfig(**state["config"]))
        teacher.load_state_dict(state["weights"])
        self._set_teacher(teacher)


STAGE_CLASSES: dict[str, type[Stage]] = {
    "warmup": WarmupStage,
    "descriptor": DescriptorStage,
    "detector": DetectorStage,
    "adaptation": AdaptationStage,
    "distillation": DistillationStage,
}
