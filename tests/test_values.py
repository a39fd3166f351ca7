"""Data values against direct computations from the stored features; files, resuming, refusals."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from oracles import subset_weights
from records import record
from test_build import changed
from test_resume import config_file
from tiny import LABEL_WORDS, tiny_jsonl, tiny_run
from typer.testing import CliRunner

from llmattrib.build import build_features
from llmattrib.cli import app
from llmattrib.config import RunConfig
from llmattrib.data import load_validation_examples
from llmattrib.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    FingerprintMismatchError,
    LlmattribError,
    MethodError,
    StaleIndexError,
    StoreLockedError,
    StoreNotFoundError,
)
from llmattrib.estimators.ame import AmeRegression, Knockoffs
from llmattrib.estimators.freeshap import FreeShap, KernelProblem
from llmattrib.estimators.knn import knn_shapley, soft_knn_shapley
from llmattrib.estimators.moments import SIGNS, Moments
from llmattrib.estimators.one_sample import msr_banzhaf, table_values
from llmattrib.estimators.permutation import UtilityResult
from llmattrib.estimators.quadrature import BANZHAF as BANZHAF_VALUE
from llmattrib.estimators.quadrature import SHAPLEY as SHAPLEY_VALUE
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import KernelGame
from llmattrib.games.subset_table import ATTRIBUTION, BANZHAF, SHAPLEY, SIZES, draw_rows
from llmattrib.lock import locked
from llmattrib.query import Run
from llmattrib.reduce import reduce_run
from llmattrib.rng import stream
from llmattrib.store import RowStore
from llmattrib.values import validation as validation_module
from llmattrib.values.result import ValuesResult
from llmattrib.values.stage import compute_values

NUM_ROWS, NUM_PROMPTS = 12, 5
REDUCE: dict[str, Any] = {"methods": ["shapley", "banzhaf", "grad_dot"], "certificate_draws": 0}
FLAVOURS: dict[str, dict[str, Any]] = {
    "loss": {"reduce": REDUCE},
    "margin": {"labels": True, "features": {"output": "margin"}, "reduce": REDUCE},
    "logits": {
        "labels": True,
        "features": {"output": "logits", "dtype": "float32"},
        "reduce": REDUCE | {"methods": ["shapley"]},
    },
}
Made = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Returns a reduced run of a flavour, made once, with settings of its values section."""
    made: dict[str, RunConfig] = {}

    def get(flavour: str, **values: Any) -> RunConfig:
        if flavour not in made:
            tmp_path = tmp_path_factory.mktemp(flavour)
            settings = FLAVOURS[flavour]
            data = tiny_jsonl(tmp_path, NUM_PROMPTS, labels=settings.get("labels", False), name="validation.jsonl")
            lines = Path(data).read_text().replace("colour", "green colour")  # not the training prompts
            Path(data).write_text(lines)
            config = tiny_run(tmp_path, num_rows=NUM_ROWS, values={"data": data, "num_samples": 64}, **settings)
            build_features(config)
            reduce_run(config)
            made[flavour] = config
        return changed(made[flavour], values=values)

    return get


