"""The mask rule against a plain stable sort, in every type, size and layout that could upset a selection without sorting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.masks.selection import (
    PATTERNS,
    check_pattern,
    keep_largest,
    nth_smallest,
    num_removed,
    scores_shape,
    select,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DENSITIES = (1e-6, 0.003, 0.1, 0.3, 0.5, 0.9, 0.94, 0.999)
# around the size from which a sample brackets the threshold, and where the stride of the sample changes
SIZES = (1, 2, 65_535, 65_536, 65_537, 81_919, 81_920, 384 * 384, 131_071, 262_144, 300_007)


def removed_by_sorting(magnitudes: Tensor, num_zeros: int) -> Tensor:
    """The rule itself: in a stable sort of |scores| the first ``num_zeros`` go."""
    mask = torch.ones(magnitudes.numel(), dtype=torch.bool)
    mask[magnitudes.flatten().double().argsort(stable=True)[:num_zeros]] = False
    return mask.view(magnitudes.shape)


def assert_is_the_rule(scores: Tensor, density: float) -> None:
    expected = removed_by_sorting(scores.abs(), int((1 - density) * scores.numel()))
    mask = select(scores, density)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    differing = int((mask != expected).sum())
    assert differing == 0, f"{differing} of {scores.numel()} differ at density {density} in {scores.dtype}"


def noise(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------- parity with the sort


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_random_scores(size: int, dtype: torch.dtype) -> None:
    scores = noise(size, size, dtype)
    for density in (0.1, 0.9):
        assert_is_the_rule(scores, density)


def test_every_density_of_a_weight_matrix() -> None:
    scores = noise(768 * 192, 1).view(768, 192)
    for density in DENSITIES:
        assert_is_the_rule(scores, density)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_distinct", [1, 2, 3, 50])
def test_tied_scores(num_distinct: int, dtype: torch.dtype) -> None:
    """Half precision gives a matrix of millions only ten thousand different values: ties are the rule, not the exception."""
    values = torch.arange(num_distinct, dtype=torch.float64) / 8
    for size in (97, 70_001, 147_456):
        chosen = torch.randint(num_distinct, (size,), generator=torch.Generator().manual_seed(size))
        signs = torch.where(noise(size, 2) < 0, -1.0, 1.0)
        scores = (values[chosen] * signs).to(dtype)
        for density in (0.1, 0.5, 0.94):
            assert_is_the_rule(scores, density)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    st.floats(0, 1, exclude_min=True),
)
def test_any_numbers(values: list[float], density: float) -> None:
    assert_is_the_rule(torch.tensor(values), density)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(65_000, 200_000),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**31),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.25, 0.01]),
)
def test_any_size_density_and_grid(size: int, density: float, seed: int, dtype: torch.dtype, grid: float) -> None:
    scores = noise(size, seed)
    assert_is_the_rule((torch.round(scores / grid) * grid if grid else scores).to(dtype), density)


def sample_stride(size: int) -> int:
    return max(1, size // 16_384)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted": lambda x: x.abs().sort().values,
    "reversed": lambda x: x.abs().sort(descending=True).values,
    "constant": torch.ones_like,
    "zeros": torch.zeros_like,
    "two values": lambda x: (torch.arange(len(x)) < len(x) // 3).float(),
    # what a strided sample sees says nothing of the rest, and the other way round
    "sampled ones are the largest": lambda x: x.abs() + 1000 * (torch.arange(len(x)) % sample_stride(len(x)) == 0),
    "sampled ones are the smallest": lambda x: x.abs() + 1000 * (torch.arange(len(x)) % sample_stride(len(x)) != 0),
    "sampled ones are equal": lambda x: x.abs() * (torch.arange(len(x)) % sample_stride(len(x)) != 0),
    "period of the stride": lambda x: 1.0 + torch.arange(len(x)) % sample_stride(len(x)),
    "period of twice the stride": lambda x: 1.0 + torch.arange(len(x)) % (2 * sample_stride(len(x))),
    "sine": lambda x: torch.sin(torch.arange(len(x)) * (2 * math.pi / sample_stride(len(x)))),
    "one outlier": lambda x: torch.cat([x[:-1], x.new_tensor([3e38])]),
    "many outliers": lambda x: torch.where(torch.arange(len(x)) % 7 == 0, 1e30 * x, x),
    "infinite ones": lambda x: torch.where(torch.arange(len(x)) % 5 == 0, math.inf * torch.sign(x), x),
    "all infinite": lambda x: torch.full_like(x, -math.inf),
    "denormal": lambda x: x * 1e-41,
    "signed zeros": lambda x: torch.where(x < 0, -0.0, 0.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [65_537, 100_003, 147_456])
def test_layouts_that_a_sample_misjudges(layout: str, size: int) -> None:
    scores = LAYOUTS[layout](noise(size, 3))
    for density in DENSITIES:
        assert_is_the_rule(scores, density)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_infinities(dtype: torch.dtype) -> None:
    scores = (1e30 * noise(100_003, 4)).to(dtype)  # float16 overflows, bfloat16 does not
    assert bool(scores.isinf().any()) == (dtype == torch.float16)
    for density in (0.1, 0.9):
        assert_is_the_rule(scores, density)


def test_more_values_than_float32_can_count() -> None:
    """Counts above 2^24 are the reason; a sort of so many takes seconds, so the mask is checked by what it keeps."""
    size = 2**24 + 4099
    scores = (torch.arange(size) % 1009).float()  # 1009 values, each as often as the other, give or take one
    for num_zeros in (2**23, 2**24 + 1):
        mask = keep_largest(scores, num_zeros)
        assert size - int(torch.count_nonzero(mask)) == num_zeros
        assert scores[mask].min() >= scores[~mask].max()
        border = scores == scores[mask].min()
        at_border = mask[border].to(torch.int8)
        assert bool((at_border.diff() >= 0).all()), "of equal ones the earlier go"


def test_a_matrix_that_is_not_contiguous() -> None:
    scores = noise(300 * 400, 5).view(400, 300).t()
    assert not scores.is_contiguous()
    assert_is_the_rule(scores, 0.7)


def test_the_scores_are_left_alone_and_carry_no_gradient() -> None:
    scores = noise(1000, 6).requires_grad_()
    before = scores.detach().clone()
    mask = select(scores, 0.5)
    assert not mask.requires_grad and torch.equal(scores, before)


def test_the_threads_do_not_matter() -> None:
    scores = torch.round(noise(147_456, 7) * 8)
    one = select(scores, 0.4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(select(scores, 0.4), one)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- counts and ties


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.floats(0, 1, exclude_min=True), st.integers(0, 10**7))
def test_the_count_is_the_papers_code(density: float, size: int) -> None:
    assert num_removed(density, size) == int((1 - density) * size)
    assert 0 <= num_removed(density, size) <= size


@pytest.mark.parametrize(
    ("density", "size", "removed"),
    [(1.0, 10, 0), (0.9, 100, 9), (0.9, 1000, 99), (0.5, 7, 3), (0.3, 10, 7), (0.94, 768 * 3072, 141_557)],
)
def test_counts_by_hand(density: float, size: int, removed: int) -> None:
    """int() of a float: 0.9 is a little more than nine tenths, so of 100 only 9 go, as in S3-Router's code."""
    assert num_removed(density, size) == removed
    assert int((~select(noise(size, 8), density)).sum()) == removed


