"""Where scores start: the distributions, the ranks and the magnitudes, for every pattern."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from s3distill.masks.scores import FROM_WEIGHTS, INITS, init_scores
from s3distill.masks.selection import PATTERNS, num_removed, scores_shape, select

NOISE = ("kaiming_uniform", "kaiming_normal", "xavier_normal", "uniform", "normal")
OUT, IN = 48, 192  # fan-in 192, fan-out 48


def weight_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (OUT, IN), generator=torch.Generator().manual_seed(seed))


def started(
    method: str, weight: Tensor, density: float = 0.6, pattern: str = "unstructured", **options: float
) -> Tensor:
    scores = torch.full(scores_shape(pattern, weight.shape), math.nan)
    init_scores(scores, weight, method, density, pattern, generator=torch.Generator().manual_seed(1), **options)
    return scores


def ranks(values: Tensor) -> Tensor:
    """Place of each value in a stable sort of the magnitudes."""
    order = values.flatten().abs().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places


def kurtosis(values: Tensor) -> float:
    """3 of a normal distribution, 1.8 of a uniform one."""
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("method", "low", "high", "std"),
    [
        # a = sqrt(5): bound sqrt(6 / ((1 + 5) fan_in)) = 1 / sqrt(fan_in)
        ("kaiming_uniform", -1 / math.sqrt(IN), 1 / math.sqrt(IN), 1 / math.sqrt(3 * IN)),
        ("uniform", 0.0, 1.0, 1 / math.sqrt(12)),
    ],
)
def test_uniform_distributions(method: str, low: float, high: float, std: float) -> None:
    scores = started(method, weight_matrix())
    assert low <= float(scores.min()) < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < float(scores.max()) <= high
    assert float(scores.mean()) == pytest.approx((low + high) / 2, abs=0.05 * std)
    assert float(scores.std()) == pytest.approx(std, rel=0.03)
    assert kurtosis(scores) == pytest.approx(1.8, abs=0.1)


@pytest.mark.parametrize(
    ("method", "std"),
    [("kaiming_normal", math.sqrt(2 / IN)), ("xavier_normal", math.sqrt(2 / (IN + OUT))), ("normal", 1.0)],
)
def test_normal_distributions(method: str, std: float) -> None:
    """S3-Router's own code draws xavier_normal from a uniform distribution."""
    scores = started(method, weight_matrix())
    assert float(scores.mean()) == pytest.approx(0, abs=0.05 * std)
    assert float(scores.std()) == pytest.approx(std, rel=0.03)
    assert kurtosis(scores) == pytest.approx(3.0, abs=0.2)
    assert float(scores.abs().max()) > 3 * std


@pytest.mark.parametrize("method", NOISE)
def test_noise_depends_on_the_generator_alone(method: str) -> None:
    ours, other = started(method, weight_matrix()), started(method, 5 * weight_matrix(seed=7))
    assert torch.equal(ours, other)
    torch.manual_seed(123)
    assert torch.equal(ours, started(method, weight_matrix()))
    scores = torch.empty(OUT, IN)
    init_scores(scores, weight_matrix(), method, 0.5, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(ours, scores)


@pytest.mark.parametrize(("method", "value"), [("zero", 0.0), ("one", 1.0)])
def test_constants(method: str, value: float) -> None:
    assert started(method, weight_matrix()).unique().tolist() == [value]


# ---------------------------------------------------------------- from the weights


@pytest.mark.parametrize("shape", [(OUT, IN), (8, 4, 3)])
def test_weight_rank_ranks_as_the_weights_do(shape: tuple[int, ...]) -> None:
    weight = weight_matrix(*shape)
    scores = started("weight_rank", weight)
    assert torch.equal(ranks(scores), ranks(weight))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    assert float(scores.abs().max()) <= bound, "the values are those of kaiming_uniform"
    signs = torch.sign(scores)
    assert 0.3 < float((signs == torch.sign(weight)).float().mean()) < 0.7, "their signs are those of the noise"


def test_weight_rank_with_equal_weights_goes_by_position() -> None:
    weight = torch.round(weight_matrix())
    weight[0] = 0
    assert torch.equal(ranks(started("weight_rank", weight)), ranks(weight))


@pytest.mark.parametrize("density", [0.3, 0.9, 1.0])
def test_weight_magnitude_is_the_mask_of_the_weights(density: float) -> None:
    weight = weight_matrix()
    scores = started("weight_magnitude", weight, density)
    assert torch.equal(scores, select(weight, density).float())
    assert int((scores == 0).sum()) == num_removed(density, weight.numel())
    assert torch.equal(select(scores, density), scores.bool()), "the mask that they stand for"


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_negative_weight_magnitude_keeps_the_smallest(density: float) -> None:
    weight = weight_matrix()
    scores = started("negative_weight_magnitude", weight, density)
    assert set(scores.unique().tolist()) == {0.0, 1.0}
    kept, gone = weight.abs()[scores == 1], weight.abs()[scores == 0]
    assert len(gone) == num_removed(density, weight.numel()) and kept.max() <= gone.min()
    assert torch.equal(select(scores, density), scores.bool())


@pytest.mark.parametrize("scale", [1.0, 0.02, -3.0])
def test_weight_magnitude_with_scale(scale: float) -> None:
    weight = weight_matrix()
    scores = started("weight_magnitude_with_scale", weight, scale=scale)
    torch.testing.assert_close(scores, weight / scale, rtol=0, atol=0)
    assert torch.equal(select(scores, 0.3), select(weight, 0.3)), "the largest weights stay"


@pytest.mark.parametrize("method", FROM_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(method: str, dtype: torch.dtype) -> None:
    """Scores are float32 and see the weights as they are, rounded."""
    weight = weight_matrix().to(dtype)
    scores = started(method, weight)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, started(method, weight.float()))


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 4), (1, 8), (12, 1, 8)])
@pytest.mark.parametrize("method", INITS)
def test_every_method_fills_every_shape(method: str, shape: tuple[int, ...], pattern: str) -> None:
    weight = weight_matrix(*shape)
    scores = started(method, weight, 0.5, pattern)
    assert scores.shape == scores_shape(pattern, shape) and scores.isfinite().all()
    assert select(scores, 0.5, pattern).expand(shape).shape == weight.shape


