"""Task gradients of every awkward kind, and independent answers to test against.

Matrices are float64 on the CPU, a gradient per row; a test converts them and moves them. The answers are written from
the papers, in float64, with other means than the library has: explicit inverses, exhaustive search, certificates.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, gen: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def uniform(*shape: int, gen: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=gen, dtype=torch.float64)


def units(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True)


def projections(combined: Tensor, matrix: Tensor) -> Tensor:
    """The projection of a shared gradient onto each task's unit gradient, in float64."""
    return units(matrix.cpu()) @ combined.cpu().double()


def spread(values: Tensor) -> float:
    """The relative spread of what should all be equal."""
    return ((values.max() - values.min()) / values.abs().mean()).item()


# ---------------------------------------------------------------------------------------------------- random draws


def scaled_to(rows: Tensor, norms: Tensor) -> Tensor:
    return units(rows) * norms[:, None]


def one_factor(tasks: int, size: int, gen: torch.Generator, loadings: Tensor | None = None) -> Tensor:
    """Unit gradients with cosines of about a_s a_t: they share one direction, each to its own degree."""
    loadings = uniform(tasks, gen=gen, low=0.3, high=0.95) if loadings is None else loadings
    common = units(normal(1, size, gen=gen))
    own = units(normal(tasks, size, gen=gen))
    return units(loadings[:, None] * common + (1 - loadings**2).sqrt()[:, None] * own)


def with_ratio(tasks: int, size: int, ratio: float, gen: torch.Generator) -> Tensor:
    """Cosines of about 0.2, norms spread evenly (in the logarithm) over a ratio, in random order."""
    rows = one_factor(tasks, size, gen, torch.full((tasks,), math.sqrt(0.2), dtype=torch.float64))
    exponents = torch.linspace(0.0, math.log10(ratio), tasks, dtype=torch.float64) - 0.5 * math.log10(ratio)
    return scaled_to(rows, 10 ** exponents[torch.randperm(tasks, generator=gen)])


def log_normal(rows: Tensor, gen: torch.Generator, sigma: float = 1.0) -> Tensor:
    """The same directions with log-normal norms."""
    return scaled_to(rows, torch.exp(sigma * normal(len(rows), gen=gen)))


def from_cosines(cosines: Tensor, norms: Tensor, size: int | None = None) -> Tensor:
    """Gradients with these cosines and norms."""
    rows = torch.linalg.cholesky(cosines.double())
    if size is not None:
        rows = torch.nn.functional.pad(rows, (0, size - rows.shape[1]))
    return scaled_to(rows, norms.double())


def near_coplanar(third: float) -> Tensor:
    """Three gradients with C^-1 1 = (172, 172, -172 sqrt 2), the third's norm free: sum v is zero at sqrt 1/2."""
    w1, w3 = 172.0, -172.0 * math.sqrt(2.0)
    # From C w = 1, row 3 and row 1, for the cosines b between the third and either other, and c between these.
    b = (1 - w3) / (2 * w1)
    c = (1 - w3 * b) / w1 - 1
    cosines = torch.tensor([[1, c, b], [c, 1, b], [b, b, 1]], dtype=torch.float64)
    return from_cosines(cosines, torch.tensor([1.0, 1.0, third]))


def demand(second: float) -> Tensor:
    """Three gradients with the cosines .8, .8 and .4, of norms 1, ``second`` and 1."""
    cosines = torch.tensor([[1.0, 0.8, 0.4], [0.8, 1.0, 0.8], [0.4, 0.8, 1.0]], dtype=torch.float64)
    return from_cosines(cosines, torch.tensor([1.0, second, 1.0]))


# --------------------------------------------------------------------------------------------------- awkward inputs


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


