"""One run is one YAML file, validated into frozen models.

Its sections are in sections.py. `load_config` reads a file and applies `section.key=value`
overrides; unknown keys are errors. Paths are taken relative to the working directory. The module knows nothing
about torch, models or stores.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from llmattrib.errors import ConfigError
from llmattrib.layout import RunLayout
from llmattrib.sections import (
    DataConfig,
    EvaluateConfig,
    FeaturesConfig,
    GoldConfig,
    IndexConfig,
    ModelConfig,
    Place,
    PlanConfig,
    QueryConfig,
    ReduceConfig,
    RetrainingConfig,
    Section,
    SlurmConfig,
    TrainConfig,
    ValuesConfig,
    WordsConfig,
)
from llmattrib.storage import read_bytes


class RunConfig(Section):
    """A whole run."""

    run_dir: Place
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    features: FeaturesConfig = FeaturesConfig()
    words: WordsConfig = WordsConfig()
    reduce: ReduceConfig = ReduceConfig()
    index: IndexConfig = IndexConfig()
    query: QueryConfig = QueryConfig()
    values: ValuesConfig = ValuesConfig()
    retraining: RetrainingConfig = RetrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gold: GoldConfig = GoldConfig()
    plan: PlanConfig = PlanConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _label_words_fit_output(self) -> "RunConfig":
        if self.features.output in ("margin", "logits") and len(self.data.label_words) < 2:
            raise ValueError(f"features.output={self.features.output} needs two or more data.label_words")
        if len(self.data.label_words) == 1:
            raise ValueError("data.label_words names one word, which is then certain: name two or more, or none")
        return self

    @property
    def layout(self) -> RunLayout:
        """Where this run's files lie."""
        return RunLayout(self.run_dir)

    @property
    def features_dtype(self) -> Literal["int8", "float16", "float32"]:
        """How features are stored: `auto` is int8 of a sketch, whose own error is larger, and float16 of exact ones."""
        if self.features.dtype != "auto":
            return self.features.dtype
        return "float16" if self.features.sketch.kind == "none" else "int8"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML whose mappings name no key twice; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `section.key=value` into its key path and its value read as YAML.

    Raises:
        ConfigError: there is no `=` or no key.
    """
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(
            f"override {text!r} is not understood",
            expected="section.key=value",
            fix="what `query` is to ask goes behind --prompt",
        )
    try:
        return path, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r} has a value that is not YAML", expected="section.key=value") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file, or from the directory of a run.

    Args:
        path: a YAML file; or a run directory, whose config.yaml is read and whose own place replaces `run_dir`, so
            that runs can be moved. Either may be an fsspec URL, a file's ending in `.yaml` or `.yml`.
        overrides: `section.key=value` strings, applied in order.

    Returns:
        The validated run.

    Raises:
        ConfigError: the file is missing or is not a YAML mapping, or a key or value is not accepted.
    """
    place = os.path.expanduser(str(path)).rstrip("/")
    is_run = not place.endswith((".yaml", ".yml")) if "://" in place else Path(place).is_dir()
    file = RunLayout(place).config if is_run else place
    try:
        tree = yaml.load(read_bytes(file).decode(), _Loader)
    except OSError as error:
        raise ConfigError(
            f"config {file} cannot be read ({error.strerror or error})",
            expected="a YAML file, or the directory of a run",
            fix="name a YAML file; configs/ has examples",
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config {file} is not YAML that can be read: {error}", fix="correct the file at the place named"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {file} holds no settings", expected="a YAML mapping with run_dir, model and data")
    if is_run:
        tree["run_dir"] = place
    for override in overrides:
        _apply(override, tree)
    return validate_config(tree, source=file)


def _apply(override: str, tree: dict[str, Any]) -> None:
    keys, value = parse_override(override)
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r} goes below {key!r}, which is a value, not a section")
        node = child
    node[keys[-1]] = value


def validate_config(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate a nested mapping into a `RunConfig`.

    Raises:
        ConfigError: naming every key that is wrong, what was found and what is accepted.
    """
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        rows = [
            f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {_complaint(item)}"
            + ("" if isinstance(item["input"], Mapping) else f" (found {item['input']!r})")
            for item in error.errors()
        ]
        raise ConfigError(f"{source} is not accepted: " + "; ".join(rows), fix="correct the named keys") from error
    try:
        config.model_dump_json()
    except PydanticSerializationError as error:
        raise ConfigError(
            f"{source} holds half of a character ({error})", expected="whole Unicode characters"
        ) from error
    return config


_PLAIN = {
    "missing": "is missing",
    "model_type": "is no section: write its settings below it, or leave it out",
    "string_type": "is no text: write one, in quotes",
    "tuple_type": "is no list: write [a, b]",
}
"""Types of pydantic's errors -> what is said instead where its own words are of Python."""


def _complaint(item: Mapping[str, Any]) -> str:
    """Say what is wrong with one key, and which one may have been meant."""
    if item["type"] != "extra_forbidden":
        return _PLAIN.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    *sections, key = item["loc"]
    section: Any = RunConfig
    for name in sections:
        section = section.model_fields[name].annotation
    near = difflib.get_close_matches(str(key), section.model_fields, 1)
    return (
        f"is no setting, did you mean {near[0]}?"
        if near
        else f"is no setting, there are {', '.join(section.model_fields)}"
    )


def config_to_yaml(config: RunConfig) -> str:
    """Write a run as YAML that `load_config` reads back to an equal run."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def digest(value: object) -> str:
    """Return a short stable hash of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
