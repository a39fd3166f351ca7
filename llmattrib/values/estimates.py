"""Estimators of data values on a validation set, each brought to one form: values with their uncertainty.

What an interval means depends on where it comes from, and `notes` say so: empirical-Bernstein intervals of independent
samples (representers' certificates, `subset`, `permutation`, `freeshap`), normal ones from the standard errors of a
subset table (`one_sample`, `msr_banzhaf`), a selection by knockoffs (`ame_lasso`), or none where nothing is sampled
(gradient methods, `knn_shapley`): the sign is then that of the number.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float, Int8

from llmattrib.config import RunConfig
from llmattrib.coordinates import Transform
from llmattrib.encoding import EncodedSet
from llmattrib.errors import MethodError
from llmattrib.estimators.ame import AmeRegression, Knockoffs
from llmattrib.estimators.freeshap import FreeShap, KernelProblem
from llmattrib.estimators.knn import knn_shapley, soft_knn_shapley
from llmattrib.estimators.moments import MIN_COUNT, Moments
from llmattrib.estimators.one_sample import TableValues, msr_banzhaf, table_values
from llmattrib.estimators.permutation import Permutation, UtilityResult
from llmattrib.estimators.quadrature import SHAPLEY as SHAPLEY_VALUE
from llmattrib.estimators.quadrature import Semivalue
from llmattrib.estimators.subset import Subset
from llmattrib.games.subset_table import ATTRIBUTION, BANZHAF, SHAPLEY, SIZES, Design, SubsetRows, SubsetTable
from llmattrib.index import nearest_rows
from llmattrib.memory import require_memory
from llmattrib.methods import MethodName
from llmattrib.progress import Progress
from llmattrib.reader import FeatureReader, current_representers
from llmattrib.retrain import retrained_rows
from llmattrib.scorers.gradient import unit_rows
from llmattrib.sections import ValuesConfig
from llmattrib.semivalues import semivalue_of
from llmattrib.settings import Settings
from llmattrib.values.game import UtilityName, ValidationGame, mean_query
from llmattrib.values.samples import KeptMoments
from llmattrib.values.validation import Validation

_QUERIES = 64  # sorted together by the nearest-neighbour game
SAMPLED = f"fewer than {MIN_COUNT} samples: intervals are infinite and signs undetermined"


@dataclass(frozen=True)
class Estimate:
    """Values of all training examples.

    Attributes:
        values: [n] mean over prompts.
        standard_error: [n], or None where nothing is sampled or the estimator has none.
        lower: [n] end of the interval, or None.
        upper: [n].
        signs: [n] 1 helpful, -1 harmful, 0 undetermined.
        empty: utility of nobody, where the values should sum to full - empty; None otherwise.
        full: utility of everybody.
        notes: what a reader of the values should know.
    """

    values: Float[np.ndarray, " n"]
    standard_error: Float[np.ndarray, " n"] | None
    lower: Float[np.ndarray, " n"] | None
    upper: Float[np.ndarray, " n"] | None
    signs: Int8[np.ndarray, " n"]
    empty: float | None = None
    full: float | None = None
    notes: tuple[str, ...] = ()


def _exact(values: Float[np.ndarray, " n"], notes: tuple[str, ...] = ()) -> Estimate:
    """Return values without sampling error."""
    return Estimate(values, None, None, None, np.sign(values).astype(np.int8), notes=notes)


def _sampled(
    moments: Moments,
    confidence: float,
    ends: tuple[float, float] | None,
    notes: tuple[str, ...],
    values: Float[np.ndarray, " n"] | None = None,
) -> Estimate:
    """Return the means of samples, or other values whose signs they certify."""
    half = moments.half_width(confidence)
    notes = notes if moments.count >= MIN_COUNT else (*notes, SAMPLED)
    empty, full = ends or (None, None)
    return Estimate(
        values=moments.mean if values is None else values,
        standard_error=moments.standard_error,
        lower=moments.mean - half,
        upper=moments.mean + half,
        signs=moments.signs(confidence),
        empty=empty,
        full=full,
        notes=notes,
    )


def from_representers(
    config: RunConfig, reader: FeatureReader, validation: Validation, kept: KeptMoments, progress: Progress
) -> Estimate:
    """Multiply stored representers with the mean query; certify the signs of a semivalue by unbiased draws.

    Raises:
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: representers are missing or outdated.
        MethodError: the draws do not fit the memory.
    """
    values = config.values
    store = current_representers(config, values.method, reader.store)
    query = mean_query(validation, Transform.of(store), reader.output)
    products = np.concatenate([np.einsum("mcp,cp->m", rows, query, optimize=True) for _, rows in store.blocks()])
    name = MethodName.parse(values.method)
    if not name.is_semivalue:
        return _exact(products, ("nothing is sampled: the sign is that of the value",))
    game = ValidationGame.of(reader, Settings.stored(store.manifest.info), validation)
    semivalue = semivalue_of(values.method)
    ends = game.ends("prediction") if semivalue.is_shapley else None
    if values.num_samples == 0:
        estimate = _exact(products, (*game.notes, "values.num_samples is 0: signs are not certified"))
        empty, full = ends or (None, None)
        return replace(estimate, signs=np.zeros(len(products), np.int8), empty=empty, full=full)
    moments = _moments(config, game, semivalue, kept, progress)
    estimate = _sampled(moments, values.confidence, ends, game.notes, products)
    assert estimate.lower is not None
    assert estimate.upper is not None
    outside = int(np.sum((products < estimate.lower) | (products > estimate.upper)))
    if outside:
        notes = (*estimate.notes, f"{outside:,} values lie outside the interval of their draws: the mean field is off")
        estimate = replace(estimate, notes=notes)
    return estimate


def from_subsets(config: RunConfig, game: ValidationGame, kept: KeptMoments, progress: Progress) -> Estimate:
    """Take Shapley values from unbiased draws alone.

    Raises:
        MethodError: there are no draws, or they do not fit the memory.
    """
    _require_samples(config.values)
    moments = _moments(config, game, SHAPLEY_VALUE, kept, progress)
    return _sampled(moments, config.values.confidence, game.ends("prediction"), game.notes)


def _moments(
    config: RunConfig, game: ValidationGame, semivalue: Semivalue, kept: KeptMoments, progress: Progress
) -> Moments:
    """Draw subsets."""
    identity = {**_game_identity(game), "sampler": "subset", "semivalue": semivalue.name}
    start = kept.start(identity, (game.num_players,), config.values.num_samples)
    estimator = Subset(semivalue, start.num_missing, config.seed, start.num_done)
    return start.finish(game.samples(estimator), progress)


def from_permutations(
    config: RunConfig, game: ValidationGame, utility: UtilityName, kept: KeptMoments, progress: Progress
) -> Estimate:
    """Sample Shapley values of any utility by permutations.

    Raises:
        MethodError: they do not fit the memory.
    """
    values = config.values
    tolerance = None if values.tolerance == "auto" else values.tolerance
    identity = {**_game_identity(game), "sampler": "permutation", "utility": utility, "tolerance": tolerance}
    start = kept.start(identity, (1, game.num_players + 1), values.num_permutations // 2)
    estimator = Permutation(2 * start.num_missing, seed=config.seed, first_sample=start.num_done, tolerance=tolerance)
    games = list(zip(game.games, game.queries, strict=True))
    found = estimator.sample_joint_utility(games, game.utility(utility))
    moments = start.finish(found.samples, progress)
    return _of_utility(UtilityResult.of(moments, found), 0, values.confidence, game.notes)


def _of_utility(result: UtilityResult, row: int, confidence: float, notes: tuple[str, ...]) -> Estimate:
    """Return the values of one utility of those sampled."""
    moments, ends = result.moments.at(row), (float(result.empty[row]), float(result.full[row]))
    reached, num_players = result.mean_prefixes, len(moments.mean)
    if reached < num_players:
        notes += (f"permutations stopped after {reached:.1f} of {num_players:,} examples on average, which biases",)
    return _sampled(moments, confidence, ends, notes)


def table_design(values: ValuesConfig) -> Design:
    """Return how the subsets of a table method are drawn."""
    if values.method == "ame_lasso":
        return ATTRIBUTION if values.ame_design == "attribution" else SHAPLEY
    return BANZHAF if values.method == "msr_banzhaf" else SIZES


def from_table(
    config: RunConfig,
    game: ValidationGame,
    utility: UtilityName,
    data: Mapping[str, Any],
    progress: Progress,
) -> Estimate:
    """Fill the run's subset table as far as needed and read the values from it.

    Args:
        config: the run.
        game: the game.
        utility: which column is read; all that the features define are kept.
        data: digests of the features and the validation set.
        progress: told of shards filled.

    Raises:
        MethodError: there are too few subsets or examples.
        FingerprintMismatchError: the table is of another game.
    """
    values, names = config.values, game.utilities
    game.require(utility)
    _require_samples(values)
    if game.num_players < 2:
        raise MethodError("there is one training example", expected="two or more to draw subsets of")
    identity = {**data, **_game_identity(game), "utilities": list(names)}
    path = config.layout.path("values", "subsets.zarr")
    table = SubsetTable.create(path, game.num_players, len(names), config.seed, identity)
    design = table_design(values)
    table.extend(design, values.num_samples)
    table.fill(lambda members: game.worth(members, names), progress)
    rows = table.rows(design).first(values.num_samples)
    rows = replace(rows, utilities=rows.utilities[:, [names.index(utility)]])
    if values.method != "one_sample":
        return _of_rows(values, rows, game.notes)
    ends = game.ends(utility)
    found = table_values(rows, SHAPLEY_VALUE, np.array(ends[:1]), np.array(ends[1:]))
    return replace(_normal(found, values.confidence, game.notes), empty=ends[0], full=ends[1])


def sub_model_rows(config: RunConfig, examples: EncodedSet) -> SubsetRows:
    """Read the sub-models of `llmattrib retrain` that the method takes, `values.num_samples` of them or more.

    Args:
        config: the run.
        examples: the training examples.

    Raises:
        StoreNotFoundError: nothing was retrained.
        MethodError: the method reads no such subsets, or there are too few.
    """
    values = config.values
    if values.method not in ("ame_lasso", "msr_banzhaf"):
        raise MethodError(
            f"values.method={values.method} cannot read sub-models",
            expected="ame_lasso or msr_banzhaf for values.game=retraining",
            fix="set one of them, or values.game=kernel",
        )
    _require_samples(values)
    rows = retrained_rows(config, table_design(values), examples)
    if len(rows.p) < values.num_samples:
        raise MethodError(
            f"{len(rows.p):,} subsets of the design {rows.design.name} are trained with every seed",
            expected=f"values.num_samples={values.num_samples:,}",
            fix=f"run `llmattrib retrain` with retraining.design={rows.design.name} and "
            f"retraining.num_subsets={values.num_samples}, or lower values.num_samples",
        )
    return rows


def from_sub_models(values: ValuesConfig, rows: SubsetRows) -> Estimate:
    """Read values from the first of `sub_model_rows`, in the mean log-odds of the prompts' answers."""
    rows = rows.first(values.num_samples)
    return _of_rows(values, replace(rows, utilities=rows.utilities.mean(axis=1, keepdims=True)), ())


