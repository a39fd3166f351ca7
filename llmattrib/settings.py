"""Reduce settings of one method, with every `auto` resolved, and the responses of the kernel game that they may name.

Responses: features of `loss`, `log_odds` and `margin` are gradients of an example's own label, so the code of the right
label, +1, is in their sign already and `labels` means 1 for them, as `unit` does. Features of `logits` have one row per
class and play one game per class with one-hot minus 1/c. What `auto` means and why: docs/methods.md section 5.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from llmattrib.config import digest
from llmattrib.errors import MethodError
from llmattrib.estimators.mean_field import LARGE
from llmattrib.methods import MethodName
from llmattrib.sections import Method, ReduceConfig

Response = Literal["labels", "unit", "residual"]
Form = Literal["pairs", "total_gradient", "streamed", "cavity"]
STREAMED, STREAMED_ROWS_A_DIM = 20_000, 16
"""`auto` streams above so many examples, and above so many for each dimension, where n^2 p passes 40 n p^2 FLOPs."""
WHITENED_RIDGE = 10.0
"""Of semivalues on whitened features, with and without label words: their rows are nearly orthogonal."""


@dataclass(frozen=True)
class Settings:
    """Reduce settings of one method with every `auto` resolved; None where the method has no such setting.

    `members` are the columns of each of several adapters where rows are scaled, each adapter's by itself; else none.
    """

    method: Method
    center: bool
    normalize: bool
    members: tuple[int, ...]
    dtype: Literal["float16", "float32"]
    ridge: float | Literal["loo"] | None
    response: Response | None
    form: Form | None
    sum_rule_tolerance: float | None
    certificate_draws: int | None
    iterations: int | None
    ensemble: Literal["members"] | None

    def digest(self) -> str:
        """Return the hash that representers of these settings are known by."""
        return digest(asdict(self))

    @classmethod
    def stored(cls, info: Mapping[str, Any]) -> "Settings":
        """Return what a representer store was made with, its ridge chosen, from `info` of its manifest."""
        return cls(**{field.name: info[field.name] for field in fields(cls)} | {"members": tuple(info["members"])})


def resolve(
    config: ReduceConfig,
    method: Method,
    output: str,
    has_labels: bool,
    num_rows: int,
    dim: int,
    is_whitened: bool = False,
    members: tuple[int, ...] = (),
) -> Settings:
    """Fill in what a method's `auto` settings mean.

    Args:
        config: the reduce section.
        method: which method.
        output: output function of the features.
        has_labels: whether the data has label words.
        num_rows: n.
        dim: p.
        is_whitened: whether a preconditioner has taken the shared directions out of the features.
        members: columns of each of several adapters; none for one.

    Raises:
        MethodError: the method or its response cannot use these features.
    """
    kind, is_semivalue = MethodName.parse(method).kind, MethodName.parse(method).is_semivalue
    _check_method(config, method, kind, output, is_semivalue)
    ridge: float | Literal["loo"] | None = None
    if kind not in ("grad_dot", "grad_cos", "spectral", "tracin_we"):
        ridge = _auto_ridge(is_semivalue, has_labels, is_whitened) if config.ridge == "auto" else config.ridge
    if method == "datainf" and ridge == "loo":
        raise MethodError(
            "leave-one-out chooses the ridge of a Gram matrix, and datainf has a damping for each block",
            expected="reduce.ridge=auto, which is the 0.1 of its paper, or a number",
            fix="reduce datainf by itself, or set reduce.ridge",
        )
    response: Response | None = None
    if is_semivalue or ridge == "loo":
        own_labels = has_labels and output != "pntk"  # the gradient of a sum over classes knows no label
        response = ("labels" if own_labels else "unit") if config.response == "auto" else config.response
        _check_response(response, output, has_labels)
    form: Form = _form(num_rows, dim) if config.form == "auto" else config.form
    normalize = method == "grad_cos" or (is_semivalue if config.normalize == "auto" else config.normalize)
    return Settings(
        method=method,
        center=(is_semivalue and not has_labels and not is_whitened) if config.center == "auto" else config.center,
        normalize=normalize,
        members=members if normalize else (),
        dtype=config.dtype,
        ridge=ridge,
        response=response,
        form=form if is_semivalue else None,
        sum_rule_tolerance=config.sum_rule_tolerance if is_semivalue else None,
        certificate_draws=config.certificate_draws if is_semivalue else None,
        iterations=config.iterations if kind in ("influence_cg", "influence_lissa") else None,
        ensemble=_ensemble(config, kind, is_semivalue),
    )


def _auto_ridge(is_semivalue: bool, has_labels: bool, is_whitened: bool) -> float | Literal["loo"]:
    if is_semivalue and is_whitened:
        return WHITENED_RIDGE
    return "loo" if is_semivalue and has_labels else 0.1


def _ensemble(config: ReduceConfig, kind: str, is_semivalue: bool) -> Literal["members"] | None:
    """Return `members` where it makes a difference to a method."""
    if config.ensemble == "kernel" or is_semivalue or kind in ("grad_dot", "grad_cos", "tracin_we"):
        return None
    if config.normalize is True:
        raise MethodError(
            "reduce.ensemble=members and reduce.normalize=true: rows of all members together would be scaled",
            expected="one of the two",
            fix="set reduce.normalize=auto, or reduce.ensemble=kernel",
        )
    return "members"


def _form(num_rows: int, dim: int) -> Form:
    if num_rows > max(STREAMED, STREAMED_ROWS_A_DIM * dim):
        return "streamed"
    return "pairs" if num_rows <= LARGE else "total_gradient"


def _check_method(config: ReduceConfig, method: Method, kind: str, output: str, is_semivalue: bool) -> None:
    if output == "logits" and not is_semivalue:
        raise MethodError(
            f"{method} needs one gradient per example, and features of output logits have one per class",
            expected="features.output loss, log_odds, margin or pntk",
            fix="set reduce.methods=[shapley] or other semivalues, or build features of output margin",
        )
    if method == "tracin_we" and (config.center is True or config.normalize is True):
        raise MethodError(
            "tracin_we is of word gradients as they are: no mean is taken off and no length is scaled",
            expected="reduce.center and reduce.normalize auto or false",
            fix="reduce tracin_we by itself, or set them to auto",
        )
    if kind == "spectral" and config.normalize is True:
        raise MethodError(
            f"{method} is what descent along gradients as they are makes of an example, and rows of unit norm are none",
            expected="reduce.normalize auto or false",
            fix="reduce spectral by itself, or set reduce.normalize=auto",
        )


def _check_response(response: Response, output: str, has_labels: bool) -> None:
    if response == "labels" and not has_labels:
        raise MethodError(
            "reduce.response=labels needs label words, and data.label_words is empty",
            expected="unit or residual for generation",
            fix="set reduce.response=unit, or name data.label_words and build again",
        )
    if response == "labels" and output == "pntk":
        raise MethodError(
            "features of output pntk are the same for every label, so labels cannot be their responses",
            expected="features.output logits, margin, log_odds or loss for responses that are labels",
            fix="build features of one of these, or set reduce.response=unit",
        )
    if response != "labels" and output == "logits":
        raise MethodError(
            f"reduce.response={response} gives every class the same response",
            expected="labels for features of output logits",
            fix="set reduce.response=labels",
        )
