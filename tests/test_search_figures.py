"""The table of searches is what the benchmark wrote, and a scan finds what flat does."""

import json

from benchmarks import query


def test_the_table_of_searches_is_rendered_from_the_result_and_a_scan_finds_what_flat_does() -> None:
    result = json.loads(query.RESULT.read_text())
    found = query.PAGE.read_text(encoding="utf-8").partition(query.BEGIN)[2].partition(query.END)[0]
    assert found == query.table(result)
    scans = [row for row in result["search"]["rows"] if row["kind"] == "scan"]
    assert scans
    assert all(row["recall_at_10"] >= 0.99 for row in scans)
    assert result["warm"]["added"] <= 0.10


def test_building_and_streamed_reducing_take_no_more_memory_for_more_examples() -> None:
    stages = json.loads((query.ROOT / "benchmarks" / "results" / "memory.json").read_text())["stages"]
    for stage, most in {"build": 5_000, "reduce_influence": 500, "reduce_streamed": 2_000}.items():
        sizes = sorted(stages[stage], key=int)
        assert (sizes[0], sizes[-1]) == ("1000", "16000")
        grown = stages[stage][sizes[-1]]["peak_bytes"] - stages[stage][sizes[0]]["peak_bytes"]
        assert grown / (int(sizes[-1]) - int(sizes[0])) <= most, f"bytes an example, of {stage}"


def test_the_kernel_game_of_5000_examples_answers_872_prompts_in_less_time_than_the_features_take() -> None:
    found = json.loads((query.ROOT / "benchmarks" / "results" / "end_to_end.json").read_text())
    case = found["llama_1m"]
    assert (case["examples"], case["prompts"]) == (5_000, 872)
    assert case["sum_rule_error"] <= 1e-3
    assert sum(case["stages"][stage]["cpu_seconds"] for stage in ("reduce", "index", "search")) <= 60