AWKWARD: dict[str, Callable[[], Tensor]] = {
    "one task": lambda: _rows([3.0, -4.0, 1.0]),
    "one task, one number": lambda: _rows([-2.0]),
    "all zero": lambda: torch.zeros(3, 4, dtype=torch.float64),
    "one task, zero": lambda: torch.zeros(1, 4, dtype=torch.float64),
    "one of three zero": lambda: _rows([1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [3.0, -1.0, 0.5]),
    "all but one zero": lambda: _rows([0.0, 0.0], [0.0, 0.0], [3.0, -1.0]),
    "equal": lambda: _rows([1.0, -2.0, 0.5]).repeat(3, 1),
    "parallel 1, 2": lambda: _rows([1.0, -2.0, 0.5], [2.0, -4.0, 1.0]),
    "x, 3x, y": lambda: _rows([0.6, 0.8, 0.0], [1.8, 2.4, 0.0], [0.0, 0.6, 0.8]),
    "opposed 1, 1": lambda: _rows([0.7, -0.2, 0.1], [-0.7, 0.2, -0.1]),
    "opposed 1, 2": lambda: _rows([0.7, -0.2, 0.1], [-1.4, 0.4, -0.2]),
    "opposed 1, -3, and another": lambda: _rows([1.0, 0.0], [-3.0, 0.0], [0.5, 2.0]),
    "rank 2 of 4": lambda: normal(4, 2, gen=generator(3)) @ normal(2, 9, gen=generator(4)),
    "rank 1 of 3": lambda: _rows([1.0], [-2.0], [0.5]) @ _rows([0.3, -0.4, 1.2, 0.1]),
    "more tasks than dimensions": lambda: normal(7, 3, gen=generator(5)),
    "d = 1": lambda: _rows([1.0], [2.0], [-4.0]),
    "d = 1, same sign": lambda: _rows([1.0], [2.0], [4.0]),
    "near duplicates": lambda: _rows([1.0, 2.0, 3.0]).repeat(3, 1) + 1e-6 * normal(3, 3, gen=generator(6)),
    "nearly opposed": lambda: _rows([1.0, 0.0], [-2.0 * math.cos(1e-5), 2.0 * math.sin(1e-5)]),
    "scale 1e-10": lambda: 1e-10 * normal(3, 8, gen=generator(7)),
    "scale 1e15": lambda: 1e15 * normal(3, 8, gen=generator(8)),
    "norm ratio 1e12": lambda: with_ratio(4, 50, 1e12, generator(9)),
    "sum v is zero": lambda: demand(0.5),
    "sum v is negative": lambda: demand(0.4),
}


# ---------------------------------------------------------------------------------------------- independent answers


def paper_weights(matrix: Tensor) -> Tensor:
    r"""IMTL-G's weights by the paper's closed form (Liu et al. 2021, Eq. 2), in float64.

    :math:`\alpha_{2:T} = g_1 U'^\top (D U'^\top)^{-1}` with the rows :math:`u_1 - u_t` in U' and :math:`g_1 - g_t`
    in D; :math:`\alpha_1 = 1 - \sum \alpha_{2:T}`.
    """
    g = matrix.double().cpu().numpy()
    if len(g) == 1:
        return torch.ones(1, dtype=torch.float64)
    u = g / np.sqrt((g * g).sum(axis=1, keepdims=True))
    d_rows, u_rows = g[0] - g[1:], u[0] - u[1:]
    others = g[0] @ u_rows.T @ np.linalg.inv(d_rows @ u_rows.T)
    return torch.tensor([1.0 - others.sum(), *others], dtype=torch.float64)


def cancellation(matrix: Tensor) -> float:
    """sum v / sum |v| of the paper's weights, of which the denominator's share is free of the weights' scale.

    The sign is that of the common projection, which is 1 / sum v.
    """
    alpha = paper_weights(matrix)
    sign = torch.sign(projections(alpha @ matrix.double(), matrix).mean())
    return (sign / alpha.abs().sum()).item()


def hull_gap(weights: Tensor, matrix: Tensor) -> float:
    """How far from the shortest vector of the convex hull of the unit gradients a weighting is, by duality.

    For x in the hull, min over the hull of |x*|^2 >= min_t <x, u_t>, hence |x - x*|^2 <= |x|^2 - min_t <x, u_t>.
    It is zero for the shortest vector, and for no other.
    """
    matrix = matrix.double().cpu()
    norms = torch.linalg.vector_norm(matrix, dim=1)
    shares = weights.double().cpu() * norms
    if not (shares >= 0).all() or shares.sum() == 0:
        return math.inf
    point = (shares / shares.sum()) @ units(matrix)
    return (point @ point - (units(matrix) @ point).min()).item()


def shortest_in_hull(matrix: Tensor) -> Tensor:
    """The shortest vector of the convex hull of the unit gradients, by trying every active set.

    By Caratheodory's theorem the shortest vector lies in the relative interior of the hull of affinely independent
    rows, where it is the shortest vector of their *affine* hull. So: of all subsets of at most rank + 1 rows whose
    affine hull's shortest vector has no negative weight, the one with the shortest.
    """
    u = units(matrix.cpu()).numpy()
    tasks = len(u)
    gram = u @ u.T
    largest = min(tasks, np.linalg.matrix_rank(u) + 1)
    best, best_square = u[0], 1.0
    for size in range(1, largest + 1):
        subsets = np.array(list(itertools.combinations(range(tasks), size)))
        blocks = gram[subsets[:, :, None], subsets[:, None, :]]
        system = np.zeros((len(subsets), size + 1, size + 1))
        system[:, :size, :size] = blocks
        system[:, :size, size] = system[:, size, :size] = 1.0
        right = np.zeros((size + 1, 1))
        right[size] = 1.0
        shares = (np.linalg.pinv(system, rcond=1e-13) @ right)[:, :size, 0]
        for index in np.flatnonzero((shares > -1e-12).all(axis=1) & (abs(shares.sum(axis=1) - 1) < 1e-9)):
            share = shares[index].clip(min=0)
            point = (share / share.sum()) @ u[subsets[index]]
            if point @ point < best_square:
                best, best_square = point, point @ point
    return torch.from_numpy(np.ascontiguousarray(best))