def _of_rows(values: ValuesConfig, rows: SubsetRows, notes: tuple[str, ...]) -> Estimate:
    """Read the values of one utility from subsets of the method's design."""
    if values.method == "msr_banzhaf":
        return _normal(msr_banzhaf(rows), values.confidence, notes)
    effects = AmeRegression().init(rows)
    chosen = [Knockoffs(values.false_discovery_rate, harmful).init(rows)[:, 0] for harmful in (False, True)]
    notes += (
        f"helpful and harmful are selected by knockoffs at a false-discovery rate of "
        f"{values.false_discovery_rate:g}, at least {int(np.ceil(1 / values.false_discovery_rate))} or none",
        f"{int(effects.num_selected[0]):,} examples have a value; LASSO shrinks it",
    )
    signs = chosen[0].astype(np.int8) - chosen[1].astype(np.int8)
    return Estimate(effects.values[:, 0], None, None, None, signs, notes=notes)


def _normal(found: TableValues, confidence: float, notes: tuple[str, ...]) -> Estimate:
    """Return estimates with normal intervals."""
    mean, error = found.values[:, 0], found.standard_errors[:, 0]
    half = float(scipy.stats.norm.ppf((1 + confidence) / 2)) * error
    signs = np.where(np.abs(mean) > half, np.sign(mean), 0).astype(np.int8)
    return Estimate(
        mean, error, mean - half, mean + half, signs, notes=(*notes, "intervals are normal, of one value at a time")
    )


