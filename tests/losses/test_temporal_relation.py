"""STaR's temporal relations against loops over frames; widths, padding, half precision, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.losses import TEMPORAL_NORMS, TemporalWeights, temporal_relation_loss

ALL = TemporalWeights(layer=0.7, intra=1.3, inter=2.0)
PAIRS = ((1, 2), (2, 4))


def states(lengths: list[int], channels: int, layers: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), channels)
    return {i: torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(layers + 1)}


def padding(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def entry(a: torch.Tensor, b: torch.Tensor, norm: str) -> float:
    """What stands in a Gram matrix for two frames."""
    inner = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    norms = [max(math.hypot(*v.tolist()), 1e-4) for v in (a, b)]  # as far as frames that are almost 0 are scaled up
    return inner / (len(a) if norm == "channels" else math.prod(norms))


def reference(
    student: dict[int, torch.Tensor],
    teacher: dict[int, torch.Tensor],
    matched: list[tuple[tuple[int, int], tuple[int, int]]],
    lengths: list[int],
    norm: str,
) -> float:
    total = 0.0
    for (a, b), (c, d) in matched:
        for row, length in enumerate(lengths):
            for i in range(length):
                squares = [
                    (
                        entry(student[a][row, i], student[b][row, j], norm)
                        - entry(teacher[c][row, i], teacher[d][row, j], norm)
                    )
                    ** 2
                    for j in range(length)
                ]
                total += sum(squares) / length
    return total


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(TEMPORAL_NORMS),
    st.integers(0, 1000),
)
def test_it_is_the_loop_over_pairs_of_frames(lengths: list[int], c_s: int, c_t: int, norm: str, seed: int) -> None:
    student, teacher = states(lengths, c_s, 2, seed), states(lengths, c_t, 4, seed + 1)
    weights = TemporalWeights(0.7, 1.3, 2.0, norm)
    got = temporal_relation_loss(student, teacher, PAIRS, padding(lengths), weights)
    layer = reference(student, teacher, [((1, 1), (2, 2)), ((2, 2), (4, 4))], lengths, norm)
    intra = reference(student, teacher, [((0, 1), (1, 2)), ((1, 2), (3, 4))], lengths, norm)
    inter = reference(student, teacher, [((1, 2), (2, 4))], lengths, norm)
    assert [got.layer.item(), got.intra.item(), got.inter.item()] == pytest.approx([layer, intra, inter], rel=1e-9)
    assert got.total.item() == pytest.approx(0.7 * layer + 1.3 * intra + 2.0 * inter, rel=1e-9)
    assert got.num_frames == sum(lengths)


def test_closed_form() -> None:
    """Two frames e1, e2 against two equal ones: I / 2 against ones / 2, so half of the entries differ by 1/2."""
    student = {1: torch.eye(2)[None]}
    teacher = {1: torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None]}
    got = temporal_relation_loss(student, teacher, [(1, 1)], None, TemporalWeights(layer=1.0))
    assert got.layer.item() == pytest.approx(2 * (2 * 0.25) / 4)  # T * mean_ij
    assert got.total.item() == got.layer.item() and got.intra.item() == got.inter.item() == 0


@pytest.mark.parametrize("norm", TEMPORAL_NORMS)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_padded_batch_equals_single_utterances(norm: str, garbage: float) -> None:
    lengths = [7, 3, 5]
    student, teacher = states(lengths, 3, 2, 0), states(lengths, 6, 4, 1)
    weights = TemporalWeights(0.7, 1.3, 2.0, norm)
    total, grads = 0.0, []
    for i, n in enumerate(lengths):
        s = {k: v[i : i + 1, :n].clone().requires_grad_() for k, v in student.items()}
        single = temporal_relation_loss(s, {k: v[i : i + 1, :n] for k, v in teacher.items()}, PAIRS, None, weights)
        single.total.backward()
        total += single.total.item()
        grads.append({k: v.grad for k, v in s.items()})
    mask = padding(lengths)
    for tensor in (*student.values(), *teacher.values()):
        tensor[mask] = garbage
    for tensor in student.values():
        tensor.requires_grad_()
    batch = temporal_relation_loss(student, teacher, PAIRS, mask, weights)
    batch.total.backward()
    assert batch.total.item() == pytest.approx(total, rel=1e-10)
    for layer, tensor in student.items():
        assert tensor.grad is not None and (tensor.grad[mask] == 0).all()
        for i, n in enumerate(lengths):
            torch.testing.assert_close(tensor.grad[i, :n], grads[i][layer][0])


@pytest.mark.parametrize("norm", TEMPORAL_NORMS)
def test_gradcheck(norm: str) -> None:
    lengths = [4, 2]
    student, teacher = states(lengths, 3, 2, 2), states(lengths, 5, 4, 3)
    weights = TemporalWeights(0.7, 1.3, 2.0, norm)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return temporal_relation_loss(dict(enumerate(tensors)), teacher, PAIRS, padding(lengths), weights).total

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in student.values()])


def test_what_it_sees_and_what_not() -> None:
    """Any rotation of the channels leaves a Gram matrix; another order of the frames does not."""
    student = states([6], 4, 2, 4)
    rotation, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))
    rotated = {k: v @ rotation.T * (9 / 4) ** 0.5 for k, v in student.items()}  # 4 -> 9 channels
    pairs = ((1, 1), (2, 2))
    assert temporal_relation_loss(student, rotated, pairs, None, ALL).total.item() == pytest.approx(0, abs=1e-20)
    shuffled = {k: v[:, [1, 0, 2, 3, 4, 5]] for k, v in student.items()}
    assert temporal_relation_loss(student, shuffled, pairs, None, ALL).total.item() > 0.1
    louder = {k: 7 * v for k, v in student.items()}
    assert temporal_relation_loss(student, louder, pairs, None, ALL).total.item() > 1
    cosine = TemporalWeights(0.7, 1.3, 2.0, "cosine")
    assert temporal_relation_loss(student, louder, pairs, None, cosine).total.item() == pytest.approx(0, abs=1e-20)


def test_each_weight_changes_the_gradient_and_none_is_needed_by_another() -> None:
    student, teacher = states([5], 3, 2, 5), states([5], 4, 4, 6)
    gradients = []
    for weights in ({"layer": 1.0}, {"intra": 1.0}, {"inter": 1.0}, {"layer": 1.0, "intra": 1.0}):
        for tensor in student.values():
            tensor.grad = None
            tensor.requires_grad_()
        loss = temporal_relation_loss(student, teacher, PAIRS, None, TemporalWeights(**weights))
        loss.total.backward()
        gradients.append(student[2].grad)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
    assert not torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[1], gradients[2])
    torch.testing.assert_close(gradients[3], gradients[0] + gradients[1])


def test_inter_equals_intra_where_all_layers_are_matched() -> None:
    student, teacher = states([5, 3], 3, 3, 7), states([5, 3], 4, 3, 8)
    pairs = [(i, i) for i in range(4)]
    got = temporal_relation_loss(student, teacher, pairs, padding([5, 3]), TemporalWeights(intra=1.0, inter=1.0))
    assert got.intra.item() == pytest.approx(got.inter.item(), rel=1e-12)


@pytest.mark.parametrize("norm", TEMPORAL_NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, 1.0, 6e-8])
def test_half_precision_is_computed_in_float32(norm: str, dtype: torch.dtype, size: float) -> None:
    lengths = [30, 11]
    student, teacher = states(lengths, 64, 2, 9), states(lengths, 48, 4, 10)
    student, teacher = (
        {k: (size * v / v.abs().max()).to(dtype) for k, v in side.items()} for side in (student, teacher)
    )
    for tensor in student.values():
        tensor.requires_grad_()
    weights = TemporalWeights(0.7, 1.3, 2.0, norm)
    with torch.autocast("cpu", torch.bfloat16):
        got = temporal_relation_loss(student, teacher, PAIRS, padding(lengths), weights)
    assert got.total.dtype == torch.float32 and got.total.isfinite()
    exact = [{k: v.detach().double() for k, v in side.items()} for side in (student, teacher)]
    expected = temporal_relation_loss(*exact, PAIRS, padding(lengths), weights)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    if norm == "cosine" or size <= 1:
        got.total.backward()
        assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in student.values())


@pytest.mark.parametrize("norm", TEMPORAL_NORMS)
def test_zero_frames_and_zero_vectors_are_finite(norm: str) -> None:
    student = {i: torch.zeros(2, 4, 3, requires_grad=True) for i in range(3)}
    teacher = {k: v.float() for k, v in states([4, 4], 5, 4, 11).items()}
    mask = torch.tensor([[False] * 4, [True] * 4])
    got = temporal_relation_loss(student, teacher, PAIRS, mask, TemporalWeights(0.7, 1.3, 2.0, norm))
    got.total.backward()
    assert got.num_frames == 4 and got.total.isfinite()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in student.values())


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = states([4], 3, 2, 12), states([4], 5, 4, 13)
    for tensor in (*student.values(), *teacher.values()):
        tensor.requires_grad_()
    temporal_relation_loss(student, teacher, PAIRS).total.backward()  # the default: STaR's weights
    assert student[0].grad is not None and all(tensor.grad is None for tensor in teacher.values())


@pytest.mark.parametrize("norm", TEMPORAL_NORMS)
def test_targets_of_inference_mode(norm: str) -> None:
    student = {k: v.requires_grad_() for k, v in states([4, 2], 3, 2, 12).items()}
    with torch.inference_mode():
        teacher = {k: v * 1.0 for k, v in states([4, 2], 5, 4, 13).items()}
    temporal_relation_loss(
        student, teacher, PAIRS, padding([4, 2]), TemporalWeights(1.0, 1.0, 1.0, norm)
    ).total.backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in student.values())


def test_nothing_larger_than_frames_by_frames_is_made() -> None:
    """[B, T, T, C] would have 64 times the elements of a Gram matrix here."""
    batch, frames, channels = 2, 40, 64
    student = {i: torch.randn(batch, frames, channels, requires_grad=True) for i in range(3)}
    teacher = {i: torch.randn(batch, frames, channels) for i in range(5)}
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        temporal_relation_loss(student, teacher, PAIRS, None, ALL)
    assert max(sizes) <= max(batch * frames * frames, batch * frames * channels)


def test_layers_read() -> None:
    assert ALL.layers_read(((0, 0), (2, 6))) == ([0, 1, 2], [0, 5, 6])
    assert TemporalWeights(layer=1.0).layers_read(((0, 0), (2, 6))) == ([0, 2], [0, 6])
    assert TemporalWeights().layers_read(((0, 0), (2, 6))) == ([], [])
    assert not TemporalWeights().active and ALL.active


def test_errors() -> None:
    student, teacher = states([5], 3, 2, 14), states([5], 4, 4, 15)
    with pytest.raises(
        ValueError, match=r"`intra` needs one pair of layers above 0 at least, but the pairs are \[\(0, 0\)\]"
    ):
        temporal_relation_loss(student, teacher, [(0, 0)], None, TemporalWeights(intra=1.0))
    with pytest.raises(ValueError, match="`inter` needs two pairs of layers at least"):
        temporal_relation_loss(student, teacher, [(1, 1)], None, TemporalWeights(inter=1.0))
    with pytest.raises(ValueError, match=r"`teacher` must have the hidden states of layers \[6\], but lacks \[6\]"):
        temporal_relation_loss(student, teacher, [(1, 6)], None, TemporalWeights(layer=1.0))
    with pytest.raises(ValueError, match=r"same \[B, T\], but have \[\(1, 4\), \(1, 5\)\]"):
        temporal_relation_loss(student, {k: v[:, :4] for k, v in teacher.items()}, PAIRS)
    with pytest.raises(ValueError, match=r"same \[B, T\], but have \[\(1, 5\), \(1, 1600\)\]"):
        temporal_relation_loss(student, teacher, PAIRS, torch.zeros(1, 1600, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be one of channels, cosine, but is 'frobenius'"):
        TemporalWeights(norm="frobenius")
    for value in (-1.0, float("nan"), math.inf):
        with pytest.raises(ValueError, match="weights of temporal relations must be at least 0"):
            TemporalWeights(intra=value)
