"""Mutual nearest neighbours and ratio test."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_fused import needs_compiler

from scfeat_ros import matcher
from scfeat_ros.features import Features, Matches
from scfeat_ros.matcher import match
from scfeat_ros.native import library, matching


@pytest.fixture(
    params=[pytest.param(name, marks=needs_compiler) for name in ("fastest", "exact")] + ["torch"],
    autouse=True,
)
def way(request, monkeypatch):
    """All ways to the neighbours."""
    if request.param == "fastest" and matching.arithmetic() == "fp32":
        pytest.skip("this CPU is fastest with exact products")
    monkeypatch.setattr(library, "is_compiled", lambda: request.param != "torch")
    exact = request.param == "exact"
    monkeypatch.setattr(matching, "nearest", partial(matching.nearest, exact=exact))


def features(descriptors):
    descriptors = np.asarray(descriptors, np.float32)
    descriptors = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
    count = len(descriptors)
    return Features(
        np.zeros((count, 2), np.float32), np.ones(count, np.float32), descriptors, (640, 480)
    )


def random_features(count, dim=16, seed=0):
    return features(np.random.default_rng(seed).normal(size=(count, dim)))


def slow_match(first, second, ratio=None):
    """The definition, pair by pair: {(i, j): similarity}."""

    def nearest(descriptor, others):
        distances = np.linalg.norm(others - descriptor, axis=1)
        order = np.argsort(distances)
        clear = (
            ratio is None or len(others) < 2 or distances[order[0]] < ratio * distances[order[1]]
        )
        return order[0], clear

    found = {}
    for i, descriptor in enumerate(first.descriptors):
        j, clear = nearest(descriptor, second.descriptors)
        back, clear_back = nearest(second.descriptors[j], first.descriptors)
        if back == i and clear and clear_back:
            found[i, int(j)] = descriptor @ second.descriptors[j]
    return found


@pytest.mark.parametrize("dim", [16, 61, 256])
@pytest.mark.parametrize("ratio", [None, 0.95, 0.8])
def test_matches_are_the_mutual_nearest_neighbours(ratio, dim):
    # more than one block of rows
    first, second = random_features(700, dim, seed=1), random_features(60, dim, seed=2)
    # some true matches, so that the ratio test has what to keep
    second.descriptors[:30] = first.descriptors[500:530] + 0.05 * second.descriptors[:30]
    second.descriptors[:] /= np.linalg.norm(second.descriptors, axis=1, keepdims=True)
    expected = slow_match(first, second, ratio)
    assert len(expected) >= 25
    found = match(first, second, ratio)
    assert [tuple(row) for row in found.indices.tolist()] == sorted(expected)
    np.testing.assert_allclose(
        found.similarity, [expected[key] for key in sorted(expected)], atol=1e-5
    )
    assert found.indices.dtype == np.int64 and found.similarity.dtype == np.float32


@needs_compiler
def test_fast_products_are_close_to_exact_ones():
    """Also where values or norms are as large as they may be against each other."""
    random = np.random.default_rng(0)
    normal = random.normal(size=(150, 127)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    one_value = np.eye(127, dtype=np.float32)[random.permutation(127)[:90]]
    all_alike = np.full((60, 127), 127**-0.5, np.float32) * random.choice([-1, 1], (60, 1))
    for a in (normal, one_value, all_alike):
        for b in (normal, one_value, all_alike):
            for size in (1.0, 1e-3, 1e4):
                found = matching.nearest(size * a, size * b)
                ordered = np.sort(a @ b.T, axis=1)
                back = np.sort(a @ b.T, axis=0)
                rounded_alike = a is not normal and b is not normal
                close = {"rtol": 0, "atol": 2.5e-4 if rounded_alike else 5e-5}
                np.testing.assert_allclose(found.similarity / size**2, ordered[:, -1], **close)
                for seconds, expected in (
                    (found.second, ordered[:, -2]),
                    (found.second_of_column, back[-2]),
                ):
                    off = np.abs(seconds / size**2 - expected)
                    if matching.arithmetic().startswith("int"):
                        # the right one may be missed, and another that is almost as near found
                        assert off.max() < 5e-3
                        off = np.sort(off)[: int(0.98 * len(off))]
                    assert off.max() <= close["atol"]
                chosen = (a @ b.T)[np.arange(len(a)), found.of_row]
                np.testing.assert_allclose(found.similarity / size**2, chosen, rtol=0, atol=5e-6)


@needs_compiler
def test_fast_products_find_the_nearest_of_many():
    random = np.random.default_rng(1)
    a, b = (random.normal(size=(count, 128)).astype(np.float32) for count in (1900, 2100))
    b[:1000] = a[:1000] + 0.7 * b[:1000]
    a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (a, b))
    exact = matching.nearest(a, b, exact=True)
    np.testing.assert_array_equal(exact.of_row, (a @ b.T).argmax(axis=1))
    for seconds in (True, False):
        found = matching.nearest(a, b, seconds)
        assert (found.of_row == exact.of_row).mean() > 0.999
        assert (found.of_column == exact.of_column).mean() > 0.999
        assert (found.second is None) == (not seconds)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 47), (64, 48), (100, 33), (37, 301)])
def test_of_equally_near_neighbours_the_first_is_taken(rows, columns):
    random = np.random.default_rng(0)
    a, b = (random.integers(-1, 2, (count, 3)).astype(np.float32) for count in (rows, columns))
    zeros = np.zeros((max(rows, columns), 3), np.float32)
    first, second = (
        Features(zeros[: len(part), :2], zeros[: len(part), 2], part, (640, 480)) for part in (a, b)
    )
    similarities = a @ b.T
    there, back = similarities.argmax(axis=1), similarities.argmax(axis=0)
    expected = [[i, j] for i, j in enumerate(there) if back[j] == i]
    assert match(first, second).indices.tolist() == expected


def test_matching_is_symmetric():
    first, second = random_features(50, seed=3), random_features(70, seed=4)
    there, back = match(first, second, 0.97), match(second, first, 0.97)
    assert len(there)
    assert set(map(tuple, there.indices)) == {(i, j) for j, i in back.indices}


def test_the_smallest_similarity_is_a_limit():
    first, second = random_features(50, seed=5), random_features(50, seed=6)
    every = match(first, second)
    limit = float(np.median(every.similarity))
    some = match(first, second, min_similarity=limit)
    assert 0 < len(some) < len(every)
    assert (some.similarity >= limit).all()
    assert len(some) == (every.similarity >= limit).sum()


def test_a_repeated_pattern_fails_the_ratio_test():
    first = features([[1, 0, 0], [0, 1, 0]])
    second = features([[1, 0.01, 0], [1, 0, 0.01], [0, 1, 0]])
    assert len(match(first, second)) == 2
    assert match(first, second, 0.8).indices.tolist() == [[1, 2]]


def test_a_descriptor_that_is_there_twice_fails_the_ratio_test():
    first = random_features(60, 128, seed=9)
    twice = features(np.concatenate([first.descriptors, first.descriptors[::-1]]))
    assert len(match(first, twice)) == 60
    assert len(match(first, twice, 0.99)) == len(match(twice, first, 0.99)) == 0


def test_of_equal_descriptors_the_first_matches():
    first, second = random_features(700, seed=7), random_features(1, seed=8)
    first.descriptors[[40, 41, 600]] = second.descriptors[0]
    assert match(first, second).indices.tolist() == [[40, 0]]
    assert match(second, first).indices.tolist() == [[0, 40]]


def test_a_single_candidate_passes_the_ratio_test():
    one = features([[1, 0]])
    assert match(one, one, 0.8).indices.tolist() == [[0, 0]]


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_matches_nothing(n, m):
    empty = Features.empty(16, (640, 480))
    found = match(random_features(n) if n else empty, random_features(m) if m else empty, ratio=0.8)
    assert found.indices.shape == (0, 2) and found.indices.dtype == np.int64
    assert found.similarity.shape == (0,) and found.similarity.dtype == np.float32


def test_features_of_different_models_do_not_match():
    with pytest.raises(ValueError, match="16 and 32 dimensions"):
        match(random_features(5, 16), random_features(5, 32))


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.1, float("nan")])
def test_a_ratio_outside_of_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        match(random_features(5), random_features(5), ratio)


def test_a_selection_keeps_rows_together():
    matches = match(random_features(20), random_features(20))
    keep = np.arange(len(matches)) % 2 == 0
    chosen = matches.select(keep)
    np.testing.assert_array_equal(chosen.indices, matches.indices[keep])
    np.testing.assert_array_equal(chosen.similarity, matches.similarity[keep])
    assert len(Matches.empty()) == 0


def test_on_a_gpu_many_features_are_matched_in_little_memory():
    a = torch.empty(100_000, 16, device="meta")  # as many as an image may have
    blocks = list(matcher._similarities(a, a))
    assert all(block.numel() <= matcher.BLOCK_VALUES for _, block in blocks)
    assert sum(rows.stop - rows.start for rows, _ in blocks) == len(a)
    few = torch.empty(8192, 16, device="meta")
    assert len(list(matcher._similarities(few, few))) == 1
