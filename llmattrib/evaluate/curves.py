"""Removal and selection curves: what do models say that were trained without the best examples, or on them alone?

A ranking of the examples is cut at some fractions of them, and a model is trained for real on what is left:

    remove_highest   without the examples ranked highest    a good ranking falls fast
    remove_lowest    without those ranked lowest            a good ranking stays, or rises where they were harmful
    keep_highest     on the highest alone                   a good ranking is up soon
    keep_lowest      on the lowest alone                    a good ranking stays down

The change at a fraction is the mean over prompts of log-odds less those of the model of everybody. The area is the
trapezoid rule over the fractions from 0, where nothing is removed (or nothing kept: the untrained model), to the last,
divided by that last one: the mean change on the way. The ranking is by the mean score over prompts; `own` curves rank
for each of the first prompts by its scores alone and measure that prompt alone.

`random` are rankings by chance; `random by class` by chance with the labels in the same proportions at every cut. What
a method has beyond removing one class shows beside that one. Ties are broken by row.
Intervals resample prompts, and rankings and training seeds where there are several. A curve of one seed and one ranking
has no interval that covers how much two fine-tunes differ: judge differences of methods by that of two random curves.
Source: docs/methods.md section 10; Ghorbani and Zou 2019; Wang et al. 2024 (FreeShap).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from llmattrib.config import RunConfig
from llmattrib.encoding import EncodedSet
from llmattrib.errors import MethodError
from llmattrib.evaluate.record import Record, Row, interval
from llmattrib.evaluate.scores import RunScores
from llmattrib.games.chosen_subsets import ChosenSubsets
from llmattrib.games.retraining import RetrainingGame
from llmattrib.lock import locked
from llmattrib.progress import Progress, silent
from llmattrib.retrain import game_inputs, load_game
from llmattrib.rng import stream
from llmattrib.sections import CurveKind, EvaluateConfig

BY_CHANCE = ("random", "random by class")


@dataclass(frozen=True)
class Ranking:
    """Examples in an order, and who is asked about it.

    Attributes:
        order: [n] rows, highest first.
        prompt: the prompt that is measured; None for all.
    """

    order: Int[np.ndarray, " n"]
    prompt: int | None = None


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        fractions: [k] of the examples, ascending.
        change: [k] mean change of the log-odds.
        low: [k] lower ends of 95 % intervals.
        high: [k] upper ends.
        area: mean change from 0 to the last fraction.
        area_low: lower end.
        area_high: upper end.
    """

    fractions: Float[np.ndarray, " k"]
    change: Float[np.ndarray, " k"]
    low: Float[np.ndarray, " k"]
    high: Float[np.ndarray, " k"]
    area: float
    area_low: float
    area_high: float


def ranked(scores: Float[np.ndarray, " n"], prompt: int | None = None) -> Ranking:
    """Return the ranking by scores, ties by row."""
    return Ranking(np.argsort(-scores, kind="stable"), prompt)


def by_class(classes: Sequence[str], draws: np.random.Generator) -> Ranking:
    """Return a random ranking whose every beginning and end has all classes in the proportions of the whole."""
    places = np.empty(len(classes))
    labels = np.array(classes)
    for label in dict.fromkeys(classes):
        rows = np.flatnonzero(labels == label)
        places[rows[draws.permutation(len(rows))]] = (np.arange(len(rows)) + draws.random()) / len(rows)
    return Ranking(np.argsort(places, kind="stable"))


def cut_sizes(fractions: Sequence[float], num_examples: int) -> Int[np.ndarray, " k"]:
    """Return the numbers of examples that fractions are, at least one and not all, each number once.

    Raises:
        MethodError: there is one example.
    """
    if num_examples == 1:
        raise MethodError("the run has one example", expected="two or more, of which some are removed and some kept")
    sizes = {min(max(1, round(fraction * num_examples)), num_examples - 1) for fraction in fractions}
    return np.array(sorted(sizes))


def cut(order: Int[np.ndarray, " n"], kind: CurveKind, size: int) -> Bool[np.ndarray, " n"]:
    """Return the members that are left."""
    chosen = order[:size] if kind.endswith("highest") else order[-size:]
    members = np.full(len(order), kind.startswith("remove"))
    members[chosen] = not kind.startswith("remove")
    return members


