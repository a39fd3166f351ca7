"""Semivalues of stored features: the kernel games of a run, one sweep over q for all its methods, their certificates.

Features of `logits` play one game per class; the others play one. Methods of one run have the same settings but for
the measure over q, so they share games and q-nodes. What a method gets does not depend on the others.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llmattrib.errors import MethodError
from llmattrib.estimators.certificate import Certificate, certify, certify_streamed, sample_queries
from llmattrib.estimators.mean_field import MeanField, MeanFieldResult
from llmattrib.estimators.q_profile import QProfile
from llmattrib.estimators.quadrature import (
    BANZHAF,
    LEAVE_ONE_OUT,
    SHAPLEY,
    Semivalue,
    ame,
    beta_shapley,
    weighted_banzhaf,
)
from llmattrib.estimators.streamed import StreamedField, StreamedResult
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import FeatureRows, KernelGame, RowSpace, ridge_errors
from llmattrib.methods import MethodName
from llmattrib.progress import Progress
from llmattrib.reader import FeatureReader, Representers
from llmattrib.scorers.gradient import absolute_ridge
from llmattrib.sections import Method
from llmattrib.settings import Settings

_CERTIFICATE_QUERIES = 32
_NOTED_BIAS = 0.05


def semivalue_of(method: Method) -> Semivalue:
    """Return the measure over q of a method that is a semivalue."""
    name = MethodName.parse(method)
    if name.kind == "beta_shapley":
        return beta_shapley(*name.arguments)
    if name.kind == "weighted_banzhaf":
        return weighted_banzhaf(*name.arguments)
    if name.kind == "ame":
        return ame(name.arguments)
    return {"shapley": SHAPLEY, "banzhaf": BANZHAF, "leave_one_out": LEAVE_ONE_OUT}[name.kind]


def mean_field(settings: Settings) -> MeanField:
    """Return the estimator of a method that is a semivalue."""
    assert settings.form is not None
    if settings.form == "streamed":
        raise MethodError(
            "values along the q-axis are not kept by the streamed form",
            expected="representers of another form",
            fix="reduce again with reduce.form=total_gradient or cavity",
        )
    assert settings.sum_rule_tolerance is not None
    return MeanField(semivalue_of(settings.method), form=settings.form, tolerance=settings.sum_rule_tolerance)


def play(
    settings: Sequence[Settings], ridge: float, reader: FeatureReader, progress: Progress
) -> list[tuple[dict[str, Any], Representers]]:
    """Play the kernel games of all outputs; the streamed form is called by all ranks, the others by one with all rows.

    Args:
        settings: of semivalues; equal but for the method.
        ridge: in units of the mean squared feature norm.
        reader: the features.
        progress: called with (done, total), for each rule of each output again.

    Returns:
        For each method what to note about it, and its representers.

    Raises:
        MethodError: it does not fit the memory, the mean field does not converge, or the ridge is lost in rounding.
    """
    assert len({dataclasses.replace(item, method="shapley") for item in settings}) == 1
    with ridge_errors():
        return (_play_streamed if settings[0].form == "streamed" else _play)(settings, ridge, reader, progress)


def _play(
    settings: Sequence[Settings], ridge: float, reader: FeatureReader, progress: Progress
) -> list[tuple[dict[str, Any], Representers]]:
    semivalues = [semivalue_of(item.method) for item in settings]
    num_outputs, draws = reader.manifest.num_outputs, settings[0].certificate_draws
    spaces: list[RowSpace] = []
    results: list[list[MeanFieldResult]] = [[] for _ in settings]
    certificates: list[list[Certificate]] = [[] for _ in settings]
    for output in range(num_outputs):

        def report(done: int, total: int, before: int = output) -> None:
            progress(before * total + done, num_outputs * total)

        game = reader.game(settings[0], ridge, output)
        spaces.append(reader.features(settings[0], output).space)
        for index, result in enumerate(mean_field(settings[0]).sweep(game, semivalues, report)):
            results[index].append(result)
            if draws:
                certificates[index].append(_certificate(game, result, semivalues[index], draws))
    return [_outcome(reader, spaces, found, measured) for found, measured in zip(results, certificates, strict=True)]


def _play_streamed(
    settings: Sequence[Settings], ridge: float, reader: FeatureReader, progress: Progress
) -> list[tuple[dict[str, Any], Representers]]:
    first, semivalues = settings[0], [semivalue_of(item.method) for item in settings]
    assert first.sum_rule_tolerance is not None
    assert first.response is not None
    num_outputs, estimator = reader.manifest.num_outputs, StreamedField(first.sum_rule_tolerance)
    results: list[list[StreamedResult]] = [[] for _ in settings]
    certificates: list[list[Certificate]] = [[] for _ in settings]
    for output in range(num_outputs):

        def report(done: int, total: int, before: int = output) -> None:
            progress(before * total + done, num_outputs * total)

        features = reader.features(first, output)
        lam, responses = absolute_ridge(features, ridge), reader.responses(first.response, output)[:, 0]
        found = estimator.sweep(features, responses, lam, semivalues, report)
        for index, (result, semivalue) in enumerate(zip(found, semivalues, strict=True)):
            results[index].append(result)
            if first.certificate_draws:
                queries = sample_queries(features, _CERTIFICATE_QUERIES, seed=0)
                draws = Subset(semivalue, num_draws=first.certificate_draws)
                certificates[index].append(certify_streamed(features, lam, result, queries, draws))

    def representers(parts: list[StreamedResult]) -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for start, rows in reader.blocks(first):
            values = [result.representers(start, rows[:, output]) for output, result in enumerate(parts)]
            yield start, np.stack(values, axis=1).astype(np.float32)

    return [
        (_info(parts, measured), partial(representers, parts))
        for parts, measured in zip(results, certificates, strict=True)
    ]


def follow(
    settings: Settings,
    reader: FeatureReader,
    queries: Float[np.ndarray, "m p"],
    rows: Int[np.ndarray, " e"],
    output: int,
    progress: Progress,
) -> QProfile:
    """Follow the values of some examples along the q-axis, in the game of one output.

    Args:
        settings: of a semivalue with a density, its ridge chosen.
        reader: the features.
        queries: query features, centred and scaled as the settings say.
        rows: examples.
        output: which game.
        progress: called with (nodes done, nodes of the present rule).
    """
    assert isinstance(settings.ridge, float)
    game, space = reader.game(settings, settings.ridge, output), reader.features(settings, output).space
    with ridge_errors():
        return mean_field(settings).profile(game, space.project(queries.astype(np.float64)), rows, progress)


def _certificate(game: KernelGame, result: MeanFieldResult, semivalue: Semivalue, draws: int) -> Certificate:
    queries = sample_queries(FeatureRows.of(game.features), _CERTIFICATE_QUERIES, seed=0)
    return certify(game, result, queries, Subset(semivalue, num_draws=draws))


def _outcome(
    reader: FeatureReader,
    spaces: Sequence[RowSpace],
    results: Sequence[MeanFieldResult],
    certificates: Sequence[Certificate],
) -> tuple[dict[str, Any], Representers]:
    """Gather the games of all outputs for one method."""
    size, num_rows = reader.manifest.shard_size, reader.manifest.num_rows

    def representers() -> Iterator[tuple[int, Float[np.ndarray, "m c p"]]]:
        for start in range(0, num_rows, size):
            parts = [
                space.lift(result.representers[start : start + size, 0])
                for space, result in zip(spaces, results, strict=True)
            ]
            yield start, np.stack(parts, axis=1).astype(np.float32)

    residuals = [result.response_residual for result in results if result.response_residual is not None]
    info = _info(results, certificates)
    info["num_groups"] = [result.num_groups for result in results]
    info["response_residual"] = max(residuals) if residuals else None
    return info, representers


def _info(results: Sequence[MeanFieldResult | StreamedResult], certificates: Sequence[Certificate]) -> dict[str, Any]:
    """Return what to note about the games of all outputs together."""
    prefix = ["" if len(results) == 1 else f"class {output}: " for output in range(len(results))]
    notes = [before + note for before, result in zip(prefix, results, strict=True) for note in result.notes]
    certificate: Certificate | None = None
    for found in certificates:
        certificate = found if certificate is None else certificate.merge(found)
    measured = None if certificate is None else certificate.summary()
    if measured is not None and measured.lower > _NOTED_BIAS:
        notes.append(f"the mean field is off: {measured}; take a larger ridge, or reduce.form=pairs")
    errors = [result.sum_rule_error for result in results if result.sum_rule_error is not None]
    return {
        "sum_rule_error": max(errors) if errors else None,
        "certificate": None if measured is None else dataclasses.asdict(measured),
        "num_nodes": max(result.num_nodes for result in results),
        "precision": results[0].precision,
        "notes": notes,
    }
