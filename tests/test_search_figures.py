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
