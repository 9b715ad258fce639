import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from aligngym.core.conjugate_gradient import conjugate_gradient


def random_matrix(size, *, rank=None, seed=0, dtype=torch.float64):
    """A random symmetric matrix with ``rank`` eigenvalues between 1 and 10, and otherwise 0."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = torch.linspace(1, 10, size, dtype=torch.float64)
    eigenvalues[size if rank is None else rank :] = 0
    return (basis * eigenvalues @ basis.T).to(dtype)


def random_vector(size, seed=1, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_as_many_steps_as_equations_solve_them(size):
    matrix, vector = random_matrix(size), random_vector(size)
    before = vector.clone()
    expected = torch.linalg.solve(matrix, vector)
    solution = conjugate_gradient(lambda v: matrix @ v, vector, iterations=size)
    torch.testing.assert_close(solution, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(vector, before)
    if size > 1:
        early = conjugate_gradient(lambda v: matrix @ v, vector, iterations=1)
        assert (early - expected).norm() > 0.1 * expected.norm()


def test_as_many_steps_as_different_eigenvalues_are_enough():
    basis, _ = torch.linalg.qr(random_vector(100).reshape(10, 10))
    matrix = basis * torch.tensor([1.0, 1, 1, 1, 5, 5, 5, 20, 20, 20]).double() @ basis.T
    vector, calls = random_vector(10), []

    def product(v):
        calls.append(v)
        return matrix @ v

    solution = conjugate_gradient(product, vector, iterations=10)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, vector), rtol=1e-10, atol=1e-10)
    assert len(calls) == 3
    # Directions are conjugate: vᵢᵀA vⱼ = 0.
    directions = torch.stack(calls)
    curvatures = directions @ matrix @ directions.T
    torch.testing.assert_close(curvatures, curvatures.diag().diag(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 5, 11])
def test_every_iterate_is_scipys(iterations):
    matrix, vector = random_matrix(20, seed=3), random_vector(20, seed=4)
    expected, _ = scipy.sparse.linalg.cg(matrix.numpy(), vector.numpy(), rtol=1e-14, maxiter=iterations)
    solution = conjugate_gradient(lambda v: matrix @ v, vector, iterations)
    np.testing.assert_allclose(solution.numpy(), expected, rtol=1e-10)


def test_every_iterate_minimises_over_its_krylov_space():
    matrix, vector = random_matrix(12, seed=5), random_vector(12, seed=6)
    for iterations in (1, 3, 6):
        krylov = torch.stack([torch.linalg.matrix_power(matrix, k) @ vector for k in range(iterations)], dim=1)
        space, _ = torch.linalg.qr(krylov)
        expected = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ vector)
        solution = conjugate_gradient(lambda v: matrix @ v, vector, iterations)
        torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_a_singular_system_with_a_solution_is_solved_with_the_least_norm(rank, dtype, accuracy):
    # Many more iterations than are needed: what is left of the residual is rounding, and must do no harm.
    for seed in range(20):
        matrix = random_matrix(20, rank=rank, seed=seed, dtype=dtype)
        vector = matrix @ random_vector(20, seed=seed + 100, dtype=dtype)
        solution = conjugate_gradient(lambda v: matrix @ v, vector, 200, 0.0)  # noqa: B023 (called at once)
        expected = torch.linalg.pinv(matrix, rtol=1e-5) @ vector
        assert (solution - expected).norm() <= accuracy * expected.norm()


def test_it_stops_at_the_tolerance():
    matrix, vector = random_matrix(50, seed=7), random_vector(50, seed=8)
    residuals = []
    for tolerance in (1e-1, 1e-4, 1e-8):
        calls = []

        def product(v, calls=calls):
            calls.append(1)
            return matrix @ v

        solution = conjugate_gradient(product, vector, 1000, tolerance)
        residual = float((vector - matrix @ solution).norm() / vector.norm())
        assert residual <= 1.01 * tolerance
        one_less = conjugate_gradient(lambda v: matrix @ v, vector, len(calls) - 1, tolerance)
        assert (vector - matrix @ one_less).norm() > tolerance * vector.norm()
        residuals.append(residual)
    assert residuals[0] > residuals[1] > residuals[2]
    # The tolerance is relative, so scaling the vector by 2ⁿ scales the result and changes nothing else.
    solution = conjugate_gradient(lambda v: matrix @ v, vector, 100, 1e-4)
    for scale in (2.0**-600, 2.0**-60, 2.0**40, 2.0**600):
        assert torch.equal(conjugate_gradient(lambda v: matrix @ v, scale * vector, 100, 1e-4), scale * solution)


def test_nothing_is_solved_by_nothing():
    assert torch.equal(conjugate_gradient(lambda v: 2 * v, torch.zeros(3)), torch.zeros(3))


def test_hessian_vector_products_by_autograd_are_products():
    weights = random_vector(6, seed=9).requires_grad_()
    features = random_vector(60, seed=10).reshape(10, 6)
    loss = torch.nn.functional.softplus(features @ weights).sum()
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)

    def product(v):
        return torch.autograd.grad(gradient @ v, weights, retain_graph=True)[0]

    solution = conjugate_gradient(product, gradient)
    slope = torch.sigmoid(features @ weights.detach())
    hessian = features.T * (slope * (1 - slope)) @ features
    torch.testing.assert_close(solution, torch.linalg.solve(hessian, gradient.detach()))
    assert not solution.requires_grad
    # Nor does a product that is differentiable itself make the result so.
    trained = hessian.clone().requires_grad_()
    assert not conjugate_gradient(lambda v: trained @ v, gradient).requires_grad


def test_curvature_that_is_not_positive_is_refused():
    for diagonal, iteration in [([-1.0, -1.0], 0), ([1.0, -1.0], 0), ([4.0, -1.0], 1), ([4.0, 1.0, -1e-3], 2)]:
        matrix = torch.tensor(diagonal)
        with pytest.raises(FloatingPointError, match=f"iteration {iteration}: the curvature .* add damping"):
            conjugate_gradient(lambda v: matrix * v, torch.ones(len(diagonal)))  # noqa: B023 (called at once)
    # No solution: the vector is outside the range.
    for diagonal in ([0.0, 0.0, 0.0], [1.0, 2.0, 0.0]):
        matrix = torch.tensor(diagonal)
        with pytest.raises(FloatingPointError, match="not positive definite"):
            conjugate_gradient(lambda v: matrix * v, torch.ones(3))  # noqa: B023 (called at once)
        # Damping, as the message says, makes it solvable.
        solution = conjugate_gradient(lambda v: matrix * v + 0.5 * v, torch.ones(3))  # noqa: B023 (called at once)
        torch.testing.assert_close(solution, 1 / (matrix + 0.5))


def test_bad_input_is_refused():
    ones = torch.ones(3)
    for vector, options, error, message in [
        (torch.ones(3, dtype=torch.int64), {}, TypeError, "vector holds torch.int64"),
        (torch.ones(3, 1), {}, ValueError, r"flat, not of shape \(3, 1\)"),
        (torch.tensor([1.0, torch.nan]), {}, FloatingPointError, "entry 1 of vector is nan"),
        (ones, {"iterations": 0}, ValueError, "at least 1, not 0"),
        (ones, {"tolerance": -1.0}, ValueError, "at least 0, not -1"),
        (ones, {"tolerance": float("nan")}, ValueError, "at least 0, not nan"),
    ]:
        with pytest.raises(error, match=message):
            conjugate_gradient(lambda v: v, vector, **options)
    with pytest.raises(ValueError, match=r"shape \(2,\) for one of \(3,\)"):
        conjugate_gradient(lambda v: v[:2], ones)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="iteration 0: vᵀA v is"):
            conjugate_gradient(lambda v: v * bad, ones)  # noqa: B023 (called at once)
