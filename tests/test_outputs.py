"""Output functions against their definitions in float64, and their precision where a token is nearly certain."""

import pytest
import torch

from llmattrib.features.outputs import Reading, evaluate_output, token_margins

EXAMPLE = torch.tensor([0, 0, 0, 1, 2, 2])
TARGET = torch.tensor([1, 4, 0, 2, 3, 3])


def reading(seed: int = 0, scale: float = 1.0) -> Reading:
    logits = scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    return Reading(logits.requires_grad_(), EXAMPLE, TARGET, torch.full((3,), -1))


def mean_log_prob(logits: torch.Tensor) -> torch.Tensor:
    token = torch.log_softmax(logits.double(), 1)[torch.arange(6), TARGET]
    return torch.stack([token[row == EXAMPLE].mean() for row in range(3)])


def test_loss_is_the_mean_negative_log_likelihood() -> None:
    read = reading()
    value = evaluate_output("loss", read, ())
    torch.testing.assert_close(value.outputs[0].double(), -mean_log_prob(read.logits), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(value.outputs[0].detach(), value.loss)


def test_log_odds_is_log_p_over_one_minus_p() -> None:
    read = reading()
    logp = mean_log_prob(read.logits)
    expected = logp - torch.log(-torch.expm1(logp))
    torch.testing.assert_close(
        evaluate_output("log_odds", read, ()).outputs[0].double(), expected, rtol=1e-5, atol=1e-5
    )


def test_log_odds_is_finite_where_the_answer_is_certain() -> None:
    logits = torch.zeros(6, 5)
    logits[torch.arange(6), TARGET] = 60.0
    read = Reading(logits.requires_grad_(), EXAMPLE, TARGET, torch.full((3,), -1))
    value = evaluate_output("log_odds", read, ())
    torch.testing.assert_close(value.log_odds, torch.full((3,), 60.0 - torch.log(torch.tensor(4.0)).item()))
    value.outputs.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad != 0).any()


def test_margin_of_two_words_is_their_difference() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0], [0.5, -1.0, 3.0]])
    read = Reading(logits, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 1]))
    value = evaluate_output("margin", read, (0, 2))
    torch.testing.assert_close(value.outputs[0], torch.tensor([-4.0, 2.5]))
    torch.testing.assert_close(value.loss, torch.nn.functional.softplus(torch.tensor([4.0, -2.5])))


def test_margin_of_many_words_is_against_the_log_sum_of_the_others() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 3, 5, 2])
    expected = [
        logits[k, t] - torch.logsumexp(torch.cat([logits[k, :t], logits[k, t + 1 :]]), 0) for k, t in enumerate(target)
    ]
    torch.testing.assert_close(token_margins(logits, target), torch.stack(expected))


def test_logits_has_one_row_per_label_word() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    read = Reading(logits, torch.arange(3), torch.tensor([4, 7, 1]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(evaluate_output("logits", read, (4, 7, 1)).outputs, logits[:, [4, 7, 1]].T)


@pytest.mark.parametrize(("label_ids", "width"), [((), 5), ((0, 2, 3), 3)])
def test_pntk_is_the_scaled_sum_of_logits(label_ids: tuple[int, ...], width: int) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    read = Reading(logits, torch.arange(3), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2]))
    columns = logits[:, list(label_ids)] if label_ids else logits
    torch.testing.assert_close(evaluate_output("pntk", read, label_ids).outputs[0], columns.sum(1) / width**0.5)


@pytest.mark.parametrize("kind", ["loss", "log_odds", "pntk"])
def test_an_example_depends_on_its_own_rows_only(kind: str) -> None:
    read = reading(4)
    evaluate_output(kind, read, ()).outputs[0, 1].backward()  # type: ignore[arg-type]
    touched = read.logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, EXAMPLE == 1)