@pytest.mark.parametrize(("pattern", "dims"), [("rows", (1, 2)), ("columns", (0, 2))])
def test_the_mean_magnitude_stands_for_a_row_or_column(pattern: str, dims: tuple[int, ...]) -> None:
    weight = weight_matrix(6, 4, 3)
    mean = weight.abs().mean(dims, keepdim=True)
    torch.testing.assert_close(started("weight_magnitude_with_scale", weight, 0.5, pattern, scale=2.0), mean / 2)
    assert torch.equal(ranks(started("weight_rank", weight, 0.5, pattern)), ranks(mean))
    assert torch.equal(started("weight_magnitude", weight, 0.5, pattern), select(mean, 0.5).float())
    smallest = started("negative_weight_magnitude", weight, 0.5, pattern)
    assert mean[smallest == 1].max() <= mean[smallest == 0].min()


def test_two_of_four_from_the_weights() -> None:
    weight = weight_matrix(8, 16)
    scores = started("weight_magnitude", weight, 0.5, "2:4")
    assert torch.equal(scores.bool(), select(weight, 0.5, "2:4"))
    opposite = started("negative_weight_magnitude", weight, 0.5, "2:4")
    assert torch.equal(opposite, 1 - scores)
    assert torch.equal(select(opposite, 0.5, "2:4"), opposite.bool())


def test_a_single_row_is_no_structure() -> None:
    """With one output, a score per output and a score for everything are the same thing."""
    weight = weight_matrix(1, 8)
    torch.testing.assert_close(
        started("weight_magnitude_with_scale", weight, 0.5, "rows"), weight.abs().mean(1, keepdim=True)
    )
    # one score per input is one per connection here, but it is still a magnitude or a weight: the mask is the same
    columns = started("weight_magnitude_with_scale", weight, 0.5, "columns")
    assert torch.equal(columns.abs(), weight.abs())


# ---------------------------------------------------------------- how it is called


@pytest.mark.parametrize("method", INITS)
def test_a_parameter_that_learns_is_filled_in_place(method: str) -> None:
    scores = nn.Parameter(torch.zeros(OUT, IN))
    weight = nn.Parameter(weight_matrix())
    before, version = weight.detach().clone(), scores._version
    init_scores(scores, weight, method, 0.6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(scores, started(method, weight_matrix()))
    assert scores.requires_grad and scores.grad_fn is None and scores._version > version
    assert torch.equal(weight, before)


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"`init_score` must be one of kaiming_uniform, .*, weight_rank, .* but is 'best'"
    ):
        started("best", weight_matrix())
    assert len(INITS) == 11 and set(FROM_WEIGHTS) < set(INITS)