def test_of_equal_scores_the_earlier_go() -> None:
    assert select(torch.ones(10), 0.5).tolist() == [False] * 5 + [True] * 5
    assert select(torch.tensor([2.0, 1.0, -1.0, 1.0, 3.0]), 0.6).tolist() == [True, False, False, True, True]
    assert select(torch.ones(2, 3), 0.5).tolist() == [[False] * 3, [True] * 3]
    large = select(torch.ones(100_000), 0.25)
    assert not large[:75_000].any() and large[75_000:].all()


def test_signs_do_not_matter() -> None:
    scores = noise(70_000, 9)
    assert torch.equal(select(scores, 0.3), select(-scores, 0.3))
    assert torch.equal(select(scores, 0.3), select(scores.abs(), 0.3))


def test_everything_or_nothing_to_remove() -> None:
    values = noise(10, 10)
    assert keep_largest(values, 0).all() and keep_largest(values, -1).all()
    assert not keep_largest(values, 10).any()
    assert select(values, 1.0).all()
    assert select(torch.zeros(0, 4), 0.5).shape == (0, 4)  # a Linear that pruning left without inputs


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(60_000, 150_000), st.floats(0, 1), st.integers(0, 1000))
def test_nth_smallest(size: int, share: float, seed: int) -> None:
    values = noise(size, seed)
    n = max(1, round(share * size))
    assert nth_smallest(values, n) == values.sort().values[n - 1]


