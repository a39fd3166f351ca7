"""The base model with its LoRA adapters: loading, checking, switching adapters off and on, greedy generation.

`load_model` always gives a PEFT model, with a fresh adapter (B = 0) when none is given, so that everything
downstream hooks LoRA layers and nothing else. Base weights take the asked dtype, LoRA factors stay float32. Only
plain LoRA on linear layers (also GPT-2's Conv1D) is supported: no DoRA, no trained biases or embeddings, no
initialisation that rewrites base weights; adapters given together must share layers and shapes. All sampling
settings of a model's generation config are dropped. The only importer of peft.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from jaxtyping import Float32
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llmattrib.adapters import (
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    adapter_errors,
    check_adapter,
    check_shapes,
    check_tensors,
    linear_modules,
)
from llmattrib.config import digest
from llmattrib.device import resolve_device
from llmattrib.distributed import Sharding
from llmattrib.errors import ConfigError, OverlongExampleError, UnsupportedAdapterError, first_line, memory_errors
from llmattrib.rng import stream
from llmattrib.sections import LoraConfig, ModelConfig
from llmattrib.weight_files import file_digest, weights_fingerprint
from llmattrib.weights import (
    check_tokenizer,
    context_length,
    load_base,
    load_tokenizer,
    quiet_loading,
    resolve_base,
    tokenizer_fingerprint,
)

GENERATION_BATCH = 16
_PEFT_NOTICES = (".*is_gradient_checkpointing", "fan_in_fan_out is set", ".*tie_word_emb", "Found missing adapter keys")


@dataclass(frozen=True)
class LoraLayer:
    """One linear layer with LoRA: y = W x + scaling B A x.

    Args:
        name: its name in the base model, e.g. `model.layers.0.self_attn.q_proj`.
        module: the module to hook; its input is x, its output y (W x while adapters are off).
        d_in: width of x.
        d_out: width of y.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int

    def factors(self, adapter: str) -> tuple[Float32[Tensor, "r d_in"], Float32[Tensor, "d_out r"], float]:
        """Return A, B and the scaling of an adapter; the tensors are the parameters themselves."""
        module: Any = self.module
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight, float(module.scaling[adapter])


