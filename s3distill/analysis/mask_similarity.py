"""What the masks of a bank say of its languages: overlaps of all pairs, and how they go with another similarity (Mantel)."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s3distill.data.similarity_csv import SimilarityMatrix
from s3distill.masks.options import HEAD
from s3distill.masks.similarity import (
    MaskSource,
    Overlap,
    Pair,
    PairCounts,
    count_pairs,
    layer_of,
    measure_overlap,
    short_name,
    sort_modules,
)

GROUPINGS: Mapping[str, Callable[[str], str]] = {"layer": layer_of, "module": short_name}
CORRELATIONS = ("pearson", "spearman")
MIN_NAMES = 3  # two names make one pair, which goes with anything

_CHUNK = 1000  # permutations at a time: those of 50 languages (1225 pairs) take 10 MB
_TIE = 1e-10  # of a correlation: the same one, summed in another order


@dataclass(frozen=True)
class MaskComparison:
    """All pairs of a bank's entries.

    Attributes:
        names: entries, in the bank's order.
        grouping: ``layer`` or ``module``.
        pairs: overlap of each pair over its common modules.
        groups: layer or module -> the same of that group, for the pairs that have it; front end first.
        left_out: entry -> modules that it masks and not all others do, by their short names.
    """

    names: tuple[str, ...]
    grouping: str
    pairs: dict[Pair, Overlap]
    groups: dict[str, dict[Pair, Overlap]]
    left_out: dict[str, tuple[str, ...]]

    def matrix(self, measure: str) -> SimilarityMatrix:
        """A measure as a symmetric matrix, 1 on the diagonal; what is not defined is NaN."""
        values = np.eye(len(self.names))
        for (a, b), overlap in self.pairs.items():
            i, j = self.names.index(a), self.names.index(b)
            values[i, j] = values[j, i] = getattr(overlap, measure)
        return SimilarityMatrix(self.names, values)


def compare_masks(bank: MaskSource, grouping: str = "layer") -> MaskComparison:
    """Compares all entries of a bank.

    Raises:
        ValueError: an unknown grouping, or what `count_pairs` refuses.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"`by` must be one of {', '.join(GROUPINGS)}, but is {grouping!r}")
    counts = count_pairs(bank)
    masked = {name: sort_modules(m for m in bank.module_names(name) if m != HEAD) for name in bank.names}
    shared = set.intersection(*map(set, masked.values()))
    left_out = {name: tuple(short_name(m) for m in modules if m not in shared) for name, modules in masked.items()}
    return MaskComparison(
        names=tuple(bank.names),
        grouping=grouping,
        pairs={pair: measure_overlap(modules.values()) for pair, modules in counts.items()},
        groups=_groups(counts, GROUPINGS[grouping]),
        left_out={name: modules for name, modules in left_out.items() if modules},
    )


def _groups(
    counts: Mapping[Pair, Mapping[str, PairCounts]], group_of: Callable[[str], str]
) -> dict[str, dict[Pair, Overlap]]:
    modules = sort_modules(module for found in counts.values() for module in found)
    groups: dict[str, dict[Pair, Overlap]] = {}
    for group, members in itertools.groupby(modules, group_of):
        group_modules = list(members)
        groups[group] = {
            pair: measure_overlap(found[m] for m in group_modules if m in found)
            for pair, found in counts.items()
            if any(m in found for m in group_modules)
        }
    return groups


@dataclass(frozen=True)
class MantelTest:
    """How two similarities of the same things go together.

    Attributes:
        correlation: over the pairs; NaN where one of the two is the same, or not defined, for all of them.
        p_two_sided: chance that names put at random on one of them correlate as much, either way.
        p_greater: the same for as high a correlation.
        num_permutations: that it was computed over.
        exact: whether these are all permutations there are.
    """

    correlation: float
    p_two_sided: float
    p_greater: float
    num_permutations: int
    exact: bool


