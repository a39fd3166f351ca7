"""Scores of every training example for every validation prompt: by the methods of a run, and by trivial baselines.

A score is a number a method gives to the pair; larger means that training on the example raises the probability of the
prompt's answer. Baselines know neither gradients nor the model's training:

    random      standard normal
    size        1: says only how large a subset is
    loss        minus the stored loss of the example, the same for all prompts
    tfidf       cosine of word tf-idf vectors of prompt and completion
    bm25        Okapi BM25 of the query's words in the example's text (Robertson and Zaragoza 2009; k1 1.5, b .75)
    embedding   cosine of mean last hidden states of the base model

With label words the texts are prompts alone, and a similarity counts positive for an example of the query's label and
negative for one of another: what a label says is not in its words.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float
from sklearn.feature_extraction.text import CountVectorizer

from llmattrib.append import require_data
from llmattrib.config import RunConfig
from llmattrib.coordinates import Transform
from llmattrib.data import Example, load_examples, load_validation_examples
from llmattrib.encoding import Encoded, EncodedSet, collate, length_batches
from llmattrib.errors import MethodError
from llmattrib.evaluate.retrieval import WORD, have_words, tfidf_scores
from llmattrib.extraction import batch_memory, encode_examples
from llmattrib.progress import Progress, silent
from llmattrib.query import Run, answered_slots, in_slots
from llmattrib.reader import FeatureReader, current_representers
from llmattrib.rng import stream
from llmattrib.scorers.gradient import unit_rows
from llmattrib.scorers.spectral import Spectral, relative_rate
from llmattrib.sections import Method, ReduceConfig
from llmattrib.settings import resolve
from llmattrib.store import RowStore
from llmattrib.train import encode_without_weights
from llmattrib.values.validation import Validation, load_validation
from llmattrib.words import METHOD as WORDS

Baseline = Literal["random", "size", "loss", "tfidf", "bm25", "embedding"]
BASELINES: tuple[Baseline, ...] = ("random", "size", "loss", "tfidf", "bm25", "embedding")


def method_scores(run: Run, method: Method, validation: Validation) -> Float[np.ndarray, "q n"]:
    """Return the inner products of the representers of a method with the validation features; exact for `tracin_we`.

    Raises:
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: representers are missing, unfinished or outdated.
    """
    if method == WORDS:
        return run.word_values(validation_examples(run))
    return scores_of_representers(run.config, method, validation)


def scores_of_representers(config: RunConfig, method: Method, validation: Validation) -> Float[np.ndarray, "q n"]:
    """Return the same of the representers in the directory of a config, whose features may be a part of a run's.

    Raises:
        StoreNotFoundError, IncompleteStoreError, StaleIndexError: as `method_scores`.
    """
    features = RowStore.open(config.layout.features)
    store = current_representers(config, method, features)
    output = str(features.manifest.fingerprint["features"]["output"])
    slots = answered_slots(validation.labels, output)
    rows = Transform.of(store)(validation.phi)
    queries = in_slots(rows, slots).reshape(len(rows), -1).astype(np.float64)
    return np.concatenate([queries @ block.reshape(len(block), -1).T for _, block in store.blocks()], axis=1)


def spectral_scores(
    reader: FeatureReader, queries: Float[np.ndarray, "q p"], steps: Sequence[int], rate: float
) -> tuple[float, dict[int, Float[np.ndarray, "q n"]]]:
    """Return the T-step influence of gradient descent at an absolute rate, for several T, without storing it.

    Args:
        reader: of features of output loss, log_odds or margin.
        queries: features of the prompts.
        steps: each T.
        rate: of a step on the mean loss.

    Returns:
        The rate of `spectral(T,rate)` that this is, and the scores of each T.

    Raises:
        MethodError: the features are of another output, or such steps diverge.
    """
    if reader.output not in ("loss", "log_odds", "margin"):
        raise MethodError(
            f"the features are of output {reader.output}, whose gradients are not those of a loss",
            expected="features.output loss, log_odds or margin",
            fix="build features of one of these to judge them by further training",
        )
    rows, dim = reader.manifest.num_rows, reader.manifest.dim
    settings = resolve(ReduceConfig(), "spectral(1,1)", reader.output, False, rows, dim)
    features = reader.curved(settings)
    relative = relative_rate(features, rate)
    found = {}
    for num_steps in steps:
        scorer = Spectral(num_steps, relative, weighted=reader.output != "loss")
        state, parts = scorer.init(features), []
        for start, block in reader.store.blocks():
            log_odds = reader.store.column("log_odds", start, start + len(block))
            parts.append(queries.astype(np.float64) @ scorer.compute(state, block[:, 0], log_odds).T)
        found[num_steps] = np.concatenate(parts, axis=1)
    return relative, found


def baseline_scores(run: Run, baseline: Baseline) -> Float[np.ndarray, "q n"]:
    """Return the scores of a baseline.

    Raises:
        ConfigError: `values.data` is not set.
        DataError: the validation examples cannot be used.
    """
    config, examples, queries = run.config, run.examples, validation_examples(run)
    if baseline == "random":
        return stream(config.seed, "evaluate", "random").standard_normal((len(queries), len(examples)))
    if baseline == "size":
        return np.ones((len(queries), len(examples)))
    if baseline == "loss":
        losses = RowStore.open(config.layout.features).column("loss").astype(np.float64)
        return np.tile(-losses, (len(queries), 1))
    has_labels = bool(config.data.label_words)
    train, asked = _texts(examples, has_labels), _texts(queries, has_labels)
    if baseline == "tfidf":
        found = tfidf_scores(train, asked)
    elif baseline == "bm25":
        found = bm25_scores(train, asked)
    else:
        found = _embedding_scores(run, examples, queries)
    return np.where(_agreement(examples, queries), found, -found) if has_labels else found


def validation_examples(run: Run) -> Sequence[Example]:
    """Return the validation examples that have features, in their order.

    Raises:
        ConfigError, DataError: as `baseline_scores`.
    """
    queries = load_validation_examples(run.config.data, run.config.values)
    if run.config.data.overlong == "skip":
        return encode_examples(run.config, run.extractor, queries).examples
    return queries


class RunScores:
    """Scores of the methods of a run and of the baselines; each is computed once, when it is first asked for.

    Attributes:
        run: the run.
        config: of it.

    Args:
        config: a run whose representers are complete.
        progress: told of validation examples whose features are computed.

    Raises:
        StoreNotFoundError, IncompleteStoreError: the features are missing or not finished.
    """

    def __init__(self, config: RunConfig, progress: Progress = silent) -> None:
        self.config, self.run, self._progress = config, Run(config), progress
        self._found: dict[str, Float[np.ndarray, "q n"]] = {}

    @cached_property
    def validation(self) -> Validation:
        """Features of the validation set."""
        return load_validation(self.run, self._progress)

    @cached_property
    def queries(self) -> Sequence[Example]:
        """The validation examples."""
        return validation_examples(self.run)

    @property
    def examples(self) -> Sequence[Example]:
        """The training examples."""
        return self.run.examples

    @cached_property
    def features(self) -> RowStore:
        """The features of the training examples."""
        return RowStore.open(self.config.layout.features)

    @cached_property
    def training(self) -> EncodedSet:
        """The training examples as training reads them now, tokenised; of the features only after `require_training`.

        Raises:
            DataError, ModelError: they cannot be used.
        """
        return encode_without_weights(self.config, load_examples(self.config.data))

    def require_training(self) -> EncodedSet:
        """Return the training examples, which must be those of the features, row by row.

        Raises:
            FingerprintMismatchError: they are others; what is trained now cannot judge these features.
            DataError, ModelError: they cannot be used.
        """
        require_data(self.features, self.training, self.config.layout.examples)
        return self.training

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of reduce."""
        return self.config.reduce.methods

    def of(self, name: str) -> Float[np.ndarray, "q n"]:
        """Return the scores of a method or baseline.

        Raises:
            As `method_scores` and `baseline_scores`.
        """
        if name not in self._found:
            if name in BASELINES:
                self._found[name] = baseline_scores(self.run, name)
            else:
                self._found[name] = method_scores(self.run, name, self.validation)
        return self._found[name]

    def table(self, without: Sequence[str] = ()) -> dict[str, Float[np.ndarray, "q n"]]:
        """Return the scores of all methods, then of all baselines but some."""
        return {name: self.of(name) for name in (*self.methods, *BASELINES) if name not in without}


