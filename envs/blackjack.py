"""Blackjack with its exact model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.blackjack import BlackjackEnv, is_natural
from numpy.typing import NDArray

from aligngym.envs.numbered_states import NumberedStates
from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP

STICK, HIT = 0, 1

#: Of a card from an infinite deck, by its value; the ace is 1, and ten, jack, queen and king are 10.
CARDS = np.array([0.0, *[1 / 13] * 9, 4 / 13])

BUST = 22
#: The dealer's results: 17 … 21, and 22 for a bust.
RESULTS = np.arange(17, BUST + 1)


class Blackjack(TabularEnv):
    """Gymnasium's ``Blackjack-v1`` with numbered states and its exact model. Undiscounted.

    The game is Gymnasium's own: actions are 0 stick and 1 hit, cards come from an infinite deck, the dealer sticks on
    17 or more. A state is 22 · sum + 2 · dealer's card + usable ace, as :class:`NumberedStates` has it. Two things are
    added, without which the observations are not a Markov decision process:

    - A natural, an ace and a ten at once, is worth more than other hands of 21, which Gymnasium shows as the same. It
      is state 704 + dealer's card.
    - State 715 is the end. It is observed after the last step, whatever the cards.

    Numbers that stand for no hand (a sum below 4 or above 21, a dealer's card of 0, a usable ace in a hand of less
    than 12) count as terminal in the model. A reset with ``options={"state": s}`` starts with that hand.
    R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed., example 5.1.

    Attributes:
        mdp: the exact model.
        game: Gymnasium's environment.

    Args:
        sab: the rules of Sutton and Barto: a natural wins unless the dealer has one too, which is a draw.
        natural: without ``sab``, whether winning with a natural pays 1.5; it does not beat another 21 of the dealer.
    """

    #: The first of the naturals, by the dealer's card, and the end.
    naturals, end = 704, 715

    def __init__(self, sab: bool = True, natural: bool = False) -> None:
        self.sab, self.natural = sab, natural
        self.game = BlackjackEnv(sab=sab, natural=natural)
        self._numbers = NumberedStates(self.game)
        super().__init__(self._make_model())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Deal, or take the hand of ``options["state"]`` and deal the dealer's second card."""
        # Not TabularEnv's reset, which would draw a state: the game deals.
        gymnasium.Env.reset(self, seed=seed)
        self.game.np_random = self.np_random
        self.game.reset()
        start = (options or {}).get("state")
        if start is not None:
            if not 0 <= start <= self.end or self.mdp.terminal[start]:
                raise ValueError(f"options: state {start} is no hand to start with; Blackjack.number tells which are")
            self.game.player, self.game.dealer[0] = self._hand(int(start))
        self.state = self._observe()
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Stick or hit."""
        if action not in (STICK, HIT):
            raise ValueError(f"action {action} is neither {STICK} stick nor {HIT} hit")
        _, reward, terminated, truncated, info = self.game.step(int(action))
        self.state = self.end if terminated else self._observe()
        return self.state, float(reward), terminated, truncated, info

    def number(self, player_sum: int, dealer_card: int, usable_ace: bool = False, *, natural: bool = False) -> int:
        """Return the number of a hand; a natural is ``number(21, dealer_card, True, natural=True)``.

        Raises:
            ValueError: if there is no such hand.
        """
        lowest = 21 if natural else 12 if usable_ace else 4
        if not (lowest <= player_sum <= 21 and 1 <= dealer_card <= 10 and usable_ace >= natural):
            kind = "a natural" if natural else "a usable ace" if usable_ace else "no usable ace"
            raise ValueError(f"no hand with {kind} has the sum {player_sum} beside the dealer's card {dealer_card}")
        return self.naturals + dealer_card if natural else 22 * player_sum + 2 * dealer_card + usable_ace

    def _observe(self) -> int:
        if is_natural(self.game.player):
            return self.naturals + self.game.dealer[0]
        return self._numbers.observation(self.game._get_obs())

    def _hand(self, state: int) -> tuple[list[int], int]:
        """Return cards that make a state, and the dealer's card."""
        if state >= self.naturals:
            return [1, 10], state - self.naturals
        player_sum, dealer_card, usable_ace = self._numbers.digits(state)
        if usable_ace:
            # A 21 of two cards would be a natural.
            return [1, 5, 5] if player_sum == 21 else [1, player_sum - 11], dealer_card
        high = min(10, player_sum - 2)
        return [10, 9, 2] if player_sum == 21 else [high, player_sum - high], dealer_card

    def _make_model(self) -> TabularMDP:
        rows, next_states, probabilities, rewards = [], [], [], []
        initial, terminal = np.zeros(self.end + 1), np.ones(self.end + 1, dtype=bool)
        for total, usable_ace, natural, dealt in _hands():
            for dealer_card in range(1, 11):
                state = self.number(total, dealer_card, usable_ace, natural=natural)
                initial[state], terminal[state] = dealt * CARDS[dealer_card], False
                for probability, reward in self._endings(total, dealer_card, natural):
                    rows.append(2 * state + STICK)
                    next_states.append(self.end)
                    probabilities.append(probability)
                    rewards.append(reward)
                for card in range(1, 11):
                    after, ace = add_card(total, usable_ace, card)
                    rows.append(2 * state + HIT)
                    next_states.append(self.end if after > 21 else self.number(after, dealer_card, ace))
                    probabilities.append(CARDS[card])
                    rewards.append(-1.0 if after > 21 else 0.0)
        columns = (np.array(column) for column in (rows, next_states, probabilities, rewards))
        return TabularMDP(Outcomes(*columns), initial, terminal, 2)

    def _endings(self, total: int, dealer_card: int, natural: bool) -> list[tuple[float, float]]:
        """Return the probabilities and rewards of winning, drawing and losing after sticking."""
        results = dealer_results(*add_card(0, False, dealer_card))
        drawn = float(results[total == RESULTS].sum())
        if natural and self.sab:
            # Only a natural of the dealer's, whose other card is the ten or the ace that does not show.
            drawn = float(CARDS[11 - dealer_card]) if dealer_card in (1, 10) else 0.0
            return [(1 - drawn, 1.0), (drawn, 0.0)]
        won = float(results[(total > RESULTS) | (RESULTS == BUST)].sum())
        lost = float(results[(total < RESULTS) & (RESULTS < BUST)].sum())
        return [(won, 1.5 if natural and self.natural else 1.0), (drawn, 0.0), (lost, -1.0)]


