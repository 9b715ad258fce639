"""Where experience comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from aligngym.core.callbacks import Metrics
from aligngym.core.policy import Policy
from aligngym.core.trajectories import Trajectories


class Sampler(ABC):
    """A source of experience: a vector environment, or prompts and reward functions.

    Attributes:
        metrics: what the last sample showed, such as the mean return of the episodes that ended in it.
    """

    metrics: Metrics

    @abstractmethod
    def sample(self, policy: Policy, seed: int) -> Trajectories:
        """Let the policy act, and return what happened.

        Rewards, ends and masks are always there; log-probabilities only if they are known better here than by asking
        the policy afterwards.

        Args:
            policy: it acts, and is not changed.
            seed: of everything random that begins here; the same seed repeats the sample.
        """

    def evaluate(self, policy: Policy, source: Any = None, **options: Any) -> Metrics:
        """Judge a policy that acts in no environment, on held-back ``source`` or what is sampled from.

        Raises:
            NotImplementedError: unless a sampler says how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a {type(policy).__name__} is judged")

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered between two samples for the next one to be the same: nothing, by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        assert not state, f"{type(self).__name__} remembers nothing"
