"""Jack's car rental."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainc, gammaln, xlogy

from aligngym.envs.outcomes import Outcomes
from aligngym.envs.tabular_env import TabularEnv
from aligngym.envs.tabular_mdp import TabularMDP


class JacksCarRental(TabularEnv):
    """Two locations rent out cars, and overnight cars can be moved from one to the other. It never ends.

    A state is (n₁, n₂), the cars at either location in the evening, numbered n₁ · (max_cars + 1) + n₂. Action a moves
    a − max_moved cars from the first location to the second, or the other way where that is negative; more cars than
    there are count as all of them. On the next day Poisson numbers of cars are requested, as many rented out as there
    are, and then Poisson numbers returned, to be rented from the day after. Cars above max_cars, moved or returned,
    leave the problem. The reward is rent · cars rented − move_cost · cars moved.

    The book's numbers are the defaults; its discount is 0.9. R. Sutton and A. Barto, *Reinforcement Learning*, 2nd ed.,
    example 4.2.

    A step draws requests and returns. The model has the exact p(s' | s, a), the whole tail of the Poisson distributions
    included, and the expected reward r(s, a) instead of a distribution of rewards: rewards of single steps differ from
    it. Since the locations are independent once the cars have been moved, p(s' | s, a) is a product of two factors.

    Args:
        max_cars: at each location, at least 1.
        max_moved: cars that can be moved in a night, at least 1 and at most ``max_cars``.
        request_means: cars requested a day at each location.
        return_means: cars returned a day at each location.
        rent: income from a car.
        move_cost: of a car.

    Raises:
        ValueError: for numbers out of these ranges, negative means, or money that is not finite.
    """

    def __init__(
        self,
        max_cars: int = 20,
        *,
        max_moved: int = 5,
        request_means: tuple[float, float] = (3.0, 4.0),
        return_means: tuple[float, float] = (3.0, 2.0),
        rent: float = 10.0,
        move_cost: float = 2.0,
    ) -> None:
        if not 1 <= max_moved <= max_cars:
            raise ValueError(f"max_moved is from 1 to max_cars, and {max_moved} and {max_cars} were given")
        for name, means in (("request_means", request_means), ("return_means", return_means)):
            if np.shape(means) != (2,) or not all(np.isfinite(means)) or min(means) < 0:
                raise ValueError(f"{name} are two numbers of cars a day, not negative, and not {means}")
        if not np.isfinite([rent, move_cost]).all():
            raise ValueError(f"rent and move_cost are amounts of money, and {rent} and {move_cost} are not both finite")
        self.max_cars, self.max_moved = max_cars, max_moved
        self.request_means, self.return_means = np.array(request_means), np.array(return_means)
        self.rent, self.move_cost = rent, move_cost
        super().__init__(self._make_model())

    def cars(self, state: Any) -> tuple[Any, Any]:
        """Return (n₁, n₂) of a state, or of an array of states."""
        return divmod(state, self.max_cars + 1)

    def moved(self, state: Any, action: Any) -> Any:
        """Return how many cars an action really moves from the first location to the second."""
        first, second = self.cars(state)
        return np.clip(np.asarray(action) - self.max_moved, -second, first)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Let a night and a day pass; ``info`` tells how many cars were moved, rented and returned."""
        if not 0 <= action < self.mdp.num_actions:
            raise ValueError(f"action {action} is not one of 0 … {self.mdp.num_actions - 1}")
        moved = int(self.moved(self.state, action))
        first, second = self.cars(self.state)
        morning = min(first - moved, self.max_cars), min(second + moved, self.max_cars)
        requested = self.np_random.poisson(self.request_means).tolist()
        returned = self.np_random.poisson(self.return_means).tolist()
        rented = [min(pair) for pair in zip(requested, morning, strict=True)]
        first, second = (
            min(cars - out + back, self.max_cars) for cars, out, back in zip(morning, rented, returned, strict=True)
        )
        self.state = first * (self.max_cars + 1) + second
        reward = self.rent * sum(rented) - self.move_cost * abs(moved)
        return self.state, float(reward), False, False, {"moved": moved, "rented": rented, "returned": returned}

    def _make_model(self) -> TabularMDP:
        size = self.max_cars + 1
        states, actions = np.arange(size**2)[:, None], np.arange(2 * self.max_moved + 1)
        moved = self.moved(states, actions)
        first, second = self.cars(states)
        days = [one_day(*means, self.max_cars) for means in zip(self.request_means, self.return_means, strict=True)]
        mornings = np.minimum(first - moved, self.max_cars), np.minimum(second + moved, self.max_cars)
        rented = days[0][1][mornings[0]] + days[1][1][mornings[1]]
        rewards = self.rent * rented - self.move_cost * np.abs(moved)
        evenings = days[0][0][mornings[0]][..., :, None] * days[1][0][mornings[1]][..., None, :]
        outcomes = Outcomes(
            np.repeat(np.arange(moved.size), size**2),
            np.tile(np.arange(size**2), moved.size),
            evenings.ravel(),
            np.repeat(rewards.ravel(), size**2),
        )
        return TabularMDP(outcomes, np.full(size**2, 1 / size**2), np.zeros(size**2, dtype=bool), len(actions))


def one_day(request_mean: float, return_mean: float, max_cars: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what a day does to one location with C cars at most.

    Args:
        request_mean: λ of the Poisson distribution of requests.
        return_mean: λ of the Poisson distribution of returns.
        max_cars: C.

    Returns:
        ``[C + 1, C + 1]``, p(cars in the evening | cars in the morning), and ``[C + 1]``, the expected number of cars
        rented out for each number of cars in the morning.
    """
    size = max_cars + 1
    # Of n cars, n − k are left if k < n are requested, and none if n or more are.
    left, rented = np.zeros((size, size)), np.zeros(size)
    returned = np.zeros((size, size))
    for cars in range(size):
        requests = _poisson_up_to(request_mean, cars)
        left[cars, : cars + 1] = requests[::-1]
        rented[cars] = requests @ np.arange(cars + 1)
        returned[cars, cars:] = _poisson_up_to(return_mean, max_cars - cars)
    return left @ returned, rented


def _poisson_up_to(mean: float, most: int) -> NDArray[np.float64]:
    """Return the probabilities of 0 … most, the last of which stands for that number and all above."""
    counts = np.arange(most + 1)
    probabilities = np.exp(xlogy(counts, mean) - mean - gammaln(counts + 1))
    probabilities[most] = gammainc(most, mean) if most else 1.0
    return probabilities