# ---------------------------------------------------------------- patterns


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000), st.booleans())
def test_two_of_four(rows: int, quads: int, seed: int, tied: bool) -> None:
    scores = noise(rows * quads * 4, seed).view(rows, quads * 4)
    scores = torch.round(scores) if tied else scores
    mask = select(scores, 0.5, "2:4")
    for row, first in itertools.product(range(rows), range(0, quads * 4, 4)):
        group = scores[row, first : first + 4].abs().tolist()
        gone = sorted(range(4), key=lambda i: (group[i], i))[:2]  # the smallest; of equal ones the earlier
        assert [i for i in range(4) if not mask[row, first + i]] == sorted(gone)


def test_two_of_four_keeps_half_whatever_the_density() -> None:
    scores = noise(32, 11).view(4, 8)
    for density in (0.5, 0.9, 1.0):
        assert int(select(scores, density, "2:4").sum()) == 16


def test_two_of_four_of_a_convolution_counts_over_inputs_and_kernel() -> None:
    scores = noise(3 * 2 * 6, 12).view(3, 2, 6)
    assert torch.equal(select(scores, 0.5, "2:4"), select(scores.view(3, 12), 0.5, "2:4").view(3, 2, 6))


@pytest.mark.parametrize("pattern", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3)])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_rows_and_columns(pattern: str, shape: tuple[int, ...], density: float) -> None:
    """One score for each: the smallest of them close their row (or column) as a whole."""
    axis = 0 if pattern == "rows" else 1
    scores = noise(shape[axis], 13).view(scores_shape(pattern, shape))
    mask = select(scores, density, pattern).expand(shape)
    closed = sorted(range(shape[axis]), key=lambda i: (abs(float(scores.flatten()[i])), i))
    closed = closed[: int((1 - density) * shape[axis])]
    for i in range(shape[axis]):
        assert mask.select(axis, i).unique().tolist() == [i not in closed]


def test_shapes_of_scores() -> None:
    assert scores_shape("unstructured", (6, 4)) == scores_shape("2:4", (6, 4)) == (6, 4)
    assert (scores_shape("rows", (6, 4)), scores_shape("columns", (6, 4))) == ((6, 1), (1, 4))
    assert (scores_shape("rows", (6, 4, 3)), scores_shape("columns", (6, 4, 3))) == ((6, 1, 1), (1, 4, 1))


# ---------------------------------------------------------------- errors


def test_an_unknown_pattern_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"`mask_pattern` must be one of unstructured, 2:4, rows, columns, but is 'quads'"
    ):
        select(torch.ones(4, 4), 0.5, "quads")
    assert PATTERNS == ("unstructured", "2:4", "rows", "columns")


@pytest.mark.parametrize("shape", [(4, 6), (4, 1, 10)])
def test_two_of_four_needs_fours(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"2:4 .* fc1 must have a multiple of 4 of them, but has {math.prod(shape[1:])}; leave"
    ):
        check_pattern("2:4", shape, "fc1")
    with pytest.raises(ValueError, match="multiple of 4"):
        select(torch.ones(shape), 0.5, "2:4")
    for pattern in ("unstructured", "rows", "columns"):
        check_pattern(pattern, shape)


NAN = "scores must be numbers, but hold NaN: the training diverged; take an earlier checkpoint"


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("values", ["different", "tied"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.101, 0.5, 1.0])
def test_nan_is_refused(size: int, values: str, share: float) -> None:
    scores = noise(size, 14) if values == "different" else torch.ones(size)
    scores[: max(1, int(share * size))] = math.nan
    for density in (0.1, 0.5, 0.9):
        if num_removed(density, size) > 0:
            with pytest.raises(RuntimeError, match=NAN):
                select(scores[torch.randperm(size, generator=torch.Generator().manual_seed(1))], density)


def test_nan_in_two_of_four_is_refused() -> None:
    scores = noise(16, 15).view(2, 8)
    scores[1, 3] = math.nan
    with pytest.raises(RuntimeError, match=NAN):
        select(scores, 0.5, "2:4")
