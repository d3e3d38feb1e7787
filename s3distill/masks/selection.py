"""Which connections stay: the exact top-k of |scores| per weight matrix, without sorting it.

The rule is S3-Router's (Fu et al., 2022, section 3.1; its code): with density k, the ``int((1 - k) * N)`` smallest of the
N values of |scores| become 0, the rest 1. Among equal values the earlier position goes first, so a mask depends on the
scores alone, not on the machine, the number of threads or the precision of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PATTERNS = ("unstructured", "2:4", "rows", "columns")

_SAMPLE = 16_384  # values that bracket the threshold; the bracket then holds about 1% of a matrix
_SMALL = 4 * _SAMPLE  # below this a plain selection is as fast
_NAN = (
    "scores must be numbers, but hold NaN: the training diverged; take an earlier checkpoint and a lower learning rate"
)
_EXACT = 2**24  # every integer up to here is a float32
_SIGMAS = 4.0  # half width of the bracket, in standard deviations of the sample's quantile


def num_removed(density: float, num_values: int) -> int:
    """int((1 - density) * num_values), the number of values that a mask sets to 0."""
    return int((1 - density) * num_values)


def select(scores: Tensor, density: float, pattern: str = "unstructured") -> Tensor:
    """The binary mask of a weight matrix.

    Args:
        scores: of the weight's shape for ``unstructured`` and ``2:4``; [out, 1, ...] for ``rows``, [1, in, ...] for ``columns``.
        density: share that is kept, in (0, 1]; ``2:4`` keeps half whatever it is.
    Returns:
        bool, the shape of ``scores``; True = kept.
    Raises:
        ValueError: unknown pattern, or scores whose rows cannot hold it.
        RuntimeError: the scores hold NaN.
    """
    magnitudes = scores.detach().abs()
    if pattern == "2:4":
        return _two_of_four(magnitudes)
    if pattern not in PATTERNS:
        raise ValueError(f"`mask_pattern` must be one of {', '.join(PATTERNS)}, but is {pattern!r}")
    return keep_largest(magnitudes, num_removed(density, magnitudes.numel()))


def keep_largest(values: Tensor, num_zeros: int) -> Tensor:
    """True everywhere but at the ``num_zeros`` smallest values, the earlier of equal ones first; the shape of ``values``."""
    if num_zeros <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    flat = values.reshape(-1)
    threshold = nth_smallest(flat, num_zeros)
    above = _flags(torch.gt, flat, threshold)
    mask = above.to(torch.bool)
    missing = flat.numel() - num_zeros - _count(above)
    if missing != 0:  # several values equal the threshold: the last of them stay
        equal = (flat == threshold).nonzero()[:, 0]
        # below, equal and above are all there is, but for NaN
        if int(torch.count_nonzero(flat < threshold)) + len(equal) != num_zeros + missing:
            raise RuntimeError(_NAN)
        mask[equal[-missing:]] = True
    return mask.view(values.shape)


def nth_smallest(values: Tensor, n: int) -> Tensor:
    """The n-th smallest value (1-based) of [N], as a scalar tensor.

    Two quantiles of a sample bracket it, and the selection goes on among the values between them only (Floyd & Rivest,
    1975). Exact: where the bracket missed, all values are searched.
    """
    total = values.numel()
    if total <= _SMALL:
        return values.kthvalue(n).values
    sample = values[:: total // _SAMPLE]
    centre = n / total * len(sample)
    width = _SIGMAS * math.sqrt(centre * max(0.0, 1 - n / total)) + 2
    first, last = math.floor(centre - width), math.ceil(centre + width)
    low = sample.kthvalue(first).values if first >= 1 else values.new_tensor(-math.inf)
    high = sample.kthvalue(last).values if last <= len(sample) else values.new_tensor(math.inf)
    below = _flags(torch.lt, values, low)
    rank = n - _count(below)
    between = _flags(torch.le, values, high).sub_(below)
    candidates = values[between.to(torch.bool)]
    if not 1 <= rank <= len(candidates):
        candidates, rank = values, n
    return candidates.kthvalue(rank).values


def _flags(compare: Callable[..., Tensor], values: Tensor, border: Tensor) -> Tensor:
    """The comparison as 0 and 1 in the type of ``values``, [N]: on a CPU three times as fast as one that gives bool."""
    flags: Tensor = compare(values, border, out=torch.empty_like(values))
    return flags


def _count(flags: Tensor) -> int:
    """How many of 0s and 1s are 1. Float32 adds them exactly up to 2^24, on a CPU several times as fast as integers."""
    return sum(int(part.sum(dtype=torch.float32)) for part in flags.split(_EXACT))


def _two_of_four(magnitudes: Tensor) -> Tensor:
    """Two of every four neighbours along the input dimension stay; [out, in, ...] with in * ... a multiple of 4."""
    check_pattern("2:4", magnitudes.shape)
    if bool(magnitudes.isnan().any()):
        raise RuntimeError(_NAN)
    quads = magnitudes.reshape(magnitudes.shape[0], -1, 4)  # [out, in, ...] -> [out, in / 4, 4]
    kept = []
    for i in range(4):
        # how many of the other three are larger; of equal ones the later counts as larger
        larger = [
            quads[..., j] >= quads[..., i] if j > i else quads[..., j] > quads[..., i] for j in range(4) if j != i
        ]
        kept.append((larger[0].to(torch.int8) + larger[1].to(torch.int8) + larger[2].to(torch.int8)) < 2)
    return torch.stack(kept, dim=-1).view(magnitudes.shape)


def check_pattern(pattern: str, shape: tuple[int, ...] | torch.Size, name: str = "the weight") -> None:
    """Refuses a pattern that a weight of this shape cannot hold (`ValueError`)."""
    inputs = math.prod(shape[1:])
    if pattern == "2:4" and inputs % 4 != 0:
        raise ValueError(
            f"`mask_pattern` 2:4 keeps 2 of 4 neighbouring inputs, so {name} must have a multiple of 4 of them, but has {inputs}; leave "
            "that module unmasked (no_prune_*, fix_attn, fix_fc) or take the pattern unstructured"
        )


def scores_shape(pattern: str, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """Shape of the scores of a weight: one per connection, per output (``rows``) or per input (``columns``)."""
    if pattern == "rows":
        return (shape[0], *(1 for _ in shape[1:]))
    if pattern == "columns":
        return (1, shape[1], *(1 for _ in shape[2:]))
    return tuple(shape)
