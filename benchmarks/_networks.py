"""Small networks on arrays for benchmarks/gold.py: training, features, and copies that are trained further at once.

A network of dense layers with tanh between them and a softmax at the end; with two classes the margin of the right
class is its log-odds. Everything is in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad, vmap

from llmattrib.features.outputs import token_margins
from llmattrib.rng import stream


@dataclass(frozen=True)
class Task:
    """Examples to train on and to ask about.

    Attributes:
        x: [n, d].
        y: [n] classes.
        asked_x: [q, d].
        asked_y: [q] the right classes.
        hidden: width of the hidden layer; 0 for a linear model.
        epochs: of training by Adam on everybody at once.
    """

    x: Float[np.ndarray, "n d"]
    y: Int[np.ndarray, " n"]
    asked_x: Float[np.ndarray, "q d"]
    asked_y: Int[np.ndarray, " q"]
    hidden: int
    epochs: int


class Network:
    """A trained network, and a `Trainee` of llmattrib/games/further_training.py.

    Attributes:
        num_examples: n.
        num_queries: q.
        sizes: parameters of each tensor.
    """

    def __init__(self, task: Task, seed: int = 0) -> None:
        self._x, self._y = torch.as_tensor(task.x), torch.as_tensor(task.y)
        self._asked_x, self._asked_y = torch.as_tensor(task.asked_x), torch.as_tensor(task.asked_y)
        self.num_examples, self.num_queries = len(task.x), len(task.asked_x)
        num_classes = int(task.y.max()) + 1
        widths = [task.x.shape[1], *([task.hidden] if task.hidden else []), num_classes]
        draws = stream(seed, "network")
        self._trained: list[Tensor] = []
        for wide, narrow in pairwise(widths):
            self._trained.append(torch.as_tensor(draws.standard_normal((wide, narrow)) / wide**0.5))
            self._trained.append(torch.zeros(narrow, dtype=torch.float64))
        self._train(task.epochs)
        self.sizes = [tensor.numel() for tensor in self._trained]

    def _train(self, epochs: int) -> None:
        parameters = [tensor.clone().requires_grad_(True) for tensor in self._trained]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(epochs):
            optimizer.zero_grad()
            stacked = [parameter[None] for parameter in parameters]
            self.losses(stacked, np.arange(self.num_examples)[None]).mean().backward()
            optimizer.step()
        self._trained = [parameter.detach() for parameter in parameters]

    @staticmethod
    def _logits(parameters: Sequence[Tensor], x: Float[Tensor, "k b d"]) -> Float[Tensor, "k b c"]:
        for place in range(0, len(parameters), 2):
            x = torch.baddbmm(parameters[place + 1][:, None], x, parameters[place])
            x = torch.tanh(x) if place + 2 < len(parameters) else x
        return x

    def start(self, num_copies: int) -> list[Tensor]:
        """Return the parameters [k, ...] of k copies."""
        return [tensor.expand(num_copies, *tensor.shape).clone().requires_grad_(True) for tensor in self._trained]

    def losses(self, parameters: Sequence[Tensor], rows: Int[np.ndarray, "k b"]) -> Float[Tensor, "k b"]:
        """Return the cross-entropy of examples under each copy."""
        logits = self._logits(parameters, self._x[rows])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._y[rows].flatten(), reduction="none")
        return loss.view(rows.shape)

    @torch.no_grad()
    def margins(self, parameters: Sequence[Tensor]) -> Float[np.ndarray, "k q"]:
        """Return the log-odds of each query's right class under each copy."""
        k = len(parameters[0])
        logits = self._logits(parameters, self._asked_x.expand(k, *self._asked_x.shape))
        return token_margins(logits.flatten(0, 1), self._asked_y.repeat(k)).view(k, -1).numpy()

    def features(self) -> tuple[Float[np.ndarray, "n p"], Float[np.ndarray, " n"], Float[np.ndarray, "q p"]]:
        """Return the gradients of the log-odds of examples, these log-odds, and the gradients of the queries'."""

        def margin(parameters: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
            return token_margins(self._logits([one[None] for one in parameters], x[None, None])[0], y[None])[0]

        gradient = vmap(grad(margin), in_dims=(None, 0, 0))
        rows = [
            torch.cat([part.flatten(1) for part in gradient(tuple(self._trained), x, y)], dim=1).numpy()
            for x, y in ((self._x, self._y), (self._asked_x, self._asked_y))
        ]
        log_odds = vmap(margin, in_dims=(None, 0, 0))(tuple(self._trained), self._x, self._y).numpy()
        return rows[0], log_odds, rows[1]