def _game_identity(game: ValidationGame) -> dict[str, object]:
    """Return what the numbers of a game depend on besides its data."""
    names = ("center", "normalize", "members", "response")
    return {name: asdict(game.settings)[name] for name in names} | {"ridge": game.ridge}


def _require_samples(values: ValuesConfig) -> None:
    if values.num_samples == 0:
        raise MethodError(
            f"values.num_samples=0 leaves {values.method} without subsets",
            expected="subsets to estimate from",
            fix="set values.num_samples=256 or more",
        )


def from_freeshap(
    config: RunConfig,
    reader: FeatureReader,
    validation: Validation,
    utility: UtilityName,
    kept: KeptMoments,
    progress: Progress,
) -> Estimate:
    """Follow FreeShap as published.

    Raises:
        MethodError: features are not of output logits, the utility is not FreeShap's, or it does not fit the memory.
    """
    values, manifest = config.values, reader.manifest
    if reader.output != "logits":
        raise MethodError(
            f"freeshap needs the gradient of each class's logit, and features are of output {reader.output}",
            expected="features.output logits, with label words",
            fix="build features with features.output=logits in another run_dir",
        )
    if utility == "prediction":
        raise MethodError(
            "values.utility=prediction is no utility of freeshap",
            expected="log_likelihood (minus the cross-entropy) or accuracy",
            fix="set values.utility=log_likelihood",
        )
    num_kernels = 1 if values.freeshap_kernels == "single" else manifest.num_outputs
    size = 8 * num_kernels * (3 * manifest.num_rows * manifest.dim + 2 * manifest.num_rows**2)
    require_memory(size, f"the kernels of {manifest.num_rows:,} examples", "set values.freeshap_kernels=single")
    rows = np.concatenate([block for _, block in reader.store.blocks()])
    labels = reader.store.column("label").astype(np.int64)
    problem = KernelProblem.of_features(rows, validation.phi, labels, validation.labels, values.freeshap_kernels)
    tolerance = 0.05 if values.tolerance == "auto" else values.tolerance
    ridge = values.freeshap_ridge
    identity = {"sampler": "freeshap", "kernels": values.freeshap_kernels, "tolerance": tolerance, "ridge": ridge}
    start = kept.start(identity, (2, len(labels) + 1), values.num_permutations)
    estimator = FreeShap(start.num_missing, tolerance, ridge=ridge, seed=config.seed, first_permutation=start.num_done)
    found = estimator.sample(problem)
    moments = start.finish(found.samples, progress)
    notes: tuple[str, ...] = ()
    sketch = manifest.fingerprint["features"]["sketch"]["kind"]
    if sketch != "none" or manifest.dtype != "float32":
        notes += (f"FreeShap starts from exact features; these are {manifest.dtype} with sketch {sketch}",)
    return _of_utility(UtilityResult.of(moments, found), int(utility == "accuracy"), values.confidence, notes)


