"""Feature building side by side: plain LoRA forward and backward, llmattrib, and the packages people use instead.

    python -m benchmarks.features [--cases tiny_r8 smollm2_r8 ...] [--rows NAME ...] [--rounds 3]

The same model, adapter and examples for all (benchmarks/lora_case.py), one thread, CPU seconds of the inner loop after
one run to warm up: no loading, no tokenising, no imports. Each round runs all rows, forwards and backwards in turn, and
ratios are taken within a round; medians and ranges. Rows:

    gemm             the base model's matrix products alone, of a forward and of the gradients of its inputs: no
                     attention, norms, LoRA or framework. No more than what plain and ours take beyond it can be saved
    plain            forward and mean completion loss of trainable LoRA factors, `backward()`, nothing kept: the limit
    ours_init        per-example gradients, sketch to 4,096 dimensions, norms and columns, without the store
    ours_trained     the same at the adapter
    passes_trained   of it forward and backward alone, A x and s B^T d among them; products_trained: with the gradients
                     of all examples too, which are thrown away. What is left is the sketch and the norms
    untuned_trained  ours_trained with products in the order of their formulas: s B A x, then the sum with the output;
                     gradients of an example with their long side first
    batch_of_one     autograd for one example at a time; gradients only, not projected
    less             the same, projected to 4,096 dimensions 16 at a time by traker's projector for a CPU, as LESS does
    bergson_p16      benchmarks/peers/bergson_build.py, 16 x 16 entries for A and for B of each layer: its default
                     wherever it projects; p8 is 8 x 8, p3 has as many dimensions as ours, p0 keeps all entries
    bergson_joint    the same of all entries together to 4,096 dimensions, what ours does
    dattri_p8        benchmarks/peers/dattri_logra.py
    kronfluence      benchmarks/peers/kronfluence_self.py
    traker           benchmarks/peers/traker_featurize.py, to 4,096 dimensions

Plain and ours compute logits where completions are predicted; the packages compute all of them, as they do for their
users. All take the same batches, so padding is the same. With SmolLM2 the joint row draws ten thousand million signs
for each batch, so it is a case of its own: one batch that is nearly full. Writes benchmarks/results/features.json, case
by case and row by row. Its ratios are medians, above 1 where ours is quicker, and where there are several cases the
lowest of them:

    ratio_to_forward_backward  ours_trained to plain, `smollm2`: in smollm2_r8 and smollm2_r16; `tiny`: in tiny_r8 and
                               tiny_r16
    ratio_to_bergson           ours_trained to, `default`: bergson_p16 in smollm2_r8 and smollm2_r16; `default_tiny`:
                               bergson_p16 in tiny_r8 and tiny_r16; `equal_dims`: bergson_joint, all entries
                               together, in smollm2_r8_joint; `equal_dims_tiny`: bergson_joint in tiny_r8;
                               `equal_dims_per_module`: bergson_p3 in smollm2_r8
    ratio_to_batch_of_one      ours_trained in tiny_r8 to, `tiny`: batch_of_one; `tiny_projected`: less

and with `_init` at the end the same of ours_init.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.lora_case import Case, make_case
from llmattrib.encoding import Encoded, collate
from llmattrib.features import capture, extract
from llmattrib.features.extract import Extractor
from llmattrib.features.sketch import Sketch
from llmattrib.forward import completion_logits
from llmattrib.model import LoadedModel
from llmattrib.sections import FeaturesConfig

RESULT = Path(__file__).parent / "results" / "features.json"
DIM = 4096
OURS = ("ours_init", "ours_trained")
PARTS = ("passes_init", "products_init", "passes_trained", "products_trained")
UNTUNED = "untuned_trained"
PEERS = ("batch_of_one", "bergson_p16", "bergson_p8", "dattri_p8", "kronfluence")
DENSE = ("bergson_p0", "bergson_joint", "less", "traker")
CASES: dict[str, tuple[str, int, int, tuple[str, ...]]] = {
    "tiny_r8": ("tiny", 8, 96, ("gemm", "plain", *OURS, *PARTS, UNTUNED, *PEERS, *DENSE)),
    "tiny_r16": ("tiny", 16, 96, ("plain", *OURS, "bergson_p16")),
    "smollm2_r8": ("smollm2", 8, 20, ("gemm", "plain", *OURS, *PARTS, UNTUNED, *PEERS, "bergson_p3")),
    "smollm2_r16": ("smollm2", 16, 20, ("plain", *OURS, "bergson_p16")),
    "smollm2_r8_joint": ("smollm2", 8, 32, (*OURS, "bergson_joint")),
}
"""Model, rank, examples and rows of each case; of `_joint` the fullest batch of the examples."""


def ours(case: Case, linearisation: str, part: str = "ours") -> Callable[[], None]:
    """Return llmattrib's loop, or a part of it."""
    extractor = Extractor(case.load(), FeaturesConfig(linearisation=linearisation), 0)  # type: ignore[arg-type]
    batches = case.batches
    if part == "ours":
        sketch = Sketch(extractor.plan("oporp", 0, DIM, batches[:2]))
        work: Callable[[list[Encoded]], object] = lambda group: extractor.extract(group, sketch)
    elif part == "products":
        work = lambda group: extractor._gradients(group, lambda *_: None, "right")
    else:
        work = lambda group: extractor._differentiate(extractor._collated(group), lambda *_: None)

    def run() -> None:
        for group in batches:
            work(group)

    return run


