"""Shapley values by pyDVL's permutation sampling; runs in the environment of `make bench`.

    python pydvl_shapley.py GAME.npz OUT.npz NUM_PERMUTATIONS

GAME holds features [n, p], responses [n], query [p] and the absolute ridge. The utility is the prediction of
scikit-learn's kernel ridge regression (linear kernel) for the query. OUT holds values [n] and the CPU seconds.
"""

import sys
import time

import numpy as np
from pydvl.valuation import Dataset, MinUpdates, ModelUtility, ShapleyValuation
from pydvl.valuation.samplers import AntitheticPermutationSampler
from sklearn.kernel_ridge import KernelRidge


class Prediction:
    """The output for one query; nothing is predicted from nobody."""

    default = 0.0
    name = "prediction"
    range = (-np.inf, np.inf)

    def __init__(self, query):
        self.query = query[None]

    def __call__(self, model):
        """Predict."""
        return float(model.predict(self.query)[0])


def main():
    """Measure."""
    game = np.load(sys.argv[1])
    model = KernelRidge(alpha=float(game["ridge"]), kernel="linear")
    utility = ModelUtility(model, Prediction(game["query"]), catch_errors=False, clone_before_fit=False)
    sampler = AntitheticPermutationSampler(seed=0)
    n = len(game["features"])
    data = Dataset(game["features"], game["responses"])
    begin = time.process_time()
    valuation = ShapleyValuation(utility, sampler, is_done=MinUpdates(int(sys.argv[3])), progress=False)
    valuation.fit(data)
    seconds = time.process_time() - begin
    result = valuation.result.sort(key="index") if hasattr(valuation.result, "sort") else valuation.result
    values = np.empty(n)
    values[np.asarray(result.indices, int)] = result.values
    np.savez(sys.argv[2], values=values, seconds=seconds, updates=np.asarray(result.counts))


if __name__ == "__main__":
    main()
