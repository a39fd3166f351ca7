"""The report: escaped, self-contained, the same again, honest about what is old or missing."""

import base64
import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_build import changed
from test_resume import config_file
from tiny import tiny_rows, tiny_run
from typer.testing import CliRunner

import llmattrib.report.plots
from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.errors import ConfigError, StoreNotFoundError
from llmattrib.evaluate.record import Record
from llmattrib.reduce import reduce_run
from llmattrib.report.page import GOALS, READING, glances_of, render, write_report
from llmattrib.report.plots import interval_of, is_method
from llmattrib.store import RowStore

EVIL = '<script>x("y")</script><img src=http://e.x onerror=b>'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags, their attributes, and whether they are closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def curve(*change):
    return {"fractions": [0.1, 0.3], "change": list(change), "low": list(change), "high": list(change)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = tiny_rows(8)
    rows[2] |= {"prompt": EVIL, "completion": "<script>", "id": "id <script>"}
    (folder / "learn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(folder, reduce={"methods": ["grad_dot"]}, features={"tokens_per_batch": 512})
    config = changed(config, data={"train": str(folder / "learn.jsonl")})
    config = changed(config, values={"data": str(config.data.train), "limit": 2, "method": "grad_dot"})
    build_features(config)
    reduce_run(config)
    digest = RowStore.open(config.layout.features).digest()
    rows = [
        {"method": "grad_dot", "auroc": 0.9, "low": 0.85, "high": 0.95, "recall": 0.5},
        {"method": EVIL, "auroc": 0.6, "low": 0.5, "high": 0.7, "recall": None},
    ]
    Record("mislabel", rows, (EVIL,)).save(config, digest)
    details = {"grad_dot": {"remove_highest": curve(-1.0, -2.0)}, "random": {"remove_highest": curve(-0.1, -0.2)}}
    rows = [
        {"method": name, "remove_highest": value, "remove_highest_low": value - 0.1, "remove_highest_high": value + 0.1}
        for name, value in (("grad_dot", -1.5), ("random", -0.15))
    ]
    Record("curves", rows, (), details).save(config, "of older features")
    done = CliRunner().invoke(app, ["values", str(config_file(config, folder)), "--quiet"])
    assert done.exit_code == 0, done.output
    return config


def test_text_is_escaped_and_nothing_is_loaded_from_elsewhere(run):
    page, _ = render(run)
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []  # well formed
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert page.count("&lt;script&gt;") >= 4  # a method, a note, a prompt and a completion
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert not re.search(r"url\(|@import|<link|<iframe|<object", page)
    assert "default-src 'none'" in page


def test_it_shows_what_is_there_and_says_what_is_not(run, tmp_path):
    done = CliRunner().invoke(app, ["report", str(config_file(run, tmp_path))])
    assert done.exit_code == 0, done.output
    path = Path(run.layout.path("report.html"))
    assert f"wrote {path}" in done.stdout
    page = path.read_text()
    assert "Are wrongly labelled examples found?" in page
    assert page.count("Measured on other features") == 1  # the curves
    assert "Most valuable" in page
    assert "Least valuable" in page
    missing = page.partition("Not measured")[2].partition("Settings")[0]
    assert "leave one out" in missing
    assert "curves" not in missing
    assert run.model.name in page
    for name in ("mislabel", "curves"):
        png = Path(run.layout.path("evaluation", f"{name}.png")).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert base64.b64encode(png).decode() in page
    write_report(run)
    assert path.read_text() == page


def test_what_was_measured_with_other_settings_of_reduce_is_marked(run):
    def num_marked(**reduce):
        return render(changed(run, reduce=reduce))[0].count("or with other settings of reduce, than this run has now")

    assert num_marked(ridge=0.5) == 2  # the curves are of older features anyway
    assert num_marked(methods=["grad_dot", "grad_cos"]) == 1  # another method changes nothing of the others


def test_verdicts_look_at_intervals(run):
    def verdicts(ours, theirs, key="auroc", name="mislabel"):
        def row(method, low, high):
            return {"method": method, key: (low + high) / 2, f"{key}_low": low, f"{key}_high": high}

        record = Record(name, [row("self, grad_dot", *ours), row("loss", *theirs), row("random", -9.0, 9.0)])
        return [glance.verdict for glance in glances_of(record, ["grad_dot"])]

    assert verdicts((0.8, 0.9), (0.5, 0.7)) == ["better"]
    assert verdicts((0.6, 0.9), (0.5, 0.7)) == ["no clear difference"]
    assert verdicts((0.1, 0.2), (0.5, 0.7)) == ["worse"]
    assert verdicts((-2.0, -1.5), (-1.0, -0.5), "remove_highest", "curves") == ["better"]  # lower is better there
    assert verdicts((-0.4, -0.2), (-1.0, -0.5), "remove_highest", "curves") == ["worse"]
    record = Record("mislabel", [{"method": "grad_dot", "auroc": 0.9}])
    assert glances_of(record, ["grad_dot"]) == []  # no baseline, no comparison


def test_intervals_belong_to_their_number():
    row = {"method": "m", "lds": 0.5, "low": 0.4, "high": 0.6, "beyond_size": 0.3}
    assert interval_of(row, "lds") == (0.4, 0.6)
    assert interval_of(row, "beyond_size") is None
    assert is_method("self, shapley", ["shapley"])
    assert is_method("shapley, own", ["shapley"])
    assert not is_method("value, tfidf", ["shapley"])


def test_every_evaluation_can_be_read():
    from llmattrib.evaluate.suite import EVALUATIONS

    assert set(READING) == set(EVALUATIONS)
    assert set(GOALS) <= set(EVALUATIONS)


def test_a_run_without_features_and_a_missing_matplotlib_are_named(run, tmp_path, monkeypatch):
    with pytest.raises(StoreNotFoundError, match="llmattrib build"):
        write_report(changed(run, tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "matplotlib.artist", None)
    with pytest.raises(ConfigError, match="to fix: install llmattrib with the extra `plots`"):
        importlib.reload(llmattrib.report.plots)
