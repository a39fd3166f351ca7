"""The kernel game of a run, with a validation set to measure its utility on.

    prediction       mean over prompts of the game's output for the right answer; linear, so one mean query serves
    log_likelihood   mean log-likelihood of the right label among the label words, in nats
    accuracy         share of prompts whose right label has the largest output, 1/k of k equal ones

Features of `logits` play one game for each class, and outputs are compared between classes. Features of an example's
own label play one game; with two label words its output v for the right answer is the margin between them, so the two
outputs are v/2 and -v/2 (labels one-hot minus 1/2 give the same). More label words need `logits`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from llmattrib.coordinates import Transform
from llmattrib.errors import MethodError
from llmattrib.estimators.permutation import Utility, accuracy, log_likelihood
from llmattrib.estimators.subset import Subset
from llmattrib.games.kernel import KernelGame
from llmattrib.games.kernel_subsets import KernelUtility
from llmattrib.query import answered_slots, in_slots
from llmattrib.reader import FeatureReader, choose_ridge
from llmattrib.settings import Settings
from llmattrib.values.validation import Validation

UtilityName = Literal["prediction", "log_likelihood", "accuracy"]
UTILITIES: tuple[UtilityName, ...] = ("prediction", "log_likelihood", "accuracy")


@dataclass(frozen=True)
class ValidationGame:
    """One kernel game for each output of the features.

    Attributes:
        games: of the same players.
        queries: [m, d] of each game, transformed and in its coordinates.
        labels: [m] of the validation examples, -1 without label words.
        settings: of reduce, that the games follow.
        ridge: relative.
        output: output function of the features.
        num_labels: number of label words.
        notes: what a reader of the values should know.
    """

    games: tuple[KernelGame, ...]
    queries: tuple[Float[np.ndarray, "m d"], ...]
    labels: Int[np.ndarray, " m"]
    settings: Settings
    ridge: float
    output: str
    num_labels: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, reader: FeatureReader, settings: Settings, validation: Validation) -> "ValidationGame":
        """Set up the games.

        Args:
            reader: the training features.
            settings: resolved settings of a semivalue.
            validation: the validation features.

        Raises:
            MethodError: features do not fit the memory, or are all zero.
        """
        ridge, _, notes = choose_ridge(settings, reader)
        assert ridge is not None
        rows = Transform(reader.center(settings), settings.normalize, settings.members)(validation.phi)
        games, queries = [], []
        for output in range(reader.manifest.num_outputs):
            games.append(reader.game(settings, ridge, output))
            queries.append(reader.features(settings, output).space.project(rows[:, output].astype(np.float64)))
        num_labels = len(reader.manifest.fingerprint["encoding"]["label_words"])
        return cls(
            tuple(games), tuple(queries), validation.labels, settings, ridge, reader.output, num_labels, tuple(notes)
        )

    @property
    def num_players(self) -> int:
        """Training examples n."""
        return len(self.games[0].features)

    @property
    def utilities(self) -> tuple[UtilityName, ...]:
        """Utilities that these features define."""
        return UTILITIES if self._why_not() is None else UTILITIES[:1]

    def require(self, utility: UtilityName) -> None:
        """Raise unless these features define a utility.

        Raises:
            MethodError: they do not.
        """
        reason = self._why_not()
        if utility != "prediction" and reason is not None:
            raise MethodError(
                f"values.utility={utility} compares labels, and {reason}",
                expected="label words with features of output logits, or two label words with uncentred margins",
                fix="set values.utility=prediction, or build features of output logits",
            )

    def _why_not(self) -> str | None:
        """Return what keeps labels from being compared."""
        if self.num_labels == 0:
            return "there are no data.label_words"
        if self.output == "logits":
            return None
        if self.output == "pntk":
            return "features of output pntk do not know the label"
        if self.num_labels > 2:
            return f"features of output {self.output} know the own label only, of {self.num_labels}"
        if self.settings.center:
            return "centred features of the own label are no margins (reduce.center)"
        if self.output == "loss" and not self.settings.normalize:
            return "features of output loss are margins only when scaled to unit norm (reduce.normalize)"
        return None

    def utility(self, name: UtilityName) -> Utility:
        """Return what predictions [k, m, c] of subsets are worth, [k, 1], the mean over prompts.

        Raises:
            MethodError: these features do not define it.
        """
        self.require(name)
        is_by_class = self.output == "logits"
        slots = answered_slots(self.labels, self.output)
        if name == "prediction":
            return lambda predictions: predictions[:, np.arange(len(slots)), slots].mean(axis=1, keepdims=True)
        measure = (accuracy if name == "accuracy" else log_likelihood)(slots)  # the pair's right answer is its first

        def utility(predictions: Float[np.ndarray, "k m c"]) -> Float[np.ndarray, "k 1"]:
            scores = predictions if is_by_class else np.concatenate([predictions / 2, -predictions / 2], axis=2)
            return np.asarray(measure(scores).mean(axis=1, keepdims=True))

        return utility

    def predictions(self, members: Bool[np.ndarray, "k n"]) -> Float[np.ndarray, "k m c"]:
        """Return the outputs of subsets for all prompts.

        Raises:
            MethodError: the kernel matrix does not fit the memory.
        """
        parts = [solve(members).reshape(len(members), len(self.labels), 1) for solve in self._solvers]
        return np.concatenate(parts, axis=2)

    def worth(self, members: Bool[np.ndarray, "k n"], names: tuple[UtilityName, ...]) -> Float[np.ndarray, "k u"]:
        """Return utilities of subsets."""
        predictions = self.predictions(members)
        return np.concatenate([self.utility(name)(predictions) for name in names], axis=1)

    def ends(self, name: UtilityName) -> tuple[float, float]:
        """Return the utility of nobody and of everybody."""
        members = np.repeat([[False], [True]], self.num_players, axis=1)
        empty, full = self.worth(members, (name,))[:, 0].tolist()
        return empty, full

    def samples(self, estimator: Subset) -> Iterator[Float[np.ndarray, " n"]]:
        """Yield a sample of every player's value in the mean prediction for each draw, unbiased."""
        for parts in zip(
            *(estimator.samples(game, query) for game, query in zip(self.games, self._mean_queries, strict=True)),
            strict=True,
        ):
            yield sum((part[0, :, 0] for part in parts), np.zeros(self.num_players))

    @cached_property
    def _solvers(self) -> tuple[KernelUtility, ...]:
        return tuple(KernelUtility(game, queries) for game, queries in zip(self.games, self.queries, strict=True))

    @cached_property
    def _mean_queries(self) -> tuple[Float[np.ndarray, "1 d"], ...]:
        slots = answered_slots(self.labels, self.output)
        return tuple(
            np.where((slots == output)[:, None], queries, 0.0).mean(axis=0, keepdims=True)
            for output, queries in enumerate(self.queries)
        )


def mean_query(validation: Validation, transform: Transform, output: str) -> Float[np.ndarray, "c p"]:
    """Return the mean over prompts of what representers are multiplied with."""
    slots = answered_slots(validation.labels, output)
    return np.asarray(in_slots(transform(validation.phi), slots).mean(axis=0, dtype=np.float64))
