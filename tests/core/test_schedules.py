import math

import numpy as np
import pytest

from aligngym.core.schedules import (
    Constant,
    Decay,
    Geometric,
    Power,
    as_schedule,
    dvoretzky_conditions,
    robbins_monro_conditions,
)


def test_values():
    assert [Constant(0.5)(k) for k in (0, 99)] == [0.5, 0.5]
    assert [Power()(k) for k in range(4)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert Power(0.3, 0.7, offset=10)(20) == pytest.approx(0.3 * 3**-0.7)
    assert [Decay(1.0, 4)(k) for k in range(6)] == pytest.approx([1, 3 / 4, 1 / 2, 1 / 4, 0, 0])
    assert [Decay(1.0, 6, warmup=2)(k) for k in range(7)] == pytest.approx([1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4, 0])
    assert [Geometric(0.8, 0.5)(k) for k in range(4)] == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert Geometric(0.8, 0.5).table(60).sum() == pytest.approx(1.6)
    cosine = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert [Decay(1.0, 4, shape="cosine")(k) for k in range(5)] == pytest.approx(cosine)


def test_the_step_size_one_over_k_averages():
    mean, targets = 0.0, [3.0, -1.0, 4.0, 10.0]
    for k, target in enumerate(targets):
        mean += Power()(k) * (target - mean)
    assert mean == pytest.approx(sum(targets) / 4)


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.1),
        Constant(0.0),
        Decay(1.0, 50),
        Decay(1.0, 50, 10, "cosine"),
        Geometric(1.0, 0.9),
        Geometric(0.3, 1.0),
        Geometric(0.0, 1.0),
    ],
)
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
        lambda: Geometric(-1.0, 0.5),
        lambda: Geometric(1.0, 0.0),
        lambda: Geometric(1.0, 1.1),
    ],
)
def test_what_is_no_step_size_is_refused(make):
    with pytest.raises(ValueError, match="not"):
        make()


def test_numbers_are_constant_schedules():
    power = Power()
    assert as_schedule(power) is power
    assert as_schedule(2) == Constant(2.0)


@pytest.mark.parametrize("schedule", [Constant(0.3), Power(0.7, 0.6, 3.0), Geometric(0.5, 0.9), Decay(1.0, 7, 2)])
def test_a_table_holds_the_steps_in_order(schedule):
    np.testing.assert_array_equal(schedule.table(10), [schedule(k) for k in range(10)])
    assert schedule.table(0).shape == (0,)


def test_conditions_are_stated_one_by_one():
    assert robbins_monro_conditions(Power())
    constant = robbins_monro_conditions(Constant(0.1))
    assert not constant
    assert constant.holds == {"Σ α_k = ∞": True, "Σ α_k² < ∞": False}
    assert str(constant).splitlines()[1:] == ["  holds  Σ α_k = ∞", "  FAILS  Σ α_k² < ∞"]
    assert robbins_monro_conditions(Geometric(1.0, 0.5)).holds == {"Σ α_k = ∞": False, "Σ α_k² < ∞": True}
    fading = dvoretzky_conditions(Power(exponent=0.9), Power(exponent=0.6))
    assert fading
    assert "Dvoretzky" in str(fading)
    assert not dvoretzky_conditions(Power(exponent=0.9), Power(exponent=0.4))
    assert dvoretzky_conditions(Constant(0.5), Constant(0.5)).holds == {
        "Σ α_k = ∞": True,
        "Σ α_k² < ∞": False,
        "Σ β_k² < ∞": False,
    }


@pytest.mark.parametrize(
    ("step_size", "noise_size", "converges"),
    [
        (Power(), Power(), True),
        (Power(exponent=0.9), Power(exponent=0.8), True),
        (Power(exponent=0.6), Power(0.1, exponent=0.6), True),
        (Power(), Constant(0.2), False),
        (Constant(0.2), Constant(0.2), False),
        (Power(0.25, exponent=2.0, offset=2.0), Constant(0.0), False),
        (Constant(0.0), Power(), False),
        (Geometric(0.5, 0.5), Geometric(0.5, 0.5), False),
    ],
)
def test_dvoretzky_conditions_agree_with_the_exact_second_moment(step_size, noise_size, converges):
    # Δ ← (1 − α) Δ + β η with unit noise: E[Δ²] ← (1 − α)² E[Δ²] + β².
    second = 1.0
    for alpha, beta in zip(step_size.table(100_000), noise_size.table(100_000), strict=True):
        second = (1 - alpha) ** 2 * second + beta**2
    assert bool(dvoretzky_conditions(step_size, noise_size)) == converges == (second < 0.005)
