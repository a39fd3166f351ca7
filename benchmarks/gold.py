"""How near the gradient family comes to further training of the final model, against the number of its steps.

    python -m benchmarks.gold [--sets tabular text facts sms]

Four final models: a tanh network on measurements of tumours (scikit-learn's breast cancer data), a network on tf-idf of
factbook passages with eight sections, and the two tasks of the ground truth, LoRA on a 1M-parameter Llama. Each is
trained further by SGD at a constant rate, once with everybody and once without each of some examples
(llmattrib/games/further_training.py); a figure is the mean over prompts of the cosine between the scores of a method
and what was lost, as `llmattrib evaluate gold` prints it. Exact gradients of the loss, no sketch, every method at its
defaults. `trak` and `shapley` take those of the log-odds, the same rows without their factor 1 - p: of loss features
trak is influence. `spectral` has the T and the rate of the training; `spectral, Fisher` is it with the empirical Fisher
matrix for curvature, `spectral, unweighted` with the Gram of the log-odds gradients, where that does not diverge.
Conjugate gradients and LiSSA solve for influence and are left out where p is large.

Further training of the Llama goes into runs/gold/ and resumes; more examples or seeds are added to what is there.
Writes benchmarks/results/gold.json set by set, docs/gold.png and the tables of docs/gold.md.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit
from sklearn.datasets import load_breast_cancer
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks._networks import Network, Task
from benchmarks._pages import fill
from benchmarks.truth.tasks import rows_of
from llmattrib.build import build_features
from llmattrib.config import RunConfig, load_config, validate_config
from llmattrib.errors import FingerprintMismatchError, MethodError
from llmattrib.evaluate.gold import ONE_SEED, SPECTRAL, judge
from llmattrib.evaluate.scores import BASELINES, RunScores, scores_of_representers, spectral_scores
from llmattrib.features.extract import COLUMNS
from llmattrib.features.sketch import Block, SketchPlan
from llmattrib.further_training import gold_scores, train_further
from llmattrib.games.further_training import FurtherTraining
from llmattrib.games.kernel import FeatureRows, array_blocks
from llmattrib.reader import FeatureReader
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.scorers.spectral import Spectral, relative_rate
from llmattrib.sections import GoldConfig
from llmattrib.store import Manifest, RowStore
from llmattrib.train import train_adapter
from llmattrib.values.validation import Validation

HERE = Path(__file__).parent
RESULT = HERE / "results" / "gold.json"
PAGE, PLOT = HERE.parent / "docs" / "gold.md", HERE.parent / "docs" / "gold.png"
BEGIN, END = "<!-- gold:begin -->\n", "<!-- gold:end -->\n"
FOLDER = Path("runs/gold")
OF_LOSS = ("grad_dot", "grad_cos", "datainf", "influence")
ITERATIVE = ("influence_cg", "influence_lissa")
OF_LOG_ODDS = ("trak", "shapley")
SETS = ("tabular", "text", "facts", "sms")
NUM_EXAMPLES, NUM_ASKED, NUM_TERMS = 200, 40, 256
FISHER, UNWEIGHTED = f"{SPECTRAL}, Fisher", f"{SPECTRAL}, unweighted"
NETWORK_STEPS = (1, 4, 16, 64, 256)
LLAMA = {
    "facts": {"learning_rate": 0.02, "steps": (1, 2, 4, 8, 16, 32)},
    "sms": {"learning_rate": 0.01, "steps": (1, 2, 4, 8, 16, 32)},
}
LLAMA_SHARED = {"batch_size": 10, "num_examples": 24, "num_seeds": 2, "shard_size": 8, "dtype": "float32"}
TITLES = {
    "tabular": "tumours, tanh network",
    "text": "passages, tf-idf, tanh network",
    "facts": "facts, LoRA on a Llama",
    "sms": "sms, LoRA on a Llama",
}


def tabular() -> Task:
    """Return tumours, half of them to train on."""
    x, y = load_breast_cancer(return_X_y=True)
    order = stream(0, "gold", "tabular").permutation(len(x))
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return _split(x[order], y[order].astype(np.int64), epochs=60)


def text() -> Task:
    """Return tf-idf of factbook passages and their sections."""
    rows = rows_of("factbook_topics.jsonl")
    order = stream(0, "gold", "text").permutation(len(rows))[: NUM_EXAMPLES + NUM_ASKED].tolist()
    labels = sorted({row["label"] for row in rows})
    vectors = TfidfVectorizer(max_features=NUM_TERMS, sublinear_tf=True).fit_transform([rows[k]["text"] for k in order])
    return _split(vectors.toarray(), np.array([labels.index(rows[k]["label"]) for k in order]), epochs=60)


def _split(x: Float[np.ndarray, "m d"], y: Int[np.ndarray, " m"], epochs: int) -> Task:
    train, asked = slice(NUM_EXAMPLES), slice(NUM_EXAMPLES, NUM_EXAMPLES + NUM_ASKED)
    return Task(x[train], y[train], x[asked], y[asked], hidden=16, epochs=epochs)


def write_store(
    config: RunConfig, phi: Float[np.ndarray, "n p"], log_odds: Float[np.ndarray, " n"], blocks: Any
) -> None:
    """Write features as `build` would, of the output that the config names; equal ones are kept."""
    fingerprint = {
        "data": hashlib.sha256(np.ascontiguousarray(phi).tobytes()).hexdigest(),
        "features": {"output": config.features.output},
        "encoding": {"label_words": list(config.data.label_words)},
        "seed": 0,
    }
    n, p = phi.shape
    named = tuple(Block(f"layer{k}", "W", int(size)) for k, size in enumerate(blocks))
    plan = SketchPlan("none", 0, p, named, tuple(map(int, blocks)))
    manifest = Manifest("features", n, 1, p, "float32", n, COLUMNS, fingerprint, {"sketch_plan": plan.to_json()})
    columns = {name: np.zeros(n, np.float32) for name in COLUMNS}
    columns["log_odds"] = log_odds.astype(np.float32)
    try:
        store = RowStore.create(config.layout.features, manifest)
    except FingerprintMismatchError:
        shutil.rmtree(config.run_dir)
        store = RowStore.create(config.layout.features, manifest)
    if store.pending():
        store.write_shard(0, phi[:, None].astype(np.float32), columns)


def family(
    config: RunConfig,
    rows: Float[np.ndarray, "n p"],
    log_odds: Float[np.ndarray, " n"],
    asked: Float[np.ndarray, "q p"],
    blocks: Sequence[int],
    gold: GoldConfig,
) -> tuple[dict[str, np.ndarray], dict[str, dict[int, np.ndarray]]]:
    """Return the scores [q, n] of the methods, and of the forms of `spectral` for each T.

    Args:
        config: a run, for its label words.
        rows: gradients of the log-odds of training examples.
        log_odds: of them.
        asked: gradients of the log-odds of the prompts' answers.
        blocks: parameters of each tensor of the model.
        gold: the further training.
    """
    queries = Validation(asked[:, None].astype(np.float32), np.zeros(len(asked), np.int64), "", 0, 0)
    found: dict[str, np.ndarray] = {}
    natural: dict[int, np.ndarray] = {}
    iterative = ITERATIVE if rows.shape[1] <= 1_000 else ()
    for output, methods in (("loss", (*OF_LOSS, *iterative)), ("log_odds", OF_LOG_ODDS)):
        tree = config.model_dump(mode="json")
        tree |= {"run_dir": f"{config.run_dir}/{output}", "features": {"output": output}}
        tree["reduce"] = {"methods": list(methods), "iterations": 500, "certificate_draws": 0}
        part = validate_config(tree)
        is_loss = output == "loss"
        write_store(part, rows * -expit(-log_odds)[:, None] if is_loss else rows, log_odds, list(blocks))
        reduce_run(part)
        sign = -1 if is_loss else 1  # of a loss the prompts' features have the other sign
        for method in methods:
            found[method] = sign * scores_of_representers(part, method, queries)
        if not is_loss:
            reader = FeatureReader(RowStore.open(part.layout.features))
            _, natural = spectral_scores(reader, asked, gold.steps, gold.learning_rate)
    named = {SPECTRAL: natural}
    for name, curvature in ((FISHER, expit(-log_odds) ** 2), (UNWEIGHTED, np.ones(len(rows)))):
        try:
            named[name] = descended(rows, log_odds, asked, curvature, gold)
        except MethodError as error:
            print(name, error.found, flush=True)
    return found, named


def descended(
    rows: Float[np.ndarray, "n p"],
    log_odds: Float[np.ndarray, " n"],
    asked: Float[np.ndarray, "q p"],
    curvature: Float[np.ndarray, " n"],
    gold: GoldConfig,
) -> dict[int, np.ndarray]:
    """Return the scores of `spectral` for each T with another curvature, a weight of each example's gradient."""
    features = FeatureRows(array_blocks(rows * np.sqrt(curvature)[:, None]), *rows.shape)
    found = {}
    for steps in gold.steps:
        scorer = Spectral(steps, relative_rate(features, gold.learning_rate), weighted=True)
        representers = scorer.compute(scorer.init(features), rows.astype(np.float32), log_odds.astype(np.float32))
        found[steps] = asked @ representers.T
    return found


