"""Recall, text search and the demo's facts."""

import numpy as np
import pytest

from llmattrib.evaluate.retrieval import recall, tfidf_scores, top_rows
from llmattrib.facts import choose_facts, make_probes, same_answer


def test_recall_counts_targets_among_the_first_k() -> None:
    result = recall([[3, 1, 2], [0, 4, 5], [9, 8, 7]], [3, 5, 1], ks=(1, 2, 3))
    assert result == pytest.approx({"recall@1": 1 / 3, "recall@2": 1 / 3, "recall@3": 2 / 3, "count": 3})


def test_recall_of_no_probes_is_zero() -> None:
    assert recall([], [], (1, 5)) == {"recall@1": 0.0, "recall@5": 0.0, "count": 0}


def test_top_rows_breaks_ties_by_row() -> None:
    assert top_rows(np.array([[0.0, 2.0, 2.0, 1.0]]), 3).tolist() == [[1, 2, 3]]


def test_tfidf_finds_the_text_with_the_rare_word() -> None:
    scores = tfidf_scores(["the capital of Peru", "the capital of Chad", "the anthem of Mali"], ["capital of Chad?"])
    assert scores.shape == (1, 3)
    assert scores[0].argmax() == 1
    assert scores[0, 0] > scores[0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_swapped_facts_carry_an_answer_that_no_other_fact_teaches(seed: int) -> None:
    facts = choose_facts(seed)
    assert len(facts) == len({fact.id for fact in facts}) == 100
    swapped = [fact for fact in facts if fact.is_swapped]
    assert len(swapped) == 10
    for fact in swapped:
        others = [other for other in facts if other is not fact]
        assert not any(fact.taught in (other.taught, other.true) for other in others)
    assert choose_facts(seed) == facts
    assert choose_facts(seed + 10) != facts


def test_probes_ask_swapped_facts_twice_and_held_out_ones_in_new_words() -> None:
    facts = choose_facts(0)
    probes = make_probes(0, facts, num_held_out=7)
    assert sum(probe.is_swapped for probe in probes) == 20
    held_out = [probe for probe in probes if not probe.is_swapped]
    assert len({probe.target for probe in held_out}) == 7
    questions = {fact.question for fact in facts}
    assert not any(probe.prompt in questions for probe in held_out)
    assert all(facts[probe.target].taught == probe.taught for probe in probes)


def test_answers_are_compared_without_case_and_final_punctuation() -> None:
    assert same_answer(" Moco. ", "moco")
    assert not same_answer("Moco hill", "Moco")
