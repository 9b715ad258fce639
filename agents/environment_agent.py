"""What all gradient agents that act in an environment share: how they act, are judged, and are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aligngym.agents.evaluation import evaluate_episodes
from aligngym.core.callbacks import Metrics
from aligngym.core.gradient_agent import Batch, GradientAgent
from aligngym.core.markov_policy import MarkovPolicy
from aligngym.core.policy import Policy
from aligngym.core.sampler import Sampler


class EnvironmentAgent(GradientAgent[Batch]):
    """An agent that learns from what a sampler brings.

    Args:
        policy: what is trained.
        sampler: where its experience comes from.
        options: of :class:`GradientAgent`.
    """

    def __init__(self, policy: Policy, sampler: Sampler, **options: Any) -> None:
        super().__init__(policy, **options)
        self.sampler = sampler

    def act(self, observations: Any, *, greedy: bool = True) -> Any:
        """Let the policy act: an action for one observation, an array of them for a batch, or completions."""
        actions = self.policy.act(observations, greedy=greedy)[0]
        return actions.cpu().numpy() if isinstance(actions, torch.Tensor) else actions

    def evaluate(
        self,
        env: Any = None,
        episodes: int = 100,
        *,
        seed: int = 0,
        discount: float = 1.0,
        greedy: bool = True,
        **options: Any,
    ) -> Metrics:
        """Play whole episodes; see :func:`aligngym.agents.evaluate_episodes`.

        A language model is judged by its sampler instead, which knows how.

        Args:
            env: another copy of the sampler's environment by default; for a language model, held-back problems.
            episodes: how many.
            seed: of the environment, and of the actions if they are drawn.
            discount: of the return.
            greedy: whether to take the most probable action, instead of drawing one.
            options: for a language model, of its sampler's ``evaluate``.
        """
        if not isinstance(self.policy, MarkovPolicy):
            return self.sampler.evaluate(self.policy, env, seed=seed, greedy=greedy, **options)
        from aligngym.envs.vectorize import single_copy

        if env is None:
            env = single_copy(self.sampler.env)  # type: ignore[attr-defined]
        policy = self.policy.eval()
        generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
        low, high = getattr(env.action_space, "low", None), getattr(env.action_space, "high", None)

        def act(observation: Any, allowed: Any = None) -> Any:
            options = {} if allowed is None else {"action_mask": allowed}
            action = policy.act(observation, greedy=greedy, generator=generator, **options)[0].cpu().numpy()
            return action.clip(low, high) if low is not None else int(action)

        masks = getattr(self.sampler, "action_masks", False)
        return evaluate_episodes(act, env, episodes, seed, discount, action_masks=masks)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, the sampler's episodes included."""
        return {**super().state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])


def means_of(collected: Sequence[Metrics]) -> Metrics:
    """Return the mean of every metric over several gradient steps that report the same ones."""
    return {name: sum(metrics[name] for metrics in collected) / len(collected) for name in collected[0]}
