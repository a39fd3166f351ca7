"""Slow, obvious versions of the games, estimators and scorers, written from their definitions."""

import itertools
import math
from collections.abc import Callable

import numpy as np

from llmattrib.rng import stream


def random_game(n: int, p: int, seed: int, c: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features and random signs."""
    draws = stream(seed, "test game", n, p)
    return draws.standard_normal((n, p)), np.sign(draws.standard_normal((n, c)))


def gradient_like_game(n: int, p: int, seed: int, c: int = 1, common: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows with a decaying spectrum and a shared direction; responses that features partly explain."""
    draws = stream(seed, "gradient-like game", n, p)
    features = draws.standard_normal((n, p)) * np.arange(1, p + 1) ** -0.5 + common
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features, np.sign(features @ draws.standard_normal((p, c)) + draws.standard_normal((n, c)))


def subset_weights(features: np.ndarray, responses: np.ndarray, lam: float, members: list[int]) -> np.ndarray:
    """Ridge regression on the members alone: [c, p]."""
    rows = features[members]
    return np.linalg.solve(rows.T @ rows + lam * np.eye(rows.shape[1]), rows.T @ responses[members]).T


def enumerate_semivalue(
    features: np.ndarray, responses: np.ndarray, lam: float, weight: Callable[[int], float]
) -> np.ndarray:
    """Sum weight(|S|) (w_{S+i} - w_S) over all subsets S without i: [n, c, p]."""
    n = len(features)
    weights = {
        members: subset_weights(features, responses, lam, list(members))
        for size in range(n + 1)
        for members in itertools.combinations(range(n), size)
    }
    values = np.zeros((n, responses.shape[1], features.shape[1]))
    for members, before in weights.items():
        for player in set(range(n)) - set(members):
            after = weights[tuple(sorted((*members, player)))]
            values[player] += weight(len(members)) * (after - before)
    return values


def enumerate_shapley(features: np.ndarray, responses: np.ndarray, lam: float) -> np.ndarray:
    n = len(features)
    return enumerate_semivalue(features, responses, lam, lambda size: 1 / (n * math.comb(n - 1, size)))


def bernoulli_weight(n: int, q: float) -> Callable[[int], float]:
    """Chance of a given set of that size among n - 1 others, each present with probability q."""
    return lambda size: q**size * (1 - q) ** (n - 1 - size)


def permutation_shapley(
    features: np.ndarray, responses: np.ndarray, lam: float, num_permutations: int, seed: int, batch: int = 250
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over permutations of prefix differences w_k - w_{k-1}: [n, p] each; one response.

    With K + lam I = L L^T in the order of the permutation, w_k - w_{k-1} = (L^-1 Phi)_k (L^-1 y)_k. Each prefix is
    solved exactly; a batch of permutations goes through the triangular solves together.
    """
    n, p = features.shape
    draws = stream(seed, "permutations")
    kernel = features @ features.T + lam * np.eye(n)
    total, square = np.zeros((n, p)), np.zeros((n, p))
    for start in range(0, num_permutations, batch):
        orders = np.stack([draws.permutation(n) for _ in range(min(batch, num_permutations - start))])
        lower = np.linalg.cholesky(kernel[orders[:, :, None], orders[:, None, :]])
        solved = np.concatenate([features[orders], responses[orders]], axis=2)  # columns: Phi, then y
        for k in range(n):
            solved[:, k] -= np.matmul(lower[:, k, None, :k], solved[:, :k])[:, 0]
            solved[:, k] /= lower[:, k, k, None]
        steps = solved[:, :, :p] * solved[:, :, p:]
        for order, step in zip(orders, steps, strict=True):
            total[order] += step
            square[order] += step**2
    mean = total / num_permutations
    variance = square / num_permutations - mean**2
    return mean, np.sqrt(variance / num_permutations)


def prefix_permutation_shapley(
    features: np.ndarray, responses: np.ndarray, lam: float, orders: list[np.ndarray]
) -> np.ndarray:
    """The same without any trick: refit after every player."""
    values = np.zeros((len(features), features.shape[1]))
    for order in orders:
        before = np.zeros(features.shape[1])
        for k, player in enumerate(order):
            after = subset_weights(features, responses, lam, list(order[: k + 1]))[0]
            values[player] += (after - before) / len(orders)
            before = after
    return values


def leave_one_out_residuals(features: np.ndarray, responses: np.ndarray, lam: float) -> np.ndarray:
    """Refit without each player and predict it: [n, c]."""
    n = len(features)
    rows = []
    for player in range(n):
        others = [other for other in range(n) if other != player]
        rows.append(responses[player] - subset_weights(features, responses, lam, others) @ features[player])
    return np.array(rows)


def influence(features: np.ndarray, lam: float) -> np.ndarray:
    """Rows (lam I + sum phi phi^T)^-1 phi_i by an explicit inverse."""
    hessian = lam * np.eye(features.shape[1])
    for row in features:
        hessian += np.outer(row, row)
    return np.stack([np.linalg.inv(hessian) @ row for row in features])


def trak(features: np.ndarray, lam: float, log_odds: np.ndarray) -> np.ndarray:
    probability = 1 / (1 + np.exp(-log_odds))
    return (1 - probability)[:, None] * influence(features, lam)


def datainf(features: np.ndarray, ridge: float, blocks: list[tuple[int, int]]) -> np.ndarray:
    """By loops over blocks of (width, size) and pairs of examples; lam = ridge * mean squared entry of a block."""
    n, start, parts = len(features), 0, []
    for width, size in blocks:
        rows = features[:, start : start + width]
        start += width
        lam = ridge * np.mean(np.sum(rows**2, axis=1)) / size
        found = np.zeros_like(rows)
        for i, row in enumerate(rows):
            for other in rows:
                found[i] += (row - other * (other @ row) / (lam + other @ other)) / (n * lam)
        parts.append(found)
    return np.concatenate(parts, axis=1)


def descend(features: np.ndarray, eta: float, steps: int) -> np.ndarray:
    """Gradient descent on the squared error of a linear model, once for each target: dtheta_T / dy_i, [n, p]."""
    found = []
    for i in range(len(features)):
        theta, target = np.zeros(features.shape[1]), np.eye(len(features))[i]
        for _ in range(steps):
            theta = theta - eta * features.T @ (features @ theta - target)
        found.append(theta)
    return np.array(found)


def grad_cos_scores(features: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[m, n] cosines by a loop."""
    return np.array([[q @ g / (np.linalg.norm(q) * np.linalg.norm(g)) for g in features] for q in queries])


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
