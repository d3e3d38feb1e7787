"""The size constraint: its value, the direction of every gradient, and that it holds a toy problem at its target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.gates import GateSet, Lagrangian, sparsity, target_at


def test_penalty_and_its_gradients() -> None:
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.lambda1.fill_(0.5)
        lagrangian.lambda2.fill_(2.0)
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    penalty = lagrangian(s, 0.7)
    assert penalty.dtype == torch.float32 and penalty.shape == ()
    assert penalty.item() == pytest.approx(0.5 * -0.4 + 2.0 * 0.16, rel=1e-6)
    penalty.backward()
    assert s.grad is not None and s.grad.item() == pytest.approx(0.5 + 2 * 2.0 * -0.4, rel=1e-6)
    # reversed: minus the derivative, so that descent ascends
    assert lagrangian.lambda1.grad is not None and lagrangian.lambda1.grad.item() == pytest.approx(0.4, rel=1e-6)
    assert lagrangian.lambda2.grad is not None and lagrangian.lambda2.grad.item() == pytest.approx(-0.16, rel=1e-6)


def test_starts_without_pressure() -> None:
    s = torch.tensor(0.0, requires_grad=True)
    Lagrangian()(s, 0.7).backward()
    assert s.grad is not None and s.grad.item() == 0


def test_any_minimiser_reaches_the_target() -> None:
    """A task that wants every gate open against a target: only the rising multipliers can bring the size down."""
    torch.manual_seed(0)
    config = EncoderConfig(
        (ConvLayerConfig(16, 10, 5),), 16, uniform_layers(2, 4, 4, 64), pos_conv_kernel=4, pos_conv_groups=4
    )
    gates, lagrangian = GateSet(config, ["head", "ffn"]), Lagrangian()
    optimizer = torch.optim.Adam([*gates.parameters(), *lagrangian.parameters()], lr=0.05)
    for step in range(800):
        values = gates.sample(step)
        task = -sum(v.mean() for v in (*values.heads, *values.ffn) if v is not None) * 0.01
        s = sparsity(config, gates.expected_counts())
        (task + lagrangian(s, target_at(step, 0.5, 200))).backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
    assert float(sparsity(config, gates.expected_counts()).detach()) == pytest.approx(0.5, abs=0.03)  # type: ignore[union-attr]
    assert float(sparsity(config, gates.kept_counts())) == pytest.approx(0.5, abs=0.05)
    assert lagrangian.lambda2.item() > 0


@given(st.integers(0, 1000), st.integers(0, 300), st.floats(0, 0.99))
def test_target_rises_linearly(step: int, warmup: int, target: float) -> None:
    value = target_at(step, target, warmup)
    if step >= warmup:
        assert value == target
    else:
        assert value == pytest.approx(target * step / warmup) and value <= target_at(step + 1, target, warmup)


def test_target_examples_and_errors() -> None:
    assert [target_at(s, 0.8, 4) for s in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert [target_at(s, 0.8, 4, start=0.4) for s in range(6)] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.8])
    assert target_at(0, 0.8, 0) == 0.8
    with pytest.raises(ValueError, match="count updates and must be at least 0, but are -1 and 3"):
        target_at(-1, 0.5, 3)


def test_multipliers_stay_float32() -> None:
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.lambda1.fill_(0.1)
    value = lagrangian.lambda1.item()
    lagrangian.half().bfloat16()
    assert lagrangian.lambda1.dtype == torch.float32 and lagrangian.lambda1.item() == value
