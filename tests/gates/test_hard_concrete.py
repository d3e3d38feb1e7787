"""Hard Concrete gates against closed forms, Monte-Carlo and a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.gates.hard_concrete import (
    EPS,
    HardConcrete,
    deterministic_gates,
    draw_noise,
    expected_open,
    num_open,
    probability_open,
    sample_gates,
)

LOG_ALPHAS = st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40)


def test_sample_is_the_papers_formula() -> None:
    log_alpha, noise = [-2.0, 0.0, 0.5, 9.0], [0.3, 0.5, 0.8, 0.999]
    expected = []
    for a, u in zip(log_alpha, noise, strict=True):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
        expected.append(min(1.0, max(0.0, s * 1.2 - 0.1)))
    sampled = sample_gates(torch.tensor(log_alpha), torch.tensor(noise))
    torch.testing.assert_close(sampled, torch.tensor(expected), atol=1e-6, rtol=0)


def test_expected_open_agrees_with_samples() -> None:
    log_alpha = torch.linspace(-4, 4, 9)
    generator = torch.Generator().manual_seed(1)
    num_draws = 40_000
    noise = draw_noise(num_draws * 9, generator).view(num_draws, 9)
    frequency = (sample_gates(log_alpha, noise) > 0).double().mean(0)
    probability = probability_open(log_alpha.double())
    error = (probability * (1 - probability) / num_draws).sqrt()
    assert ((frequency - probability).abs() < 4 * error).all()
    torch.testing.assert_close(expected_open(log_alpha), probability.sum())


def test_probability_open_is_the_papers_formula() -> None:
    expected = 1 / (1 + math.exp(-(0.7 - 2 / 3 * math.log(0.1 / 1.1))))
    assert probability_open(torch.tensor([0.7], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_gradients() -> None:
    log_alpha = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.linspace(0.35, 0.6, 5, dtype=torch.float64)  # all strictly between 0 and 1
    assert torch.autograd.gradcheck(lambda a: sample_gates(a, noise), log_alpha)
    assert torch.autograd.gradcheck(probability_open, log_alpha)
    assert torch.autograd.gradcheck(expected_open, log_alpha)


@pytest.mark.parametrize("location", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_locations_stay_finite_in_float32(location: float) -> None:
    log_alpha = torch.full((64,), location, requires_grad=True)
    noise = torch.rand(64, generator=torch.Generator().manual_seed(0))
    noise[0], noise[1] = EPS, 1 - EPS
    gates = sample_gates(log_alpha, noise)
    (gates.sum() + expected_open(log_alpha)).backward()
    assert log_alpha.grad is not None and log_alpha.grad.isfinite().all()
    assert (gates == float(location > 0)).all()


def test_noise_keeps_its_distance_from_0_and_1() -> None:
    noise = draw_noise(100_000, torch.Generator().manual_seed(0))
    assert noise.min() >= EPS and noise.max() <= 1 - EPS and noise.dtype == torch.float32
    assert torch.logit(noise).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(LOG_ALPHAS, st.integers(0, 1))
def test_deterministic_closes_exactly_the_expected_number(values: list[float], min_open: int) -> None:
    log_alpha = torch.tensor(values)
    gates = deterministic_gates(log_alpha, min_open)
    # a slow loop: close the lowest, the first of equals, one after the other
    num_zero = min(
        round(len(values) - sum(1 / (1 + math.exp(-min(max(a + 2 / 3 * math.log(11), -700), 700))) for a in values)),
        len(values) - min_open,
    )
    left = list(range(len(values)))
    for _ in range(num_zero):
        left.remove(min(left, key=lambda i: (values[i], i)))
    assert torch.nonzero(gates).flatten().tolist() == left
    assert int(num_open(log_alpha, min_open)) == len(left)
    assert gates.max() <= 1 and (gates[left] >= EPS).all()
    assert gates.dtype == torch.float32 and not gates.requires_grad


def test_open_evaluation_gates_are_soft_and_increase_with_log_alpha() -> None:
    gates = deterministic_gates(torch.tensor([-9.0, 0.0, 2.0, 4.0]))
    expected = [0.0, 0.5, 1 / (1 + math.exp(-2.4)), 1 / (1 + math.exp(-4.8))]
    torch.testing.assert_close(gates, torch.tensor(expected))


def test_equal_gates_close_by_position() -> None:
    # P(z > 0) = 1/2 each, so that 3 of 6 close
    gates = deterministic_gates(torch.full((6,), 2 / 3 * math.log(1 / 11)))
    assert (gates == 0).tolist() == [True] * 3 + [False] * 3


def test_min_open_sample_keeps_the_highest() -> None:
    gate = HardConcrete(4)
    torch.nn.init.constant_(gate.log_alpha, -30.0)
    noise = torch.tensor([0.2, 0.9, 0.5, 0.1])
    assert (gate.sample(noise) == 0).all()
    kept = gate.sample(noise, min_open=1)
    assert torch.nonzero(kept).flatten().tolist() == [1] and 0 < kept[1] < 0.01
    torch.nn.init.constant_(gate.log_alpha, 0.0)
    assert torch.equal(gate.sample(noise, min_open=1), gate.sample(noise))  # no effect while one is open


def test_initialisation() -> None:
    torch.manual_seed(0)
    gate = HardConcrete(20_000, init_drop=0.2)
    assert gate.log_alpha.mean().item() == pytest.approx(math.log(4), abs=3e-4)
    assert gate.log_alpha.std().item() == pytest.approx(0.01, rel=0.05)
    assert gate.num_gates == 20_000 and "20000" in repr(gate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_stay_float32_and_exact_when_the_model_is_cast(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), HardConcrete(8))
    before = model[1].log_alpha.detach().clone()
    model[1].log_alpha.sum().backward()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[1].log_alpha, before) and model[1].log_alpha.dtype == torch.float32
    assert model[1].log_alpha.grad.dtype == torch.float32
    for cast in (model.half, model.bfloat16, model.double, model.float):
        cast()
        assert torch.equal(model[1].log_alpha, before)


def test_gates_move_to_a_device() -> None:
    gate = HardConcrete(3).half().to(device="meta", dtype=torch.float16)
    assert gate.log_alpha.device.type == "meta" and gate.log_alpha.dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ValueError, match="`num_gates` must be at least 1, but is 0"):
        HardConcrete(0)
    with pytest.raises(ValueError, match=r"`init_drop` must be in \(0, 1\), but is 1.0"):
        HardConcrete(3, init_drop=1.0)