def bm25_scores(train_texts: Sequence[str], query_texts: Sequence[str]) -> Float[np.ndarray, "q n"]:
    """Score training texts for each query text by Okapi BM25.

    Args:
        train_texts: the documents.
        query_texts: their words are the queries; a word asked twice counts twice.

    Returns:
        Scores; zeros where the training texts hold no word.
    """
    if not have_words(train_texts):
        return np.zeros((len(query_texts), len(train_texts)))
    vectorizer = CountVectorizer(token_pattern=WORD)
    counts = vectorizer.fit_transform(train_texts).tocsr().astype(np.float64)
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    found_in = np.asarray((counts > 0).sum(axis=0)).ravel()
    rarity = np.log(1 + (len(train_texts) - found_in + 0.5) / (found_in + 0.5))
    rows, columns = counts.nonzero()
    k1, b = 1.5, 0.75  # how soon repeated words stop to count, and how much long documents are scaled down
    scale = k1 * (1 - b + b * lengths / lengths.mean())
    weights = rarity[columns] * counts.data * (k1 + 1) / (counts.data + scale[rows])
    documents = scipy.sparse.csr_matrix((weights, (rows, columns)), shape=counts.shape)
    return np.asarray((vectorizer.transform(query_texts) @ documents.T).todense(), np.float64)


