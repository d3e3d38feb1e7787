"""Hard Concrete gates: random values in [0, 1], often exactly 0 or 1, whose expected L0 norm is differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from s3distill.gates.float32 import Float32Module

TEMPERATURE = 2 / 3  # beta in Louizos et al. (2018)
STRETCH = (-0.1, 1.1)  # gamma, zeta in Louizos et al. (2018)
EPS = 1e-6  # distance that the noise keeps from 0 and 1, and the smallest value of an open evaluation gate
EVALUATION_SHARPNESS = 0.8  # DPHuBERT's factor, see `deterministic_gates`


def draw_noise(num_gates: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise in [EPS, 1 - EPS] on the CPU, [num_gates], float32."""
    return torch.rand(num_gates, generator=generator).clamp_(EPS, 1 - EPS)


def concrete(log_alpha: Tensor, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Binary Concrete sample, s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta)  (Louizos et al., 2018, eq. 10).

    Args:
        log_alpha: gate locations, [N].
        noise: u in (0, 1), [N].
    Returns:
        [N] in (0, 1), differentiable in ``log_alpha``.
    """
    return torch.sigmoid((torch.logit(noise) + log_alpha) / temperature)


def sample_gates(
    log_alpha: Tensor, noise: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH
) -> Tensor:
    """Hard Concrete sample, z = clamp(s * (r - l) + l, 0, 1)  (Louizos et al., 2018, eqs. 10 and 11).

    Args:
        log_alpha: gate locations, [N].
        noise: u in (0, 1), [N].
        stretch: (l, r) with l < 0 < 1 < r.
    Returns:
        [N] in [0, 1], differentiable in ``log_alpha`` where 0 < z < 1.
    """
    low, high = stretch
    return (concrete(log_alpha, noise, temperature) * (high - low) + low).clamp(0, 1)


def probability_open(
    log_alpha: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH
) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - beta * ln(-l / r))  (Louizos et al., 2018, eq. 12).

    Args:
        log_alpha: gate locations, [N].
    Returns:
        [N] in (0, 1), differentiable in ``log_alpha``.
    """
    low, high = stretch
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


def expected_open(
    log_alpha: Tensor, temperature: float = TEMPERATURE, stretch: tuple[float, float] = STRETCH
) -> Tensor:
    """Expected number of open gates, sum_j P(z_j > 0)  (Louizos et al., 2018, eq. 12).

    The sum is taken in float64, so that costs built on it are exact where all gates are surely open or closed.

    Args:
        log_alpha: gate locations, [N].
    Returns:
        Scalar [] float64 in [0, N], differentiable in ``log_alpha``.
    """
    return probability_open(log_alpha.double(), temperature, stretch).sum()


@torch.no_grad()
def num_open(log_alpha: Tensor, min_open: int = 0) -> Tensor:
    """Number of open evaluation gates, N - round(N - E[L0]) and at least ``min_open``, [] float64."""
    num_gates = log_alpha.numel()
    return num_gates - (num_gates - expected_open(log_alpha)).round().clamp_max(num_gates - min_open)


@torch.no_grad()
def deterministic_gates(log_alpha: Tensor, min_open: int = 0) -> Tensor:
    """Evaluation gates: round(N - E[L0]) of them are exactly 0, the rest sigmoid(0.8 * log_alpha / beta).

    This is DPHuBERT's rule, with exact counts where gates are equal.

    The number that stays is the expected one, so that the size of the evaluated and of the pruned model is the size
    that was trained for (up to half a unit per gate vector). Gates with the lowest log_alpha are closed; of equal ones,
    the first. The open ones stay soft and are folded into the weights by pruning. sigmoid(0.6 * log_alpha / beta) would
    be E[z] within 0.004; the sharper 0.8 gives the survivors a little more, to make up for the mass of the closed ones.
    It is kept at or above ``EPS``, so that "open" and "> 0" are the same.

    Args:
        log_alpha: gate locations, [N].
        min_open: at least this many stay open.
    Returns:
        [N] float32 in {0} or [EPS, 1], without gradient.
    """
    num_gates = log_alpha.numel()
    order = torch.sort(log_alpha, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(num_gates, device=order.device))
    soft = torch.sigmoid(EVALUATION_SHARPNESS * log_alpha / TEMPERATURE).clamp_min(EPS)
    return soft.masked_fill(rank < num_gates - num_open(log_alpha, min_open), 0)


class HardConcrete(Float32Module):
    """One vector of gates; its parameter ``log_alpha`` [N] stays float32 when the model is cast.

    Args:
        num_gates: N, at least 1.
        init_drop: m in (0, 1); log_alpha starts at ln((1 - m) / m), which closes sigmoid(-ln((1 - m) / m) - 1.6) of the
            gates (0.2% for m = 0.01), since the stretch leaves a gate open far beyond its middle.
        init_std: std of the normal noise around that start; it breaks ties.
    Raises:
        ValueError: ``num_gates`` or ``init_drop`` out of range.
    """

    def __init__(self, num_gates: int, init_drop: float = 0.01, init_std: float = 0.01) -> None:
        super().__init__()
        if num_gates < 1:
            raise ValueError(f"`num_gates` must be at least 1, but is {num_gates}; leave out gates of empty structures")
        if not 0 < init_drop < 1:
            raise ValueError(f"`init_drop` must be in (0, 1), but is {init_drop}; 0.01 starts nearly open")
        self.log_alpha = nn.Parameter(torch.empty(num_gates, dtype=torch.float32))
        nn.init.normal_(self.log_alpha, math.log((1 - init_drop) / init_drop), init_std)

    @property
    def num_gates(self) -> int:
        return self.log_alpha.numel()

    def sample(self, noise: Tensor, min_open: int = 0) -> Tensor:
        """Training gates [N] from noise u [N] in (0, 1), see `sample_gates`.

        With ``min_open=1``, if all gates come out closed, the one with the highest sample takes its unstretched value s
        > 0 instead.
        """
        noise = noise.to(self.log_alpha.device)
        gates = sample_gates(self.log_alpha, noise)
        if min_open == 0:
            return gates
        assert min_open == 1
        unstretched = concrete(self.log_alpha, noise)
        highest = nn.functional.one_hot(unstretched.argmax(), self.num_gates).bool()
        return torch.where(highest & (gates.max() == 0), unstretched.clamp_min(EPS), gates)

    def deterministic(self, min_open: int = 0) -> Tensor:
        """Evaluation gates [N], see `deterministic_gates`."""
        return deterministic_gates(self.log_alpha, min_open)

    def probability_open(self) -> Tensor:
        """P(z > 0) per gate, [N], see `probability_open`."""
        return probability_open(self.log_alpha)

    def expected_open(self) -> Tensor:
        """Expected number of open gates, [] float64, see `expected_open`."""
        return expected_open(self.log_alpha)

    def extra_repr(self) -> str:
        return f"num_gates={self.num_gates}"
