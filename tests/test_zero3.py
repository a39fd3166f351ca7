"""ZeRO-3 by two real processes: weights are in parts, features those of one process, failures end both."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_build import changed, contents
from test_distributed import ROOT, launch, launch_command, launch_env
from test_resume import config_file, wait_for_commits
from tiny import tiny_adapter_dir, tiny_run

from llmattrib.build import build_features
from llmattrib.store import RowStore

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SETTINGS = ROOT / "configs" / "deepspeed"
PERSISTENT = 1000

# Builds some runs and notes what their parameters look like between passes.
PROBE = """
import gc, json, sys
from pathlib import Path
from llmattrib import build
from llmattrib.build import build_features
from llmattrib.config import load_config
from llmattrib.distributed import ranks
team = ranks()
extractors = []
load = build.load_extractor
def keep(*args):
    extractors.append(load(*args))
    return extractors[-1]
build.load_extractor = keep
for run in sys.argv[2:]:
    result = build_features(load_config(run), team)
    extractor = extractors[-1]
    parameters = dict(extractor.loaded.model.named_parameters())
    found = {
        "whole": [name for name, parameter in parameters.items() if parameter.numel()],
        "num": len(parameters),
        "mine": sum(parameter.ds_tensor.numel() for parameter in parameters.values()),
        "all": sum(parameter.ds_numel for parameter in parameters.values()),
        "where": sorted({parameter.ds_tensor.device.type for parameter in parameters.values()}),
        "batches": extractor.num_batches,
        "done": result.num_shards_done,
    }
    Path(sys.argv[1], f"{Path(run).stem}-{team.rank}.json").write_text(json.dumps(found))
    extractors.clear()  # as after `llmattrib build`: process groups that live on at the interpreter's end may abort it
    del extractor, parameters
    gc.collect()
