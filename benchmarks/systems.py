"""The table of README: the four published systems, what does each here, and a figure that a benchmark measured.

    python -m benchmarks.systems

Reads the results of kernel_game, poison, tracin_we and gold; measures nothing itself. `make bench` ends with it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pages import fill

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- systems:begin -->\n", "<!-- systems:end -->\n"


def result(name: str) -> Any:
    """Return what a benchmark wrote."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def freeshap() -> str:
    """Speed of permutations and of the mean field."""
    game = result("kernel_game")
    speedup, field = game["permutation_speedup"], game["mean_field_n5000_p512"]
    return (
        f"permutations {speedup['n500']:.0f} (n = 500) and {speedup['n2000']:.0f} times (n = 2,000) as fast as the "
        f"published incremental inverse; without sampling {field['seconds']:.0f} s of two threads for 5,000 examples "
        f"and all future prompts, {field['relative_error']:.1%} from a long sampled reference"
    )


def ame() -> str:
    """Planted poisons found."""
    found = result("poison")
    share = np.mean(found["kernel"]["centred"]["ame_lasso, 800"])
    text = f"finds {share:.0%} of ten poisons among 400 examples from 800 subsets of the kernel game"
    count, recall = max(found["retraining"]["ame_lasso"].items(), key=lambda item: int(item[0]))
    text += f"; from real sub-models {recall:.0%} of five among 100 ({count} of them)"
    return f"{text}, and {found['taught']['ame_lasso']['100']:.0%} of the facts among 160 that taught an answer (100)"


def tracin_we() -> str:
    """Scores against sub-models."""
    methods = result("tracin_we")["halves"]["facts"]["methods"]
    return (
        f"LDS on questions {methods['tracin_we']['lds']:.2f}, TracIn of the last layer "
        f"{methods['grad_dot, last layer']['lds']:.2f}, of all layers {methods['grad_dot']['lds']:.2f}"
    )


def final_model() -> str:
    """Agreement with further training."""
    rows = result("gold")["sets"]["facts"]["rows"]
    steps = max(row["steps"] for row in rows)
    cosine = {row["method"]: row["cosine"] for row in rows if row["steps"] == steps}
    return (
        f"cosine with {steps} steps of further training: T-step influence {cosine['spectral']:.2f}, "
        f"gradients {cosine['grad_dot']:.2f}, influence {cosine['influence']:.2f}"
    )


def table() -> str:
    """Render the table."""
    rows = [
        (
            "FreeShap (Wang et al. 2024)",
            "Shapley values on the NTK: without sampling, answered by the index; and as published",
            "`llmattrib reduce CONFIG`, `llmattrib values CONFIG values.method=freeshap`",
            freeshap(),
        ),
        (
            "AME (Lin et al. 2022)",
            "LASSO with knockoffs over random subsets, of the kernel game or of real sub-models",
            "`llmattrib values CONFIG values.method=ame_lasso`; `values.game=retraining` after `llmattrib retrain`",
            ame(),
        ),
        (
            "TracIn-WE (Yeh et al. 2022)",
            "gradients at the word embeddings; shows the words through which an example acts",
            "`llmattrib query CONFIG --method tracin_we --explain`",
            tracin_we(),
        ),
        (
            "Final-model-only attribution (Wei et al. 2024)",
            "the further-training gold standard, and the gradient family: Grad-Dot, Grad-Cos, DataInf, influence "
            "(direct, CG, LiSSA), TRAK, EK-FAC, T-step spectral influence",
            "`llmattrib evaluate gold CONFIG`",
            final_model(),
        ),
    ]
    lines = ["| system | here | command | a figure from a run |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    """Write the table into README."""
    fill(README, BEGIN, table(), END)


if __name__ == "__main__":
    main()