def from_neighbors(config: RunConfig, reader: FeatureReader, validation: Validation, progress: Progress) -> Estimate:
    """Value examples by exact Shapley values of the nearest-neighbour classifier, cosine of features.

    Raises:
        MethodError: there are no label words, or the features know the label.
    """
    values, labels = config.values, reader.store.column("label").astype(np.int64)
    num_classes = len(reader.manifest.fingerprint["encoding"]["label_words"])
    if num_classes == 0:
        raise MethodError(
            "knn_shapley compares labels, and there are no data.label_words",
            expected="label words",
            fix="name data.label_words and build again, or set values.method=shapley",
        )
    if not is_label_free(reader):
        raise MethodError(
            f"features of output {reader.output} depend on the label, so nearness in them does too",
            expected="features.output logits or pntk, or two label words",
            fix="build features of output logits, or set values.method=shapley",
        )
    rows = np.concatenate([block for _, block in reader.store.blocks()])
    order_by = label_free(rows, labels, reader.output)
    queries = label_free(validation.phi, validation.labels, reader.output)
    (n, m), k = (len(rows), len(queries)), values.knn_neighbors
    total, worth = np.zeros(n), 0.0
    for start in range(0, m, _QUERIES):
        part = slice(start, start + _QUERIES)
        order = nearest_rows(order_by, queries[part])
        matches = labels == validation.labels[part, None]
        if values.knn_label == "hard":
            found = knn_shapley(order, matches, k)
        else:
            found = soft_knn_shapley(order, matches, k, num_classes)
        total += found.sum(axis=0)
        votes = np.take_along_axis(matches, order[:, :k], axis=1).sum()
        worth += float(votes) / (k if values.knn_label == "hard" else min(k, n))
        progress(min(start + _QUERIES, m), m)
    empty = 0.0 if values.knn_label == "hard" else 1 / num_classes
    estimate = _exact(total / m, ("nothing is sampled: the sign is that of the value",))
    return replace(estimate, empty=empty, full=worth / m)


def is_label_free(reader: FeatureReader) -> bool:
    """Whether rows that do not depend on the label can be made of features: always of two label words."""
    return reader.output in ("logits", "pntk") or len(reader.manifest.fingerprint["encoding"]["label_words"]) <= 2


def label_free(rows: Float[np.ndarray, "m c p"], labels: np.ndarray, output: str) -> Float[np.ndarray, "m d"]:
    """Return unit rows that do not depend on the label: of two words, that of the first (margins change sign)."""
    if output not in ("logits", "pntk"):
        rows = np.where((labels == 1)[:, None, None], -rows, rows)
    return unit_rows(rows.reshape(len(rows), -1))
