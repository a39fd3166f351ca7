"""FSDP2 by two real processes: parameters are in parts, features those of one process, a failure ends both."""

import json

import pytest
import torch
from test_build import changed
from test_distributed import launch
from test_resume import config_file
from test_zero3 import FAIL, agree, runs
from tiny import tiny_run

from llmattrib.build import build_features
from llmattrib.distributed import Fsdp2, ranks
from llmattrib.errors import LlmattribError
from llmattrib.store import RowStore

# Builds some runs and notes what their parameters look like between passes.
PROBE = """
import json, sys
from pathlib import Path
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
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
    parts = [parameter.to_local() for parameter in parameters.values()]
    found = {
        "whole": [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)],
        "num": len(parameters),
        "mine": sum(part.numel() for part in parts),
        "held": sum(part.untyped_storage().nbytes() // part.element_size() for part in parts),
        "all": sum(parameter.numel() for parameter in parameters.values()),
        "units": sum(isinstance(module, FSDPModule) for module in extractor.loaded.model.modules()),
        "batches": extractor.num_batches,
        "done": result.num_shards_done,
    }
    Path(sys.argv[1], f"{Path(run).stem}-{team.rank}.json").write_text(json.dumps(found))
    extractors.clear()  # as after `llmattrib build`: process groups that live on at the interpreter's end may abort it
    del extractor, parameters, parts, result
"""
UNITS = {"init": 5, "single": 3, "logits": 5, "half": 5, "trained": 3}
"""Two blocks, the embeddings where they are not one, and what is left."""


@pytest.mark.slow
@pytest.mark.distributed
def test_features_of_sharded_parameters_are_those_of_one_process(tmp_path):
    kinds = runs(tmp_path)
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    files = []
    for name, config in kinds.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(config_file(config, tmp_path).read_text())
    ended = launch(script, tmp_path, *files, config="fsdp2.yaml")
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
            assert found["held"] == found["mine"]  # a part is no view of the whole
            assert found["units"] == UNITS[name]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_fails_in_a_pass_ends_both_with_its_message(tmp_path):
    config = changed(tiny_run(tmp_path, num_rows=16), features={"tokens_per_batch": 48})
    script = tmp_path / "fail.py"
    script.write_text(FAIL)
    ended = launch(script, config_file(config, tmp_path), "inside", config="fsdp2.yaml")
    assert ended.returncode != 0
    assert " ".join(ended.stderr.split()).count("does not fit in the memory of the device") == 1, ended.stderr
    assert "RuntimeError" not in ended.stderr
    assert RowStore.open(config.layout.features).pending()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"VERSION": "1"}, "version 1"),
        ({"VERSION": "2", "CPU_RAM_EFFICIENT_LOADING": "true"}, "version 2"),
        ({"VERSION": "2", "AUTO_WRAP_POLICY": "SOMEHOW"}, r"settings that accelerate refuses \(Invalid auto wrap"),
    ],
)
def test_settings_of_another_kind_are_named(monkeypatch, settings, found):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in settings.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(LlmattribError, match=rf"asks for FSDP with {found}[\s\S]*launch/fsdp2\.yaml"):
        ranks()


def test_a_model_without_blocks_is_refused():
    class Odd(torch.nn.Module):
        _no_split_modules = None

    with pytest.raises(LlmattribError, match=r"Odd does not say which of its modules are blocks[\s\S]*zero3\.yaml"):
        Fsdp2(is_offloaded=False).partition(Odd(), torch.device("cpu"))
