"""Names of methods: what may be written, its one canonical spelling, and the file name that goes with it.

    shapley, banzhaf, leave_one_out, influence, influence_cg, influence_lissa, trak, datainf, grad_dot, grad_cos,
    tracin_we
    spectral(T,rate)        T steps of gradient descent, T whole; the rate is relative, see scorers/spectral.py
    beta_shapley(a,b)       a, b >= 1; a > b favours small subsets
    weighted_banzhaf(q)     every other example is there with probability q
    ame, ame(q,q,...)       the mean over these q; plain `ame` is ame(.2,.4,.6,.8)

Numbers are spelled as Python's shortest decimals without a trailing `.0`, points of `ame` ascending, so equal methods
have equal names, and equal files. The module knows nothing of what a method computes.
"""

from dataclasses import dataclass

GRADIENT_METHODS = (
    "influence",
    "influence_cg",
    "influence_lissa",
    "trak",
    "datainf",
    "grad_dot",
    "grad_cos",
    "tracin_we",
)
GRADIENT_FORMS = (*GRADIENT_METHODS, "spectral(T,rate)")
SEMIVALUE_FORMS = (
    "shapley",
    "banzhaf",
    "leave_one_out",
    "beta_shapley(a,b)",
    "weighted_banzhaf(q)",
    "ame",
    "ame(q,...)",
)
AME_POINTS = (0.2, 0.4, 0.6, 0.8)
MAX_LENGTH = 128
_NUM_ARGUMENTS = {
    "beta_shapley": 2,
    "spectral": 2,
    "weighted_banzhaf": 1,
    "banzhaf": 0,
    "leave_one_out": 0,
    "shapley": 0,
}


@dataclass(frozen=True)
class MethodName:
    """A method and its numbers.

    Attributes:
        kind: the word before the bracket.
        arguments: what the brackets hold; empty without brackets, save for `ame`.
    """

    kind: str
    arguments: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "MethodName":
        """Read a name in any of its spellings.

        Example:
            >>> str(MethodName.parse("beta_shapley( 4.0, 1 )"))
            'beta_shapley(4,1)'

        Raises:
            ValueError: it is none of the known forms, or a number is out of range.
        """
        kind, bracket, inside = "".join(text.split()).partition("(")
        if kind not in (*GRADIENT_METHODS, "ame", *_NUM_ARGUMENTS) or bool(bracket) != inside.endswith(")"):
            raise ValueError(_unknown(text))
        try:
            arguments = tuple(float(number) for number in inside[:-1].split(",")) if bracket else ()
        except ValueError:
            raise ValueError(_unknown(text)) from None
        if kind == "ame":
            arguments = tuple(sorted(arguments)) if bracket else AME_POINTS
        elif len(arguments) != _NUM_ARGUMENTS.get(kind, 0) or bool(bracket) != bool(arguments):
            raise ValueError(_unknown(text))
        name = cls(kind, arguments)
        name._check(text)
        return name

    def _check(self, text: str) -> None:
        if self.kind == "beta_shapley":
            if not all(1 <= number < float("inf") for number in self.arguments):
                raise ValueError(f"{text!r} has a parameter below 1 or infinite; its density could not be integrated")
        elif self.kind == "spectral":
            steps, rate = self.arguments
            if not (1 <= steps < float("inf") and steps == int(steps) and 0 < rate < float("inf")):
                raise ValueError(f"{text!r} needs a whole number of steps, 1 or more, and a positive rate")
        elif not all(0 <= number <= 1 for number in self.arguments):
            raise ValueError(f"{text!r} has a probability outside [0, 1]")
        elif len(set(self.arguments)) < len(self.arguments):
            raise ValueError(f"{text!r} names a probability twice")
        if len(str(self)) > MAX_LENGTH:
            raise ValueError(f"{text!r} is longer than {MAX_LENGTH} characters, which a file name must hold")

    def __str__(self) -> str:
        if not self.arguments or (self.kind == "ame" and self.arguments == AME_POINTS):
            return self.kind
        return f"{self.kind}({','.join(repr(float(number)).removesuffix('.0') for number in self.arguments)})"

    @property
    def is_semivalue(self) -> bool:
        """Whether it is a semivalue of the kernel game."""
        return self.kind not in (*GRADIENT_METHODS, "spectral")

    @property
    def file_name(self) -> str:
        """The canonical spelling without brackets and commas: beta_shapley_4_1."""
        return str(self).replace("(", "_").replace(",", "_").rstrip(")")


def canonical(text: str) -> str:
    """Return the one spelling of a method.

    Raises:
        ValueError: there is no such method.
    """
    return str(MethodName.parse(text))


def _unknown(text: str) -> str:
    known = ", ".join((*SEMIVALUE_FORMS, *GRADIENT_FORMS))
    hint = "; in a [...] list quote a name with commas" if text.count("(") != text.count(")") else ""
    return f"{text!r} is no method; known are {known}{hint}"