def _texts(examples: Sequence[Example], prompts_only: bool) -> list[str]:
    return [
        example.prompt_text if prompts_only else f"{example.prompt_text} {example.completion}" for example in examples
    ]


def _agreement(examples: Sequence[Example], queries: Sequence[Example]) -> Bool[np.ndarray, "q n"]:
    train = np.array([example.completion.strip() for example in examples])
    return np.asarray(np.array([query.completion.strip() for query in queries])[:, None] == train[None, :])


def _embedding_scores(run: Run, examples: Sequence[Example], queries: Sequence[Example]) -> Float[np.ndarray, "q n"]:
    encoded = [encode_examples(run.config, run.extractor, rows).encoded for rows in (queries, examples)]
    asked, train = (unit_rows(_embed(run, rows)) for rows in encoded)
    return np.asarray(asked @ train.T)


@torch.no_grad()
def _embed(run: Run, encoded: Sequence[Encoded]) -> Float[np.ndarray, "m d"]:
    """Return the mean last hidden state of each text under the base model; with label words, of its prompt."""
    loaded, has_labels = run.extractor.loaded, bool(run.config.data.label_words)
    found: dict[int, Float[np.ndarray, " d"]] = {}
    for rows in length_batches(list(map(len, encoded)), run.config.features.tokens_per_batch):
        with batch_memory(run.config, len(rows)), loaded.base_only():
            batch = collate([encoded[row] for row in rows], loaded.pad_id).to(loaded.device)
            states = loaded.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
            ).hidden_states[-1]
            is_text = batch.attention_mask.bool() & ~batch.completion_mask if has_labels else batch.attention_mask
            mask = is_text[..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
        found.update(zip(rows, mean.double().cpu().numpy(), strict=True))
    return np.array([found[row] for row in range(len(encoded))])