def add_card(total: int, usable_ace: bool, card: int) -> tuple[int, bool]:
    """Return the sum of a hand with one more card, and whether an ace counts 11 in it; it does if it can."""
    least, has_ace = total - 10 * usable_ace + card, usable_ace or card == 1
    return (least + 10, True) if has_ace and least <= 11 else (least, False)


@lru_cache
def dealer_results(total: int, usable_ace: bool) -> NDArray[np.float64]:
    """Return ``[6]``, the probabilities of :data:`RESULTS` for a dealer who holds this and draws below 17."""
    if total >= 17:
        return np.equal(min(total, BUST), RESULTS).astype(np.float64)
    return sum((CARDS[card] * dealer_results(*add_card(total, usable_ace, card)) for card in range(1, 11)), np.zeros(6))


def _hands() -> Iterator[tuple[int, bool, bool, float]]:
    """Yield all hands of the player: sum, usable ace, natural, and the probability of being dealt it."""
    dealt: dict[tuple[int, bool], float] = {}
    for first, second in product(range(1, 11), repeat=2):
        hand = add_card(*add_card(0, False, first), second)
        dealt[hand] = dealt.get(hand, 0.0) + float(CARDS[first] * CARDS[second])
    # Two cards make 21 only as a natural.
    yield 21, True, True, dealt.pop((21, True))
    for usable_ace in (False, True):
        for total in range(12 if usable_ace else 4, 22):
            yield total, usable_ace, False, dealt.get((total, usable_ace), 0.0)
