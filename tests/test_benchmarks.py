"""Figures in the README are those that the benchmarks wrote."""

import json

from benchmarks.demo import BEGIN, END, README, RESULT, pool, table


def test_the_readme_table_is_rendered_from_the_result() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table(json.loads(RESULT.read_text()))


def test_recorded_figures_reach_what_is_promised() -> None:
    result = json.loads(RESULT.read_text())
    default = result["methods"][result["default_method"]]
    assert default["swapped"]["recall@1"] >= 0.9
    assert default["swapped"]["count"] >= 30
    (stored,) = [row for row in result["sketch"]["rows"] if row["stored"]]
    assert stored["dim"] == 4096
    assert stored["frobenius_error"] <= 0.08
    assert all(run["peak_memory_bytes"] <= 4 << 30 for run in result["runs"])


def test_pooling_weighs_prompts_equally() -> None:
    def run(recall: float, count: int) -> dict[str, object]:
        return {"methods": {"shapley": {"swapped": {"recall@1": recall, "recall@5": 1.0, "count": count}}}}

    pooled = pool([run(1.0, 30), run(0.5, 10), run(0.0, 0)])
    assert pooled == {"shapley": {"swapped": {"recall@1": 0.875, "recall@5": 1.0, "count": 40}}}
