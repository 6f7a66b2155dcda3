"""Stage 2: the detector, by policy gradient on what its keypoints match (Sec. III-D 2).

Descriptors and bridge are frozen. The score map is a policy: a distribution from which keypoints
are sampled. Keypoints of two images are sampled and matched by the frozen descriptors, and every
possible match is rewarded if the two points fit the known geometry, and penalized if not. The
gradient of the expected reward raises the scores of places that match well and lowers the others.

Deviations, where the paper's text cannot be right:

- Algorithm 1 draws two independent sets of eight indices, which pairs points that do not
  correspond; one set is drawn here, and all sets of a call differ.
- A fundamental matrix has no scale: points are normalized, and unit-norm matrices of equal sign
  are compared (`geometry.eight_point`, `geometry.fundamental_error`).
- P_m marks all pairs that fit the epipolar lines, which also holds for many points on a line that
  do not correspond. Resamples are drawn from those among them that are each other's most
  probable match. (By `match_probability`, whose second softmax favours distinctive points: about a
  fifth of these pairs are not mutual nearest neighbours, by which features are matched later.)
- Eq. 20 prints the second term as -tanh(L) (-P_m); it is the penalty for pairs that are no match,
  -tanh(L) (not P_m). With good geometry it vanishes, and false matches would cost nothing; a lower
  bound is kept (`false_match`), as in DISK.
- Eq. 21 is called a loss but is an objective to be maximized: positive reward times a
  log-probability. `keypoint_loss` returns its negative. The regularization must penalize
  keypoints: lambda_reg is negative in the objective. This cost vanishes with the
  fundamental-matrix error, so a constant one is added, as in DISK.
- The sum of Eq. 21 runs over all pairs of points. Each pair is weighted by its match probability
  under the frozen descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scfeat_training.geometry import (
    eight_point,
    epipolar_lines,
    fundamental_error,
    homogeneous,
    transform_points,
)


@dataclass(frozen=True)
class PolicyOptions:
    """How keypoints are sampled and rewarded.

    Attributes:
        cell: side of the cells of which each may give one keypoint, pixels (g_k).
        draws: number of sets of keypoints sampled from the score maps of a pair; the mean of their
            losses has less variance.
        threshold: largest distance of a right match, pixels (epsilon of Eq. 18).
        temperature: factor on the cosine similarity in the match probability (an inverse
            temperature).
        resamples: n_iter of Algorithm 1.
        fundamental_reward: use the fundamental-matrix error in the reward (Eq. 20); False leaves
            1 for right and -false_match for wrong pairs (Table III).
        precision: share of a right match's reward that is lost, with the square of its error, at
            an error equal to the threshold; 0 rewards all right matches equally, as in the paper.
        false_match: smallest penalty of a wrong match.
        penalty_rise: steps over which the penalty of wrong matches and the cost of keypoints rise
            from 0. Keypoints of an untrained policy rarely match: penalized from the start, it
            would learn to sample none.
        sharpness: factor on the scores in the softmax over a cell.
        keypoint_cost: constant cost of each keypoint (DISK): places with a smaller expected reward
            are given up.
        regularization: -lambda_reg of Eq. 21: additional cost of a keypoint per
            fundamental-matrix error.
    """

    cell: int = 8
    draws: int = 1
    threshold: float = 2.0
    temperature: float = 60.0
    resamples: int = 100
    fundamental_reward: bool = True
    precision: float = 0.0
    false_match: float = 0.25
    penalty_rise: int = 300
    sharpness: float = 1.0
    keypoint_cost: float = 0.005
    regularization: float = 0.1


@dataclass
class Keypoints:
    """Keypoints drawn from one score map.

    points (N, 2): x, y in pixels, float. log_probability (N,): of drawing and accepting each,
    differentiable.
    """

    points: torch.Tensor
    log_probability: torch.Tensor


def noise_count(height: int, width: int, cell: int) -> int:
    """Uniform numbers that `draw_keypoints` takes for a map of that size."""
    return (height // cell) * (width // cell) * (cell * cell + 1)


def draw_keypoints(
    scores: torch.Tensor, cell: int, noise: torch.Tensor, sharpness: float = 1.0
) -> Keypoints:
    """Draw at most one keypoint from each cell.

    A pixel of the cell is drawn from the softmax over the cell's scores, then accepted with the
    probability 1 - exp(-score). (For a score softplus(z) that is the sigmoid of z, DISK's
    acceptance; peakiness multiplies the score and with it the rate.)

    Args:
        scores: (H, W) non-negative score map, H and W multiples of `cell`.
        cell: side of the cells, pixels.
        noise: (`noise_count`,) uniform in [0, 1).
        sharpness: factor on the scores in the softmax.
    """
    height, width = scores.shape
    rows, columns = height // cell, width // cell
    cells = scores.view(rows, cell, columns, cell).transpose(1, 2).reshape(rows * columns, -1)
    noise = noise.view(rows * columns, -1)
    log_place = F.log_softmax(sharpness * cells, dim=1)
    gumbel = -torch.log(-torch.log(noise[:, :-1].clamp(1e-12, 1 - 1e-7)))
    place = (log_place.detach() + gumbel).argmax(dim=1, keepdim=True)
    score = cells.gather(1, place)[:, 0].clamp_min(1e-6)
    log_accept = torch.log(-torch.expm1(-score))
    accepted = (noise[:, -1] < log_accept.detach().exp()).nonzero()[:, 0]
    place = place[accepted, 0]
    x = accepted % columns * cell + place % cell
    y = accepted // columns * cell + place // cell
    log_probability = log_place[accepted, place] + log_accept[accepted]
    return Keypoints(torch.stack([x, y], dim=1).to(scores.dtype), log_probability)


def match_probability(
    descriptors1: torch.Tensor, descriptors2: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(N, M) probability of a match: softmax over the rows times softmax over the columns.

    Args:
        descriptors1, descriptors2: (N, D) and (M, D) of unit norm.
        temperature: factor on the cosine similarity.
    """
    logits = temperature * descriptors1 @ descriptors2.T
    return torch.softmax(logits, dim=1) * torch.softmax(logits, dim=0)


