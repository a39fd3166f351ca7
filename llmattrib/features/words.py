"""Word gradients of examples: the gradient of an output at the input embedding's output, summed over each word.

    g_w = sum over the positions t of word w of df/de_t          e_t = output of the input embedding at t

A hook makes the embedding's output the leaf of the graph and reads the gradient there, so frozen and tied embeddings
work, and of a tied weight only the input side counts: the weight's own gradient is never formed. Several adapters take
a pass each; an adapter of weight eta is a block of its own, scaled by sqrt(eta), so that inner products of whole rows
are sums over adapters of eta times theirs.

Examples never mix. Positions that are kept are those of the largest gradients over all blocks, earlier ones first when
equal. Source: Yeh et al. 2022 (TracIn-WE, arXiv 2202.11844).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmattrib.encoding import Batch, Encoded, Side, collate
from llmattrib.errors import ConfigError
from llmattrib.features.extract import standing_at
from llmattrib.features.outputs import Reading, evaluate_output
from llmattrib.forward import completion_logits, loss_scale
from llmattrib.model import LoadedModel
from llmattrib.sections import FeaturesConfig, OutputFunction
from llmattrib.wording import NO_WORD


@dataclass(frozen=True)
class WordGradients:
    """The word gradients of one example, words ascending.

    Attributes:
        words: k words, each once.
        rows: [k, d] their gradients, float32.
        norm: of the gradients at all positions of words, also those that are not kept.
    """

    words: Int[np.ndarray, " k"]
    rows: Float[np.ndarray, "k d"]
    norm: float

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(np.isfinite(self.norm) and np.isfinite(self.rows).all())


def sum_words(
    gradients: Float[np.ndarray, "t d"], words: Int[np.ndarray, " t"], top_positions: int | None
) -> WordGradients:
    """Sum the gradients at the kept positions of an example over each word.

    Args:
        gradients: at each position.
        words: the word of each position, -1 for none.
        top_positions: how many positions are kept, those of the largest gradients; None keeps all. Positions without a
            gradient, such as the last token, are never kept.
    """
    norms = np.linalg.norm(gradients, axis=1)
    places = np.flatnonzero((words != NO_WORD) & ~(norms == 0))
    norm = float(np.linalg.norm(norms[places]))
    if top_positions is not None:
        places = np.sort(places[np.argsort(-norms[places], kind="stable")[:top_positions]])
    found, inverse = np.unique(words[places], return_inverse=True)
    rows = np.zeros((len(found), gradients.shape[1]), np.float32)
    np.add.at(rows, inverse, gradients[places])
    return WordGradients(found, rows, norm)


class WordExtractor:
    """Computes word gradients of batches at a fixed linearisation point.

    Attributes:
        num_batches: extracted so far.

    Args:
        loaded: the model with its adapters, frozen.
        features: output function and linearisation point.
        weights: of the adapters where the point is `trained`; empty for all alike, with sum 1.
        label_ids: token ids of the label words, empty for generation.

    Raises:
        ConfigError: there are not as many weights as adapters.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        features: FeaturesConfig,
        weights: Sequence[float] = (),
        label_ids: Sequence[int] = (),
    ) -> None:
        self.loaded, self.label_ids, self.num_batches = loaded, tuple(label_ids), 0
        self._output: OutputFunction = features.output
        self._loss_scale = loss_scale(loaded)
        points: list[str | None] = [None] if features.linearisation == "init" else [*loaded.adapter_names]
        if weights and len(weights) != len(points):
            raise ConfigError(
                f"words.adapter_weights has {len(weights)} numbers, and gradients are taken at {len(points)} points",
                expected="a weight for each of model.adapters, with features.linearisation=trained",
                fix="correct words.adapter_weights, or leave it empty",
            )
        self._points = list(zip(points, weights or [1 / len(points)] * len(points), strict=True))

    @property
    def dim(self) -> int:
        """Numbers of a gradient: the embedding's width times the adapters."""
        return len(self._points) * int(_embedding(self.loaded).embedding_dim)

    def extract(
        self,
        examples: Sequence[Encoded],
        words: Sequence[Int[np.ndarray, " _"]],
        top_positions: int | None,
        padding_side: Side = "right",
    ) -> list[WordGradients]:
        """Compute the word gradients of one batch.

        Args:
            examples: b encoded examples.
            words: of each of them, the word at each position, -1 for none.
            top_positions: see `sum_words`.
            padding_side: the result does not depend on it.

        Returns:
            In the order of `examples`. NaN and infinity are passed on, see `WordGradients.is_finite`.
        """
        batch = collate(examples, self.loaded.pad_id, padding_side).to(self.loaded.device)
        blocks = [weight**0.5 * self._pass(point, batch) for point, weight in self._points]
        gradients = torch.cat(blocks, dim=2).cpu().numpy()
        masks = batch.attention_mask.bool().cpu().numpy()
        self.num_batches += 1
        return [sum_words(gradients[row][masks[row]], own, top_positions) for row, own in enumerate(words)]

    def _pass(self, adapter: str | None, batch: Batch) -> Float[Tensor, "b t d"]:
        """Return the gradients at every position, in float32."""
        sharding = self.loaded.sharding
        with standing_at(self.loaded, adapter), embedding_outputs(_embedding(self.loaded)) as seen, torch.enable_grad():
            logits, example, target = completion_logits(self.loaded.model, batch)
            reading = Reading(logits, example, target, batch.labels)
            values = evaluate_output(self._output, reading, self.label_ids)
            (values.outputs[0].sum() * self._loss_scale).backward()  # type: ignore[no-untyped-call]
        if sharding:
            sharding.release()
        (leaf,) = seen
        assert leaf.grad is not None
        return leaf.grad.float() / self._loss_scale


def _embedding(loaded: LoadedModel) -> Any:
    base: Any = loaded.model.get_base_model()
    return base.get_input_embeddings()


@contextmanager
def embedding_outputs(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """Make the outputs of an embedding leaves of the graph; yield the list that they are put into."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = embedding.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
