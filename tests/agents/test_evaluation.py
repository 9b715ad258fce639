import math

import gymnasium
import numpy as np
import pytest

from aligngym.agents import evaluate_episodes
from aligngym.envs import GridWorld


class Corridor(gymnasium.Env):
    """Pays 1, 2, 3, … and ends after as many steps as the episode's number, counted from 1."""

    observation_space = gymnasium.spaces.Discrete(100)
    action_space = gymnasium.spaces.Discrete(1)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return 0, {}

    def step(self, action):
        self.time += 1
        return self.time, float(self.time), self.time == self.episode, False, {}


def test_returns_lengths_and_the_standard_error_by_hand():
    result = evaluate_episodes(lambda observation: 0, Corridor(), episodes=3)
    # Returns 1, 1 + 2, 1 + 2 + 3.
    assert result["return"] == pytest.approx(10 / 3)
    assert result["return_standard_error"] == pytest.approx(np.std([1, 3, 6], ddof=1) / math.sqrt(3))
    assert result["length"] == 2
    assert result["truncated"] == 0


def test_discounting_by_hand():
    result = evaluate_episodes(lambda observation: 0, Corridor(), episodes=3, discount=0.5)
    assert result["return"] == pytest.approx((1 + 2 + 2.75) / 3)


def test_cut_episodes_are_counted_and_an_end_at_the_limit_is_none():
    result = evaluate_episodes(lambda observation: 0, Corridor(), episodes=4, max_steps=3)
    assert result["truncated"] == 0.25
    assert result["return"] == (1 + 3 + 6 + 6) / 4
    limited = gymnasium.wrappers.TimeLimit(GridWorld("S.G"), max_episode_steps=5)
    result = evaluate_episodes(lambda observation: 3, limited, episodes=2)
    assert result == {"return": -5.0, "return_standard_error": 0.0, "length": 5.0, "truncated": 1.0}


def test_one_episode_has_no_standard_error_and_none_is_refused():
    assert math.isnan(evaluate_episodes(lambda observation: 1, GridWorld("S.G"), episodes=1)["return_standard_error"])
    with pytest.raises(ValueError, match="not 0"):
        evaluate_episodes(lambda observation: 1, GridWorld("S.G"), episodes=0)