@dataclass
class LoadedModel:
    """A model on its device, frozen and in eval mode unless `prepare_trainable` made it.

    Args:
        model: the PEFT model.
        tokenizer: of the adapters' folders when they bring one, else of the base.
        device: where passes run, and the parameters are.
        layers: the LoRA layers, in the order of the model.
        adapter_names: PEFT names, in the order the folders were given.
        max_length: context in tokens.
        fingerprint: what the numbers depend on: base_model, dtype, quantization (when there is some), tokenizer,
            chat_template, lora, adapters (`none` when fresh).
        sharding: how ranks share the weights of the base, or None. The adapter is whole until `partition`.
    """

    model: peft.PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    layers: list[LoraLayer]
    adapter_names: list[str]
    max_length: int
    fingerprint: dict[str, str] = field(default_factory=dict)
    sharding: Sharding | None = None

    @property
    def pad_id(self) -> int:
        """The token to pad with; masks never depend on it."""
        tokens = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in tokens if isinstance(token, int)), 0)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switch all adapters off: the base model. LoRA layers still run, so their hooks fire."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        tuner: Any = self.model.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()
            _only_trainable(self.model, trainable)

    def use(self, adapter: str) -> None:
        """Switch to one adapter."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.set_adapter(adapter)
        _only_trainable(self.model, trainable)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> list[list[int]]:
        """Complete prompts greedily with the active adapter.

        Args:
            prompts: token ids.
            max_new_tokens: most tokens of an answer.
            stop_ids: tokens that end an answer besides the model's own, e.g. the template's end of turn.

        Returns:
            The answers' tokens, without the token that ended them.

        Raises:
            OverlongExampleError: a prompt and its answer may exceed the context.
            DeviceMemoryError: they do not fit on the device.
        """
        room = self.max_length - max_new_tokens
        if prompts and max(map(len, prompts)) > room:
            raise OverlongExampleError(
                f"a prompt has {max(map(len, prompts))} tokens and {max_new_tokens} are to be generated",
                expected=f"at most {self.max_length} tokens in all, the model's context",
                fix="shorten the prompt or lower query.max_new_tokens",
            )
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), GENERATION_BATCH):
            rows = order[start : start + GENERATION_BATCH]
            found = self._generate([prompts[row] for row in rows], max_new_tokens, stop_ids)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        return answers

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        stops = sorted(self._own_stops() | set(stop_ids))
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=self.pad_id
        )
        with memory_errors(
            f"answering {len(prompts)} prompts at once",
            expected="room for the model and the cache of its answers",
            fix="ask fewer prompts at a time, or lower query.max_new_tokens",
        ):
            tokens = self.model.generate(  # type: ignore[no-untyped-call]
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings
            )
        answers = []
        for row in tokens[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
        return answers

    def _own_stops(self) -> set[int]:
        base: Any = self.model.get_base_model()
        own = base.generation_config.eos_token_id
        tokens = own if isinstance(own, list) else [own]
        return {token for token in (*tokens, self.tokenizer.eos_token_id) if isinstance(token, int)}


def load_model(
    config: ModelConfig,
    *,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    sharding: Sharding | None = None,
) -> LoadedModel:
    """Load the base model and its adapters, frozen.

    Args:
        config: which base model, and the shape of the fresh adapter when `adapters` is empty.
        adapters: PEFT folders.
        dtype: of the base weights instead of `config.dtype`.
        sharding: where ranks share the base's weights.

    Raises:
        ModelNotFoundError: base or adapter is missing or unreadable.
        AdapterMismatchError: an adapter was made for another base, has other layers than its config says, or adapters
            differ in layers or shapes.
        UnsupportedAdapterError: an adapter is not plain LoRA.
        TokenizerMismatchError: the tokenizer has tokens the model has no embedding for.
        ConfigError: `config.lora` does not fit the model.
        DeviceMemoryError: the model does not fit on the device.
    """
    names = ["default"] if len(adapters) < 2 else [f"adapter{number}" for number in range(len(adapters))]
    paths = [Path(adapter) for adapter in adapters]
    base, tokenizer, context, fingerprint = _open_base(config, dtype or config.dtype, paths, sharding)
    model = _given(base, paths, names) if paths else _fresh(base, config, seed=0)
    loaded = _loaded(model, tokenizer, names, context)
    loaded.sharding = sharding
    if sharding and sharding.is_placing:
        loaded.device = resolve_device(config.device)
    _only_trainable(model, [])
    model.eval()
    loaded.fingerprint = fingerprint | _lora_fingerprint(loaded, paths)
    return loaded


def prepare_trainable(config: ModelConfig, dtype: str, seed: int, adapter: str | None = None) -> LoadedModel:
    """Load the base model with an adapter whose A and B can be trained.

    Args:
        config: base model and LoRA shape.
        dtype: of the base weights; the adapter's are float32.
        seed: of a fresh adapter: A is drawn from `stream(seed, "lora_A", layer, 0)`; B is zero.
        adapter: a PEFT folder to begin with instead.

    Raises:
        ModelError, ConfigError: as `load_model`.
    """
    paths = [] if adapter is None else [Path(adapter)]
    base, tokenizer, context, fingerprint = _open_base(config, dtype, paths)
    model = _given(base, paths, ["default"]) if paths else _fresh(base, config, seed)
    loaded = _loaded(model, tokenizer, ["default"], context)
    factors = [factor for layer in loaded.layers for factor in layer.factors("default")[:2]]
    _only_trainable(loaded.model, factors)
    loaded.model.eval()
    for module in loaded.model.modules():  # the base model's own dropout stays off
        if isinstance(module, PeftLoraLayer):
            module.lora_dropout.train()
    loaded.fingerprint = fingerprint | _lora_fingerprint(loaded, paths)
    return loaded


def lora_a_init(seed: int, layer: LoraLayer, rank: int, init: int) -> Float32[Tensor, "r d_in"]:
    """Draw a fresh A as PEFT does: uniform on +-1/sqrt(d_in), on the CPU, from a stream of its own.

    Args:
        seed: the run's seed.
        layer: which layer.
        rank: r.
        init: number of the initialisation, from 0.
    """
    bound = layer.d_in**-0.5
    draws = stream(seed, "lora_A", layer.name, init).uniform(-bound, bound, size=(rank, layer.d_in))
    return torch.from_numpy(draws.astype("float32"))


def save_adapter(loaded: LoadedModel, folder: Path, base_name: str) -> None:
    """Write the first adapter in PEFT's format; its config names the base model `base_name`."""
    config = loaded.model.peft_config[loaded.adapter_names[0]]
    config.base_model_name_or_path = base_name
    loaded.model.save_pretrained(str(folder), selected_adapters=[loaded.adapter_names[0]], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    settings = folder / "adapter_config.json"
    tree = json.loads(settings.read_text(encoding="utf-8"))
    for key, value in tree.items():
        if isinstance(value, list):  # PEFT keeps target_modules as a set, in an order that changes between processes
            tree[key] = sorted(value)
    settings.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _open_base(
    config: ModelConfig, dtype: str, adapters: Sequence[Path], sharding: Sharding | None = None
) -> tuple[Any, PreTrainedTokenizerBase, int, dict[str, str]]:
    """Check the adapters' folders; return base model, tokenizer, context and their part of the fingerprint."""
    folder = resolve_base(config.name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    base_print = weights_fingerprint(folder)
    for path in adapters:
        check_adapter(path, config.name, base_print)
    own = adapters or [*map(Path, config.adapters)]  # sub-models train fresh factors, by the run's tokenizer
    tokenizer = load_tokenizer(folder, own, trust_remote_code=config.trust_remote_code)
    context = context_length(folder, tokenizer, trust_remote_code=config.trust_remote_code)
    base = load_base(config, folder, dtype, resolve_device(config.device), sharding)
    check_tokenizer(tokenizer, int(base.get_input_embeddings().num_embeddings))
    fingerprint = tokenizer_fingerprint(tokenizer) | {"base_model": base_print, "dtype": dtype}
    if config.quantization is not None:
        fingerprint["quantization"] = config.quantization
    return base, tokenizer, context, fingerprint


def _given(base: Any, paths: Sequence[Path], names: Sequence[str]) -> peft.PeftModel:
    """Put adapters from their folders on the base model."""
    check_shapes(paths, base)
    for name, path in zip(names, paths, strict=True):
        with adapter_errors(path), _peft_quiet():  # by itself PEFT reads to the first GPU it finds
            if name == names[0]:
                model = peft.PeftModel.from_pretrained(base, path, adapter_name=name, torch_device="cpu")
            else:
                model.load_adapter(path, adapter_name=name, torch_device="cpu")
        check_tensors(path, [n for n, m in model.named_modules() if isinstance(m, PeftLoraLayer) and name in m.lora_A])
    return model


def _fresh(base: Any, config: ModelConfig, seed: int) -> peft.PeftModel:
    """Put a new LoRA adapter on the base model: A drawn from our streams, B zero."""
    model = _attach(base, _peft_config(base, config.lora))
    with torch.no_grad():
        for layer in lora_layers(model, "default"):
            a, b, _ = layer.factors("default")
            a.copy_(lora_a_init(seed, layer, a.shape[0], 0))
            b.zero_()
    return model


def empty_adapter(base: Any, lora: LoraConfig, adapter: Path | None = None) -> tuple[peft.PeftModel, list[LoraLayer]]:
    """Put LoRA on a base model without data, frozen; return it and its layers.

    Args:
        base: a model on torch's meta device.
        lora: shape of the adapter.
        adapter: a PEFT folder whose adapter_config.json gives the shape instead; its weights are not read.

    Raises:
        ConfigError, UnsupportedAdapterError: the shape does not fit the model.
    """
    shape = _peft_config(base, lora) if adapter is None else peft.LoraConfig.from_pretrained(str(adapter))
    with torch.device("meta"):
        model = _attach(base, shape)
    _only_trainable(model, [])
    return model.eval(), lora_layers(model, "default")


def _peft_config(base: Any, lora: LoraConfig) -> peft.LoraConfig:
    targets, layers = _targets(base, lora)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )


def _attach(base: Any, shape: peft.LoraConfig) -> peft.PeftModel:
    try:
        with _peft_quiet(), torch.random.fork_rng(devices=[]):
            model: peft.PeftModel = peft.get_peft_model(base, shape)
    except (ValueError, re.error) as error:
        linear = sorted({name.rpartition(".")[2] for name, _ in linear_modules(base)})
        raise ConfigError(
            f"model.lora does not fit the model: {first_line(error)}",
            expected=f"target_modules among {linear}",
            fix="correct model.lora.target_modules or model.lora.layers",
        ) from error
    return model


def _targets(base: Any, lora: LoraConfig) -> tuple[str | list[str], list[int] | None]:
    """Return PEFT's `target_modules` and `layers_to_transform`."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if lora.layers is None:
        return targets, None
    first, last = map(int, lora.layers.split("-"))
    num_layers = int(base.config.get_text_config().num_hidden_layers)
    if not first <= last < num_layers:
        raise ConfigError(f"model.lora.layers is {lora.layers}", expected=f"first-last within 0-{num_layers - 1}")
    if targets == "all-linear":  # PEFT takes no layer range with it
        targets = sorted({name.rpartition(".")[2] for name, _ in linear_modules(base)})
    if isinstance(targets, str):
        raise ConfigError(
            "model.lora.target_modules is a pattern and model.lora.layers is set",
            expected="all-linear or a list of names when layers is set",
            fix="put the layers into the pattern",
        )
    return targets, list(range(first, last + 1))


def lora_layers(model: peft.PeftModel, adapter: str) -> list[LoraLayer]:
    """List the LoRA layers of an adapter in the order of the model.

    Raises:
        UnsupportedAdapterError: LoRA sits on something that is no linear layer.
    """
    layers = []
    found: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, PeftLoraLayer)]
    for name, module in found:
        name = name.removeprefix(PEFT_PREFIX)
        if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
            raise UnsupportedAdapterError(
                f"the adapter changes {name}, a {type(module.get_base_layer()).__name__}",
                expected="LoRA on linear layers only",
                fix="train an adapter without it",
            )
        layers.append(LoraLayer(name, module, int(module.in_features), int(module.out_features)))
    return layers


def _loaded(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, names: list[str], context: int) -> LoadedModel:
    return LoadedModel(model, tokenizer, next(model.parameters()).device, lora_layers(model, names[0]), names, context)


def _only_trainable(model: nn.Module, trainable: Sequence[Tensor]) -> None:
    """Set requires_grad on exactly these parameters; PEFT sets it on whatever adapter it activates."""
    wanted = {id(parameter) for parameter in trainable}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


def _lora_fingerprint(loaded: LoadedModel, paths: Sequence[Path]) -> dict[str, str]:
    """Describe the adapters: weights, and shape, rank and scaling of each layer, short when they are all the same."""
    adapter = loaded.adapter_names[0]
    rows = [(layer.name, layer.factors(adapter)[0].shape[0], layer.factors(adapter)[2]) for layer in loaded.layers]
    ranks, scalings = sorted({row[1] for row in rows}), sorted({row[2] for row in rows})
    weights = "+".join(file_digest(path / ADAPTER_WEIGHTS)[:32] for path in paths) or "none"
    return {"lora": f"rank {ranks} scaling {scalings} on {len(rows)} layers {digest(rows)}", "adapters": weights}


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """Ignore PEFT's notices that say nothing to a user of this package; missing keys are an error here."""
    with warnings.catch_warnings():
        for notice in _PEFT_NOTICES:
            warnings.filterwarnings("ignore", message=notice)
        with quiet_loading():
            yield