def untuned(case: Case) -> Callable[[], None]:
    """Return llmattrib's loop at the adapter without the order of products that is quick on a CPU."""

    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, up: Tensor, receive: object) -> Tensor:
        hidden = x @ a.T
        ctx.save_for_backward(x, hidden, a, up)
        ctx.receive = receive
        return y.detach() + hidden @ up

    def gradients(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)

    run = ours(case, "trained")

    def patched() -> None:
        with (
            mock.patch.object(capture._Added, "forward", staticmethod(forward)),
            mock.patch.object(extract, "gradients", gradients),
        ):
            run()

    return patched


def trainable(case: Case) -> LoadedModel:
    """Load the model with factors that can be trained."""
    loaded = case.load()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loaded


def backward(loaded: LoadedModel, examples: list[Encoded]) -> None:
    """Forward and backward of the mean loss."""
    logits, _, target = completion_logits(loaded.model, collate(examples, loaded.pad_id))
    torch.nn.functional.cross_entropy(logits, target).backward()


def gemm(case: Case) -> Callable[[], None]:
    """Return the matrix products of forward and backward, each a call of its own on data that is there."""
    model = case.load().model
    head = model.get_output_embeddings()
    linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lora_" not in name]
    products = []
    for examples in case.batches:
        num_tokens = len(examples) * max(map(len, examples))
        num_predicted = sum(len(example) - example.completion_start for example in examples)
        sizes = [(module.weight, num_predicted if module is head else num_tokens) for module in linear]
        products += [(weight, torch.randn(size, weight.shape[1])) for weight, size in sizes]

    def run() -> None:
        for weight, x in products:
            torch.mm(torch.mm(x, weight.T), weight)

    return torch.no_grad()(run)


def plain(case: Case) -> Callable[[], None]:
    """Return the limit."""
    loaded, batches = trainable(case), case.batches

    def run() -> None:
        for examples in batches:
            backward(loaded, examples)
            loaded.model.zero_grad(set_to_none=True)

    return run


def batch_of_one(case: Case, project: Callable[[torch.Tensor], object] = lambda rows: None) -> Callable[[], None]:
    """Return autograd for one example at a time; what is projected is projected 16 at a time."""
    loaded = trainable(case)
    factors = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]

    def gradient(example: Encoded) -> torch.Tensor:
        backward(loaded, [example])
        row = torch.cat([factor.grad.flatten() for factor in factors if factor.grad is not None])
        loaded.model.zero_grad(set_to_none=True)
        return row

    def run() -> None:
        for start in range(0, len(case.examples), 16):
            project(torch.stack([gradient(example) for example in case.examples[start : start + 16]]))

    return run


def less(case: Case) -> Callable[[], None]:
    """Return autograd for one example at a time and a dense projection."""
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(layer.factors("default")[k].numel() for layer in case.load().layers for k in (0, 1))
    projector = BasicProjector(size, DIM, 0, ProjectionType.rademacher, "cpu")
    return batch_of_one(case, lambda rows: projector.project(rows, model_id=0))


