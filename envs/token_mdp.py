"""Writing a text of a few tokens, as a decision process small enough to be listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aligngym.core.trajectories import Trajectories
from aligngym.envs.enumeration import as_trajectories
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_mdp import TabularMDP


class TokenMDP:
    """Choose one of V tokens, L times; the complete sequence is rewarded.

    A state is a prefix, an action the next token. Prefixes are numbered like a heap, the empty one 0, and token a after
    prefix s gives prefix V · s + 1 + a. Complete sequences are terminal. This is the decision process of a language
    model in miniature: deterministic, a tree, its reward at the end.

    Attributes:
        sequences: ``[V^L, L]``, all complete sequences in lexicographic order.
        rewards: ``[V^L]``, the reward of each.
        mdp: the exact model.

    Args:
        rewards: a function of a complete sequence (a tuple of tokens), or ``[V^L]`` numbers in lexicographic order.
        vocabulary_size: V, at least 1.
        length: L, at least 1.

    Raises:
        ValueError: for a vocabulary or length below 1, more than 10,000 sequences, a wrong number of rewards, or one
            that is not finite.
    """

    max_sequences = 10_000

    def __init__(
        self, rewards: Callable[[tuple[int, ...]], float] | ArrayLike, vocabulary_size: int, length: int
    ) -> None:
        if vocabulary_size < 1 or length < 1:
            raise ValueError(f"a vocabulary of {vocabulary_size} and a length of {length}: both must be at least 1")
        # With one token there is one sequence of any length, but a chain of length + 1 prefixes.
        if max(length, vocabulary_size**length) > self.max_sequences:
            raise ValueError(
                f"{vocabulary_size} tokens make {vocabulary_size}^{length} sequences, more than {self.max_sequences}: "
                "take a smaller vocabulary or length"
            )
        self.vocabulary_size, self.length = vocabulary_size, length
        self.sequences: NDArray[np.int64] = np.indices((vocabulary_size,) * length).reshape(length, -1).T
        if callable(rewards):
            rewards = [rewards(tuple(int(token) for token in sequence)) for sequence in self.sequences]
        self.rewards = np.asarray(rewards, dtype=np.float64)
        if self.rewards.shape != (len(self.sequences),):
            raise ValueError(f"{self.rewards.shape} rewards for {len(self.sequences)} sequences")
        if not np.isfinite(self.rewards).all():
            worst = self.sequences[~np.isfinite(self.rewards)][0]
            raise ValueError(f"the reward of sequence {tuple(worst.tolist())} is not finite")
        self.mdp = self._make_model()

    def prefix(self, tokens: Sequence[int]) -> int:
        """Return the state that a sequence of at most L tokens leads to.

        Raises:
            ValueError: for too many tokens or one outside the vocabulary.
        """
        if len(tokens) > self.length or any(not 0 <= token < self.vocabulary_size for token in tokens):
            raise ValueError(f"{list(tokens)} is no prefix of {self.length} tokens from 0 … {self.vocabulary_size - 1}")
        state = 0
        for token in tokens:
            state = state * self.vocabulary_size + 1 + token
        return state

    def all_trajectories(self) -> Trajectories:
        """Return the V^L complete sequences as trajectories, observations being prefixes before each token."""
        observations = np.zeros_like(self.sequences)
        for position in range(1, self.length):
            before = observations[:, position - 1]
            observations[:, position] = before * self.vocabulary_size + 1 + self.sequences[:, position - 1]
        rewards = np.zeros(self.sequences.shape)
        rewards[:, -1] = self.rewards
        return as_trajectories(observations, self.sequences, rewards)

    def _make_model(self) -> TabularMDP:
        size, leaves = self.vocabulary_size, len(self.sequences)
        num_states = sum(size**length for length in range(self.length + 1))
        # Row s · V + a leads to state s · V + a + 1, so every state but the first is entered by exactly one row, and
        # the rows in order enter the complete sequences last, in lexicographic order.
        rows = np.arange(num_states - 1)
        rewards = np.zeros(num_states - 1)
        rewards[-leaves:] = self.rewards
        terminal = np.arange(num_states) >= num_states - leaves
        initial = np.arange(num_states) == 0
        return TabularMDP(Outcomes(rows, rows + 1, np.ones(num_states - 1), rewards), initial, terminal, size)
