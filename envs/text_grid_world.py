"""A grid world that is read and answered in words."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from aligngym.envs.grid_map import FORBIDDEN, WALL, ZHAO_MAP, GridMap
from aligngym.envs.grid_rendering import map_text
from aligngym.envs.grid_world import GridWorld
from aligngym.envs.tabular_mdp import TabularMDP

#: What the actions of a grid are called.
WORDS = ("up", "right", "down", "left", "stay")

#: Characters of an answer that are read; a longer one is an answer too, and read as well.
LONGEST_ANSWER = 256


class TextGridWorld(gymnasium.Env[str, str]):
    """Walk on a grid by answering its map, drawn in characters with ``@`` for the walker, with the word of a move.

    The first observation of an episode begins with the rules; later ones are the map alone. An answer is a move if
    exactly one of its words, in upper or lower case, is the name of one: "Left.", "I move left". Any other answer is
    invalid: the walker stays, and the answer costs like a bump. What the world does is left to a :class:`GridWorld`,
    with whose seeds it shares starts and slips, so that its exact optimum is that of the grid.

    ``info`` says in which ``state`` the walker is, whether the answer was ``invalid``, and whether it ``is_success``:
    the walker is on a target.

    Attributes:
        grid: the world behind the words, with its exact model ``grid.mdp``, which is ``mdp`` here as well.
        words: the name of every action of the grid.
        rules: what stands before the first map of an episode.

    Args:
        map: see :class:`GridWorld`.
        max_steps: answers after which an episode is truncated; by default the number of cells, more than any shortest
            path has steps.
        words: other names of the actions, in their order, such as single letters for a model of a few tokens.
        rules: another text before the first map, or ``""`` for none.
        separator: stands between two cells of a row. A blank makes every cell a token of its own for most tokenizers,
            which otherwise see "..#" as one.
        invalid_reward: what an invalid answer pays; by default ``step_reward`` or ``boundary_reward``, whichever is
            less.
        render_mode: ``"ansi"``, the map as text.
        options: of :class:`GridWorld`: its slip, its rewards.

    Raises:
        ValueError: for bad words or a bad number of steps, if somewhere an invalid answer would do better than every
            move, and what :class:`GridWorld` raises.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's own name)

    def __init__(
        self,
        map: str | GridMap = ZHAO_MAP,
        *,
        max_steps: int | None = None,
        words: Sequence[str] | None = None,
        rules: str | None = None,
        separator: str = " ",
        invalid_reward: float | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is ansi or None, not {render_mode!r}")
        self.grid = GridWorld(map, **options)
        self.max_steps = self.grid.mdp.num_states if max_steps is None else max_steps
        if self.max_steps < 1:
            raise ValueError(f"max_steps is at least 1, or None, not {max_steps}")
        self.words = tuple(WORDS[: self.grid.num_actions] if words is None else words)
        self._check_words()
        self.separator, self.render_mode = separator, render_mode
        self.rules = self._default_rules() if rules is None else rules
        bump = min(self.grid.step_reward, self.grid.boundary_reward)
        self.invalid_reward = bump if invalid_reward is None else invalid_reward
        self._values = self._steps_to_go(lambda action_values: action_values.max(axis=1))
        self._refuse_profitable_silence()
        self.steps = 0
        longest = self.rules + "\n" + self.text_of(0)
        self.observation_space = spaces.Text(len(longest), charset=frozenset(longest) | {"@", *str(self.grid.map)})
        self.action_space = spaces.Text(LONGEST_ANSWER, min_length=0, charset=string.printable)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start where the grid starts with this seed, or in ``options["state"]``, and return the rules and the map."""
        super().reset(seed=seed)
        self.grid.reset(seed=seed, options=options)
        self.steps = 0
        return self.opening + self.text_of(self.state), self._info(invalid=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Read an answer and move."""
        move = self.move_of(action)
        reward, terminated = float(self.invalid_reward), False
        if move is not None:
            _, reward, terminated, _, _ = self.grid.step(move)
        self.steps += 1
        truncated = self.steps >= self.max_steps and not terminated
        return self.text_of(self.state), reward, terminated, truncated, self._info(invalid=move is None)

    def render(self) -> Any:
        """Return the map."""
        return self.text_of(self.state)

    # What words stand for.

    def move_of(self, answer: str) -> int | None:
        """Return the number of the one move that an answer names, ``None`` if it names none or several."""
        numbers = {word.casefold(): number for number, word in enumerate(self.words)}
        named = [numbers[word] for word in re.findall(r"\w+", answer.casefold()) if word in numbers]
        return named[0] if len(named) == 1 else None

    def text_of(self, state: int) -> str:
        """Return the map with the walker in a state."""
        return "\n".join(map(self.separator.join, map_text(self.grid.map, state).split("\n")))

    def state_of(self, text: str) -> int:
        """Return the state that an observation shows, with or without the rules before it.

        Raises:
            ValueError: if it is no observation of this world.
        """
        if text not in self._numbers:
            raise ValueError(f"{text!r} is no map of this world")
        return self._numbers[text]

    @property
    def opening(self) -> str:
        """What stands before the first map of an episode: the rules on lines of their own."""
        return f"{self.rules}\n" if self.rules else ""

    @property
    def state(self) -> int:
        """Where the walker is."""
        return self.grid.state

    @property
    def mdp(self) -> TabularMDP:
        """The exact model, without invalid answers."""
        return self.grid.mdp

    # What is attainable.

    @property
    def optimal_return(self) -> float:
        """The greatest expected undiscounted return of an episode of ``max_steps``, exactly."""
        return float(self.mdp.initial @ self._values[-1])

    def exact_return(self, policy: ArrayLike) -> float:
        """Return the expected undiscounted return of an episode under π(a|s), ``[S, A]`` probabilities.

        Raises:
            ValueError: if it is no policy of this model.
        """
        table = np.asarray(policy, dtype=np.float64)
        shape = self.mdp.rewards.shape
        if table.shape != shape or (table < 0).any() or not np.allclose(table.sum(axis=1), 1):
            raise ValueError(f"a policy is {shape} probabilities with rows that sum to one, not {table.shape} of these")
        return float(self.mdp.initial @ self._steps_to_go(lambda q: (table * q).sum(axis=1))[-1])

    def _steps_to_go(self, backup: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return ``[max_steps + 1, S]``, the values of every state with 0, 1, … steps to go."""
        values = [np.zeros(self.mdp.num_states)]
        for _ in range(self.max_steps):
            values.append(np.where(self.mdp.terminal, 0.0, backup(self.mdp.action_values(values[-1], 1.0))))
        return np.array(values)

    def _refuse_profitable_silence(self) -> None:
        silent = np.where(self.mdp.terminal, 0.0, self.invalid_reward + self._values[:-1])
        gain = silent - self._values[1:]
        if not np.isfinite(self.invalid_reward) or gain.max() > 1e-9:
            steps, state = np.unravel_index(gain.argmax(), gain.shape)
            raise ValueError(
                f"an invalid answer that pays {self.invalid_reward} would do better than every move in state {state} "
                f"with {steps + 1} steps to go, and the optimum would not be the grid's: lower invalid_reward"
            )

    def _check_words(self) -> None:
        if len(self.words) != self.grid.num_actions:
            raise ValueError(f"words are {len(self.words)} names {self.words} for {self.grid.num_actions} actions")
        for word in self.words:
            if not re.fullmatch(r"\w+", word):
                raise ValueError(f"words are single words of letters or digits, and one is {word!r}")
        if len({word.casefold() for word in self.words}) < len(self.words):
            raise ValueError(f"words must differ in more than case, and are {self.words}")

    def _default_rules(self) -> str:
        rows = str(self.grid.map)
        signs = [", # is a wall" * (WALL in rows), f", {FORBIDDEN} is forbidden" * (FORBIDDEN in rows)]
        *others, last = self.words
        return f"Walk @ to G{''.join(signs)}. Answer {', '.join(others)} or {last}."

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The state that every text shows."""
        texts = [self.text_of(state) for state in range(self.mdp.num_states)]
        return {begin + text: number for begin in ("", self.opening) for number, text in enumerate(texts)}

    def _info(self, *, invalid: bool) -> dict[str, Any]:
        return {"state": self.state, "invalid": invalid, "is_success": bool(self.grid.map.target[self.state])}


class NumberedText(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Show the number of the state instead of its text, and answer with the name of an action instead of its number.

    With it an agent on numbered states acts, and learns, in a text world.

    Args:
        env: an environment with ``state_of(text)``, ``words`` and an exact model: a :class:`TextGridWorld`.

    Raises:
        TypeError: for another environment.
    """

    def __init__(self, env: gymnasium.Env[str, str]) -> None:
        super().__init__(env)
        _check_numbered(env)
        self.observation_space = spaces.Discrete(TabularMDP.from_env(env).num_states)
        self.action_space = spaces.Discrete(len(env.get_wrapper_attr("words")))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Begin an episode and return (the number of its first state, info)."""
        text, info = self.env.reset(seed=seed, options=options)
        return self.get_wrapper_attr("state_of")(text), info

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Answer with the name of ``action``."""
        text, reward, terminated, truncated, info = self.env.step(self.get_wrapper_attr("words")[int(action)])
        return self.get_wrapper_attr("state_of")(text), float(reward), terminated, truncated, info


def text_player(act: Callable[[int], Any], env: gymnasium.Env[str, str]) -> Callable[[str], str]:
    """Return a player of a text world that does what an agent on its numbered states would do.

    Args:
        act: gives the number of an action for the number of a state, such as the ``act`` of an agent.
        env: see :class:`NumberedText`; it is asked what texts stand for, and not stepped.

    Raises:
        TypeError: for another environment.
    """
    _check_numbered(env)
    state_of, words = env.get_wrapper_attr("state_of"), env.get_wrapper_attr("words")
    return lambda text: words[int(act(state_of(text)))]


def _check_numbered(env: gymnasium.Env[str, str]) -> None:
    for name in ("state_of", "words", "mdp"):
        if not env.has_wrapper_attr(name):
            raise TypeError(f"{env} has no {name}: only texts that stand for numbered states can be played by number")
