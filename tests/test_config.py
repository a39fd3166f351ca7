"""Configs: what is accepted, what is refused and with which words, round trips, paths."""

from pathlib import Path

import pytest
import yaml

from llmattrib.config import RunConfig, config_to_yaml, digest, load_config, parse_override, validate_config
from llmattrib.errors import ConfigError
from llmattrib.layout import RunLayout
from llmattrib.sections import METHODS
from llmattrib.storage import atomic_write

MINIMAL = {"run_dir": "runs/x", "model": {"name": "m"}, "data": {"train": "d.jsonl"}}
ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_minimal_config_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.features.linearisation == "init"
    assert config.features.sketch.kind == "oporp"
    assert config.reduce.methods == METHODS
    assert config.index.kind == "auto"
    assert config.query.method == "shapley"


def test_overrides_set_values_of_any_type_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path,
        [
            "features.sketch.dim=64",
            "features.sketch.dim=128",
            "reduce.methods=[trak, shapley]",
            "seed=7",
            "data.id=null",
        ],
    )
    assert config.features.sketch.dim == 128
    assert config.reduce.methods == ("trak", "shapley")
    assert (config.seed, config.data.id) == (7, None)


def test_label_words_are_those_of_the_map_in_its_order(tmp_path: Path) -> None:
    label_map = "data.label_map={spam: 'Yes', junk: 'Yes', ham: 'No'}"
    config = load_config(write(tmp_path, MINIMAL), [label_map, "features.output=margin"])
    assert config.data.label_words == ("Yes", "No")
    assert validate_config(yaml.safe_load(config_to_yaml(config))) == config
    assert load_config(write(tmp_path, MINIMAL), [label_map, "data.label_words=[]"]).data == config.data


def test_yaml_round_trip_is_exact(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        ["data.label_words=[ham, späm]", "features.output=margin", "reduce.ridge=0.3", "model.lora.layers=2-3"],
    )
    path = tmp_path / "again.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
    assert "späm" in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_accepted(path: Path) -> None:
    assert load_config(path).run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.nmae=x", r"model\.nmae: is no setting, did you mean name\? \(found 'x'\)"),
        ("plan.colour=x", r"plan\.colour: is no setting, there are architecture, num_examples, .* \(found 'x'\)"),
        ("train.learning_rate=.inf", r"train\.learning_rate: Input should be a finite number \(found inf\)"),
        ("train=", r"train: is no section: write its settings below it, or leave it out \(found None\)"),
        ("model.adapters=a/b", r"model\.adapters: is no list: write \[a, b\] \(found 'a/b'\)"),
        ("model.adapters=[a/b, ./a/b/]", r"model\.adapters: .*one adapter is named twice"),
        ('data.system="so sad \\ud83d"', r"holds half of a character .*\\ud83d' in position 7"),
        ("features.output=los", r"features\.output: Input should be 'loss', 'log_odds'.*\(found 'los'\)"),
        ("features.sketch.dim=0", r"features\.sketch\.dim: Input should be greater than 0"),
        ("data.label_words=[spam]", r"data\.label_words names one word"),
        ("features.output=margin", r"config: features\.output=margin needs two or more data\.label_words"),
        ("data.label_map={spam: Yes, ham: No}", r"label_map\.spam: is no text: write one, in quotes \(found True\)"),
        ("data.train=[a, b]", r"data\.train: is no text: write one, in quotes \(found \['a', 'b'\]\)"),
        ("data.label_map={spam: a, ' spam': b}", r"data\.label_map: .*two completions differ in space only"),
        ("data.label_map={spam: a, ham: ' a'}", r"data\.label_map: .*two words differ in space only"),
        ("data.label_map={spam: ' '}", r"data\.label_map: .*a completion or a word is empty"),
        ("data.label_map={a: b, b: a}", r"the word 'b' is also a completion, and one of another word, 'a'"),
        (
            "data={train: d, label_map: {spam: a, ham: b}, label_words: [b, a]}",
            r"data\.label_words: .*label_map has the words \['a', 'b'\]; leave label_words out",
        ),
        ("reduce.methods=[]", r"methods is empty"),
        ("reduce.certificate_draws=7", r"certificate_draws is below 8; take 16 to 64"),
        (
            "reduce.methods=[shapely]",
            r"reduce\.methods\.0: .*'shapely' is no method; known are shapley, banzhaf",
        ),
        ("reduce.methods=[ame, 'ame(.8,.2,.6,.4)']", r"methods names ame twice"),
        ("reduce.ridge=-1", r"reduce\.ridge"),
        ("reduce.ridge=1.0e-9", r"reduce\.ridge.*greater than or equal to 0\.00000001 \(found 1e-09\)"),
        ("reduce.ridge=.inf", r"reduce\.ridge.*Input should be a finite number \(found inf\)"),
        ("values.freeshap_ridge=1.0e-13", r"freeshap_ridge: Input should be greater than or equal to 0\.000000000001"),
        ("model.lora.layers=first", r"model\.lora\.layers: String should match pattern"),
        ("seed=-1", r"seed: Input should be greater than or equal to 0"),
        ("run_dir=''", r"run_dir: String should have at least 1 character"),
    ],
)
def test_wrong_value_names_the_key_what_was_found_and_what_is_accepted(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


def test_several_inits_of_a_trained_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features: .*num_inits=3 is for linearisation=init"):
        load_config(write(tmp_path, MINIMAL), ["features.num_inits=3", "features.linearisation=trained"])


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, MINIMAL | {"run_dir": "~/runs/x", "data": {"train": "~/d.jsonl"}})
    config = load_config("~/config.yaml", ["model.adapters=[~/lora]"])
    assert (config.run_dir, config.data.train) == (f"{tmp_path}/runs/x", f"{tmp_path}/d.jsonl")
    assert config.model.adapters == (f"{tmp_path}/lora",)


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"seed: .*\(found 'x'\); data: is missing; extra: .*\(found 1\)") as caught:
        validate_config({"run_dir": "r", "model": {"name": "m"}, "seed": "x", "extra": 1}, source="some.yaml")
    assert caught.value.found.startswith("some.yaml is not accepted")


