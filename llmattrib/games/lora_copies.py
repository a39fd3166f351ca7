"""Copies of a LoRA adapter over one base model: k models in one forward pass.

The base is run on the rows of all copies together, its adapters switched off; a hook on every LoRA layer adds
s B_k A_k x to the rows of copy k, so that one backward pass gives each copy its own gradients. Factors are tensors
[k, r, d_in] and [k, d_out, r] outside the model. Dropout is off.

Widened to float64, a model computes in float64 throughout: where its own code goes down to float32 (norms, softmax), it
is kept from it, since a difference of two margins would otherwise be rounded at 1e-7 of a margin.
Limit: a step holds the activations of k batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmattrib.config import RunConfig
from llmattrib.encoding import Encoded, collate, label_token_ids, length_batches
from llmattrib.errors import ConfigError, memory_errors
from llmattrib.features.outputs import Reading, evaluate_output, mean_per_example
from llmattrib.forward import completion_logits
from llmattrib.model import LoadedModel


class LoraCopies:
    """A `Trainee` of further_training.py: the adapter of a run.

    Attributes:
        num_examples: n.
        num_queries: q.
    """

    def __init__(
        self, config: RunConfig, loaded: LoadedModel, examples: Sequence[Encoded], queries: Sequence[Encoded]
    ) -> None:
        """Take over a model of one adapter.

        Args:
            config: the run; reads `gold.dtype`, `data.label_words` and `features.tokens_per_batch`.
            loaded: the final model, in float32.
            examples: n tokenised training examples.
            queries: q tokenised queries, each with its answer.

        Raises:
            ConfigError: a quantized base is to be widened.
        """
        self._config, self._loaded, self._examples, self._queries = config, loaded, examples, queries
        self.num_examples, self.num_queries = len(examples), len(queries)
        self._label_ids = label_token_ids(loaded.tokenizer, config.data)
        self._layers = [(layer, *layer.factors(loaded.adapter_names[0])) for layer in loaded.layers]
        self._is_wide = config.gold.dtype == "float64"
        if self._is_wide:
            if config.model.quantization is not None:
                raise ConfigError(
                    f"gold.dtype is float64, and the base is held in {config.model.quantization}",
                    expected="a base that can be widened",
                    fix="set gold.dtype=float32, or model.quantization=null",
                )
            loaded.model.double()

    def start(self, num_copies: int) -> list[Tensor]:
        """Return the factors [k, ...] of every layer, A then B."""
        dtype = torch.float64 if self._is_wide else torch.float32
        factors = [factor.detach().to(dtype) for _, a, b, _ in self._layers for factor in (a, b)]
        return [factor.expand(num_copies, *factor.shape).clone().requires_grad_(True) for factor in factors]

    def losses(self, parameters: Sequence[Tensor], rows: Int[np.ndarray, "k b"]) -> Float[Tensor, "k b"]:
        """Return the mean negative log-likelihood of completions, over the whole vocabulary as in training.

        Raises:
            DeviceMemoryError: the batch does not fit on the device.
        """
        num_copies, size = rows.shape
        lengths = [max(len(self._examples[row]) for row in column) for column in rows.T.tolist()]
        found: list[Tensor] = [torch.empty(0)] * size
        with self._running(parameters), self._memory(num_copies):
            for columns in length_batches(lengths, self._room(num_copies)):
                batch = [self._examples[row] for row in rows[:, columns].reshape(-1).tolist()]
                logits, example, target = completion_logits(self._loaded.model, self._collate(batch))
                nll = nn.functional.cross_entropy(logits, target, reduction="none")
                part = mean_per_example(nll, example, len(batch)).view(num_copies, len(columns))
                for column, losses in zip(columns, part.unbind(1), strict=True):
                    found[column] = losses
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def margins(self, parameters: Sequence[Tensor]) -> Float[np.ndarray, "k q"]:
        """Return the log-odds of each query's answer, from logits in float64.

        Raises:
            DeviceMemoryError: a batch does not fit on the device.
        """
        num_copies = len(parameters[0])
        found = np.empty((num_copies, self.num_queries))
        with self._running(parameters), self._memory(num_copies):
            for rows in length_batches(list(map(len, self._queries)), self._room(num_copies)):
                batch = self._collate([self._queries[row] for row in rows] * num_copies)
                logits, example, target = completion_logits(self._loaded.model, batch)
                reading = Reading(logits.double(), example, target, batch.labels)
                log_odds = evaluate_output("log_odds", reading, self._label_ids).log_odds
                found[:, rows] = log_odds.view(num_copies, len(rows)).cpu().numpy()
        return found

    def _room(self, num_copies: int) -> int:
        return self._config.features.tokens_per_batch // num_copies

    def _collate(self, examples: Sequence[Encoded]) -> Any:
        return collate(examples, self._loaded.pad_id).to(self._loaded.device)

    def _memory(self, num_copies: int) -> Any:
        return memory_errors(
            f"a step of {num_copies} copies of the adapter",
            expected="room for the activations of a batch of every copy",
            fix="lower gold.shard_size or gold.batch_size",
        )

    @contextmanager
    def _running(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Let the model be the copies."""
        with ExitStack() as stack:
            stack.enter_context(self._loaded.base_only())
            if self._is_wide:
                stack.enter_context(_KeepWide())
            pairs = zip(parameters[::2], parameters[1::2], strict=True)
            for (layer, _, _, scaling), (a, b) in zip(self._layers, pairs, strict=True):
                stack.callback(layer.module.register_forward_hook(_adding(a, b, scaling)).remove)
            yield


def _adding(
    a: Float[Tensor, "k r d_in"], b: Float[Tensor, "k d_out r"], scaling: float
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a hook that adds what each copy's factors make of its rows; rows come copy by copy."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].reshape(len(a), -1, a.shape[2]).to(a.dtype)
        added = torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
        return output + (scaling * added).view(output.shape).to(output.dtype)

    return hook


class _KeepWide(TorchFunctionMode):
    """Keep float64 tensors from being narrowed to float32 by the code of a model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values())):
                return args[0]
            if kwargs.get("dtype") == torch.float32:  # softmax
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)