def epipolar_errors(
    fundamental: torch.Tensor, points1: torch.Tensor, points2: torch.Tensor
) -> torch.Tensor:
    """(N, M) float64: the larger of the two distances to the other's epipolar line (Eq. 16-17).

    P_m of Eq. 18 is where this is below the threshold.

    Args:
        fundamental: (3, 3) with x2^T F x1 = 0.
        points1, points2: (N, 2) and (M, 2) pixels.
    """
    fundamental = fundamental.double()
    points1, points2 = points1.double(), points2.double()
    in_second = (epipolar_lines(fundamental, points1) @ homogeneous(points2).T).abs()
    in_first = (epipolar_lines(fundamental.T, points2) @ homogeneous(points1).T).abs()
    return torch.maximum(in_second, in_first.T)


def homography_errors(
    H: torch.Tensor, points1: torch.Tensor, points2: torch.Tensor
) -> torch.Tensor:
    """(N, M) float64: the larger of the two distances to the transferred point.

    The exact counterpart of `epipolar_errors` for pairs of views of one photo.

    Args:
        H: (3, 3), pixels of image 1 to pixels of image 2.
        points1, points2: (N, 2) and (M, 2) pixels.
    """
    H, points1, points2 = H.double(), points1.double(), points2.double()
    forward = torch.cdist(transform_points(H, points1), points2)
    back = torch.cdist(points1, transform_points(torch.linalg.inv(H), points2))
    return torch.maximum(forward, back)