def contender(name: str, case: Case) -> Callable[[], None]:
    """Return the loop of a row."""
    package, _, variant = name.partition("_")
    if package in ("ours", "passes", "products"):
        return ours(case, variant, package)
    if package == "untuned":
        return untuned(case)
    if package == "bergson":
        from benchmarks.peers import bergson_build

        return (
            bergson_build.contender(case, DIM, "global")
            if variant == "joint"
            else bergson_build.contender(case, int(variant[1:]))
        )
    if package == "dattri":
        from benchmarks.peers import dattri_logra

        return dattri_logra.contender(case, int(variant[1:]))
    if package == "kronfluence":
        from benchmarks.peers import kronfluence_self

        return kronfluence_self.contender(case)
    if package == "traker":
        from benchmarks.peers import traker_featurize

        return traker_featurize.contender(case, DIM)
    return {"gemm": gemm, "plain": plain, "batch_of_one": batch_of_one, "less": less}[name](case)


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(case: Case, names: list[str], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Yield CPU seconds of each row and round so far, after every round."""
    runs = {name: contender(name, case) for name in names}
    for name, run in runs.items():
        if name not in ("bergson_joint", "less", "traker"):  # these keep nothing from one batch to the next
            print(f"{name}: {cpu_seconds(run):.1f} CPU seconds to warm up", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(cpu_seconds(runs[name]))
            print(number, name, round(seconds[name][-1], 2), flush=True)
        yield seconds


def figures(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return tokens a CPU second of each row, and how many times quicker than it each of ours is."""
    rows: dict[str, Any] = {}
    for name, found in seconds.items():
        if name in PARTS:
            continue
        rows[name] = {
            "tokens_per_cpu_second": round(case.num_tokens / statistics.median(found), 1),
            "range": [round(case.num_tokens / second, 1) for second in (max(found), min(found))],
            "rounds": len(found),
        }
        for own in set(OURS) & set(seconds) - {name}:
            ratios = [theirs / mine for theirs, mine in zip(found, seconds[own], strict=True)]
            rows[name][f"{own}_over_this"] = {
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    return rows


def shares(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return what part of the CPU time of ours each stage takes, at each linearisation point that was taken apart."""
    found = {}
    for point in ("init", "trained"):
        rows = [seconds.get(f"{part}_{point}", []) for part in ("passes", "products", "ours")]
        if all(rows):
            parts = [(a / c, (b - a) / c, (c - b) / c) for a, b, c in zip(*rows, strict=True)]
            medians = [round(statistics.median(part), 3) for part in zip(*parts, strict=True)]
            found[point] = dict(zip(("model", "products", "sketch"), medians, strict=True))
    return found


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios that are asked for; see the top of the file."""

    def lowest(row: str, *names: str) -> dict[str, float | None]:
        """Return the lowest median of the cases, by the end of its name."""
        found = {}
        for own, end in (("ours_trained", ""), ("ours_init", "_init")):
            cells = [cases.get(name, {"rows": {}})["rows"].get(row, {}).get(f"{own}_over_this") for name in names]
            found[end] = min((cell["ratio"] for cell in cells if cell), default=None)
        return found

    def named(**ratios: dict[str, float | None]) -> dict[str, float | None]:
        return {name + end: ratio for name, found in ratios.items() for end, ratio in found.items()}

    smollm2, tiny = ("smollm2_r8", "smollm2_r16"), ("tiny_r8", "tiny_r16")
    return {
        "ratio_to_forward_backward": named(smollm2=lowest("plain", *smollm2), tiny=lowest("plain", *tiny)),
        "ratio_to_bergson": named(
            default=lowest("bergson_p16", *smollm2),
            default_tiny=lowest("bergson_p16", *tiny),
            equal_dims=lowest("bergson_joint", "smollm2_r8_joint"),
            equal_dims_tiny=lowest("bergson_joint", "tiny_r8"),
            equal_dims_per_module=lowest("bergson_p3", "smollm2_r8"),
        ),
        "ratio_to_batch_of_one": named(
            tiny=lowest("batch_of_one", "tiny_r8"), tiny_projected=lowest("less", "tiny_r8")
        ),
    }


def merge(
    name: str, case: Case, found: dict[str, Any], parts: dict[str, dict[str, float]], asked: list[str] | None
) -> None:
    """Add rows of a case to the result file: all, or those asked for and those not there yet."""
    tree = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    cases = {key: value for key, value in tree.get("cases", {}).items() if key in CASES}
    before = cases.get(name, {})
    old = before.get("rows", {})
    rows = old | {row: cell for row, cell in found.items() if asked is None or row in asked or row not in old}
    cases[name] = {
        "model": case.model,
        "rank": case.rank,
        "examples": len(case.examples),
        "tokens": case.num_tokens,
        "shares": before.get("shares", {}) | parts,
        "rows": {row: rows[row] for row in CASES[name][3] if row in rows},
    }
    ordered = {key: cases[key] for key in CASES if key in cases}
    RESULT.write_text(json.dumps({**summary(ordered), "dim": DIM, "cases": ordered}, indent=1) + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", nargs="+", help="these rows alone, beside ours and plain")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases:
        model, rank, num_examples, names = CASES[name]
        kept = [row for row in names if not options.rows or row in (*options.rows, *OURS, "plain")]
        with tempfile.TemporaryDirectory() as folder:
            case = make_case(model, rank, num_examples, Path(folder))
            case = case.fullest() if name.endswith("_joint") else case
            for seconds in measure(case, kept, options.rounds):
                merge(name, case, figures(case, seconds), shares(seconds), options.rows)
    print(json.dumps(summary(json.loads(RESULT.read_text())["cases"]), indent=1))


if __name__ == "__main__":
    main()