"""


def settings_file(folder, name="zero3.json"):
    """The shipped settings, but for the size below which a parameter stays whole: tiny models have no other."""
    tree = json.loads((SETTINGS / name).read_text())
    tree["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
    path = folder / name
    path.write_text(json.dumps(tree))
    return path


def options(folder, name="zero3.json"):
    return {"config": "zero3.yaml", "options": ["--deepspeed_config_file", str(settings_file(folder, name))]}


def agree(config, one):
    """Compare a store with that of one process, row by row and column by column."""
    stores = [RowStore.open(run.layout.features) for run in (config, one)]
    rows, wanted = (store.read(0, store.manifest.num_rows) for store in stores)
    error = np.abs(rows - wanted).max(axis=(1, 2)) / np.abs(wanted).max(axis=(1, 2))
    assert error.max() < 1e-5
    for name in stores[1].manifest.columns:
        np.testing.assert_allclose(stores[0].column(name), stores[1].column(name), rtol=1e-5, atol=1e-6)
    assert stores[0].manifest.fingerprint == stores[1].manifest.fingerprint
    assert stores[0].manifest.info["sketch_plan"] == stores[1].manifest.info["sketch_plan"]
    assert stores[0].pending() == []


def runs(folder):
    """Runs of several kinds, in which the ranks have unequal work."""
    features = {"dtype": "float32", "tokens_per_batch": 64, "shard_size": 4}
    kinds = {}
    for name, rows, labels, family, more in (
        ("init", 9, False, "llama", {"num_inits": 2}),  # shards of 4, 4 and 1 rows: the second rank has one
        ("single", 3, False, "gpt2", {}),  # one shard: the second rank has none; layers of Conv1D
        ("logits", 5, True, "llama", {"output": "logits"}),  # two outputs of one batch
        ("half", 3, False, "llama", {}),  # a base in bfloat16 beside factors in float32
        ("trained", 6, False, "qwen2", {"linearisation": "trained"}),
    ):
        place = folder / name
        place.mkdir()
        config = changed(tiny_run(place, family, labels=labels, num_rows=rows), features={**features, **more})
        if name == "trained":
            adapters = [tiny_adapter_dir(place, config.model.name, seed=seed, name=f"a{seed}") for seed in (0, 1)]
            config = changed(config, model={"adapters": adapters})
        kinds[name] = changed(config, model={"dtype": "bfloat16"}) if name == "half" else config
    return kinds


def test_features_of_partitioned_weights_are_those_of_one_process(tmp_path):
    kinds = runs(tmp_path)
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    files = []
    for name, config in kinds.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(config_file(config, tmp_path).read_text())
    ended = launch(script, tmp_path, *files, **options(tmp_path))
    assert ended.returncode == 0, ended.stderr
    for name, config in kinds.items():
        one = changed(config, tmp_path / f"{name}-one")
        result = build_features(one)
        agree(config, one)
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert first["done"] == second["done"] == result.num_shards
        assert first["batches"] == second["batches"] > 0  # in step, one without work too
        for found in (first, second):
            assert found["num"] > 10
            assert found["whole"] == []
            assert found["mine"] == pytest.approx(found["all"] / 2, rel=0.01)


def test_killed_and_run_again_with_weights_in_the_memory_of_the_machine(tmp_path):
    config = changed(
        tiny_run(tmp_path, num_rows=80), features={"dtype": "float32", "shard_size": 2, "tokens_per_batch": 64}
    )
    arguments = ("launch/build.py", config_file(config, tmp_path))
    command = launch_command(*arguments, **options(tmp_path))
    process = subprocess.Popen(command, env=launch_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_commits(config, 4, process)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:  # ranks have sessions of their own
        each.kill()
    process.communicate()
    store = RowStore.open(config.layout.features)
    pending = store.pending()
    assert 0 < len(pending) <= 36
    kept = {shard: Path(store.path, f"rows/c.{shard}.0.0").read_bytes() for shard in set(range(40)) - set(pending)}
    ended = launch(*arguments, **options(tmp_path, "zero3_offload.json"))
    assert ended.returncode == 0, ended.stderr
    assert f"{len(pending)} of 40 shards computed now" in ended.stdout
    for shard, data in kept.items():
        assert Path(store.path, f"rows/c.{shard}.0.0").read_bytes() == data
    one = changed(config, tmp_path / "one")
    build_features(one)
    agree(config, one)
    names = [{name.partition("-")[0] for name in contents(run.layout.features)} for run in (config, one)]
    assert names[0] == names[1]  # but for the checksums, as rows are equal to rounding


FAIL = """
import os
import sys
import torch
from llmattrib.cli import app
from llmattrib.features.extract import Extractor
where, rank = sys.argv[2], int(os.environ["RANK"])
extract, shared = Extractor.extract, Extractor._pass
def poisoned(self, examples, sketch, side="right"):
    found = extract(self, examples, sketch, side)
    if rank == 1 and self.num_batches == 2:
        found.phi[0] = float("nan")
    return found
def starved(self, *args):
    if rank == 1 and self.num_batches == 1:
        raise torch.OutOfMemoryError("none left")
    return shared(self, *args)
if where == "between":
    Extractor.extract = poisoned
else:
    Extractor._pass = starved
app(["build", sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [("between", "is NaN or infinite"), ("inside", "does not fit in the memory of the device")],
)
def test_a_rank_that_fails_ends_both_with_its_message(tmp_path, where, message):
    config = changed(tiny_run(tmp_path, num_rows=16), features={"tokens_per_batch": 48})
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    started = time.monotonic()
    ended = launch(script, config_file(config, tmp_path), where, **options(tmp_path))
    assert ended.returncode != 0
    assert " ".join(ended.stderr.split()).count(message) == 1, ended.stderr
    assert "RuntimeError" not in ended.stderr
    assert time.monotonic() - started < 100
    assert RowStore.open(config.layout.features).pending()


SETTLE = """
import os, sys
from llmattrib.distributed import ranks
from llmattrib.errors import LlmattribError
for path in sys.argv[1:]:
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = path
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        ranks()
    except LlmattribError as error:
        print("=", " ".join(str(error).split()))
"""


def test_settings_of_the_repository_are_found_from_anywhere_and_those_not_of_zero3_named(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "second.json").write_text('{"zero_optimization": {"stage": 2}}')
    command = [sys.executable, "-c", SETTLE, "", "list.json", "second.json", "configs/deepspeed/zero3.json"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=launch_env(), check=False)
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stdout.splitlines() if line.startswith("=")]
    # the last is in order, and there is no launcher
    wanted = ("no file, cannot be read", "list.json, cannot be read", "asks for ZeRO stage 2", "cannot be joined")
    for line, words in zip(told, wanted, strict=True):
        assert words in line
