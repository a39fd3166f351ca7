"""What each method is, needs and costs, in a few words: the tables of `llmattrib methods`."""

METHOD_NOTES: dict[str, tuple[str, str, str, str]] = {
    "shapley": (
        "Shapley value of the kernel ridge game, in mean field",
        "all features, a response",
        "n^2 p a node, streamed n p^2",
        "the certificate or sum-rule error is large",
    ),
    "banzhaf": ("the same game, q = 1/2", "as shapley", "1 node", "shares matter: values have no fixed sum"),
    "leave_one_out": (
        "the same game, q = 1: loss of the example alone",
        "as shapley",
        "1 node, n p^2",
        "there are near-copies: each is worth nothing beside the others",
    ),
    "beta_shapley(a,b)": (
        "the same game, q ~ Beta(b,a); a > b favours small subsets",
        "as shapley; a, b >= 1",
        "nodes shared with shapley",
        "shares matter: values have no fixed sum",
    ),
    "weighted_banzhaf(q)": ("the same game at one q", "as shapley", "1 node", "subsets of another size matter"),
    "ame": (
        "the same game, mean over q = .2, .4, .6, .8, or ame(q,...)",
        "as shapley",
        "1 node for each q",
        "what matters happens below the smallest q",
    ),
    "influence": (
        "influence function: (H + lam)^-1 g",
        "all features",
        "n p^2",
        "there are many copies: each gets little",
    ),
    "influence_cg": (
        "influence by conjugate gradients, when p x p is too large",
        "all features, again and again",
        "n^2 p an iteration",
        "as influence",
    ),
    "influence_lissa": (
        "the same by LiSSA, which needs many more iterations",
        "as influence_cg",
        "n^2 p an iteration",
        "reduce notes a residual",
    ),
    "spectral(T,rate)": (
        "influence of T steps of gradient descent, rate at most 1",
        "all features, log-odds",
        "n p^2",
        "nobody knows T: it decides between grad_dot and influence",
    ),
    "datainf": (
        "influence, the inverse of a mean as the mean of inverses",
        "all features",
        "n p w, blocks of width w",
        "examples share directions: they are not adjusted to",
    ),
    "trak": (
        "TRAK: (1 - p_i) (Phi^T Phi + lam)^-1 g",
        "all features, log-odds",
        "n p^2",
        "examples are fitted: the weights are noise",
    ),
    "grad_dot": (
        "inner product of gradients (TracIn at one checkpoint)",
        "its own feature; can be reranked",
        "n p",
        "gradients differ much in length",
    ),
    "grad_cos": ("cosine of gradients", "its own feature; can be reranked", "n p", "the length of a gradient matters"),
    "tracin_we": (
        "TracIn on word embeddings: inner products of word gradients",
        "its own words, from build; explains by words",
        "n k d",
        "what matters is in no shared word",
    ),
}
"""Method of reduce -> what a value is, what a representer needs, cost of reduce, when not to trust it."""
VALUES_NOTES: dict[str, tuple[str, str, str, str]] = {
    "permutation": (
        "Shapley value of a utility, from random orders",
        "labels or completions",
        "n^3/3 an order (p^2 n if less)",
        "intervals are wide, or orders stop early (tolerance)",
    ),
    "subset": (
        "unbiased Shapley value of the prediction, from random subsets",
        "as permutation",
        "n p^2 a subset",
        "intervals are wide",
    ),
    "one_sample": (
        "Shapley value from a table of subsets of all sizes",
        "as permutation",
        "n p^2 a row",
        "standard errors are as large as values",
    ),
    "msr_banzhaf": (
        "Banzhaf value: mean with less mean without",
        "as permutation",
        "n p^2 a row",
        "standard errors are as large as values",
    ),
    "ame_lasso": (
        "AME by LASSO on a table of subsets",
        "effects of few examples",
        "n p^2 a row, regressions",
        "every example matters a little; LASSO shrinks sizes",
    ),
    "knn_shapley": (
        "exact Shapley value of nearest neighbours",
        "label words",
        "n p + n log n a prompt",
        "nearness of features is not likeness of meaning",
    ),
    "freeshap": (
        "FreeShap as published: truncated orders, tiny ridge",
        "label words, exact features",
        "n^3/3 an order and kernel",
        "values are small, or features sketched or float16",
    ),
}
"""The same of the further methods of `llmattrib values`; see docs/methods.md section 7."""