def of_network(name: str) -> dict[str, Any]:
    """Judge the family on a small network."""
    task = tabular() if name == "tabular" else text()
    network = Network(task)
    gold = GoldConfig(steps=NETWORK_STEPS, learning_rate=0.2, batch_size=10, num_seeds=10)
    game, members = FurtherTraining(network, gold), ~np.eye(NUM_EXAMPLES, dtype=bool)
    lost = np.array([game.worth(members, seed).reshape(NUM_EXAMPLES, len(gold.steps), -1) for seed in range(10)])
    rows, log_odds, asked = network.features()
    words = ["A", "B"] if task.y.max() == 1 else []
    tree = {"run_dir": str(FOLDER / name), "model": {"name": "none"}, "data": {"train": "none", "label_words": words}}
    scores, natural = family(validate_config(tree), rows, log_odds, asked, network.sizes, gold)
    scores["random"] = stream(0, "gold", "random").standard_normal((NUM_ASKED, NUM_EXAMPLES))
    return record(gold, scores, natural, lost.transpose(0, 2, 3, 1), np.arange(NUM_EXAMPLES), log_odds)


def of_llama(name: str) -> dict[str, Any]:
    """Judge the family on an adapter of the ground truth; trains what is not there yet."""
    tree = load_config(HERE / "truth" / f"{name}.yaml").model_dump(mode="json")
    tree |= {"run_dir": str(FOLDER / name), "gold": {**LLAMA_SHARED, **LLAMA[name]}}
    tree["features"] |= {"output": "loss", "linearisation": "trained", "num_inits": 1}
    config = validate_config(tree)
    train_adapter(config)
    train_further(config)
    build_features(config)
    left_out, lost = gold_scores(config)
    run = RunScores(config)
    log_odds = run.features.column("log_odds").astype(np.float64)
    phi = run.features.read(0, len(log_odds))[:, 0] / -expit(-log_odds)[:, None]
    asked = -run.validation.phi[:, 0].astype(np.float64)  # less a factor 1 - p of each prompt, which no cosine sees
    blocks = [int(block["size"]) for block in run.features.manifest.info["sketch_plan"]["blocks"]]
    scores, natural = family(config, phi, log_odds, asked, blocks, config.gold)
    scores |= {baseline: run.of(baseline) for baseline in BASELINES if baseline != "size"}
    return record(config.gold, scores, natural, lost, left_out, log_odds)


