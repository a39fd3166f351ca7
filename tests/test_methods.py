"""Names of methods: one spelling, one file, clear refusals."""

import re

import pytest

from llmattrib.config import load_config
from llmattrib.errors import ConfigError
from llmattrib.layout import RunLayout
from llmattrib.methods import AME_POINTS, GRADIENT_METHODS, MethodName
from llmattrib.sections import QueryConfig, ReduceConfig


@pytest.mark.parametrize(
    ("text", "name", "file"),
    [
        ("shapley", "shapley", "shapley"),
        ("leave_one_out", "leave_one_out", "leave_one_out"),
        (" beta_shapley( 4.0, 1) ", "beta_shapley(4,1)", "beta_shapley_4_1"),
        ("beta_shapley(1,2.50)", "beta_shapley(1,2.5)", "beta_shapley_1_2.5"),
        ("weighted_banzhaf(.30)", "weighted_banzhaf(0.3)", "weighted_banzhaf_0.3"),
        ("weighted_banzhaf(1e-12)", "weighted_banzhaf(1e-12)", "weighted_banzhaf_1e-12"),
        ("ame", "ame", "ame"),
        ("ame(.8,.2,.6,.4)", "ame", "ame"),
        ("ame(.5, 0.25)", "ame(0.25,0.5)", "ame_0.25_0.5"),
        ("spectral( 100.0, .50)", "spectral(100,0.5)", "spectral_100_0.5"),
    ],
)
def test_equal_methods_have_one_name_and_one_file(text, name, file):
    parsed = MethodName.parse(text)
    assert (str(parsed), parsed.file_name) == (name, file)
    assert MethodName.parse(name) == parsed
    assert parsed.is_semivalue == (parsed.kind != "spectral")
    assert ReduceConfig(methods=(text,)).methods == (name,)
    assert QueryConfig(method=text).method == name
    assert RunLayout("run").representers(text) == f"run/representers/{file}.zarr"
    assert re.fullmatch(r"[a-z0-9_.-]+", file)


def test_plain_ame_has_the_published_points():
    assert MethodName.parse("ame").arguments == AME_POINTS == (0.2, 0.4, 0.6, 0.8)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradient_methods_are_no_semivalues(method):
    assert not MethodName.parse(method).is_semivalue


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapely", r"'shapely' is no method; known are shapley, .* beta_shapley\(a,b\), .* spectral\(T,rate\)$"),
        ("beta_shapley", "is no method"),
        ("beta_shapley(1)", "is no method"),
        ("beta_shapley(1,2,3)", "is no method"),
        ("beta_shapley(4", r"in a \[\.\.\.\] list quote a name with commas"),
        ("banzhaf()", "is no method"),
        ("ame()", "is no method"),
        ("influence(1)", "is no method"),
        ("beta_shapley(a,b)", "is no method"),
        ("beta_shapley(.5,1)", "a parameter below 1"),
        ("beta_shapley(nan,1)", "a parameter below 1"),
        ("weighted_banzhaf(1.5)", r"a probability outside \[0, 1\]"),
        ("ame(-.1,.2)", r"a probability outside \[0, 1\]"),
        ("spectral(10)", "is no method"),
        ("spectral(1.5,.1)", "needs a whole number of steps, 1 or more, and a positive rate"),
        ("spectral(0,.1)", "needs a whole number of steps"),
        ("spectral(inf,.1)", "needs a whole number of steps"),
        ("spectral(10,0)", "a positive rate"),
        ("ame(.2,.2)", "names a probability twice"),
        ("ame(" + ",".join(f"0.{k:04d}" for k in range(1, 40)) + ")", "longer than 128 characters"),
    ],
)
def test_other_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        MethodName.parse(text)


def test_a_list_that_splits_a_name_says_to_quote_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\nmodel: {name: m}\ndata: {train: t}\n")
    with pytest.raises(ConfigError, match=r"reduce\.methods\.0: .*in a \[\.\.\.\] list quote a name with commas"):
        load_config(path, ["reduce.methods=[beta_shapley(4,1)]"])
    loaded = load_config(path, ["reduce.methods=[shapley, 'beta_shapley(4,1)']", "query.method=beta_shapley(4,1)"])
    assert loaded.reduce.methods == ("shapley", "beta_shapley(4,1)")
    assert loaded.query.method == "beta_shapley(4,1)"
