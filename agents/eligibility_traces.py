"""Sarsa(λ): every step teaches all state-action pairs that led to it, the recent ones most.

Each pair carries a trace z that rises when the pair is visited and decays by γλ with every step, and the error of one
step moves every entry by its trace,

    δ = r + γ Q(s', a') − Q(s, a),    Q ← Q + δ z.

The step size is part of the trace: z rises by α of the visit. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd
ed., chapter 12.
"""

from __future__ import annotations

from typing import Any

import gymnasium

from aligngym.agents.temporal_difference import Sarsa, Step

#: Traces below this are dropped: added to numbers of ordinary size, what they carry is lost in rounding.
NEGLIGIBLE = 1e-17


class SarsaLambda(Sarsa):
    """Sarsa(λ) with accumulating, replacing or dutch traces. With λ = 0 all of them are Sarsa.

    At a visit of (s, a), whose trace has decayed to z,

    - ``"accumulating"`` traces rise to z + α: the updates of an episode add up to those of the λ-return, as long as
      they are small;
    - ``"replacing"`` traces rise to α, however often the pair was visited: more stable with large α (S. Singh and
      R. Sutton, *Reinforcement learning with replacing eligibility traces*, 1996);
    - ``"dutch"`` traces rise to z + α (1 − z), and the error is corrected for what the last update changed: true online
      Sarsa(λ), which is exactly the online λ-return method (H. van Seijen et al., *True online temporal-difference
      learning*, 2016; section 12.8).

    Args:
        env: see :class:`TDControl`.
        discount: γ.
        trace: λ in [0, 1].
        traces: which kind.
        options: the other arguments of :class:`TDControl`.

    Raises:
        ValueError: for a λ outside [0, 1] or another kind of traces.
    """

    def __init__(
        self, env: gymnasium.Env, discount: float, trace: float = 0.9, traces: str = "accumulating", **options: Any
    ) -> None:
        super().__init__(env, discount, **options)
        if not 0 <= trace <= 1:
            raise ValueError(f"trace is λ, between 0 and 1, not {trace}")
        if traces not in ("accumulating", "replacing", "dutch"):
            raise ValueError(f"traces are 'accumulating', 'replacing' or 'dutch', not {traces!r}")
        self.trace, self.traces = trace, traces
        self.start_episode()

    def start_episode(self) -> None:
        """Forget all traces."""
        self._traces: dict[tuple[int, int], float] = {}
        self._expected: float | None = None

    def learn_from(self, step: Step) -> None:
        """Move every entry that has a trace."""
        pair = step.state, step.action
        value, following = self.rows[step.state][step.action], self.following(step)
        error = step.reward + self.discount * following - value
        step_size = self._visit(pair)
        if self.traces == "dutch" and self._expected is not None:
            # What the last update changed in this entry has been learned from already.
            surprise = value - self._expected
            error += surprise
            self.rows[step.state][step.action] -= step_size * surprise
        for (state, action), trace in self._traces.items():
            self.rows[state][action] += trace * error
        self._expected = following
        self._decay()

    def _visit(self, pair: tuple[int, int]) -> float:
        """Raise the trace of a pair, count the visit, and return its step size."""
        state, action = pair
        step_size, trace = self.step_size(self._counts[state][action]), self._traces.get(pair, 0.0)
        raised = {"accumulating": trace + step_size, "replacing": step_size, "dutch": trace + step_size * (1 - trace)}
        self._traces[pair] = raised[self.traces]
        self._counts[state][action] += 1
        return step_size

    def _decay(self) -> None:
        """Let all traces fade."""
        factor = self.discount * self.trace
        self._traces = {pair: factor * trace for pair, trace in self._traces.items() if factor * trace > NEGLIGIBLE}
