"""The stage `values`: what every training example is worth over a validation set.

    validation set -> validation.zarr -> an estimator -> values/<method>.csv, .parquet, .json

A value is the example's share in a utility, the mean over validation prompts; positive is helpful. For a method of
`reduce` it is an inner product of the stored representer with the mean query; the other methods play games (see
estimates.py). Validation features, the subset table and the moments of other samplers (samples.py) go on where a killed
run stopped, and grow with `values.num_samples` and `values.num_permutations`. Equal values that are there are kept. One
process.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from llmattrib.config import RunConfig, digest
from llmattrib.data import Example, load_examples
from llmattrib.errors import MethodError
from llmattrib.estimators.moments import SIGNS
from llmattrib.games.kernel import ridge_errors
from llmattrib.lock import locked
from llmattrib.methods import MethodName
from llmattrib.progress import Progress, silent
from llmattrib.query import Run
from llmattrib.reader import FeatureReader, current_representers
from llmattrib.store import RowStore
from llmattrib.train import encode_without_weights
from llmattrib.values.estimates import (
    Estimate,
    from_freeshap,
    from_neighbors,
    from_permutations,
    from_representers,
    from_sub_models,
    from_subsets,
    from_table,
    sub_model_rows,
)
from llmattrib.values.game import UtilityName, ValidationGame
from llmattrib.values.result import DataValue, ValuesResult, read_values, write_values
from llmattrib.values.samples import KeptMoments
from llmattrib.values.validation import Validation, load_validation
from llmattrib.words import METHOD as WORDS

TABLE_METHODS = ("one_sample", "msr_banzhaf", "ame_lasso")
_OPTIONS = {
    "permutation": ("num_permutations", "tolerance", "confidence"),
    "subset": ("num_samples", "confidence"),
    "one_sample": ("num_samples", "confidence"),
    "msr_banzhaf": ("num_samples", "confidence"),
    "ame_lasso": ("num_samples", "ame_design", "false_discovery_rate"),
    "knn_shapley": ("knn_neighbors", "knn_label"),
    "freeshap": ("num_permutations", "tolerance", "confidence", "freeshap_kernels", "freeshap_ridge"),
}
"""Method -> the settings that it reads; methods of reduce read those of `subset`."""
_OWN_GAME = ("knn_shapley", "freeshap")


def compute_values(config: RunConfig, progress: Progress = silent) -> ValuesResult:
    """Value every training example over the validation set of `config.values`.

    Args:
        config: the run; its features must be complete, and for a method of reduce its representers.
        progress: told of validation examples done, then of samples.

    Returns:
        The values, and where they were written.

    Raises:
        ConfigError: `values.data` is not set.
        DataError: the validation examples cannot be used.
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: an earlier stage is missing, unfinished or outdated.
        FingerprintMismatchError: the features, or the subset table, are of other settings.
        MethodError: the method cannot run on these features or with this utility.
        StoreLockedError: another process values this run now.
    """
    started = time.perf_counter()
    if config.values.game == "retraining":
        return replace(_of_sub_models(config), seconds=time.perf_counter() - started)
    if config.values.method == WORDS:
        raise MethodError(
            f"{WORDS} values are of a prompt's words, and values.method={WORDS} asks for one number of a whole set",
            expected="a method of features, or one that samples",
            fix=f"ask prompt by prompt, `llmattrib query --method {WORDS}`, or set values.method=grad_dot",
        )
    utility = resolve_utility(config)
    run = Run(config)
    reader = FeatureReader(RowStore.open(config.layout.features))
    with locked(config.layout.path("values")):
        validation = load_validation(run, progress)
        settings = _settings(config, utility)
        data = {"features": reader.store.digest(), "validation": validation.digest}
        fingerprint = {**data, "settings": settings, "seed": config.seed, "game": _game_fingerprint(config, reader)}
        method = config.values.method
        name = method if method in _OPTIONS else MethodName.parse(method).file_name
        paths = [config.layout.path("values", f"{name}.{suffix}") for suffix in ("csv", "parquet")]
        fingerprint = json.loads(json.dumps(fingerprint))
        result = read_values(paths[0], paths[1], fingerprint)
        if result is None:
            kept = KeptMoments(config.layout.path("values", f"{name}.npz"), {**data, "seed": config.seed})
            with ridge_errors():
                estimate = _estimate(config, reader, validation, utility, data, kept, progress)
            result = _result(config, run.examples, len(validation.labels), utility, estimate, paths)
            result = replace(result, notes=(*result.notes, *_validation_notes(config, validation)))
            write_values(result, settings, fingerprint)
    return replace(result, seconds=time.perf_counter() - started)


def _of_sub_models(config: RunConfig) -> ValuesResult:
    """Value examples by the retraining game."""
    name = f"{config.values.method}_retraining"
    paths = [config.layout.path("values", f"{name}.{suffix}") for suffix in ("csv", "parquet")]
    if config.values.utility != "auto":
        raise MethodError(
            f"values.utility={config.values.utility}, and sub-models are asked for the log-odds of the right answers",
            expected="auto for values.game=retraining",
            fix="set values.utility=auto, or values.game=kernel",
        )
    settings = {**_settings(config, "log_odds"), "game": "retraining"}
    examples = encode_without_weights(config, load_examples(config.data))
    rows = sub_model_rows(config, examples)
    seeds = config.retraining.num_seeds
    fingerprint = {"sub_models": digest(rows.utilities.tolist()), "settings": settings, "seeds": seeds}
    fingerprint = json.loads(json.dumps(fingerprint))
    with locked(config.layout.path("values")):
        result = read_values(paths[0], paths[1], fingerprint)
        if result is None:
            estimate = from_sub_models(config.values, rows)
            result = _result(config, examples.examples, rows.utilities.shape[1], "log_odds", estimate, paths)
            write_values(result, settings, fingerprint)
    return result


def resolve_utility(config: RunConfig) -> UtilityName:
    """Return the utility that a method values, `auto` filled in.

    Raises:
        MethodError: the method has no such utility.
    """
    method, utility = config.values.method, config.values.utility
    if utility == "auto":
        return {"freeshap": "log_likelihood", "knn_shapley": "accuracy"}.get(method, "prediction")  # type: ignore[return-value]
    if method == "knn_shapley" and utility != "accuracy":
        raise MethodError(
            f"values.utility={utility} is no utility of knn_shapley",
            expected="the votes of the nearest neighbours for the right label",
            fix="set values.utility=auto",
        )
    if utility != "prediction" and method not in (*TABLE_METHODS, *_OWN_GAME, "permutation"):
        raise MethodError(
            f"values.utility={utility} is not linear in a query, so {method} has no values of it",
            expected="prediction",
            fix="set values.method=permutation (or one_sample, msr_banzhaf, ame_lasso), or values.utility=prediction",
        )
    return utility


def _settings(config: RunConfig, utility: str) -> dict[str, Any]:
    """Return what the values depend on besides data and game, as JSON."""
    method = config.values.method
    options = config.values.model_dump(mode="json")
    read = _OPTIONS.get(method, _OPTIONS["subset"])
    return {"method": method, "utility": utility, **{key: options[key] for key in read}}


def _game_fingerprint(config: RunConfig, reader: FeatureReader) -> Any:
    """Return what else of reduce the values depend on."""
    method = config.values.method
    if method in _OWN_GAME:
        return None
    if method not in _OPTIONS:
        return current_representers(config, method, reader.store).digest()
    settings = asdict(reader.resolve(config.reduce, "shapley"))
    return {name: settings[name] for name in ("center", "normalize", "members", "ridge", "response")}


def _estimate(
    config: RunConfig,
    reader: FeatureReader,
    validation: Validation,
    utility: UtilityName,
    data: dict[str, str],
    kept: KeptMoments,
    progress: Progress,
) -> Estimate:
    """Run the method."""
    method = config.values.method
    if method == "freeshap":
        return from_freeshap(config, reader, validation, utility, kept, progress)
    if method == "knn_shapley":
        return from_neighbors(config, reader, validation, progress)
    if method not in _OPTIONS:
        return from_representers(config, reader, validation, kept, progress)
    game = ValidationGame.of(reader, reader.resolve(config.reduce, "shapley"), validation)
    if method == "subset":
        return from_subsets(config, game, kept, progress)
    if method == "permutation":
        return from_permutations(config, game, utility, kept, progress)
    return from_table(config, game, utility, data, progress)


def _validation_notes(config: RunConfig, validation: Validation) -> list[str]:
    """Return what a reader should know of the validation set."""
    counts = {"cut to fit": validation.num_truncated, "skipped as too long": validation.num_skipped}
    notes = [f"{count:,} validation examples {what}" for what, count in counts.items() if count]
    if config.features.output == "pntk":
        notes.append("features of output pntk know no answer: values measure likeness, their signs mean nothing")
    return notes


def _result(
    config: RunConfig,
    examples: Sequence[Example],
    num_validation: int,
    utility: str,
    estimate: Estimate,
    paths: list[str],
) -> ValuesResult:
    """Join values with the texts of their examples."""

    def column(array: Any) -> list[float | None]:
        return [None] * len(estimate.values) if array is None else array.tolist()

    columns = zip(
        examples,
        estimate.values.tolist(),
        *(column(array) for array in (estimate.standard_error, estimate.lower, estimate.upper)),
        estimate.signs.tolist(),
        strict=True,
    )
    values = tuple(
        DataValue(
            example.id, example.index, value, error, lower, upper, SIGNS[sign], example.prompt_text, example.completion
        )
        for example, value, error, lower, upper, sign in columns
    )
    return ValuesResult(
        csv_path=paths[0],
        parquet_path=paths[1],
        method=config.values.method,
        utility=utility,
        num_validation=num_validation,
        expected_total=None if estimate.full is None or estimate.empty is None else estimate.full - estimate.empty,
        values=values,
        notes=estimate.notes,
        is_reused=False,
        seconds=0.0,
    )
