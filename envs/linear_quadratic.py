"""Linear dynamics with quadratic costs: a continuous problem of which everything is known exactly."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov

Matrix = NDArray[np.float64]


class LinearQuadratic(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Keep a linear system near the origin with little effort.

        x' = A x + B u + w,  w ~ N(0, diag(noise²)),  r = −(xᵀQ x + uᵀR u)

    Observations are states x and actions are u. Episodes start uniformly in a box around the origin and never
    terminate; a time limit truncates them. The best policy of all is linear, u = −K x. Of every linear policy, and
    with Gaussian noise added to its actions too, the value, the expected return and its gradient are known: they are
    what agents can be tested against. D. Bertsekas, *Dynamic Programming and Optimal Control*, vol. I, 3rd ed.,
    section 4.1.

    By default it is a double integrator, a mass of 1 that is pushed along a line: x is its position and speed, u the
    force, held for half a second. Costs are such that its best forces stay below 0.5.

    The bounds of both spaces are nominal. Those of observations are the largest numbers there are; those of actions are
    for agents that need some, and an action beyond them is not clipped but applied, because a clipped system would not
    be linear. A reset with ``options={"state": x}`` starts in x.

    Attributes:
        state: ``[n]``, x; observations are it in float32.

    Args:
        dynamics: ``[n, n]``, A.
        control: ``[n, m]``, B.
        state_cost: ``[n, n]``, Q, symmetric and positive semi-definite.
        action_cost: ``[m, m]``, R, symmetric and positive definite.
        noise: the standard deviation of w, one number or ``[n]``.
        start: each episode starts in [−start, start], one number or ``[n]``.
        action_bound: the action space is [−action_bound, action_bound]^m.

    Raises:
        ValueError: if shapes do not fit, a number is not finite or out of range, or a cost is not definite as said.
    """

    def __init__(
        self,
        dynamics: ArrayLike = ((1.0, 0.5), (0.0, 1.0)),
        control: ArrayLike = ((0.125,), (0.5,)),
        state_cost: ArrayLike = ((1.0, 0.0), (0.0, 0.1)),
        action_cost: ArrayLike = ((3.0,),),
        *,
        noise: ArrayLike = 0.02,
        start: ArrayLike = 0.3,
        action_bound: float = 1.0,
    ) -> None:
        self.dynamics, self.control = _matrix("dynamics", dynamics), _matrix("control", control)
        size, actions = self.control.shape
        if self.dynamics.shape != (size, size):
            raise ValueError(f"dynamics has shape {self.dynamics.shape}; with this control it must be {(size, size)}")
        self.state_cost = _cost("state_cost", state_cost, size, definite=False)
        self.action_cost = _cost("action_cost", action_cost, actions, definite=True)
        self.noise, self.start = _widths("noise", noise, size), _widths("start", start, size)
        if not 0 < action_bound < np.inf:
            raise ValueError(f"action_bound is positive and finite, not {action_bound}")
        largest = float(np.finfo(np.float32).max)
        self.observation_space = gymnasium.spaces.Box(-largest, largest, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-action_bound, action_bound, (actions,), np.float32)
        self.state = np.zeros(size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a first state, or take ``options["state"]``, and return (it, {})."""
        super().reset(seed=seed)
        state = (options or {}).get("state")
        if state is None:
            state = self.np_random.uniform(-self.start, self.start)
        self.state = _vector("options: state", state, len(self.state))
        return self.state.astype(np.float32), {}

    def step(self, action: ArrayLike) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Apply an action ``[m]`` and return (x', r, False, False, {}).

        Raises:
            ValueError: for an action of another shape, or that is not finite.
            OverflowError: if the system has been driven beyond what an observation can say.
        """
        action = _vector("action", action, self.control.shape[1])
        reward = -(self.state @ self.state_cost @ self.state + action @ self.action_cost @ action)
        noise = self.noise * self.np_random.standard_normal(len(self.state))
        self.state = self.dynamics @ self.state + self.control @ action + noise
        if not (np.abs(self.state) <= self.observation_space.high).all():  # type: ignore[attr-defined]
            raise OverflowError(
                f"the state is {self.state}: the policy makes the system unstable; shorten episodes or limit actions"
            )
        return self.state.astype(np.float32), float(reward), False, False, {}

    def optimal_gain(self, discount: float) -> Matrix:
        """Return ``[m, n]``, the K of the best policy u = −K x of an endless task, by the discrete Riccati equation.

        K = (R + γ BᵀP B)^(−1) γ BᵀP A, where P is the fixed point of P = Q + KᵀR K + γ (A − B K)ᵀP (A − B K). Discount
        makes it the problem of √γ A and √γ B. Neither noise nor the start change it.

        Raises:
            ValueError: for a discount outside [0, 1], or if no policy has a finite value.
        """
        _check_discount(discount)
        root = np.sqrt(discount)
        try:
            cost = solve_discrete_are(root * self.dynamics, root * self.control, self.state_cost, self.action_cost)
        except np.linalg.LinAlgError as error:
            raise ValueError(f"no policy is known to be best with a discount of {discount}: {error}") from error
        return np.linalg.solve(self._curvature(cost, discount), discount * self.control.T @ cost @ self.dynamics)

    def cost_matrix(self, gain: ArrayLike, discount: float) -> Matrix:
        """Return ``[n, n]``, P = Q + KᵀR K + γ (A − B K)ᵀP (A − B K) of a policy u = −K x, by the Lyapunov equation.

        Raises:
            ValueError: if the policy does not stabilise √γ A, so that its costs grow for ever.
        """
        gain, closed = self._closed_loop(gain, discount)
        return solve_discrete_lyapunov(np.sqrt(discount) * closed.T, self.state_cost + gain.T @ self.action_cost @ gain)

    def value(
        self, states: ArrayLike, gain: ArrayLike, discount: float, action_covariance: ArrayLike | None = None
    ) -> Matrix:
        """Return the values of ``[..., n]`` states under u ~ N(−K x, Σ), in a task that never ends.

        v(x) = −xᵀP x − (tr(R Σ) + γ tr(P (W + B Σ Bᵀ))) / (1 − γ), with W = diag(noise²).

        Args:
            states: x.
            gain: ``[m, n]``, K.
            discount: γ.
            action_covariance: ``[m, m]``, Σ; 0 if not given.

        Raises:
            ValueError: if a shape does not fit or the value is not finite.
        """
        cost, states = self.cost_matrix(gain, discount), np.asarray(states, dtype=np.float64)
        covariance = self._covariance(action_covariance)
        per_step = np.sum(self.action_cost * covariance) + discount * np.sum(cost * self._disturbance(covariance))
        if discount == 1 and per_step > 0:
            raise ValueError("noise costs something in every step: without a discount, its sum is not finite")
        constant = per_step / (1 - discount) if per_step else 0.0
        return -(np.einsum("...i,ij,...j->...", states, cost, states) + constant)

    def expected_return(
        self, gain: ArrayLike, discount: float, action_covariance: ArrayLike | None = None, steps: int | None = None
    ) -> float:
        """Return E[Σ_t γ^t r_t] under u ~ N(−K x, Σ), over the distribution of the first state.

        Args:
            gain: ``[m, n]``, K.
            discount: γ.
            action_covariance: ``[m, m]``, Σ; 0 if not given.
            steps: count the first so many rewards; all if not given. They are finitely many for any K and γ.

        Raises:
            ValueError: if a shape does not fit or the return is not finite.
        """
        if steps is None:
            centre = self.value(np.zeros(len(self.start)), gain, discount, action_covariance)
            return float(centre - np.sum(self.cost_matrix(gain, discount) * self._start_covariance))
        if steps < 1:
            raise ValueError(f"steps is a number of rewards, at least 1, not {steps}")
        gain, closed = self._closed_loop(gain, discount, stable=False)
        covariance = self._covariance(action_covariance)
        moment, total = self._start_covariance, 0.0
        for step in range(steps):
            costs = np.sum(self.state_cost * moment) + np.sum(self.action_cost * (gain @ moment @ gain.T + covariance))
            total -= discount**step * costs
            moment = closed @ moment @ closed.T + self._disturbance(covariance)
        return float(total)

    def return_gradient(self, gain: ArrayLike, discount: float, action_covariance: ArrayLike | None = None) -> Matrix:
        """Return ``[m, n]``, the gradient of the expected return with respect to K, in a task that never ends.

        −2 ((R + γ BᵀP B) K − γ BᵀP A) S, with S = Σ_t γ^t E[x_t x_tᵀ]. M. Fazel et al., *Global convergence of policy
        gradient methods for the linear quadratic regulator*, 2018, lemma 1, with discount and noise.

        Raises:
            ValueError: if a shape does not fit or the return is not finite.
        """
        if not discount < 1:
            raise ValueError(f"the sum over states needs a discount below 1, not {discount}")
        cost = self.cost_matrix(gain, discount)
        gain, closed = self._closed_loop(gain, discount)
        disturbance = self._disturbance(self._covariance(action_covariance))
        entering = self._start_covariance + discount / (1 - discount) * disturbance
        moments = solve_discrete_lyapunov(np.sqrt(discount) * closed, entering)
        slope = self._curvature(cost, discount) @ gain - discount * self.control.T @ cost @ self.dynamics
        return -2 * slope @ moments

    @property
    def _start_covariance(self) -> Matrix:
        """``[n, n]``, that of a uniform distribution."""
        return np.diag(self.start**2 / 3)

    def _curvature(self, cost: Matrix, discount: float) -> Matrix:
        """Return R + γ BᵀP B, half the second derivative of the cost of an action."""
        return self.action_cost + discount * self.control.T @ cost @ self.control

    def _disturbance(self, covariance: Matrix) -> Matrix:
        """Return W + B Σ Bᵀ, the covariance of x' given x."""
        return np.diag(self.noise**2) + self.control @ covariance @ self.control.T

    def _closed_loop(self, gain: ArrayLike, discount: float, stable: bool = True) -> tuple[Matrix, Matrix]:
        """Return K and A − B K."""
        _check_discount(discount)
        gain = _matrix("gain", gain)
        if gain.shape != self.control.T.shape:
            raise ValueError(f"gain has shape {gain.shape}; it needs a row per action and a column per state variable")
        closed = self.dynamics - self.control @ gain
        radius = np.sqrt(discount) * np.abs(np.linalg.eigvals(closed)).max()
        if stable and not radius < 1:
            raise ValueError(f"this gain lets costs grow for ever: √γ (A − B K) has an eigenvalue of size {radius:.4g}")
        return gain, closed

    def _covariance(self, covariance: ArrayLike | None) -> Matrix:
        size = self.control.shape[1]
        return np.zeros((size, size)) if covariance is None else _cost("action_covariance", covariance, size, False)


def _vector(name: str, vector: ArrayLike, size: int) -> Matrix:
    vector = np.array(vector, dtype=np.float64)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise ValueError(f"{name} is {size} finite numbers, not {vector}")
    return vector


def _matrix(name: str, matrix: ArrayLike) -> Matrix:
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"{name} is a matrix of finite numbers, not {matrix}")
    return matrix


def _cost(name: str, matrix: ArrayLike, size: int, definite: bool) -> Matrix:
    matrix = _matrix(name, matrix)
    if matrix.shape != (size, size) or np.abs(matrix - matrix.T).max() > 1e-9 * np.abs(matrix).max():
        raise ValueError(f"{name} is a symmetric {size} × {size} matrix, not {matrix.tolist()}")
    smallest, largest = np.linalg.eigvalsh(matrix)[[0, -1]]
    if smallest < -1e-9 * largest or (definite and smallest <= 0):
        raise ValueError(
            f"{name} is positive {'' if definite else 'semi-'}definite, and has an eigenvalue of {smallest:.4g}"
        )
    return matrix


def _widths(name: str, widths: ArrayLike, size: int) -> Matrix:
    widths = np.array(widths, dtype=np.float64)
    if widths.shape not in ((), (size,)) or not ((widths >= 0) & (widths < np.inf)).all():
        raise ValueError(f"{name} is one number from 0, or one for each of {size} state variables, not {widths}")
    return np.broadcast_to(widths, size).copy()


def _check_discount(discount: float) -> None:
    if not 0 <= discount <= 1:
        raise ValueError(f"the discount is between 0 and 1, not {discount}")
