"""Linear datamodelling score of bergson on the two truth tasks: same model, adapters, tokens, labels and sub-models.

    python -m benchmarks.peers.bergson_lds [--tasks sms facts] [--points init early trained]

bergson reads our tokens and our labels (-100 outside the completion), so it scores exactly the prompts and completions
that `benchmarks.lds` does, and its gradients are those of the A and B of the very adapters: at `init` one with B = 0.

    bergson                  `bergson build` of the prompts and `bergson score`, as they are: inner products of whole
                             gradients
    bergson unit             the same of gradients of unit length
    bergson trackstar        its pipeline: 16 x 16 projections a module, the autocorrelation of gradients inverted
    bergson trackstar unit   the same of unit length, preconditioned on both sides
    bergson ekfac            its pipeline with eigenvalue-corrected Kronecker factors
    bergson trak             its pipeline: log-odds, one projection of all entries to 16, 32, 64 or 128 dimensions (of
                             160 or 200 rows), whichever scores best

All else at its defaults, except that at `init` the modules of A, whose gradients vanish there, are left out: with them
its preconditioners divide by zero. What cannot be computed is printed with its error, and has no row. Adds to
benchmarks/results/lds.json in the format of `benchmarks.lds`, and renders docs/choosing.md. In the environment of
`make bench`.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bergson.cli.commands import Build, Ekfac, Score, Trackstar, Trak
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
    TrakConfig,
)
from bergson.data import load_scores

from benchmarks.lds import POINTS, figures, merge, name_of, truth_of, variant, write_docs
from benchmarks.peers.bergson_build import dataset
from benchmarks.truth.margins import TINY, load
from llmattrib.config import RunConfig
from llmattrib.data import Example, load_examples, load_validation_examples
from llmattrib.evaluate.lds import lds
from llmattrib.model import load_model, save_adapter
from llmattrib.train import encode_without_weights

TRAK_DIMS = (16, 32, 64, 128)


class Work:
    """One linearisation point of one task, as files that bergson reads.

    Attributes:
        folder: where its runs go.
        adapter: PEFT folder.
        base: folder of the base model and tokenizer.
        train, queries: datasets of tokens and labels.
    """

    def __init__(self, config: RunConfig) -> None:
        self.folder = Path(config.run_dir) / "bergson"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.base = config.model.name
        self.left_out = "*lora_A*" if config.features.linearisation == "init" else None
        self.adapter = config.model.adapters[0] if config.model.adapters else self._untrained(config)
        self.train = self._data("train", config, load_examples(config.data))
        self.queries = self._data("queries", config, load_validation_examples(config.data, config.values))

    def _untrained(self, config: RunConfig) -> str:
        loaded = load_model(config.model)
        save_adapter(loaded, self.folder / "adapter", self.base)
        return str(self.folder / "adapter")

    def _data(self, name: str, config: RunConfig, examples: Sequence[Example]) -> str:
        path = self.folder / name
        dataset(encode_without_weights(config, examples).encoded).save_to_disk(str(path))
        return str(path)

    def index(self, name: str, data: str, kind: type[IndexConfig] = IndexConfig, **settings: object) -> IndexConfig:
        """Return the settings of one run."""
        return kind(
            run_path=str(self.folder / name),
            model=self.adapter,
            tokenizer=self.base,
            data=DataConfig(dataset=data),
            token_batch_size=256,
            filter_modules=self.left_out,
            **settings,
        )

    def query_set(self) -> QuerySetConfig:
        """Return the prompts, a score for each."""
        return QuerySetConfig(dataset=self.queries)


def inner_products(work: Work, unit: bool) -> Path:
    """Run `bergson build` and `bergson score`."""
    name = "unit" if unit else "dot"
    asked = work.index(f"{name}_queries", work.queries)
    Build(asked, PreprocessConfig(unit_normalize=unit)).execute()
    scored = work.index(name, work.train)
    Score(ScoreConfig(query_path=asked.run_path), scored, PreprocessConfig(unit_normalize=unit)).execute()
    return Path(scored.run_path)


def trackstar(work: Work, unit: bool) -> Path:
    """Run `bergson trackstar`."""
    index = work.index(f"trackstar{'_unit' if unit else ''}", work.train, TrackstarIndexConfig)
    settings = TrackstarConfig(query=work.query_set(), preprocess_cfg=PreprocessConfig(unit_normalize=unit))
    Trackstar(index, settings).execute()
    return Path(index.run_path) / "scores"


def ekfac(work: Work) -> Path:
    """Run `bergson ekfac`."""
    index = work.index("ekfac", work.train)
    hessian = HessianConfig(method="kfac", ev_correction=True)
    Ekfac(index, hessian, ScoreConfig(), PreprocessConfig(), HessianPipelineConfig(query=work.query_set())).execute()
    return Path(index.run_path) / "scores"


def trak(work: Work, dim: int) -> Path:
    """Run `bergson trak`."""
    settings = {"projection_dim": dim, "projection_target": "global", "loss_fn": "log_odds"}
    index = work.index(f"trak{dim}", work.train, TrackstarIndexConfig, **settings)
    Trak(index, TrakConfig(query=work.query_set())).execute()
    return Path(index.run_path) / "scores"


METHODS: dict[str, tuple[Callable[[Work], Path], ...]] = {
    "bergson": (lambda work: inner_products(work, False),),
    "bergson unit": (lambda work: inner_products(work, True),),
    "bergson trackstar": (lambda work: trackstar(work, False),),
    "bergson trackstar unit": (lambda work: trackstar(work, True),),
    "bergson ekfac": (ekfac,),
    "bergson trak": tuple(partial(trak, dim=dim) for dim in TRAK_DIMS),
}
"""The runs of each row; of several the best score counts."""


def scores_in(folder: Path) -> np.ndarray:
    """Read scores [q, n]; larger means that training on the example raises the probability of the answer."""
    scores = np.asarray(load_scores(folder)[:], dtype=np.float64).T
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).mean():.0%} of its scores are not finite")
    return scores


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TINY, default=TINY)
    parser.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    options = parser.parse_args()
    for task in options.tasks:
        rows, margins = load(task)
        found = truth_of(rows, margins)
        for point in options.points:
            work = Work(variant(task, point, 1))
            methods: dict[str, Any] = {}
            for method, runs in METHODS.items():
                name = name_of(method, point, 1)
                for run in runs:
                    try:
                        score = figures(lds(scores_in(run(work)), rows))
                    except Exception as error:
                        print(task, name, f"not computed: {type(error).__name__}: {error}", flush=True)
                        continue
                    print(task, name, score, flush=True)
                    methods[name] = max(methods.get(name, score), score, key=lambda found: found["beyond_size"])
            merge(task, found, methods)
            shutil.rmtree(work.folder)
    write_docs()


if __name__ == "__main__":
    main()
