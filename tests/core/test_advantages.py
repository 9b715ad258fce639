import itertools

import numpy as np
import pytest
import torch

from aligngym.core.advantages import (
    discounted_returns,
    gae,
    group_normalised,
    leave_one_out,
    n_step_returns,
)

DISCOUNT = 0.9


def segment(seed=0, rows=6, steps=9):
    """Random rewards and values, with episodes that terminate and are truncated inside the rows."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, rows, steps, dtype=torch.float64, generator=generator)
    ends = torch.rand(rows, steps, generator=generator)
    terminated, truncated = ends < 0.15, (ends > 0.15) & (ends < 0.3)
    # Within an episode V(s_{t+1}) is the value of the next column; after a cut it is another state's.
    goes_on = ~(terminated | truncated)[:, :-1]
    next_values[:, :-1] = torch.where(goes_on, values[:, 1:], next_values[:, :-1])
    return rewards, values, next_values, terminated, truncated


def n_step_by_definition(rewards, next_values, terminated, truncated, discount, n):
    """r_t + … + γ^{k−1} r_{t+k−1} + γ^k V, k = n steps or as many as the episode and the row have left."""
    result = torch.zeros_like(rewards)
    for row, start in itertools.product(*map(range, rewards.shape)):
        for power, t in enumerate(range(start, rewards.shape[1])):
            result[row, start] += discount**power * rewards[row, t]
            if terminated[row, t]:
                break
            if truncated[row, t] or power == n - 1 or t == rewards.shape[1] - 1:
                result[row, start] += discount ** (power + 1) * next_values[row, t]
                break
    return result


def test_termination_ends_the_sum_and_truncation_bootstraps():
    rewards = torch.tensor([[1.0, 2.0, 4.0]]).repeat(3, 1)
    next_values = torch.tensor([[10.0, 20.0, 40.0]]).repeat(3, 1)
    cut = torch.tensor([[False, True, False]])
    never = torch.zeros_like(cut)
    terminated, truncated = torch.cat([cut, never, never]), torch.cat([never, cut, never])
    # γ = ½: the last step is always open-ended, 4 + ½·40 = 24.
    expected = [[1 + 2 / 2, 2, 24], [1 + 2 / 2 + 20 / 4, 2 + 20 / 2, 24], [1 + 2 / 2 + 24 / 4, 2 + 24 / 2, 24]]
    assert discounted_returns(rewards, terminated, truncated, 0.5, next_values).tolist() == expected
    without = discounted_returns(rewards, terminated, truncated, 0.5)
    assert without.tolist() == [[2, 2, 4], [2, 2, 4], [1 + 2 / 2 + 4 / 4, 2 + 4 / 2, 4]]
    zero = torch.zeros_like(rewards)
    assert gae(rewards, zero, next_values, terminated, truncated, 0.5, 1.0).tolist() == [
        [1 + 5 + 2 / 2, 2, 24],
        [1 + 5 + 12 / 2, 12, 24],
        [1 + 5 + (2 + 10 + 24 / 2) / 2, 2 + 10 + 24 / 2, 24],
    ]


def test_gae_without_trace_is_the_temporal_difference_error():
    rewards, values, next_values, terminated, truncated = segment()
    errors = rewards + DISCOUNT * next_values.masked_fill(terminated, 0.0) - values
    torch.testing.assert_close(gae(rewards, values, next_values, terminated, truncated, DISCOUNT, 0.0), errors)


def test_gae_with_full_trace_is_monte_carlo_minus_value():
    rewards, values, next_values, terminated, truncated = segment()
    returns = discounted_returns(rewards, terminated, truncated, DISCOUNT, next_values)
    advantages = gae(rewards, values, next_values, terminated, truncated, DISCOUNT, 1.0)
    torch.testing.assert_close(advantages, returns - values)
    everything = n_step_by_definition(rewards, next_values, terminated, truncated, DISCOUNT, n=100)
    torch.testing.assert_close(returns, everything)


@pytest.mark.parametrize("trace", [0.3, 0.95])
def test_gae_plus_value_is_the_lambda_return(trace):
    """(1−λ) Σ_n λ^{n−1} G^{(n)}, whose tail λ^{N−1} G^{(N)} holds all n that reach the end of the episode."""
    rewards, values, next_values, terminated, truncated = segment()
    steps = rewards.shape[1]
    lambda_return = torch.zeros_like(rewards)
    for row, start in itertools.product(*map(range, rewards.shape)):
        ends = (terminated | truncated)[row, start:].nonzero()
        longest = int(ends[0]) + 1 if len(ends) else steps - start
        for n in range(1, longest + 1):
            weight = (1 - trace) * trace ** (n - 1) if n < longest else trace ** (n - 1)
            one_row = (x[row : row + 1] for x in (rewards, next_values, terminated, truncated))
            lambda_return[row, start] += weight * n_step_by_definition(*one_row, DISCOUNT, n)[0, start]
    advantages = gae(rewards, values, next_values, terminated, truncated, DISCOUNT, trace)
    torch.testing.assert_close(advantages + values, lambda_return)


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_n_step_returns_are_their_definition(n):
    rewards, _, next_values, terminated, truncated = segment()
    expected = n_step_by_definition(rewards, next_values, terminated, truncated, DISCOUNT, n)
    actual = n_step_returns(rewards, next_values, terminated, truncated, DISCOUNT, n)
    torch.testing.assert_close(actual, expected)


def test_n_step_needs_a_step():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        n_step_returns(*segment()[:1], *segment()[2:], DISCOUNT, 0)


def test_masked_steps_are_stepped_over():
    """Advantages are those of the sequence without the masked columns, wherever these are put in."""
    rewards, values, next_values, terminated, truncated = segment(steps=5)
    short = gae(rewards, values, next_values, terminated, truncated, DISCOUNT, 0.7)
    columns = torch.tensor([1, 2, 5, 6, 9])
    mask = torch.zeros(len(rewards), 11, dtype=torch.bool)
    mask[:, columns] = True

    def spread(x, fill):
        return x.new_full(mask.shape, fill).index_copy_(1, columns, x)

    floats, flags = (rewards, values, next_values), (terminated, truncated)
    long = gae(*(spread(x, 7.0) for x in floats), *(spread(x, False) for x in flags), DISCOUNT, 0.7, mask)
    torch.testing.assert_close(long, spread(short, 0.0))


def test_adding_a_potential_to_the_value_function_is_reward_shaping():
    """γΦ(s') − Φ(s) on the rewards is what raising V by Φ takes away again: the advantages stay."""
    rewards, values, next_values, terminated, truncated = segment()
    next_values = next_values.masked_fill(terminated, 0.0)
    shaped = rewards + DISCOUNT * next_values - values
    zero = torch.zeros_like(values)
    torch.testing.assert_close(
        gae(shaped, zero, zero, terminated, truncated, DISCOUNT, 0.8),
        gae(rewards, values, next_values, terminated, truncated, DISCOUNT, 0.8),
    )


RETURNS = torch.tensor([1.0, 10.0, 2.0, 6.0, 20.0], dtype=torch.float64)
GROUP = torch.tensor([7, 3, 7, 7, 3])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    assert leave_one_out(RETURNS, GROUP).tolist() == pytest.approx([1 - 4, 10 - 20, 2 - 3.5, 6 - 1.5, 20 - 10])
    torch.testing.assert_close(leave_one_out(RETURNS + 100, GROUP), leave_one_out(RETURNS, GROUP))
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(RETURNS, torch.tensor([0, 0, 0, 0, 1]))


def test_leave_one_out_gives_the_exact_policy_gradient_in_expectation():
    """Summed over all groups of three actions with their probabilities, Σ A ∇log π is k·∇E[R]."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    log_probs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_probs.exp() * reward).sum(), logits, retain_graph=True)
    estimate = torch.zeros_like(exact)
    for actions in itertools.product(range(3), repeat=3):
        actions = torch.tensor(actions)
        probability = log_probs[actions].sum().exp().detach()
        advantages = leave_one_out(reward[actions], torch.zeros(3))
        surrogate = probability * (advantages * log_probs[actions]).mean()
        estimate += torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    torch.testing.assert_close(estimate, exact)


def test_group_normalised_is_numpy_group_by_group():
    expected = np.empty(5)
    for number in (3, 7):
        members = (number == GROUP).numpy()
        x = RETURNS.numpy()[members]
        expected[members] = (x - x.mean()) / (x.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(group_normalised(RETURNS, GROUP), expected, rtol=1e-12)
    centred = group_normalised(RETURNS, GROUP, scale=False)
    assert centred.tolist() == pytest.approx([-2, -5, -1, 3, 5])


def test_group_normalised_ignores_shift_scale_and_order():
    plain = group_normalised(RETURNS, GROUP, epsilon=0.0)
    torch.testing.assert_close(group_normalised(3 * RETURNS - 50, GROUP, epsilon=0.0), plain)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(group_normalised(RETURNS[order], GROUP[order], epsilon=0.0), plain[order])


def test_a_group_of_equal_returns_has_no_advantage():
    equal = group_normalised(torch.tensor([0.1, 0.1, 0.1, 5.0]), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(equal, torch.zeros(4), atol=1e-3, rtol=0)
