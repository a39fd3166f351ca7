"""Samplers of data values that are killed, asked for more samples, or find a file that is not whole."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_jsonl, tiny_run

from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.reduce import reduce_run
from llmattrib.values import samples as samples_module
from llmattrib.values.stage import compute_values

SAMPLERS: list[dict[str, Any]] = [
    {"method": "shapley", "num_samples": 37},
    {"method": "subset", "num_samples": 37},
    {"method": "permutation", "num_permutations": 40, "utility": "log_likelihood"},
    {"method": "permutation", "num_permutations": 40, "utility": "accuracy", "tolerance": 0.5},
    {"method": "freeshap", "num_permutations": 20},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A reduced run of logits with a validation set."""
    path = tmp_path_factory.mktemp("logits")
    data = tiny_jsonl(path, 5, labels=True, name="validation.jsonl")
    Path(data).write_text(Path(data).read_text().replace("colour", "green colour"))
    config = tiny_run(
        path,
        labels=True,
        features={"output": "logits", "dtype": "float32"},
        reduce={"methods": ["shapley"], "certificate_draws": 0},
        values={"data": data},
    )
    build_features(config)
    reduce_run(config)
    compute_values(config)
    return config


def with_values(config: RunConfig, run_dir: Path, **values: Any) -> RunConfig:
    """The config in a copy of its run directory without values."""
    if not run_dir.exists():
        shutil.copytree(config.run_dir, run_dir, ignore=shutil.ignore_patterns("values"))
    tree = config.model_dump(mode="json")
    return validate_config({**tree, "run_dir": str(run_dir), "values": tree["values"] | values})


def files(config: RunConfig) -> dict[str, bytes]:
    """What the folder of values holds, locks apart."""
    folder = Path(config.layout.path("values"))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the samples that are drawn; every one is written at once."""
    numbers: list[int] = []
    original = samples_module._for_a_while

    def counted(pending: Iterator[np.ndarray], before: int, *rest: Any) -> Iterator[np.ndarray]:
        for number, sample in enumerate(original(pending, before, *rest), start=before):
            numbers.append(number)
            yield sample

    monkeypatch.setattr(samples_module, "_for_a_while", counted)
    monkeypatch.setattr(samples_module, "_SECONDS", 0.0)
    return numbers


@pytest.mark.parametrize("values", SAMPLERS, ids=lambda values: f"{values['method']}-{values.get('utility', 'auto')}")
def test_a_killed_sampler_goes_on_and_ends_with_the_bytes_of_an_unbroken_run(
    run: RunConfig, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "_SECONDS", 30.0)
        unbroken = with_values(run, tmp_path / "unbroken", **values)
        whole = compute_values(unbroken)
    size = len(drawn)
    assert drawn == list(range(size))
    drawn.clear()
    broken = with_values(run, tmp_path / "broken", **values)
    seen: list[tuple[int, int]] = []

    def die(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_values(broken, die)
    assert drawn == list(range(8))
    found = compute_values(broken, lambda done, total: seen.append((done, total)))
    assert drawn == [*range(8), *range(7, size)]  # the eighth was drawn and not written
    assert seen == [(done, size) for done in range(8, size + 1)]
    assert found.values == whole.values
    assert files(broken) == files(unbroken)


@pytest.mark.parametrize("values", SAMPLERS, ids=lambda values: f"{values['method']}-{values.get('utility', 'auto')}")
def test_more_samples_go_on_and_other_ones_start_again(
    run: RunConfig, tmp_path: Path, drawn: list[int], values: dict[str, Any]
) -> None:
    key = "num_samples" if "num_samples" in values else "num_permutations"
    each = 2 if values["method"] == "permutation" else 1
    whole = compute_values(with_values(run, tmp_path / "whole", **values))
    drawn.clear()
    few = values | {key: 16 * each}
    compute_values(with_values(run, tmp_path / "grown", **few))
    assert drawn == list(range(16))
    grown = with_values(run, tmp_path / "grown", **values)
    assert compute_values(grown).values == whole.values
    assert drawn == list(range(values[key] // each))
    drawn.clear()
    compute_values(with_values(run, tmp_path / "grown", **few))
    assert drawn == list(range(16))  # fewer start again
    kept = Path(grown.layout.path("values", f"{values['method']}.npz"))
    kept.write_bytes(kept.read_bytes()[:-40])
    drawn.clear()
    assert compute_values(grown).values == whole.values  # what is not whole counts as none
    drawn.clear()
    compute_values(grown.model_copy(update={"values": grown.values.model_copy(update={"limit": 3})}))
    assert drawn == list(range(values[key] // each))  # another validation set
