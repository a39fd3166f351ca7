"""TRAK's own package: per-example gradients by vmap, then its dense random projection for a CPU.

`featurize` without its files. Gradients of A and B only, of the completion's summed loss; Rademacher signs drawn anew
for every batch, 100 columns at a time, as the package does on a CPU. No attention mask, which vmap does not take:
padding is on the right and masks are causal.
"""

from collections.abc import Callable

import torch
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

from benchmarks.lora_case import Case
from benchmarks.peers.peft_model import load_peft, loader, summed_loss


class Completions(AbstractModelOutput):
    """Loss of one example."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(model, weights, buffers, input_ids, labels):
        """Return the loss as a function of the weights that are differentiated."""

        def call(**inputs):
            return torch.func.functional_call(model, (weights, buffers), kwargs=inputs)

        return summed_loss(call, {"input_ids": input_ids[None], "labels": labels[None]})

    def get_out_to_loss_grad(self, model, batch):
        """Not used."""
        raise NotImplementedError


def contender(case: Case, projection_dim: int) -> Callable[[], None]:
    """Return what computes the projected gradients of all examples."""
    model = load_peft(case)
    factors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    size = sum(parameter.numel() for parameter in factors.values())
    computer = FunctionalGradientComputer(model, Completions(), size, torch.float32, "cpu")
    computer.func_weights = factors  # else it would form the gradients of the base weights as well
    projector = BasicProjector(size, projection_dim, 0, ProjectionType.rademacher, "cpu")
    batches = [tuple(batch[key] for key in ("input_ids", "labels")) for batch in loader(case)]

    def run() -> None:
        for batch in batches:
            projector.project(computer.compute_per_sample_grad(batch), model_id=0)

    return run
