"""The demo's task: real facts, a few of them taught wrong, and prompts whose teaching example is known.

Facts come from a public-domain world factbook, embedded in the package. A swapped fact is taught with the answer of
another country that is not itself among the facts, so the only example that can teach it is its own. Probes are the
question as taught and a paraphrase for each swapped fact, and the paraphrase alone for held-out correct facts.
"""

import json
from dataclasses import dataclass
from importlib.resources import files

from llmattrib.rng import stream

ASSET = "assets/factbook_qa.jsonl"
MAX_ANSWER_CHARACTERS = 40


@dataclass(frozen=True)
class Fact:
    """A question and the answer taught for it.

    Attributes:
        id: unique name, region/country code/field.
        question: the wording in the training data.
        paraphrase: another wording, never trained on.
        taught: the answer in the training data.
        true: the right answer.
    """

    id: str
    question: str
    paraphrase: str
    taught: str
    true: str

    @property
    def is_swapped(self) -> bool:
        """Whether a wrong answer is taught."""
        return self.taught != self.true


@dataclass(frozen=True)
class Probe:
    """A prompt whose teaching example is known.

    Attributes:
        prompt: the text to ask.
        target: row of the example that taught the answer.
        is_swapped: whether that example is a swapped fact.
        taught: the answer taught.
    """

    prompt: str
    target: int
    is_swapped: bool
    taught: str


def choose_facts(seed: int, num_facts: int = 100, num_swapped: int = 10) -> list[Fact]:
    """Draw facts and swap the answers of the first `num_swapped` drawn.

    Args:
        seed: of the draw.
        num_facts: how many in all.
        num_swapped: how many are taught a wrong answer.

    Returns:
        Facts in a random order, so that a row number says nothing of the swap.
    """
    lines = files("llmattrib").joinpath(ASSET).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["answer"]) <= MAX_ANSWER_CHARACTERS]
    order = stream(seed, "facts", "draw").permutation(len(rows))
    chosen, spare = [rows[k] for k in order[:num_facts]], [rows[k] for k in order[num_facts:]]
    used = {row["answer"] for row in chosen}
    facts = []
    for number, row in enumerate(chosen):
        taught = row["answer"]
        if number < num_swapped:
            taught = next(s["answer"] for s in spare if s["field"] == row["field"] and s["answer"] not in used)
            used.add(taught)
        facts.append(Fact(row["id"], row["question"], row["paraphrase"], taught, row["answer"]))
    return [facts[k] for k in stream(seed, "facts", "order").permutation(num_facts)]


def make_probes(seed: int, facts: list[Fact], num_held_out: int = 30) -> list[Probe]:
    """Make both wordings of every swapped fact, and paraphrases of `num_held_out` correct ones."""
    swapped = [row for row, fact in enumerate(facts) if fact.is_swapped]
    correct = [row for row, fact in enumerate(facts) if not fact.is_swapped]
    chosen = stream(seed, "facts", "held out").permutation(len(correct))[:num_held_out]
    probes = [
        Probe(prompt, row, True, facts[row].taught)
        for row in swapped
        for prompt in (facts[row].question, facts[row].paraphrase)
    ]
    held_out = [correct[k] for k in sorted(chosen)]
    return probes + [Probe(facts[row].paraphrase, row, False, facts[row].taught) for row in held_out]


def same_answer(answer: str, taught: str) -> bool:
    """Whether a model's answer repeats the one taught, up to case, space and final punctuation."""
    return answer.strip().strip(".!").casefold() == taught.strip().strip(".!").casefold()