def mantel_test(
    a: SimilarityMatrix, b: SimilarityMatrix, permutations: int = 9999, seed: int = 0, correlation: str = "pearson"
) -> MantelTest:
    """Mantel's permutation test (Mantel, 1967): the pairs of one thing are not independent, so a plain p-value would mislead.

    Rows and columns of ``b`` are permuted together. Where there are no more than ``permutations`` orders, each is taken
    once, and p is the fraction with a correlation at least as high; else p = (1 + number as high) / (1 + permutations), of
    random ones (Phipson and Smyth, 2010).

    Args:
        a, b: with the same names in the same order; diagonals are not used.
        correlation: ``pearson``, or ``spearman`` (of the ranks).
    Raises:
        ValueError: other names, fewer than three of them, or an argument out of range.
        RuntimeError: scipy is not installed (for ``spearman``).
    """
    _check_test(a, b, permutations, correlation)
    num_names = len(a.names)
    rows, columns = np.triu_indices(num_names, 1)
    pairs = [_standardise(m.values[rows, columns], correlation) for m in (a, b)]
    exact = math.factorial(num_names) <= permutations
    if pairs[0] is None or pairs[1] is None:
        return MantelTest(math.nan, math.nan, math.nan, 0, exact)
    values = np.zeros((num_names, num_names))
    values[rows, columns] = values[columns, rows] = pairs[1]  # permuting leaves ranks, mean and scale as they are
    observed = float(pairs[0] @ pairs[1])
    count = as_high = as_far = 0
    for orders in _orders(num_names, permutations, seed, exact):
        found = values[orders[:, rows], orders[:, columns]] @ pairs[0]
        count += len(found)
        as_high += int((found >= observed - _TIE).sum())
        as_far += int((np.abs(found) >= abs(observed) - _TIE).sum())
    extra = 0 if exact else 1  # the order as it is: among all of them, but not among the random ones
    return MantelTest(observed, (as_far + extra) / (count + extra), (as_high + extra) / (count + extra), count, exact)


def _check_test(a: SimilarityMatrix, b: SimilarityMatrix, permutations: int, correlation: str) -> None:
    if a.names != b.names:
        raise ValueError(
            f"two similarities must have the same names in the same order, but have {', '.join(a.names)} and {', '.join(b.names)}"
        )
    if len(a.names) < MIN_NAMES:
        raise ValueError(
            f"a comparison with a reference needs at least {MIN_NAMES} entries, but there are {', '.join(a.names)}; leave the reference out"
        )
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1, but is {permutations}; 9999 gives p down to 0.0001")
    if correlation not in CORRELATIONS:
        raise ValueError(f"`correlation` must be one of {', '.join(CORRELATIONS)}, but is {correlation!r}")


def _standardise(values: np.ndarray, correlation: str) -> np.ndarray | None:
    """Mean 0 and sum of squares 1, such that a correlation is a dot product; None where that cannot be."""
    if not np.isfinite(values).all():
        return None
    if correlation == "spearman":
        values = import_scipy("stats").rankdata(values)
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return None
    centred = values - values.mean()
    return centred / np.linalg.norm(centred)


def _orders(num_names: int, permutations: int, seed: int, exact: bool) -> Iterator[np.ndarray]:
    """Permutations in chunks, int64 [<= _CHUNK, N]."""
    if exact:
        everything = itertools.permutations(range(num_names))
        while chunk := list(itertools.islice(everything, _CHUNK)):
            yield np.array(chunk)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, permutations, _CHUNK):
        size = min(_CHUNK, permutations - start)
        yield generator.permuted(np.tile(np.arange(num_names), (size, 1)), axis=1)


def import_scipy(module: str) -> Any:
    """A module of scipy, or a RuntimeError that says how to get it."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise RuntimeError(
            "mask similarity needs scipy, which is not installed; run: pip install 's3distill[plots]'"
        ) from error


def cluster(matrix: SimilarityMatrix) -> np.ndarray | None:
    """Average linkage over the distances 1 - similarity, as scipy's ``linkage`` [N - 1, 4]; None where one is not defined.

    Raises:
        RuntimeError: scipy is not installed.
    """
    distances = 1.0 - matrix.values[np.triu_indices(len(matrix.names), 1)]
    if not np.isfinite(distances).all():
        return None
    hierarchy = import_scipy("cluster.hierarchy")
    return hierarchy.linkage(np.maximum(distances, 0.0), method="average", optimal_ordering=True)


def sort_by_cluster(names: Sequence[str], linkage: np.ndarray | None) -> list[str]:
    """Names such that alike ones are neighbours."""
    if linkage is None:
        return list(names)
    return [names[i] for i in import_scipy("cluster.hierarchy").leaves_list(linkage)]
