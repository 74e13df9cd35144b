"""The figures of a quality report, on pairs worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.stages.reward_quality import ScoredPair, log_loss, quality, wilson_interval

LOG3 = math.log(3)


def pair(margin: float, **changes: object) -> ScoredPair:
    usual = ScoredPair(chosen=margin, rejected=0.0, probability=1.0, chosen_tokens=5, rejected_tokens=5)
    return replace(usual, **changes)  # type: ignore[arg-type]


def test_accuracy_leaves_ties_out_and_counts_equal_scores_as_wrong() -> None:
    found = quality([pair(1.0), pair(-1.0), pair(0.0), pair(2.0), pair(3.0, probability=0.5)])
    assert (found.accuracy.value, found.accuracy.pairs) == (0.5, 4)
    assert (found.accuracy.low, found.accuracy.high) == wilson_interval(2, 4)


def test_log_loss_is_the_cross_entropy_with_what_people_said() -> None:
    found = quality([pair(LOG3), pair(LOG3, probability=0.75), pair(0.0, probability=0.5)])
    certain, soft = -math.log(0.75), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found.log_loss == pytest.approx((certain + soft + math.log(2)) / 3)


def test_a_model_that_is_as_often_right_as_it_says_is_calibrated() -> None:
    pairs = [pair(LOG3), pair(LOG3), pair(LOG3), pair(-LOG3)]  # says 3/4 of the likelier one, which 3 of 4 prefer
    found = quality(pairs)
    (only,) = found.calibration
    assert (only.predicted, only.observed, only.pairs) == (pytest.approx(0.75), 0.75, 4)
    assert found.calibration_error == pytest.approx(0.0)


def test_the_calibration_error_weighs_each_bin_by_its_pairs() -> None:
    found = quality([pair(LOG3), pair(-LOG3), pair(20.0), pair(20.0)])
    assert [(b.pairs, round(b.predicted, 3), b.observed) for b in found.calibration] == [(2, 0.75, 0.5), (2, 1.0, 1.0)]
    assert found.calibration_error == pytest.approx(0.5 * 0.25)


def test_a_model_that_scores_length_is_found_out() -> None:
    pairs = [
        pair(3.0, chosen=4.0, rejected=1.0, chosen_tokens=4, rejected_tokens=1),
        pair(-1.0, chosen=2.0, rejected=3.0, chosen_tokens=2, rejected_tokens=3),
        pair(0.0, chosen=2.0, rejected=2.0, chosen_tokens=2, rejected_tokens=2),
    ]
    found = quality(pairs)
    assert found.length_correlation == pytest.approx(1.0)
    assert (found.longer_preferred, found.longer_preferred_by_people) == (1.0, 0.5)
    assert quality([pair(1.0), pair(2.0)]).length_correlation == 0.0, "every candidate has the same length"


def test_accuracy_by_source_and_by_certainty() -> None:
    sources = quality([pair(1.0, source="b"), pair(-1.0, source="a"), pair(1.0, source="a"), pair(1.0)]).by_source
    assert [(name, found.value, found.pairs) for name, found in sources.items()] == [("a", 0.5, 2), ("b", 1.0, 1)]
    groups = quality([pair(m) for m in (-0.1, 0.2, -0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]).by_margin
    assert [(group.largest_margin, group.accuracy.value) for group in groups] == [
        (0.2, 0.5),
        (0.4, 0.5),
        (0.6, 1),
        (0.8, 1),
    ]


@given(st.lists(st.builds(pair, st.floats(-50, 50), probability=st.floats(0.5, 1)), min_size=1, max_size=30))
def test_every_pair_stands_in_one_bin_and_every_decided_one_in_one_group(pairs: list[ScoredPair]) -> None:
    pairs = [*pairs, pair(1.0)]
    found = quality(pairs)
    assert sum(b.pairs for b in found.calibration) == len(pairs)
    assert sum(group.accuracy.pairs for group in found.by_margin) == found.accuracy.pairs
    assert 0 <= found.calibration_error <= 1
    assert all(0.5 <= b.predicted <= 1 for b in found.calibration)


def test_wilson_intervals_match_published_values() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_log_loss_of_a_margin_is_exact_and_does_not_overflow() -> None:
    assert log_loss(0.0) == pytest.approx(math.log(2))
    assert log_loss(2.0) == pytest.approx(0.126928, abs=1e-6)
    assert log_loss(-2.0) == pytest.approx(2.126928, abs=1e-6)
    assert log_loss(-1000.0) == 1000.0
    assert log_loss(1000.0) == 0.0