def test_run_directory_is_read_and_its_place_is_its_run_dir(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["seed=3"])
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(config_to_yaml(config))
    expected = config.model_copy(update={"run_dir": str(moved)})
    assert load_config(moved) == load_config(f"{moved}/") == expected
    url = "memory://test_config/run"
    atomic_write(f"{url}/config.yaml", config_to_yaml(config).encode())
    assert load_config(url) == config.model_copy(update={"run_dir": url})
    assert load_config(f"{url}/config.yaml") == config, "a file by its URL keeps its run_dir"


def test_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"/config\.yaml cannot be read .*\n  expected: a YAML file, or the directory"
    ):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"memory://nowhere/config\.yaml cannot be read"):
        load_config("memory://nowhere")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("a: {b: 1}\nc: {d: 1, d: 2}", r"(?s)'d' stands twice\s+in .*line 2"),
        ("a: 1\nb: 2\na: 3", r"(?s)'a' stands twice\s+in .*line 3"),
        (b"\xff\xfe", "is not YAML"),
        ("- a", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_file_that_is_no_mapping(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("text", ["seed", "=1", ".seed=1", "model..name=x"])
def test_override_without_key_or_value(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"override .* is not understood\n  expected: section\.key=value\n.*behind --prompt"
    ):
        parse_override(text)


def test_override_whose_value_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match="has a value that is not YAML"):
        parse_override("data.label_words=[a")


def test_override_below_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes below 'name', which is a value, not a section"):
        load_config(write(tmp_path, MINIMAL), ["model.name.x=1"])


def test_configs_are_frozen() -> None:
    config = RunConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_layout_joins_paths_and_urls() -> None:
    layout = RunLayout("s3://bucket/run/")
    assert layout.features == "s3://bucket/run/features.zarr"
    assert layout.representers("trak") == "s3://bucket/run/representers/trak.zarr"
    assert layout.index("trak") == "s3://bucket/run/index/trak.faiss"
    assert RunConfig.model_validate(MINIMAL).layout.config == "runs/x/config.yaml"


def test_digest_does_not_depend_on_key_order_and_sees_every_value() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest({"a": 1}), digest({"a": "1"}), digest({"a": [1]}), digest({"b": 1})}) == 4
