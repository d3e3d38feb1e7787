"""Dropout and attention with dropout: the share that is dropped, closed forms, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill.encoder.dropout import attention_with_dropout, dropout


def seeded(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    torch.manual_seed(5)
    return function(*arguments)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    x = torch.full((1000, 1001), 2.0)
    y = seeded(dropout, x, p, True)
    kept = y != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 2e-3  # four standard deviations of a million draws
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2 / (1 - p)), rtol=2e-4, atol=0)
    # of neighbours, which share a 64-bit number, and of rows
    correlations = torch.corrcoef(torch.stack([kept[:, i].float() for i in range(8)])).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.15


def test_the_generator_decides() -> None:
    x = torch.ones(50)
    assert torch.equal(seeded(dropout, x, 0.3, True), seeded(dropout, x, 0.3, True))
    torch.manual_seed(5)
    assert not torch.equal(dropout(x, 0.3, True), dropout(x, 0.3, True))


@pytest.mark.parametrize("p", [0.0, 1e-9])
def test_nothing_is_dropped(p: float) -> None:
    x = torch.randn(4, 5)
    assert torch.equal(dropout(x, p, True), x)
    assert torch.equal(dropout(x, 0.5, False), x)


def test_all_is_dropped() -> None:
    assert torch.equal(dropout(torch.randn(4, 5), 1.0, True), torch.zeros(4, 5))


def test_gradient_of_dropout() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: seeded(dropout, x, 0.3, True), (x,))


def inputs(mask: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, 3, t, 4, dtype=torch.float64, generator=generator) for t in (5, 6, 6))
    if mask == "none":
        return q, k, v, None  # type: ignore[return-value]
    if mask == "bool":
        return q, k, v, torch.arange(6) < torch.tensor([6, 4])[:, None, None, None]
    return q, k, v, torch.randn(1, 3, 5, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention_is_softmax_dropout_and_values(mask: str) -> None:
    q, k, v, m = inputs(mask)
    found = seeded(attention_with_dropout, q, k, v, m, 0.3)
    bias = torch.zeros(()) if m is None else m
    bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else bias
    attention = (q @ k.transpose(2, 3) / 2 + bias).softmax(-1)
    expected = seeded(dropout, attention, 0.3, True) @ v  # the same draw of the same shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_mean_over_draws_is_attention_without_dropout(mask: str) -> None:
    q, k, v, m = (t if t is None or t.dtype == torch.bool else t.float() for t in inputs(mask))
    torch.manual_seed(7)
    mean = torch.stack([attention_with_dropout(q, k, v, m, 0.2) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(q, k, v, m), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_gradients_of_attention(mask: str) -> None:
    q, k, v, m = inputs(mask)
    arguments = [t.requires_grad_() for t in (q, k, v)]
    if mask == "added":
        arguments.append(m.requires_grad_())

    def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None = None) -> Tensor:
        return seeded(attention_with_dropout, q, k, v, m if added is None else added, 0.3)

    assert torch.autograd.gradcheck(attend, arguments)


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_row_that_is_all_padding_gives_0_and_spoils_nothing(kind: str) -> None:
    q, k, v, _ = inputs("none")
    q.requires_grad_()
    may = torch.tensor([[True] * 6, [False] * 6])[:, None, None]
    mask = may if kind == "bool" else torch.zeros(2, 3, 5, 6, dtype=torch.float64).masked_fill(~may, -torch.inf)
    found = seeded(attention_with_dropout, q, k, v, mask, 0.3)
    assert torch.equal(found[1], torch.zeros_like(found[1])) and bool(found[0].abs().max() > 0)
    gradient = torch.autograd.grad(found[0].sum(), q)[0]
    assert bool(gradient.isfinite().all()) and bool(gradient[0].abs().max() > 0)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    q, k, v, _ = inputs("none")
    q.requires_grad_()
    loss = attention_with_dropout(q, k, v, None, 0.3).square().sum()
    gradient = torch.autograd.grad(loss, q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_types_must_agree() -> None:
    q, k, v, _ = inputs("none")
    with pytest.raises(
        ValueError, match=r"must have one type, but have torch\.float64, torch\.float64 and torch\.float32"
    ):
        attention_with_dropout(q, k, v.float(), None, 0.1)


def test_attention_keeps_one_byte_per_weight() -> None:
    """And not the map, which is computed again: of long utterances it would be most of what a layer keeps."""
    q, k, v = (torch.randn(2, 3, 50, 8, requires_grad=True) for _ in "qkv")
    known = {t.untyped_storage().data_ptr() for t in (q, k, v)}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention_with_dropout(q, k, v, None, 0.1)
    assert 2 * 3 * 50 * 50 <= sum(sizes.values()) <= 2 * 3 * 50 * 50 + 16
