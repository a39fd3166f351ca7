"""dattri's LoGra: `cache` of its attributor with the identity for a Hessian, gradients kept in memory.

A random normal projection of each side of A and of B, p x p entries each, as bergson's. The loop is all of `cache`:
hooks on and off, forward and backward, projection. Logits at all positions.
"""

import tempfile
from collections.abc import Callable

from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask

from benchmarks.lora_case import Case
from benchmarks.peers.peft_model import adapter_layers, load_peft, loader, summed_loss


def contender(case: Case, projection_dim: int) -> Callable[[], None]:
    """Return what computes the projected gradients of all examples."""
    model = load_peft(case)
    task = AttributionTask(
        loss_func=lambda module, batch, device: summed_loss(module, batch), model=model, checkpoints=model.state_dict()
    )
    attributor = LoGraAttributor(
        task,
        layer_names=adapter_layers(model),
        hessian="Identity",
        proj_dim=projection_dim**2,
        offload="none",
        cache_dir=tempfile.mkdtemp(),
    )
    batches = loader(case)
    return lambda: attributor.cache(batches)