class Curves:
    """Curves of rankings of n examples under one utility, which is evaluated once, for all that they need.

    Args:
        rankings: name -> rankings whose curves are averaged.
        kinds: which curves.
        sizes: from `cut_sizes`.
    """

    def __init__(
        self, rankings: Mapping[str, Sequence[Ranking]], kinds: Sequence[CurveKind], sizes: Int[np.ndarray, " k"]
    ) -> None:
        self.rankings, self.kinds, self.sizes = rankings, kinds, sizes
        first = next(iter(rankings.values()))[0]
        self.num_examples = len(first.order)
        ends = np.repeat([[False], [True]], self.num_examples, axis=1)
        cuts = [
            cut(ranking.order, kind, size)
            for some in rankings.values()
            for ranking in some
            for kind in kinds
            for size in sizes.tolist()
        ]
        self.members: Bool[np.ndarray, "m n"] = np.concatenate([ends, np.array(cuts)])
        """Nobody, everybody, then all cuts."""

    def curves(
        self, utilities: Float[np.ndarray, "s m q"], seed: int, num_resamples: int
    ) -> dict[str, dict[CurveKind, Curve]]:
        """Return the curves, given what `members` are worth under s training seeds."""
        empty, full = utilities[:, :1], utilities[:, 1:2]
        cuts = (utilities[:, 2:] - full).reshape(len(utilities), -1, len(self.sizes), utilities.shape[2])
        nobody = empty - full
        found: dict[str, dict[CurveKind, Curve]] = {}
        start = 0
        for name, some in self.rankings.items():
            stop = start + len(some) * len(self.kinds)
            part = cuts[:, start:stop].reshape(len(utilities), len(some), len(self.kinds), len(self.sizes), -1)
            start = stop
            found[name] = {}
            for place, kind in enumerate(self.kinds):
                anchor = nobody if kind.startswith("keep") else np.zeros_like(nobody)
                anchors = np.broadcast_to(anchor[:, None], (len(utilities), len(some), 1, part.shape[-1]))
                change = np.concatenate([anchors, part[:, :, place]], axis=2)
                draws = stream(seed, "evaluate", "curves", name, kind)
                found[name][kind] = self._curve(_of_prompts(change, some), draws, num_resamples)
        return found

    def _curve(self, change: Float[np.ndarray, "s r k1 q"], draws: np.random.Generator, num_resamples: int) -> Curve:
        """Average the changes, fraction 0 first, and bootstrap."""
        fractions = np.concatenate([[0.0], self.sizes / self.num_examples])
        samples = np.empty((num_resamples, len(fractions)))
        for sample in samples:
            seeds, rankings, prompts = (draws.integers(0, size, size) for size in np.delete(change.shape, 2).tolist())
            sample[:] = change[seeds][:, rankings][..., prompts].mean(axis=(0, 1, 3))
        mean = change.mean(axis=(0, 1, 3))
        low, high = np.percentile(samples[:, 1:], (2.5, 97.5), axis=0)
        ends = interval(_area(fractions, samples))
        return Curve(fractions[1:], mean[1:], low, high, float(_area(fractions, mean)), *ends)


def _of_prompts(change: Float[np.ndarray, "s r k q"], rankings: Sequence[Ranking]) -> Float[np.ndarray, "s r2 k q2"]:
    """Return the changes of the prompts asked about; rankings of one prompt each become the prompts of one ranking."""
    if rankings[0].prompt is None:
        return change
    own = [change[:, row, :, ranking.prompt] for row, ranking in enumerate(rankings)]
    return np.stack(own, axis=-1)[:, None]


def _area(fractions: Float[np.ndarray, " k"], change: Float[np.ndarray, "*m k"]) -> Float[np.ndarray, "*m"]:
    return np.asarray(np.trapezoid(change, fractions, axis=-1) / fractions[-1])


def rankings_of(
    scores: Mapping[str, Float[np.ndarray, "q n"]], classes: Sequence[str] | None, settings: EvaluateConfig, seed: int
) -> dict[str, list[Ranking]]:
    """Return the rankings of methods and baselines, and of chance.

    Args:
        scores: without `random`, which gets rankings of its own.
        classes: of the examples, None when there are none.
        settings: how many.
        seed: of chance.
    """
    found: dict[str, list[Ranking]] = {}
    for name, array in scores.items():
        found[name] = [ranked(array.mean(axis=0))]
        if settings.curve_prompts:
            found[f"{name}, own"] = [ranked(array[q], q) for q in range(min(settings.curve_prompts, len(array)))]
    num_examples = next(iter(scores.values())).shape[1]
    some = range(settings.num_random)
    orders = [stream(seed, "evaluate", "random ranking", k).permutation(num_examples) for k in some]
    found["random"] = [Ranking(order) for order in orders]
    if classes is not None:
        found["random by class"] = [by_class(classes, stream(seed, "evaluate", "by class", k)) for k in some]
    return found


