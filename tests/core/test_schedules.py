import math

import numpy as np
import pytest

from aligngym.core.schedules import Constant, Decay, Power, as_schedule


def test_values():
    assert [Constant(0.5)(k) for k in (0, 99)] == [0.5, 0.5]
    assert [Power()(k) for k in range(4)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert Power(0.3, 0.7, offset=10)(20) == pytest.approx(0.3 * 3**-0.7)
    assert [Decay(1.0, 4)(k) for k in range(6)] == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4, 0, 0])
    assert [Decay(1.0, 6, warmup=2)(k) for k in range(7)] == pytest.approx([1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4, 0])
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert [Decay(1.0, 4, shape="cosine")(k) for k in range(5)] == pytest.approx(cosine)


def test_the_step_size_one_over_k_averages():
    mean, targets = 0.0, [3.0, -1.0, 4.0, 10.0]
    for k, target in enumerate(targets):
        mean += Power()(k) * (target - mean)
    assert mean == pytest.approx(sum(targets) / 4)


@pytest.mark.parametrize("schedule", [Constant(0.1), Constant(0.0), Decay(1.0, 50), Decay(1.0, 50, 10, "cosine")])
@pytest.mark.parametrize("order", [1, 2])
def test_flags_agree_with_partial_sums(schedule, order):
    """A sum converges if and only if what doubling its length adds goes to 0."""
    added = sum(schedule(k) ** order for k in range(1000, 2000))
    diverges = schedule.sum_diverges if order == 1 else not schedule.sum_of_squares_converges
    assert diverges == (added > 1e-9)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 0.5, 0.51, 0.75, 1.0, 1.01, 2.0])
@pytest.mark.parametrize("order", [1, 2])
def test_power_flags_agree_with_partial_sums(exponent, order):
    """Σ_{n ≤ k < 2n} α_k^m ~ c·n^(1−m·exponent): constant or growing in n if and only if the sum diverges."""
    schedule = Power(0.7, exponent, offset=3.0)
    n = 2**19
    dyadic = [sum(float(schedule(k)) ** order for k in range(a, 2 * a, a // 2**9)) * a / 2**9 for a in (n, 2 * n)]
    grows = np.log2(dyadic[1] / dyadic[0]) > -1e-4
    assert grows == (schedule.sum_diverges if order == 1 else not schedule.sum_of_squares_converges)
    assert schedule.is_robbins_monro == (0.5 < exponent <= 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(-0.1),
        lambda: Constant(math.nan),
        lambda: Power(-1.0),
        lambda: Power(exponent=-0.5),
        lambda: Power(offset=0.0),
        lambda: Decay(1.0, 10, warmup=11),
        lambda: Decay(1.0, 10, shape="square"),
        lambda: Decay(-1.0, 10),
    ],
)
def test_what_is_no_step_size_is_refused(make):
    with pytest.raises(ValueError, match="not"):
        make()


def test_numbers_are_constant_schedules():
    power = Power()
    assert as_schedule(power) is power
    assert as_schedule(2) == Constant(2.0)
