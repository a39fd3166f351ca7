"""bergson's feature building: the loop of `bergson build`, without loading, tokenising and the final save.

Projected per module as its command does: p x p for A and for B of every layer (`per_module`), or all entries together
to p dimensions (`global`, what its TRAK pipeline uses). What is in the loop: padding, forward and backward, projection,
and writing rows to the memory-mapped file. Projection matrices are cached by bergson after the first run, but for
`global`, whose matrix it makes anew for each batch. Batches are those of the case; logits are computed at all
positions, losses at completions.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from bergson.collector.collector import CollectorComputer
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config.config import IndexConfig
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset

from benchmarks.lora_case import Case
from llmattrib.encoding import Encoded


def dataset(examples: list[Encoded]) -> Dataset:
    """Return tokenised examples as bergson reads them: labels are -100 outside the completion."""
    return Dataset.from_list(
        [
            {
                "input_ids": list(example.input_ids),
                "labels": [-100] * example.completion_start + list(example.input_ids[example.completion_start :]),
                "length": len(example),
            }
            for example in examples
        ]
    )


def contender(case: Case, projection_dim: int, target: str = "per_module") -> Callable[[], None]:
    """Return what computes and writes the gradients of all examples."""
    config = IndexConfig(
        run_path=str(Path(tempfile.mkdtemp()) / "index"),
        model=str(case.adapter),
        token_batch_size=case.token_budget,
        projection_dim=projection_dim,
        projection_target=target,
    )
    config.partial_run_path.mkdir(parents=True)
    model, target_modules = setup_model_and_peft(config)
    processor = create_processor(model, config, target_modules)
    data = dataset(case.examples)

    def run() -> None:
        collector = GradientCollector(
            model=model.base_model, cfg=config, processor=processor, target_modules=target_modules, data=data
        )
        collector.teardown = lambda: None
        computer = CollectorComputer(model, data, collector=collector, batches=case.groups, cfg=config)
        computer.run_with_collector_hooks()

    run.dim = lambda: _dim(config)
    return run


def _dim(config: IndexConfig) -> int:
    import json

    info = json.loads((config.partial_run_path / "info.json").read_text())
    return sum(info["grad_sizes"].values())
