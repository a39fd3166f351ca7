"""kronfluence's per-example gradients, through its self-influence loop with the identity for a Hessian.

It keeps no features: the loop forms the gradients of A and B of every example and their squared norms. Logits at all
positions.
"""

from collections.abc import Callable
from typing import Any

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.score.self import compute_self_scores_with_loaders
from kronfluence.task import Task
from kronfluence.utils.state import State

from benchmarks.lora_case import Case
from benchmarks.peers.peft_model import Batch, adapter_layers, load_peft, loader, summed_loss


class Completions(Task):
    """Loss of completions with respect to A and B."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Batch, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        """Return the loss of a batch."""
        return summed_loss(model, batch)

    def compute_measurement(self, batch: Batch, model: torch.nn.Module) -> torch.Tensor:
        """Return what is explained: the loss."""
        return summed_loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the layers."""
        return self.layers

    def get_attention_mask(self, batch: Batch) -> torch.Tensor:
        """Return the mask."""
        return batch["attention_mask"]


def contender(case: Case) -> Callable[[], Any]:
    """Return what computes the gradients of all examples."""
    model = load_peft(case)
    task = Completions(adapter_layers(model))
    model = prepare_model(model, task)
    state, batches = State(cpu=True), loader(case)
    return lambda: compute_self_scores_with_loaders(
        loaded_factors={},
        model=model,
        state=state,
        task=task,
        train_loader=batches,
        score_args=ScoreArguments(),
        factor_args=FactorArguments(strategy="identity"),
        tracked_module_names=None,
        disable_tqdm=True,
    )