def copied(config: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(config.run_dir, tmp_path / "copy")
    return config.model_copy(update={"run_dir": str(tmp_path / "copy")})


class Plain:
    """The kernel game of a run, refitted for every subset, from what is stored."""

    def __init__(self, config: RunConfig) -> None:
        features, asked = RowStore.open(config.layout.features), RowStore.open(config.layout.validation)
        representers = RowStore.open(config.layout.representers("shapley"))
        info, mean = representers.manifest.info, representers.read_vector("mean").astype(np.float64)
        self.output = config.features.output
        rows = features.read(0, NUM_ROWS).astype(np.float64)
        queries = asked.read(0, asked.manifest.num_rows).astype(np.float64)
        if info["center"]:
            np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6 * np.abs(rows).max())
            rows, queries = rows - mean, queries - mean
        if info["normalize"]:
            rows, queries = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (rows, queries))
        self.rows, self.queries = rows.transpose(1, 0, 2), queries.transpose(1, 0, 2)
        self.labels = asked.column("label").astype(int)
        labels = features.column("label").astype(int)
        self.num_outputs = len(self.rows)
        by_class = self.output == "logits"
        self.responses = [
            ((labels == c) - 1 / self.num_outputs)[:, None] if by_class else np.ones((NUM_ROWS, 1))
            for c in range(self.num_outputs)
        ]
        self.ridges = [info["ridge"] * np.mean(np.sum(x**2, axis=1)) for x in self.rows]
        self.slots = self.labels if by_class else np.zeros(len(self.labels), int)

    def games(self) -> list[KernelGame]:
        return [KernelGame(*parts) for parts in zip(self.rows, self.responses, self.ridges, strict=True)]

    def predictions(self, members: list[int]) -> np.ndarray:
        """[m, c]"""
        if not members:
            return np.zeros((len(self.labels), self.num_outputs))
        parts = zip(self.rows, self.responses, self.ridges, self.queries, strict=True)
        return np.concatenate([q @ subset_weights(x, y, lam, members).T for x, y, lam, q in parts], axis=1)

    def worth(self, members: list[int], utility: str) -> float:
        outputs, right = self.predictions(members), np.arange(len(self.labels))
        if utility == "prediction":
            return float(outputs[right, self.slots].mean())
        scores = outputs if self.output == "logits" else np.stack([outputs[:, 0], 0 * outputs[:, 0]], axis=1)
        if utility == "log_likelihood":
            return float(np.mean(scores[right, self.slots] - np.log(np.exp(scores).sum(1))))
        best = scores == scores.max(1, keepdims=True)
        return float(np.mean(best[right, self.slots] / best.sum(1)))

    def worths(self, utility: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda masks: np.array([[self.worth(list(np.flatnonzero(mask)), utility)] for mask in masks])


def numbers(result: ValuesResult, field: str = "value") -> np.ndarray:
    return np.array([getattr(item, field) for item in result.values], float)


def close(found: np.ndarray, wanted: np.ndarray, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


def test_validation_features_are_those_of_queries(finished: Made) -> None:
    config = finished("margin")
    compute_values(config)
    run = Run(config)
    examples = load_validation_examples(config.data, config.values)
    phi = run.features(examples, [run._encode(example) for example in examples])
    store = RowStore.open(config.layout.validation)
    stored = store.read(0, NUM_PROMPTS)
    assert store.manifest.dtype == "int8"
    np.testing.assert_allclose(stored, phi, rtol=0, atol=np.abs(phi).max() / 250)
    assert store.column("label").tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("flavour", "method"), [
    ("loss", "shapley"), ("loss", "banzhaf"), ("loss", "grad_dot"), ("margin", "shapley"), ("logits", "shapley")
])  # fmt: skip
def test_values_of_representers_are_means_of_inner_products(finished: Made, flavour: str, method: str) -> None:
    config = finished(flavour, method=method)
    result = compute_values(config)
    store, asked = RowStore.open(config.layout.representers(method)), RowStore.open(config.layout.validation)
    rows, vectors = asked.read(0, NUM_PROMPTS).astype(np.float64), store.read(0, NUM_ROWS).astype(np.float64)
    wanted = np.zeros(NUM_ROWS)
    for row, label in zip(rows, asked.column("label").astype(int), strict=True):
        slot = label if flavour == "logits" else 0
        query = (row - store.read_vector("mean"))[slot]
        if store.manifest.info["normalize"]:
            query /= np.linalg.norm(query)
        wanted += vectors[:, slot] @ query / NUM_PROMPTS
    close(numbers(result), wanted)
    assert [item.id for item in result.values] == [f"row-{i}" for i in range(NUM_ROWS)]
    assert [item.index for item in result.values] == list(range(NUM_ROWS))


@pytest.mark.parametrize(("flavour", "method"), [
    ("loss", "shapley"), ("loss", "banzhaf"), ("margin", "subset"), ("logits", "subset"), ("logits", "shapley")
])  # fmt: skip
def test_signs_are_certified_by_unbiased_draws(finished: Made, flavour: str, method: str) -> None:
    config = finished(flavour, method=method, num_samples=96, confidence=0.8)
    result = compute_values(config)
    plain = Plain(config)
    semivalue = BANZHAF_VALUE if method == "banzhaf" else SHAPLEY_VALUE
    samples = np.zeros((96, NUM_ROWS))
    for c, game in enumerate(plain.games()):
        draws = Subset(semivalue, 96, config.seed).samples(game, plain.queries[c])
        samples += [draw[plain.slots == c, :, 0].sum(0) / NUM_PROMPTS for draw in draws]
    moments = Moments.of(iter(samples), (NUM_ROWS,))
    half = moments.half_width(0.8)
    if method == "subset":
        close(numbers(result), moments.mean)
    close(numbers(result, "standard_error"), moments.standard_error)
    close(numbers(result, "lower"), moments.mean - half)
    close(numbers(result, "upper"), moments.mean + half)
    assert [item.sign for item in result.values] == [SIGNS[int(code)] for code in moments.signs(0.8)]
    if method == "banzhaf":
        assert result.expected_total is None
    else:
        due = plain.worth(list(range(NUM_ROWS)), "prediction")  # small where centred: values nearly cancel
        assert result.expected_total == pytest.approx(due, abs=1e-6 * np.abs(numbers(result)).sum())
    if method == "shapley":
        assert result.expected_total is not None
        assert abs(result.total - result.expected_total) < 2e-3 * np.abs(numbers(result)).sum()


@pytest.mark.parametrize("flavour", ["loss", "margin", "logits"])
@pytest.mark.parametrize("utility", ["prediction", "log_likelihood", "accuracy"])
def test_permutation_values_equal_refitting_every_prefix(finished: Made, flavour: str, utility: str) -> None:
    config = finished(flavour, method="permutation", utility=utility, num_permutations=32, confidence=0.5)
    if flavour == "loss" and utility != "prediction":
        with pytest.raises(MethodError, match=rf"values\.utility={utility} compares labels, and there are no data"):
            compute_values(config)
        return
    result = compute_values(config)
    plain, samples = Plain(config), []
    for k in range(16):
        order = stream(config.seed, "permutation", k).permutation(NUM_ROWS)
        sample = np.zeros(NUM_ROWS)
        for players in (order, order[::-1]):
            worths = [plain.worth(list(players[:size]), utility) for size in range(NUM_ROWS + 1)]
            sample[players] += np.diff(worths) / 2
        samples.append(sample)
    moments = Moments.of(iter(samples), (NUM_ROWS,))
    close(numbers(result), moments.mean)
    close(numbers(result, "standard_error"), moments.standard_error)
    close(numbers(result, "upper"), moments.mean + moments.half_width(0.5))
    every = list(range(NUM_ROWS))
    due = plain.worth(every, utility) - plain.worth([], utility)
    assert result.expected_total == pytest.approx(due, abs=1e-6)
    assert result.total == pytest.approx(due, abs=1e-6)


def test_truncation_is_noted(finished: Made) -> None:
    config = finished("margin", method="permutation", utility="accuracy", num_permutations=4, tolerance=0.9)
    result = compute_values(config)
    assert any("permutations stopped after" in note for note in result.notes)
    assert any("fewer than 16 samples" in note for note in result.notes)
    assert {item.sign for item in result.values} == {"undetermined"}
    assert np.isinf(numbers(result, "upper")).all()


@pytest.mark.parametrize("flavour", ["margin", "logits"])
@pytest.mark.parametrize("utility", ["prediction", "log_likelihood", "accuracy"])
def test_table_methods_equal_their_estimators_on_refitted_subsets(
    finished: Made, tmp_path: Path, flavour: str, utility: str
) -> None:
    config = finished(flavour, num_samples=100, utility=utility)
    compute_values(changed(config, values={"method": "msr_banzhaf"}))
    plain = Plain(config)
    ends = [np.array([plain.worth(members, utility)]) for members in ([], list(range(NUM_ROWS)))]
    banzhaf = msr_banzhaf(draw_rows(BANZHAF, config.seed, NUM_ROWS, 100, plain.worths(utility)))
    sizes = table_values(draw_rows(SIZES, config.seed, NUM_ROWS, 100, plain.worths(utility)), SHAPLEY_VALUE, *ends)
    for method, wanted in (("msr_banzhaf", banzhaf), ("one_sample", sizes)):
        result = compute_values(changed(config, values={"method": method}))
        close(numbers(result), wanted.values[:, 0])
        close(numbers(result, "standard_error"), wanted.standard_errors[:, 0])
        close(numbers(result, "upper"), wanted.values[:, 0] + 1.959964 * wanted.standard_errors[:, 0])
        certain = np.abs(wanted.values) > 1.959964 * wanted.standard_errors
        assert [item.sign != "undetermined" for item in result.values] == certain[:, 0].tolist()
        assert (result.expected_total is None) == (method == "msr_banzhaf")


@pytest.mark.parametrize(("name", "design"), [("attribution", ATTRIBUTION), ("shapley", SHAPLEY)])
def test_ame_is_lasso_with_knockoffs(finished: Made, name: str, design: Any) -> None:
    settings = {"method": "ame_lasso", "ame_design": name, "num_samples": 128, "false_discovery_rate": 0.5}
    config = finished("margin", **settings)
    result = compute_values(config)
    rows = draw_rows(design, config.seed, NUM_ROWS, 128, Plain(config).worths("prediction"))
    close(numbers(result), AmeRegression().init(rows).values[:, 0], 1e-4)  # coordinate descent stops at 1e-5
    signs = sum(
        sign * Knockoffs(0.5, harmful).init(rows)[:, 0].astype(int) for sign, harmful in ((1, False), (-1, True))
    )
    assert [item.sign for item in result.values] == [SIGNS[code] for code in signs.tolist()]
    assert {item.standard_error for item in result.values} == {None}


@pytest.mark.parametrize("kernels", ["single", "per_class"])
@pytest.mark.parametrize("utility", ["auto", "accuracy"])
def test_freeshap_is_the_published_estimator(finished: Made, kernels: Any, utility: str) -> None:
    settings = {"method": "freeshap", "freeshap_kernels": kernels, "utility": utility, "num_permutations": 20}
    config = finished("logits", **settings)
    result = compute_values(config)
    features, asked = RowStore.open(config.layout.features), RowStore.open(config.layout.validation)
    problem = KernelProblem.of_features(
        features.read(0, NUM_ROWS),
        asked.read(0, NUM_PROMPTS),
        features.column("label").astype(np.int64),
        asked.column("label").astype(np.int64),
        kernels,
    )
    drawn = FreeShap(20).sample(problem)
    found = UtilityResult.of(Moments.of(drawn.samples, drawn.shape), drawn)
    metric = 0 if utility == "auto" else 1
    close(numbers(result), found.moments.mean[metric])
    close(numbers(result, "standard_error"), found.moments.standard_error[metric])
    assert result.expected_total == pytest.approx(found.full[metric] - found.empty[metric])
    assert result.utility == ("log_likelihood" if utility == "auto" else "accuracy")
    assert any("FreeShap starts from exact features; these are float32 with sketch oporp" in n for n in result.notes)


@pytest.mark.parametrize("flavour", ["margin", "logits"])
@pytest.mark.parametrize("label", ["hard", "soft"])
def test_neighbours_are_sorted_by_cosine_without_the_label(finished: Made, flavour: str, label: str) -> None:
    config = finished(flavour, method="knn_shapley", knn_label=label, knn_neighbors=3)
    result = compute_values(config)
    features, asked = RowStore.open(config.layout.features), RowStore.open(config.layout.validation)
    taught, wanted = features.column("label"), asked.column("label")
    rows, queries = features.read(0, NUM_ROWS), asked.read(0, NUM_PROMPTS)
    if flavour == "margin":
        rows[taught == 1] *= -1
        queries[wanted == 1] *= -1
    rows, queries = rows.reshape(NUM_ROWS, -1), queries.reshape(NUM_PROMPTS, -1)
    order = np.argsort(-queries @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T, axis=1, kind="stable")
    matches = taught == wanted[:, None]
    values = knn_shapley(order, matches, 3) if label == "hard" else soft_knn_shapley(order, matches, 3, 2)
    close(numbers(result), values.mean(0))
    assert result.expected_total == pytest.approx(result.total)
    assert {item.lower for item in result.values} == {None}


def test_flipped_labels_have_the_lowest_values(tmp_path: Path) -> None:
    colours, things = ("red", "green", "blue", "user"), ("tree", "stone", "river", "house", "what", "is")

    def write(name: str, nouns: tuple[str, ...], flipped: set[int]) -> str:
        rows = [
            {"id": f"{i}", "prompt": f"{'spam ' * 6}{a} {b}" if i % 2 else f"{'ham ' * 6}{a} {b}"}
            for i, (a, b) in enumerate((a, b) for b in nouns for a in colours)
        ]
        for i, row in enumerate(rows):
            row["completion"] = LABEL_WORDS[(i + (i in flipped)) % 2]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    train = write("planted.jsonl", things[:4], {3, 8})
    clean = write("clean.jsonl", things[4:], set())
    config = tiny_run(tmp_path, labels=True, features={"output": "margin"}, reduce=REDUCE | {"methods": ["shapley"]})
    config = changed(config, data={"train": train}, values={"data": clean})
    build_features(config)
    reduce_run(config)
    for settings in ({}, {"method": "permutation", "utility": "log_likelihood"}, {"method": "knn_shapley"}):
        result = compute_values(changed(config, values=settings))
        assert {hit.row for hit in result.lowest(2)} == {3, 8}, settings
    certified = compute_values(changed(config, values={"num_samples": 512}))
    assert [certified.values[row].sign for row in (3, 8)] == ["harmful", "harmful"]


def test_files_hold_the_values_and_equal_ones_are_kept(finished: Made, tmp_path: Path) -> None:
    config = copied(finished("margin", num_samples=32), tmp_path)
    done: list[tuple[int, int]] = []
    result = compute_values(config, lambda now, total: done.append((now, total)))
    assert done[-1] == (32, 32)
    with open(result.csv_path, newline="") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(result.parquet_path).to_pylist()
    for row, stored, item in zip(rows, table, result.values, strict=True):
        assert (row["id"], int(row["index"]), float(row["value"])) == (item.id, item.index, item.value)
        assert [float(row[name]) for name in ("standard_error", "lower", "upper")] == [
            item.standard_error,
            item.lower,
            item.upper,
        ]
        assert (row["sign"], row["prompt"], row["completion"]) == (item.sign, item.prompt, item.completion)
        assert stored == item.__dict__
    summary = json.loads(Path(config.layout.path("values", "shapley.json")).read_text())
    assert summary["total"] == result.total
    assert summary["settings"]["num_samples"] == 32
    assert sum(summary["signs"].values()) == NUM_ROWS
    before = {file: file.read_bytes() for file in Path(config.layout.path("values")).iterdir() if file.is_file()}
    again = compute_values(config)
    assert again.is_reused
    assert again.values == result.values
    assert not compute_values(changed(config, values={"num_samples": 16})).is_reused
    assert not compute_values(config).is_reused
    assert {file: file.read_bytes() for file in before} == before
    Path(result.parquet_path).write_bytes(b"PAR1 cut off")
    assert not compute_values(config).is_reused


def test_lowest_and_highest_are_hits_with_text(finished: Made) -> None:
    result = compute_values(finished("loss"))
    values = numbers(result)
    assert [hit.row for hit in result.highest(3)] == np.argsort(-values, kind="stable")[:3].tolist()
    lowest = result.lowest(2)
    assert [hit.row for hit in lowest] == np.argsort(values, kind="stable")[:2].tolist()
    assert lowest[0].prompt.startswith("what is the colour of a")
    assert lowest[0].share == pytest.approx(values.min() / np.abs(values).sum())
    assert result.count("helpful") + result.count("harmful") + result.count("undetermined") == NUM_ROWS


def test_a_killed_run_goes_on_with_the_missing_shards(
    finished: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished("margin", method="msr_banzhaf")
    whole = compute_values(config)
    config = copied(config, tmp_path)
    for path in (config.layout.validation, config.layout.path("values")):
        shutil.rmtree(path)
    extract, calls = validation_module.extract_rows, []

    def dies_at_the_second(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[3]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(*arguments, **options)

    monkeypatch.setattr(validation_module, "extract_rows", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compute_values(config)
    assert RowStore.open(config.layout.validation).pending() == [1]
    assert compute_values(config).values == whole.values
    assert calls == [4, 1, 1]
    monkeypatch.setattr(validation_module, "encode_examples", None)  # a complete store needs no model
    of_shard = record(config.layout.path("values", "subsets.zarr"), 1)
    of_shard.unlink()
    Path(config.layout.path("values", "msr_banzhaf.json")).unlink()
    assert compute_values(config).values == whole.values
    assert of_shard.exists()


def test_a_longer_table_begins_with_the_shorter_one(finished: Made, tmp_path: Path) -> None:
    config = copied(finished("margin", method="one_sample", num_samples=64), tmp_path)
    shutil.rmtree(config.layout.path("values"), ignore_errors=True)
    short = compute_values(config)
    commits = Path(config.layout.path("values", "subsets.zarr", "commits"))
    before = {file.name: file.stat().st_mtime_ns for file in commits.iterdir()}
    compute_values(changed(config, values={"num_samples": 96}))
    assert {name: (commits / name).stat().st_mtime_ns for name in before} == before
    assert len(list(commits.iterdir())) == len(before) + 1
    assert compute_values(config).values == short.values


def test_another_validation_set_replaces_the_features(finished: Made, tmp_path: Path) -> None:
    config = copied(finished("loss"), tmp_path)
    first = compute_values(config)
    other = compute_values(changed(config, values={"limit": 2}))
    assert (first.num_validation, other.num_validation) == (NUM_PROMPTS, 2)
    assert RowStore.open(config.layout.validation).manifest.num_rows == 2
    table = changed(config, values={"method": "one_sample"})
    compute_values(changed(table, values={"limit": 3}))
    with pytest.raises(FingerprintMismatchError, match=r"subsets\.zarr was made with other settings(.|\n)*validation"):
        compute_values(table)


def test_no_draws_leave_signs_open(finished: Made) -> None:
    result = compute_values(finished("loss", num_samples=0))
    assert result.count("undetermined") == NUM_ROWS
    assert any("signs are not certified" in note for note in result.notes)


REFUSED: list[tuple[str, dict[str, Any], type[LlmattribError], str]] = [
    ("loss", {"data": None}, ConfigError, r"values\.data is not set(.|\n)*set values\.data="),
    ("loss", {"data": "missing.jsonl"}, EmptyDatasetError, r"no file missing\.jsonl(.|\n)*check values\.data"),
    ("loss", {"data": "s3://x/y.jsonl"}, DataError, r"values\.data is s3://"),
    ("loss", {"method": "influence"}, StoreNotFoundError, "llmattrib reduce"),
    ("margin", {"utility": "accuracy"}, MethodError, r"utility=accuracy is not linear in a query, so shapley has no"),
    ("margin", {"utility": "log_likelihood", "method": "subset"}, MethodError, r"so subset has no values of it"),
    ("margin", {"method": "knn_shapley", "utility": "prediction"}, MethodError, "is no utility of knn_shapley"),
    ("logits", {"method": "freeshap", "utility": "prediction"}, MethodError, "is no utility of freeshap"),
    ("margin", {"method": "freeshap"}, MethodError, r"freeshap needs the gradient of each class's logit(.|\n)*margin"),
    ("loss", {"method": "knn_shapley"}, MethodError, r"compares labels, and there are no data\.label_words"),
    ("loss", {"method": "one_sample", "num_samples": 0}, MethodError, "leaves one_sample without subsets"),
    ("loss", {"method": "subset", "num_samples": 0}, MethodError, "leaves subset without subsets"),
    ("loss", {"method": "one_sample", "utility": "accuracy"}, MethodError, r"there are no data\.label_words"),
]


@pytest.mark.parametrize(("flavour", "values", "error", "message"), REFUSED)
def test_what_cannot_be_valued_is_refused(
    finished: Made, flavour: str, values: dict[str, Any], error: type[LlmattribError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compute_values(finished(flavour, **values))


def test_labels_are_not_compared_with_centred_or_unscaled_features(finished: Made, tmp_path: Path) -> None:
    values = {"method": "permutation", "utility": "accuracy"}
    with pytest.raises(MethodError, match=r"centred features of the own label are no margins"):
        compute_values(changed(finished("margin", **values), reduce={"center": True}))


def test_settings_of_other_features_and_old_representers_are_refused(finished: Made, tmp_path: Path) -> None:
    config = finished("loss")
    with pytest.raises(FingerprintMismatchError, match=r"encoding\.system"):
        compute_values(changed(config, data={"system": "be brief"}))
    config = copied(config, tmp_path)
    shutil.rmtree(config.layout.features)
    build_features(changed(config, data={"limit": 8}))
    with pytest.raises(StaleIndexError, match="was made from other features"):
        compute_values(config)


@pytest.mark.parametrize(
    ("flavour", "settings", "message"),
    [
        (
            "loss",
            {"ridge": 0.2},
            r"shapley\.zarr was made with reduce settings ridge=0\.1\n.*ridge=0\.2, as the config",
        ),
        ("margin", {"ridge": 0.2}, r"reduce settings ridge=loo\n.*ridge=0\.2, as.*\n.*run `llmattrib reduce`"),
        (
            "margin",
            {"center": True, "dtype": "float16"},
            r"settings center=False, dtype=float32\n.*center=True, dtype=f",
        ),
    ],
)
def test_representers_of_other_reduce_settings_are_refused(
    finished: Made, flavour: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StaleIndexError, match=message):
        compute_values(changed(finished(flavour), reduce=settings))


def test_ridge_lost_in_rounding_is_an_error(tmp_path: Path) -> None:
    sketch = {"sketch": {"kind": "rademacher", "dim": 4}}
    config = tiny_run(tmp_path, features=sketch, values={"method": "permutation", "num_permutations": 2})
    config = changed(config, values={"data": config.data.train})
    build_features(config)
    tiny = config.reduce.model_copy(update={"ridge": 1e-20})  # the config refuses it
    with pytest.raises(MethodError, match=r"cannot be solved \(Matrix is not positive(.|\n)*larger reduce\.ridge"):
        compute_values(config.model_copy(update={"reduce": tiny}))


def test_one_process_at_a_time(finished: Made) -> None:
    config = finished("loss")
    with locked(config.layout.path("values")), pytest.raises(StoreLockedError, match="is being written by"):
        compute_values(config)


@pytest.mark.parametrize("reduce", [{"methods": ["shapley", "freeshap"]}, {"method": "freeshap"}])
def test_freeshap_is_no_method_of_reduce(finished: Made, reduce: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"set values\.method=freeshap and values\.data"):
        changed(finished("loss"), reduce=reduce)


def test_command_line(finished: Made, tmp_path: Path) -> None:
    config = copied(finished("margin", num_samples=32), tmp_path)
    path = config_file(config, tmp_path)
    shown = CliRunner().invoke(app, ["values", str(path), "--top", "2"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert f"wrote {config.layout.path('values', 'shapley.csv')} and " in shown.stdout
    assert "shapley values of 12 examples in prediction over 5 prompts" in shown.stdout
    assert "undetermined; sum" in shown.stdout
    assert shown.stdout.index("Highest values") < shown.stdout.index("Lowest values")
    result = compute_values(config)
    assert result.is_reused
    assert all(hit.id in shown.stdout for hit in (*result.lowest(2), *result.highest(2)))
    arguments = ["values", str(path), "values.num_samples=16", "--json", "--top", "1"]
    tree = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert [len(tree[name]) for name in ("lowest", "highest")] == [1, 1]
    assert tree["csv"] == result.csv_path
    quiet = CliRunner().invoke(app, ["values", str(path), "--quiet"], catch_exceptions=False)
    assert quiet.stdout == ""
    refused = CliRunner().invoke(app, ["values", str(path), "values.data=null"])
    assert refused.exit_code == 2
    assert "values.data is not set" in refused.stderr