def record(
    gold: GoldConfig,
    scores: dict[str, np.ndarray],
    natural: dict[str, dict[int, np.ndarray]],
    lost: Float[np.ndarray, "s t q m"],
    left_out: Int[np.ndarray, " m"],
    log_odds: Float[np.ndarray, " n"],
) -> dict[str, Any]:
    """Judge and return what is recorded of a set."""
    rows = []
    for place, steps in enumerate(gold.steps):
        at_steps = {name: found[steps] for name, found in natural.items()}
        named = {name: array[:, left_out] for name, array in (scores | at_steps).items()}
        rows += [
            {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in judge(steps, named, lost[:, place])
        ]
    return {
        "num_examples": len(log_odds),
        "num_left_out": len(left_out),
        "num_seeds": len(lost),
        "num_prompts": lost.shape[2],
        "learning_rate": gold.learning_rate,
        "batch_size": gold.batch_size,
        "steps": list(gold.steps),
        "dtype": gold.dtype,
        "median_probability": round(float(np.median(expit(log_odds))), 4),
        "rows": rows,
    }


def cell(rows: Sequence[dict[str, Any]], steps: int, method: str) -> str:
    """Render one figure; the best of a column but for `one_seed` is bold."""
    column = {row["method"]: row for row in rows if row["steps"] == steps}
    if method not in column:
        return ""
    best = max(row["cosine"] for name, row in column.items() if name != ONE_SEED)
    row = column[method]
    value = f"{row['cosine']:.3f}"
    value = f"**{value}**" if row["cosine"] == best and method != ONE_SEED else value
    return f"{value} ({row['low']:.2f}-{row['high']:.2f})"


def table(result: dict[str, Any]) -> str:
    """Render the tables of docs/gold.md."""
    lines = []
    for name in (name for name in SETS if name in result["sets"]):
        found = result["sets"][name]
        lines += [
            f"**{TITLES[name]}**: {found['num_left_out']} of {found['num_examples']} examples left out, "
            f"{found['num_seeds']} seeds, {found['num_prompts']} prompts; SGD at {found['learning_rate']}, batches of "
            f"{found['batch_size']}; median probability of the right answer {found['median_probability']:.2f}",
            "",
            "| | " + " | ".join(f"T = {steps}" for steps in found["steps"]) + " |",
            "|---" * (len(found["steps"]) + 1) + "|",
        ]
        order = (SPECTRAL, FISHER, UNWEIGHTED, *OF_LOSS, *ITERATIVE, *OF_LOG_ODDS, *BASELINES, ONE_SEED)
        known = {row["method"] for row in found["rows"]}
        for method in (method for method in order if method in known):
            cells = [cell(found["rows"], steps, method) for steps in found["steps"]]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    """Draw docs/gold.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    styles = {SPECTRAL: "C3-o", "grad_dot": "C0-", "grad_cos": "C0--", "influence": "C2-", "datainf": "C2--"}
    styles |= {"trak": "C4-", "shapley": "C1-", ONE_SEED: "k:"}
    names = [name for name in SETS if name in result["sets"]]
    figure, panels = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), sharey=True)
    for panel, name in zip(np.atleast_1d(panels), names, strict=True):
        found = result["sets"][name]
        for method, style in styles.items():
            curve = [row["cosine"] for row in found["rows"] if row["method"] == method]
            panel.plot(found["steps"], curve, style, label=method, markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_title(TITLES[name], fontsize=9)
        panel.set_xlabel("steps of further training, T")
        panel.axhline(0, color="0.8", linewidth=0.8)
    np.atleast_1d(panels)[0].set_ylabel("cosine to what was lost")
    np.atleast_1d(panels)[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})


def write_docs() -> None:
    """Draw the plot and write the tables into their page."""
    result = json.loads(RESULT.read_text())
    plot(result)
    fill(PAGE, BEGIN, table(result), END)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=SETS)
    options = parser.parse_args()
    for name in options.sets:
        found = of_network(name) if name in ("tabular", "text") else of_llama(name)
        tree = json.loads(RESULT.read_text()) if RESULT.exists() else {"sets": {}}
        tree["sets"][name] = found
        RESULT.write_text(json.dumps(tree, indent=1) + "\n")
        for row in found["rows"]:
            print(name, row["steps"], row["method"], row["cosine"], flush=True)
    write_docs()


if __name__ == "__main__":
    main()