def curves_of_run(scores: RunScores, progress: Progress = silent) -> Record:
    """Retrain and measure the curves of every method and baseline of a run.

    Sub-models are kept in run_dir/retraining/chosen.zarr: a killed evaluation goes on, another one reuses them.

    Args:
        scores: of the run.
        progress: told of sub-models done.

    Returns:
        Rows `method` and the area of each kind with its interval; saved, with the curves in `details`.

    Raises:
        ConfigError: `values.data` is not set.
        StoreLockedError: another process trains sub-models of this run.
        FingerprintMismatchError: the sub-models that are there, or the features, are of other data or settings.
        MethodError: the run has one example.
    """
    config, settings = scores.config, scores.config.evaluate
    examples = scores.require_training()
    without = ("random", "size")  # a constant ranks nothing
    classes = [example.completion for example in scores.examples] if config.data.label_words else None
    rankings = rankings_of(scores.table(without), classes, settings, config.seed)
    curves = Curves(rankings, settings.curves, cut_sizes(settings.fractions, len(scores.examples)))
    seeds = range(config.seed, config.seed + settings.num_seeds)
    utilities = retrained(config, curves.members, seeds, progress, examples)
    found = curves.curves(utilities, config.seed, settings.num_resamples)
    first = settings.curves[0]
    names = sorted(found, key=lambda name: found[name][first].area, reverse=first in ("remove_lowest", "keep_highest"))
    return Record(
        "curves",
        [_row(name, found[name]) for name in names],
        (
            f"areas: mean change of the log-odds of {utilities.shape[2]} prompts up to "
            f"{curves.sizes[-1] / curves.num_examples:.0%} of {curves.num_examples:,} examples, "
            f"{settings.num_seeds} fine-tunes each; {_spread(found, settings)}",
            "removing the highest should lower, removing the lowest should not, keeping the highest should cost least",
        ),
        {name: {kind: _curve_json(curve) for kind, curve in found[name].items()} for name in names},
    ).save(config, scores.features.digest())


def retrained(
    config: RunConfig,
    members: Bool[np.ndarray, "m n"],
    seeds: range,
    progress: Progress = silent,
    tokenised: EncodedSet | None = None,
) -> Float[np.ndarray, "s m q"]:
    """Return the log-odds of the validation prompts under sub-models, from the run's table of chosen subsets.

    Args:
        config: the run.
        members: the subsets.
        seeds: of training.
        progress: told of sub-models done.
        tokenised: the training examples, where they are tokenised already.

    Raises:
        As `curves_of_run`.
    """
    examples, queries, identity = game_inputs(config, tokenised)
    loaded: list[RetrainingGame] = []

    def utility(subset: Bool[np.ndarray, "1 n"], seed: int) -> Float[np.ndarray, "1 q"]:
        if not loaded:  # nothing to train needs no model
            loaded.append(load_game(config, examples, queries))
        return loaded[0].worth(subset, seed)

    with locked(config.layout.path("retraining")):
        path = config.layout.path("retraining", "chosen.zarr")
        table = ChosenSubsets(path, members.shape[1], len(queries.encoded), identity)
        return table.worth(members, seeds, utility, progress)


def _row(name: str, curves: Mapping[CurveKind, Curve]) -> Row:
    row: Row = {"method": name}
    for kind, curve in curves.items():
        row |= {kind: curve.area, f"{kind}_low": curve.area_low, f"{kind}_high": curve.area_high}
    return row


def _spread(found: Mapping[str, Mapping[CurveKind, Curve]], settings: EvaluateConfig) -> str:
    """Say how to read the intervals."""
    seeds = "prompts and seeds" if settings.num_seeds > 1 else "prompts"
    return f"intervals resample {seeds}, and rankings of {' and '.join(n for n in BY_CHANCE if n in found)}"


def _curve_json(curve: Curve) -> dict[str, list[float]]:
    names = ("fractions", "change", "low", "high")
    return {name: [round(float(value), 6) for value in getattr(curve, name)] for name in names}
