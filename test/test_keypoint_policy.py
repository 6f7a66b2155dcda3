"""The policy gradient of stage 2."""

import math

import pytest
import torch

from scfeat_training.geometry import fundamental_from_pose, symmetric_epipolar_distance
from scfeat_training.keypoint_policy import (
    Keypoints,
    PolicyOptions,
    draw_keypoints,
    epipolar_errors,
    homography_errors,
    keypoint_loss,
    match_probability,
    mutual_nearest,
    noise_count,
    pair_reward,
)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_at_most_one_keypoint_a_cell_and_inside_it():
    scores = torch.full((32, 48), 5.0)
    drawn = draw_keypoints(scores, 8, uniform(noise_count(32, 48, 8)))
    cells = {(int(x) // 8, int(y) // 8) for x, y in drawn.points}
    assert len(cells) == len(drawn.points) == 24
    assert (drawn.points >= 0).all()
    assert (drawn.points[:, 0] < 48).all() and (drawn.points[:, 1] < 32).all()


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_log_probability_is_softmax_in_the_cell_times_acceptance(sharpness):
    scores = 3 * uniform(16, 16, seed=1)
    drawn = draw_keypoints(scores, 8, uniform(noise_count(16, 16, 8), seed=2), sharpness)
    assert len(drawn.points) > 0
    for (x, y), log_probability in zip(
        drawn.points.long().tolist(), drawn.log_probability, strict=True
    ):
        top, left = y // 8 * 8, x // 8 * 8
        cell = sharpness * scores[top : top + 8, left : left + 8]
        place = (sharpness * scores[y, x]).exp() / cell.exp().sum()
        accept = 1 - torch.exp(-scores[y, x])
        assert float(log_probability) == pytest.approx(math.log(place * accept), abs=1e-4)


def test_draws_follow_the_probabilities():
    scores = torch.zeros(8, 8)
    scores[2, 5] = 4.0
    share = scores.exp() / scores.exp().sum()
    accept = 1 - math.exp(-4.0)
    hits = 0
    for seed in range(2000):
        drawn = draw_keypoints(scores, 8, uniform(65, seed=seed))
        hits += drawn.points.tolist() == [[5.0, 2.0]]
    assert hits / 2000 == pytest.approx(float(share[2, 5]) * accept, abs=0.03)


def test_match_probability_prefers_the_true_partner():
    descriptors = torch.eye(5)
    probability = match_probability(descriptors, descriptors[[2, 0, 1, 4, 3]], 60.0)
    assert probability.argmax(1).tolist() == [1, 2, 0, 4, 3]
    assert torch.allclose(probability.amax(1), torch.ones(5), atol=1e-6)


def test_epipolar_matches_need_both_directions():
    """Sideways motion: lines are rows, so two points match if their rows differ by less."""
    K = torch.tensor([[200.0, 0, 100], [0, 200, 80], [0, 0, 1]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    F = fundamental_from_pose(K, K, eye, torch.tensor([1.0, 0, 0], dtype=torch.float64))
    first = torch.tensor([[10.0, 20.0], [50.0, 60.0]])
    second = torch.tensor([[90.0, 21.5], [3.0, 60.0], [3.0, 63.0]])
    found = epipolar_errors(F, first, second)
    assert found[0, 0] == pytest.approx(1.5) and found[1, 2] == pytest.approx(3.0)
    assert (found < 2.0).tolist() == [[True, False, False], [False, True, False]]


def test_epipolar_errors_are_those_of_every_pair_in_both_images():
    F = torch.tensor([[0.1, -0.5, 20.0], [0.7, 0.2, -90.0], [-30.0, 80.0, 500.0]])
    first, second = 100 * uniform(3, 2, seed=1), 100 * uniform(4, 2, seed=2)
    found = epipolar_errors(F, first, second)
    assert found.shape == (3, 4)
    for row, one in zip(found, first.double(), strict=True):
        points = one.expand(4, 2)
        expected = symmetric_epipolar_distance(F.double(), points, second.double())
        torch.testing.assert_close(row, expected)


def test_homography_matches():
    H = torch.tensor([[2.0, 0, 3.0], [0, 2.0, -1.0], [0, 0, 1.0]])
    first = torch.tensor([[10.0, 20.0], [30.0, 5.0]])
    second = torch.tensor([[63.0, 9.0], [23.0, 39.5], [23.0, 42.0]])
    # the third is 3 px away in the second image but 1.5 px in the first: both must be near
    assert (homography_errors(H, first, second) < 2.0).tolist() == [
        [False, True, False],
        [True, False, False],
    ]


def test_mutual_nearest():
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 0.7]])
    assert mutual_nearest(similarity).tolist() == [[True, False], [False, False], [False, True]]
    for shape in ((0, 2), (3, 0), (0, 0)):
        assert mutual_nearest(torch.zeros(shape)).shape == shape


def test_reward_pays_matches_and_fines_the_others():
    errors = torch.tensor([[1.0, 30.0]])
    options = PolicyOptions(false_match=0.25)
    good = pair_reward(errors, torch.tensor(0.0), options)
    bad = pair_reward(errors, torch.tensor(0.8), options)
    assert good.tolist() == [[1.0, -0.25]]
    assert bad[0, 0] == pytest.approx(1 - math.tanh(0.8))
    assert bad[0, 1] == pytest.approx(-math.tanh(0.8))
    plain = pair_reward(errors, torch.tensor(0.8), PolicyOptions(fundamental_reward=False))
    assert plain.tolist() == [[1.0, -0.25]]
    exact = PolicyOptions(false_match=0.25, precision=0.8, threshold=2.0)
    assert pair_reward(errors, torch.tensor(0.0), exact)[0, 0] == pytest.approx(1 - 0.8 / 4)


def test_penalty_rises_from_nothing():
    errors = torch.tensor([[1.0, 30.0]])
    options = PolicyOptions(false_match=0.2, penalty_rise=100)
    rewards = [pair_reward(errors, torch.tensor(0.0), options, step) for step in (0, 50, 500)]
    assert [r[0, 1].item() for r in rewards] == pytest.approx([0.0, -0.1, -0.2])
    assert [r[0, 0].item() for r in rewards] == [1.0, 1.0, 1.0]


def test_loss_is_the_negative_objective_of_eq_21():
    first = Keypoints(torch.zeros(2, 2), torch.tensor([-1.0, -2.0], requires_grad=True))
    second = Keypoints(torch.zeros(1, 2), torch.tensor([-3.0], requires_grad=True))
    probability = torch.tensor([[0.5], [0.25]])
    reward = torch.tensor([[1.0], [-0.2]])
    options = PolicyOptions(keypoint_cost=0.0, regularization=0.1)
    error = torch.tensor(0.3)
    loss = keypoint_loss(first, second, probability, reward, error, options)
    pairs = 0.5 * (-1.0 - 3.0) + 0.25 * -0.2 * (-2.0 - 3.0)
    objective = (pairs - 0.1 * 0.3 * (-1.0 - 2.0 - 3.0)) / 3
    assert loss.item() == pytest.approx(-objective)
    # a keypoint's cost rises with the steps, and is all of it without the fundamental matrix
    options = PolicyOptions(
        fundamental_reward=False, keypoint_cost=0.2, regularization=0.1, penalty_rise=100
    )
    for step, share in ((0, 0.0), (50, 0.5), (None, 1.0)):
        loss = keypoint_loss(first, second, probability, reward, error, options, step)
        objective = (pairs - share * 0.2 * (-1.0 - 2.0 - 3.0)) / 3
        assert loss.item() == pytest.approx(-objective)


def test_scores_rise_at_good_places_and_fall_at_bad_ones():
    """A toy pair under the identity: in every cell one pixel has a descriptor of its own.

    The descriptor is the same in both images there; everywhere else it is one common vector, so
    matches between other pixels are wrong.
    """
    torch.manual_seed(0)
    side, cell = 16, 8
    cells = (side // cell) ** 2
    descriptors = torch.zeros(side, side, cells + 1)
    descriptors[..., -1] = 1
    good = torch.zeros(side, side, dtype=torch.bool)
    for k in range(cells):
        y, x = k // 2 * cell + 3, k % 2 * cell + 5
        descriptors[y, x] = 0
        descriptors[y, x, k] = 1
        good[y, x] = True
    logits = torch.zeros(2, side, side, requires_grad=True)
    options = PolicyOptions(
        fundamental_reward=False, threshold=0.5, false_match=0.05, keypoint_cost=0.0
    )
    optimizer = torch.optim.Adam([logits], lr=0.1)
    identity = torch.eye(3)

    def scores():
        return torch.nn.functional.softplus(logits)

    before = scores().detach().clone()
    for step in range(150):
        drawn = [
            draw_keypoints(s, cell, uniform(noise_count(side, side, cell), seed=2 * step + k))
            for k, s in enumerate(scores())
        ]
        found = [descriptors[d.points[:, 1].long(), d.points[:, 0].long()] for d in drawn]
        probability = match_probability(*found, 60.0)
        errors = homography_errors(identity, drawn[0].points, drawn[1].points).float()
        reward = pair_reward(errors, torch.tensor(0.0), options)
        loss = keypoint_loss(*drawn, probability, reward, torch.tensor(0.0), options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = scores().detach()

    def log_probability(score_map):
        return torch.log_softmax(score_map, 1) + torch.log(-torch.expm1(-score_map))

    def of_cells(score_map):
        return score_map.view(2, 2, cell, 2, cell).transpose(2, 3).reshape(-1, cell * cell)

    rise = log_probability(of_cells(after)) - log_probability(of_cells(before))
    at_good = of_cells(good.expand(2, side, side))
    assert (rise[at_good] > 0.5).all()
    assert rise[~at_good].mean() < -0.5


def test_no_keypoints_give_a_loss_without_effect():
    scores = torch.zeros(16, 16, requires_grad=True)
    noise = torch.full((noise_count(16, 16, 8),), 0.999)
    drawn = draw_keypoints(scores, 8, noise)
    assert len(drawn.points) == 0
    empty = torch.zeros(0, 0)
    loss = keypoint_loss(drawn, drawn, empty, empty, torch.tensor(1.0), PolicyOptions())
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()
