"""Fidelity of sketched kernels: exact where nothing is compressed, better where it is wider, refused where unfit."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmattrib.build import build_features
from llmattrib.errors import FeatureError, FingerprintMismatchError, MethodError, StoreNotFoundError
from llmattrib.evaluate import sketch as sketch_module
from llmattrib.evaluate.sketch import kernel_error, sketch_fidelity
from tests.tiny import tiny_run


def test_kernel_error_compares_entries_off_the_diagonal() -> None:
    exact = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 2.0], [2.0, 2.0, 9.0]])
    found = exact + np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.3], [0.0, 0.3, 5.0]])
    error, spearman = kernel_error(found, exact)
    assert error == pytest.approx(0.3 / 3)
    assert spearman == pytest.approx(0.8660254)


def test_an_uncompressed_store_is_exact_and_wider_sketches_are_closer(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, features={"sketch": {"kind": "none"}, "dtype": "float32", "shard_size": 4})
    build_features(config)
    seen: list[tuple[int, int]] = []
    rows = sketch_fidelity(config, dims=(64, 1024), progress=lambda done, total: seen.append((done, total)))
    assert [row.stored for row in rows] == [True, False, False]
    assert rows[0].frobenius_error < 1e-5
    assert rows[0].spearman > 0.999
    assert rows[0].frobenius_error < rows[2].frobenius_error < rows[1].frobenius_error
    assert [row.bytes_per_example for row in rows[1:]] == [256, 4096]
    assert seen[-1] == (12, 12)
    saved = json.loads((tmp_path / "run" / "evaluation" / "sketch.json").read_text())
    assert saved["details"]["num_examples"] == 12
    assert saved["details"]["gradient_dim"] == rows[0].dim
    assert [row["dim"] for row in saved["rows"]] == [row.dim for row in rows]


def test_it_needs_features_one_output_and_the_model_they_were_made_with(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    with pytest.raises(StoreNotFoundError, match="llmattrib build"):
        sketch_fidelity(config)
    build_features(config)
    with pytest.raises(FeatureError, match="3 or more examples"):
        sketch_fidelity(config, num_examples=2)
    with pytest.raises(FingerprintMismatchError, match="seed"):
        sketch_fidelity(config.model_copy(update={"seed": 5}))
    labels = tiny_run(tmp_path, labels=True, features={"output": "logits"}, run_dir=str(tmp_path / "labels"))  # type: ignore[arg-type]
    build_features(labels)
    with pytest.raises(MethodError, match="one feature row a class"):
        sketch_fidelity(labels)


def test_a_sample_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path)
    build_features(config)
    monkeypatch.setattr(sketch_module, "MAX_EXACT_BYTES", 1 << 10)
    with pytest.raises(FeatureError, match="--examples"):
        sketch_fidelity(config)