def resample(count: int, resamples: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 8) different sets of eight different indices below `count`, n = `resamples` or fewer.

    Fewer only if there are hardly that many different sets.

    Raises:
        ValueError: `count` is below 8.
    """
    if count < 8:
        raise ValueError(f"cannot draw 8 of {count} matches")
    sets = torch.zeros(0, 8, dtype=torch.long)
    for _ in range(4):
        keys = torch.rand(resamples, count, generator=generator)
        drawn = keys.topk(8, dim=1).indices.sort(dim=1).values
        sets = torch.unique(torch.cat([sets, drawn]), dim=0)
        if len(sets) >= resamples:
            break
    order = torch.randperm(len(sets), generator=generator)[:resamples]
    return sets[order]


def fundamental_matrix_error(
    points1: torch.Tensor,
    points2: torch.Tensor,
    fundamental: torch.Tensor,
    size: tuple[int, int],
    resamples: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Algorithm 1: the smallest error of the matrices that resamples of the matches give.

    Args:
        points1, points2: (N, 2) matched points in pixels.
        fundamental: (3, 3) the true matrix, in pixels.
        size: (width, height) of both images.
        resamples: n_iter.
        generator: draws the resamples; on the CPU.

    Returns:
        A number in [0, 1]; 1 where there are fewer than eight matches.
    """
    if len(points1) < 8:
        return points1.new_ones((), dtype=torch.float64)
    width, height = size
    # pixels -> about [-1, 1]; x2^T F x1 = (T x2)^T (T^-T F T^-1) (T x1)
    scale = 2.0 / max(width, height)
    to_pixels = torch.tensor(
        [[1 / scale, 0, (width - 1) / 2], [0, 1 / scale, (height - 1) / 2], [0, 0, 1]],
        dtype=torch.float64,
        device=points1.device,
    )
    true = to_pixels.T @ fundamental.double() @ to_pixels
    middle = to_pixels[:2, 2]
    chosen = resample(len(points1), resamples, generator).to(points1.device)
    estimated = eight_point(
        (points1.double()[chosen] - middle) * scale, (points2.double()[chosen] - middle) * scale
    )
    return fundamental_error(estimated, true).min()


def mutual_nearest(similarity: torch.Tensor) -> torch.Tensor:
    """(N, M) bool: entries that are the largest of their row and of their column."""
    if not similarity.numel():  # of one of the images no keypoint was drawn
        return similarity > 0
    rows = similarity == similarity.amax(dim=1, keepdim=True)
    return rows & (similarity == similarity.amax(dim=0, keepdim=True))


def rise(options: PolicyOptions, step: int | None) -> float:
    """Share of penalty and cost that applies at a training step; 1 for None."""
    return 1.0 if step is None else min(1.0, step / max(1, options.penalty_rise))


def pair_reward(
    errors: torch.Tensor, error: torch.Tensor, options: PolicyOptions, step: int | None = None
) -> torch.Tensor:
    """r (N, M) of Eq. 20 from the pairs' errors in pixels and the fundamental-matrix error.

    `step` is the number of the training step, for the rise of the penalty; None for its end.
    """
    if not options.fundamental_reward:
        right, wrong = 1.0, options.false_match
    else:
        penalty = float(torch.tanh(error))
        right, wrong = 1.0 - penalty, max(penalty, options.false_match)
    distance = errors / options.threshold
    right = right * (1 - options.precision * distance.square())
    return torch.where(distance < 1, right, -rise(options, step) * wrong)


def keypoint_loss(
    first: Keypoints,
    second: Keypoints,
    probability: torch.Tensor,
    reward: torch.Tensor,
    error: torch.Tensor,
    options: PolicyOptions,
    step: int | None = None,
) -> torch.Tensor:
    """L_kp: the negative objective of Eq. 21, for one pair of images.

    Args:
        first, second: N and M drawn keypoints.
        probability: (N, M) match probability, detached.
        reward: (N, M), detached.
        error: the fundamental-matrix error, detached.
        options: cost and regularization.
        step: see `rise`.

    Returns:
        A scalar whose gradient is minus the policy gradient.
    """
    count = len(first.points) + len(second.points)
    if count == 0:
        return first.log_probability.sum() + second.log_probability.sum()
    expected = probability * reward
    cost = options.keypoint_cost * rise(options, step)
    if options.fundamental_reward:
        cost = cost + options.regularization * float(error)
    objective = (first.log_probability * (expected.sum(1) - cost)).sum() + (
        second.log_probability * (expected.sum(0) - cost)
    ).sum()
    return -objective / count
