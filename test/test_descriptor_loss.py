"""The losses of stages 0 and 1 against known geometry."""

import pytest
import torch
import torch.nn.functional as F

from scfeat_ros.model.sampling import sample
from scfeat_training.descriptor_loss import (
    DescriptorOptions,
    View,
    clip_lines,
    depth_interval,
    descriptor_loss,
    epipolar_loss,
    expected_place,
    query_count,
    query_points,
    search_line,
)
from scfeat_training.geometry import epipolar_lines, fundamental_from_pose
from scfeat_training.warmup_loss import WarmupOptions, contrastive_loss, place_loss

SIZE = (160, 128)
SHIFT = 5  # cells of 4 px: the second camera stands to the side, all points at one depth


@pytest.fixture
def stereo():
    """F_cn of a fronto-parallel scene seen by two cameras side by side, and the geometry."""
    generator = torch.Generator().manual_seed(0)
    width, height = SIZE[0] // 4, SIZE[1] // 4
    coarse = torch.randn(1, 64, height // 2, (width + SHIFT) // 2 + 1, generator=generator)
    wide = F.interpolate(coarse, scale_factor=2, mode="bicubic")[..., : width + SHIFT]
    map1, map2 = wide[..., :width], wide[..., SHIFT:]
    K = torch.tensor([[200.0, 0, 80], [0, 200, 64], [0, 0, 1]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    # x2 = x1 - 20 px at depth 10: focal length 200 times baseline 1 over depth
    t = torch.tensor([-1.0, 0, 0], dtype=torch.float64)
    fundamental = fundamental_from_pose(K, K, eye, t)[None]
    view = View(K[None].float(), torch.tensor([[5.0, 20.0]]))
    return map1, map2, fundamental, (view, view, eye[None].float(), t[None].float())


def cell_centres():
    """Queries at the centres of cells whose partner lies inside the second image."""
    x = torch.arange(SHIFT + 3, SIZE[0] // 4 - 3, 4) * 4 + 1.5
    y = torch.arange(4, SIZE[1] // 4 - 4, 4) * 4 + 1.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, -1, 2)


def lines_of(fundamental, points):
    return epipolar_lines(fundamental, points.double()).float()


def test_line_search_finds_the_true_match(stereo):
    map1, map2, fundamental, _ = stereo
    points = cell_centres()
    queries = F.normalize(sample(map1, points), dim=-1)
    ends, hit = clip_lines(lines_of(fundamental, points), SIZE)
    assert hit.all()
    found, some = search_line(queries, map2, ends, 100)
    true = points - torch.tensor([4.0 * SHIFT, 0])
    assert some.all()
    spacing = (SIZE[0] - 1) / 99
    assert (found - true).norm(dim=-1).max() < spacing


def test_loss_is_zero_at_the_true_match_and_grows_with_the_distance(stereo):
    map1, map2, fundamental, _ = stereo
    points = cell_centres()
    lines = lines_of(fundamental, points)
    noise = torch.full((1, points.shape[1], 2), 0.5)  # windows centred on what the search finds
    losses = []
    for offset in (0.0, 1.0, 2.0, 4.0):
        moved = lines.clone()
        moved[..., 2] += offset  # the line beside the true one
        loss, used = epipolar_loss(map1, map2, points, moved, noise, DescriptorOptions())
        assert used == 1
        losses.append(float(loss))
    # the window's samples are 4 px apart: what is exact is the match, not the expected place
    assert losses[0] < 0.4
    assert losses == sorted(losses)
    assert losses[3] == pytest.approx(4.0, abs=0.8)


def test_exact_descriptors_beat_wrong_ones_in_both_directions(stereo):
    map1, map2, fundamental, cameras = stereo
    count = query_count(SIZE, 16)
    noise = torch.rand(1, count, 8, generator=torch.Generator().manual_seed(1))
    options = DescriptorOptions()
    right, used = descriptor_loss(map1, map2, fundamental, noise, options, cameras)
    other = torch.randn(map2.shape, generator=torch.Generator().manual_seed(2))
    wrong, _ = descriptor_loss(map1, other, fundamental, noise, options, cameras)
    assert 0.5 < used <= 1
    assert right < 0.5 * wrong


def test_both_directions_count_alike():
    """Images, cameras and noise in the other order give the same loss, whatever the geometry."""
    generator = torch.Generator().manual_seed(7)
    width, height = 40, 24
    map1, map2 = (torch.randn(2, 8, height, width, generator=generator) for _ in range(2))
    K = torch.tensor([[150.0, 0, 80], [0, 150, 48], [0, 0, 1]]).expand(2, 3, 3)
    K2 = K * torch.tensor([[1.2], [1.2], [1]])
    angle = torch.tensor(0.3)
    turn = torch.eye(3)
    turn[[0, 0, 2, 2], [0, 2, 0, 2]] = torch.stack(
        [angle.cos(), angle.sin(), -angle.sin(), angle.cos()]
    )
    R = turn.expand(2, 3, 3)
    t = torch.tensor([[-1.0, 0.3, 0.2], [0.5, 0.1, -0.6]])
    first = View(K, torch.tensor([[2.0, 9.0], [3.0, 5.0]]))
    second = View(K2, torch.tensor([[4.0, 7.0], [2.5, 30.0]]))
    fundamental = fundamental_from_pose(*(part.double() for part in (K, K2, R, t)))
    noise = torch.rand(2, query_count((4 * width, 4 * height), 16), 8, generator=generator)
    options = DescriptorOptions(jitter=0.8, max_cost=0.02)
    there = descriptor_loss(map1, map2, fundamental, noise, options, (first, second, R, t))
    back = descriptor_loss(
        map2,
        map1,
        fundamental.mT,
        noise[..., [2, 3, 0, 1, 6, 7, 4, 5]],
        options,
        (second, first, R.mT, -(R.mT @ t[..., None])[..., 0]),
    )
    assert (there[1] > 0.1).all() and (there[1] < 0.9).all()
    torch.testing.assert_close(there, back, atol=1e-4, rtol=1e-3)


def test_queries_are_weighted_by_how_sure_they_are():
    """By the deviation of Eq. 14, which takes no part in the gradient."""
    generator = torch.Generator().manual_seed(8)
    map1 = torch.randn(1, 8, 16, 20, generator=generator)
    map2 = torch.randn(1, 8, 16, 20, generator=generator, requires_grad=True)
    points = torch.tensor([[[10.0, 20], [40, 30], [60, 50]]])
    lines = torch.tensor([[[0.6, 0.8, -40.0], [0, 1, -33], [1, 0, -60]]])
    noise = torch.rand(1, 3, 2, generator=generator)
    options = DescriptorOptions(window=0.3, temperature=8.0, max_cost=1.0)
    alone, deviations = [], []
    for row in range(3):
        one = points[:, [row]], lines[:, [row]], noise[:, [row]]
        loss, used = epipolar_loss(map1, map2, *one, options)
        assert used == 1
        alone.append(loss)
        queries = F.normalize(sample(map1, one[0]), dim=-1)
        found, _ = search_line(queries, map2, clip_lines(one[1], (80, 64))[0], 100)
        shift = (one[2] - 0.5) * 0.5 * 0.3 * torch.tensor([80.0, 64])
        _, deviation = expected_place(queries, map2, found + shift, (24.0, 19.2), 8.0)
        deviations.append(deviation.detach()[0])
    weight = 1 / torch.stack(deviations)
    assert weight.max() > 1.05 * weight.min()
    expected = (weight * torch.stack(alone)).sum() / weight.sum()
    found, _ = epipolar_loss(map1, map2, points, lines, noise, options)
    torch.testing.assert_close(found[0], expected)
    gradients = [torch.autograd.grad(loss.sum(), map2)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_the_window_is_shifted_to_both_sides():
    """By at most `jitter` of its half side; where nothing is alike, its middle is expected."""
    map1, map2 = torch.ones(1, 4, 32, 40), torch.ones(1, 4, 32, 40)
    points, lines = torch.tensor([[[80.0, 60.0]]]), torch.tensor([[[0.0, 1.0, -60.0]]])
    for noise, shift in ((0.0, 3.2), (0.5, 0.0), (1.0, 3.2)):
        shifts = torch.tensor([[[0.9, noise]]])
        loss, _ = epipolar_loss(map1, map2, points, lines, shifts, DescriptorOptions())
        assert float(loss) == pytest.approx(shift, abs=1e-3)  # half of 0.1 of 128 px, halved


def test_what_is_far_from_its_line_is_left_out():
    """Farther than a share of the shorter side."""
    map1, map2 = torch.ones(1, 4, 32, 40), torch.ones(1, 4, 32, 40)
    points, lines = torch.tensor([[[80.0, 60.0]]]), torch.tensor([[[0.0, 1.0, -60.0]]])
    noise = torch.tensor([[[0.5, 0.5 + 14 / 64]]])  # shifts the window by 14 px
    for share, used in ((0.1, 0), (0.12, 1)):
        options = DescriptorOptions(window=1.0, max_cost=share)
        assert epipolar_loss(map1, map2, points, lines, noise, options)[1] == used


def test_gradient_agrees_with_finite_differences():
    """One query: the weight of Eq. 14, which is detached, cancels."""
    generator = torch.Generator().manual_seed(3)
    map1, map2 = (
        torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    points = torch.tensor([[[14.3, 17.1]]], dtype=torch.float64)
    lines = torch.tensor([[[0.6, 0.8, -21.0]]], dtype=torch.float64)
    noise = torch.tensor([[[0.2, 0.9]]], dtype=torch.float64)
    options = DescriptorOptions(window=0.4, temperature=3.0, max_cost=1.0)

    def loss(first, second):
        return epipolar_loss(first, second, points, lines, noise, options)[0]

    assert loss(map1, map2) > 0
    assert torch.autograd.gradcheck(loss, (map1, map2))


def test_expected_place_of_a_sharp_match(stereo):
    map1, map2, _, _ = stereo
    points = cell_centres()
    queries = F.normalize(sample(map1, points), dim=-1)
    true = points - torch.tensor([4.0 * SHIFT, 0])
    mean, deviation = expected_place(queries, map2, true, (16, 16), 60.0)
    assert (mean - true).abs().max() < 0.2
    flat, wide = expected_place(torch.zeros_like(queries), map2, true + 3, (16, 16), 60.0)
    assert torch.allclose(flat, true + 3, atol=1e-3)  # an undecided softmax gives the middle
    assert (wide > 5 * deviation.median()).all()


def test_lines_that_miss_the_image_do_not_count(stereo):
    map1, map2, _, _ = stereo
    points = cell_centres()[:, :2]
    lines = torch.tensor([[[0.0, 1.0, 500.0], [0.0, 1.0, 400.0]]])
    _, hit = clip_lines(lines, SIZE)
    assert not hit.any()
    noise = torch.full((1, 2, 2), 0.5)
    maps = map1.clone().requires_grad_()
    loss, used = epipolar_loss(maps, map2, points, lines, noise, DescriptorOptions())
    loss.sum().backward()
    assert loss == 0 and used == 0
    assert (maps.grad == 0).all()
    # the image is wider than high
    upright, flat = torch.tensor([[[1.0, 0.0, -150.0]]]), torch.tensor([[[0.0, 1.0, -150.0]]])
    for line, hit in ((upright, True), (flat, False)):
        _, used = epipolar_loss(
            map1, map2, points[:, :1], line, noise[:, :1], DescriptorOptions(max_cost=1.0)
        )
        assert bool(used) == hit
    # and where there is no geometry there is no line
    two = torch.cat([torch.full_like(upright, torch.nan), upright], dim=1)
    maps = map2.clone().requires_grad_()
    loss, used = epipolar_loss(map1, maps, points, two, noise, DescriptorOptions(max_cost=1.0))
    loss.sum().backward()
    assert used == 0.5 and maps.grad.isfinite().all()
    alone, _ = epipolar_loss(
        map1, map2, points[:, 1:], upright, noise[:, 1:], DescriptorOptions(max_cost=1.0)
    )
    torch.testing.assert_close(loss, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ((0.0, 1.0, -10.0), [(0, 10), (159, 10)]),
        ((1.0, 0.0, -7.0), [(7, 0), (7, 127)]),
        ((2**-0.5, -(2**-0.5), 0.0), [(0, 0), (127, 127)]),
    ],
)
def test_clipped_lines_end_at_the_border(line, expected):
    ends, hit = clip_lines(torch.tensor([line]), SIZE)
    assert hit.all()
    found = sorted(tuple(round(v, 3) for v in end) for end in ends[0].tolist())
    assert torch.allclose(torch.tensor(found), torch.tensor(expected).float(), atol=1e-2)


def test_depth_range_keeps_the_part_of_the_line_that_can_be(stereo):
    _, _, fundamental, (first, second, R, t) = stereo
    points = torch.tensor([[[100.0, 60.0]]])
    ends, _ = clip_lines(lines_of(fundamental, points), SIZE)
    low, high = depth_interval(points, ends, first, second, R, t)
    place = ends[0, 0, 0] + torch.stack([low, high])[:, 0] * (ends[0, 0, 1] - ends[0, 0, 0])
    # disparities 200 / 5 = 40 and 200 / 20 = 10
    assert sorted(place[:, 0].tolist()) == pytest.approx([60.0, 90.0], abs=1e-2)
    for unknown in ((0.0, torch.inf), (5.0, torch.inf), (0.0, 20.0)):
        view = View(first.K, torch.tensor([unknown]))
        low, high = depth_interval(points, ends, view, second, R, t)
        assert (low.item(), high.item()) == (0.0, 1.0)
    # the second camera stands between the two depths
    low, high = depth_interval(points, ends, first, second, R, t - torch.tensor([[0, 0, 10.0]]))
    assert (low.item(), high.item()) == (0.0, 1.0)


def test_the_search_keeps_to_what_is_allowed(stereo):
    map1, map2, fundamental, _ = stereo
    points = cell_centres()
    queries = F.normalize(sample(map1, points), dim=-1)
    ends, _ = clip_lines(lines_of(fundamental, points), SIZE)
    for low, high in ((0.0, 0.3), (0.4, 0.6), (0.8, 1.0)):
        limits = torch.full(points.shape[:2], low), torch.full(points.shape[:2], high)
        found, some = search_line(queries, map2, ends, 101, limits)
        share = (found - ends[..., 0, :]).norm(dim=-1) / (SIZE[0] - 1)
        assert some.all()
        assert share.min() >= low - 1e-5 and share.max() <= high + 1e-5
    between = torch.full(points.shape[:2], 0.501), torch.full(points.shape[:2], 0.509)
    assert not search_line(queries, map2, ends, 101, between)[1].any()


def test_query_points_lie_in_their_cells():
    noise = torch.rand(2, query_count(SIZE, 16), 2, generator=torch.Generator().manual_seed(4))
    points = query_points(SIZE, 16, noise)
    cells = ((points + 0.5) / 16).floor()
    assert len({tuple(c) for c in cells[0].tolist()}) == (160 // 16) * (128 // 16)
    assert cells.amin((0, 1)).tolist() == [0, 0] and cells.amax((0, 1)).tolist() == [9, 7]


def test_contrastive_loss_by_hand():
    """Two points, one negative each in the other image and one in the own image."""
    descriptors1 = torch.eye(2)[None]
    descriptors2 = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])
    points = torch.tensor([[[0.0, 0.0], [100.0, 0.0]]])
    valid = torch.tensor([[True, False]])
    loss = contrastive_loss(
        descriptors1, descriptors2, points, points, valid, WarmupOptions(temperature=1.0)
    )
    forward = torch.tensor([0.8, 0.0, 0.0]).exp().sum().log() - 0.8
    back = torch.tensor([0.8, 0.6, 0.6]).exp().sum().log() - 0.8
    assert float(loss) == pytest.approx(0.5 * float(forward + back), abs=1e-6)


def test_near_candidates_are_no_negatives():
    descriptors = F.normalize(
        torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(5)), dim=2
    )
    valid = torch.tensor([[True, True, True]])
    far = torch.tensor([[[0.0, 0.0], [50.0, 0.0], [90.0, 0.0]]])
    near = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [90.0, 0.0]]])
    options = WarmupOptions(temperature=0.1)
    with_all = contrastive_loss(descriptors, descriptors, far, far, valid, options)
    without = contrastive_loss(descriptors, descriptors, near, near, valid, options)
    assert without < with_all


def test_anchors_are_the_valid_points():
    """Fewer anchors than points: the loss is theirs alone, all points stay candidates."""
    generator = torch.Generator().manual_seed(6)
    descriptors1, descriptors2 = (
        F.normalize(torch.randn(1, 12, 8, generator=generator), dim=2) for _ in range(2)
    )
    points = torch.arange(12.0)[None, :, None] * torch.tensor([40.0, 0.0])
    valid = torch.zeros(1, 12, dtype=torch.bool)
    valid[:, [3, 7, 8]] = True
    inputs = descriptors1, descriptors2, points, points, valid
    few, all_points = (
        contrastive_loss(*inputs, WarmupOptions(anchors=count)) for count in (3, 100)
    )
    assert float(few) == pytest.approx(float(all_points), abs=1e-6)


def test_place_loss_is_small_only_for_the_right_descriptor(stereo):
    map1, map2, _, _ = stereo
    points = cell_centres()
    true = points - torch.tensor([4.0 * SHIFT, 0])
    valid = torch.ones(points.shape[:2], dtype=torch.bool)
    noise = torch.full(points.shape, 0.5)
    queries = F.normalize(sample(map1, points), dim=-1)
    options = WarmupOptions()
    right = place_loss(queries, map2, true, valid, noise, options)
    wrong = place_loss(queries.roll(1, dims=1), map2, true, valid, noise, options)
    assert right < 0.3 < wrong
    assert place_loss(queries, map2, true, ~valid, noise, options) == 0
