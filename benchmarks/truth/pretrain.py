"""Pretrain the 1M-parameter Llama on which ground truth is made by retraining; writes benchmarks/truth/llama_1m/.

    apt-get install wordnet-base
    OMP_NUM_THREADS=1 python -m benchmarks.truth.pretrain [--wordnet /usr/share/wordnet]

Text: the definitions of WordNet 3.0 (its licence permits use and redistribution with its notice, which is copied beside
the weights) and passages of the CIA World Factbook (public domain), shuffled. Tokens: byte-level BPE, 1,024 of them,
trained on the same text. The steps are fixed, so two runs on one machine give the same weights; `STEPS` took about
twelve minutes on one thread. Weights are stored in bfloat16.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmattrib.rng import stream

FOLDER = Path(__file__).parent / "llama_1m"
ASSETS = Path(__file__).parents[2] / "llmattrib" / "assets"
VOCABULARY, WIDTH, CONTEXT = 1024, 128, 256
STEPS, BATCH, LENGTH, RATE = 1500, 24, 128, 3e-3


def definitions(wordnet: Path) -> list[str]:
    """Return `word: definition` of every WordNet entry."""
    texts = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry, _, gloss = line.partition(" | ")
            word = entry.split(" ")[4].replace("_", " ")
            texts.append(f"{re.sub(r'[(].*[)]$', '', word)}: {gloss.strip()}")
    return texts


def licence(wordnet: Path) -> str:
    """Return the notice that WordNet's files begin with."""
    lines = (wordnet / "data.noun").read_text(encoding="latin-1").splitlines()
    return "\n".join(re.sub(r"^ +\d+ ", "", line).rstrip() for line in lines if line.startswith("  ")) + "\n"


def passages() -> list[str]:
    """Return the passages of the factbook."""
    lines = (ASSETS / "factbook_topics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", model_max_length=CONTEXT)


def make_model() -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


def pretrain(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Train on random windows of the text; return the mean loss of the last hundred steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    draws, losses, started = stream(0, "pretrain"), [], time.perf_counter()
    for step in range(STEPS):
        rate = RATE * min((step + 1) / 100, 0.5 + 0.5 * np.cos(np.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = draws.integers(0, len(tokens) - LENGTH, size=BATCH)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {np.mean(losses[-100:]):.3f} nats, {time.perf_counter() - started:.0f} s")
    return float(np.mean(losses[-100:]))


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    arguments = parser.parse_args()
    texts = definitions(arguments.wordnet) + passages()
    texts = [texts[row] for row in stream(0, "pretrain_order").permutation(len(texts)).tolist()]
    tokenizer = make_tokenizer(texts)
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, 0)]
    print(f"{len(texts)} texts, {len(tokens)} tokens")
    model = make_model()
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    loss = pretrain(model, torch.tensor(tokens))
    shutil.rmtree(FOLDER, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    (FOLDER / "WORDNET_LICENCE.txt").write_text(licence(arguments.wordnet))
    print(f"final loss {loss:.3f} nats a token; saved as {FOLDER}")


if __name__ == "__main__":
    main()
