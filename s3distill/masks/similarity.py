"""How much two masks share: connections counted module by module over a mask bank, and the measures that are made of them.

Two masks that have nothing to do with each other and keep a fraction d each already have cosine d, so the raw measures are
high wherever sparsity is low; kappa takes out what chance alone would give.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from s3distill.masks.options import ENCODER, HEAD

Pair = tuple[str, str]
MEASURES = ("kappa", "cosine", "jaccard")

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # not conv_layers


class MaskSource(Protocol):
    """What is read of a bank; see `s3distill.masks.bank.MaskBank`."""

    @property
    def names(self) -> Sequence[str]: ...

    def module_names(self, name: str) -> Sequence[str]: ...

    def mask(self, name: str, module: str) -> Tensor: ...


@dataclass(frozen=True)
class PairCounts:
    """Connections of one module by what masks a and b say of them: ``n10`` are kept by a and removed by b."""

    n11: int
    n10: int
    n01: int
    n00: int

    @property
    def num_connections(self) -> int:
        return self.n11 + self.n10 + self.n01 + self.n00

    @property
    def kept_a(self) -> int:
        return self.n11 + self.n10

    @property
    def kept_b(self) -> int:
        return self.n11 + self.n01

    @property
    def has_constant(self) -> bool:
        """Whether one of the masks keeps all or nothing, and so chooses nothing."""
        return any(kept in (0, self.num_connections) for kept in (self.kept_a, self.kept_b))


@dataclass(frozen=True)
class Overlap:
    """How much two masks share over some modules; what is not defined is NaN.

    Attributes:
        num_modules, num_connections: what was compared.
        density_a, density_b: fractions that the masks keep.
        cosine: n11 / sqrt((n11 + n10)(n11 + n01)).
        chance_cosine: the cosine that independent masks with these densities have.
        jaccard: n11 / (n11 + n10 + n01).
        kappa: (p_o - p_e) / (1 - p_e), see `measure_overlap`; 1 = the same mask, 0 = as independent masks.
    """

    num_modules: int
    num_connections: int
    density_a: float
    density_b: float
    cosine: float
    chance_cosine: float
    jaccard: float
    kappa: float


def count_pair(a: Tensor, b: Tensor) -> PairCounts:
    """Counts the connections of one module.

    Args:
        a, b: masks, bool, of the same shape.
    Raises:
        ValueError: they are not.
    """
    return _count_pair(a, b, _count_kept(a), _count_kept(b))


def _count_pair(a: Tensor, b: Tensor, kept_a: int, kept_b: int) -> PairCounts:
    if a.shape != b.shape:
        raise ValueError(
            f"two masks must have the same shape to be compared, but they have {tuple(a.shape)} and {tuple(b.shape)}; compare masks "
            "of one backbone"
        )
    both = _count_kept(a & b)
    return PairCounts(both, kept_a - both, kept_b - both, a.numel() - kept_a - kept_b + both)


def _count_kept(mask: Tensor) -> int:
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be bool, but is {mask.dtype}; compare the scores with their threshold first")
    return int(torch.count_nonzero(mask))


def measure_overlap(counts: Iterable[PairCounts]) -> Overlap:
    """Sums counts over modules, and measures the overlap.

    Kappa is Cohen's (1960), with p_o = (n11 + n00) / N and p_e = d_a d_b + (1 - d_a)(1 - d_b). Over several modules the
    agreement by chance is taken within each: with one density for all of them, masks that merely keep more in the same
    modules would seem to agree. Modules in which a mask is constant say nothing of a choice and do not count in kappa.
    """
    counts = list(counts)
    n11 = sum(c.n11 for c in counts)
    kept_a, kept_b = sum(c.kept_a for c in counts), sum(c.kept_b for c in counts)
    total = sum(c.num_connections for c in counts)
    chance = sum(_ratio(c.kept_a * c.kept_b, c.num_connections) for c in counts if c.num_connections)
    return Overlap(
        num_modules=len(counts),
        num_connections=total,
        density_a=_ratio(kept_a, total),
        density_b=_ratio(kept_b, total),
        cosine=_ratio(n11, math.sqrt(kept_a * kept_b)),
        chance_cosine=_ratio(chance, math.sqrt(kept_a * kept_b)),
        jaccard=_ratio(n11, kept_a + kept_b - n11),
        kappa=_kappa([c for c in counts if not c.has_constant]),
    )


def _kappa(counts: Sequence[PairCounts]) -> float:
    """N p_o and N p_e summed over modules: n00 has the same excess over chance as n11, N d_a d_b being expected of n11."""
    excess, room = 0.0, 0.0
    for c in counts:
        total = c.num_connections
        excess += 2 * (c.n11 * c.n00 - c.n10 * c.n01) / total  # N (p_o - p_e), exact in integers up to the division
        room += (c.kept_a * (total - c.kept_b) + c.kept_b * (total - c.kept_a)) / total  # N (1 - p_e)
    return _ratio(excess, room)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def count_pairs(bank: MaskSource) -> dict[Pair, dict[str, PairCounts]]:
    """Counts every pair of entries over the modules that both mask; the head is left out, since dictionaries differ.

    One module of all entries is in memory at a time.

    Returns:
        Pair of names, in the bank's order -> module -> counts; front end first, then layer by layer.
    Raises:
        ValueError: fewer than two entries, or a pair that has no masked module in common.
    """
    names = list(bank.names)
    if len(names) < 2:
        raise ValueError(
            f"a comparison needs at least two entries, but the bank has {', '.join(names) or 'none'}; add one with "
            "`s3distill masks pack`"
        )
    masked = {name: [m for m in bank.module_names(name) if m != HEAD] for name in names}
    pairs = list(itertools.combinations(names, 2))
    _check_common(pairs, masked)
    counts: dict[Pair, dict[str, PairCounts]] = {pair: {} for pair in pairs}
    for module in sort_modules(module for modules in masked.values() for module in modules):
        masks = {name: bank.mask(name, module) for name in names if module in masked[name]}
        kept = {name: _count_kept(mask) for name, mask in masks.items()}
        for a, b in itertools.combinations(masks, 2):
            counts[a, b][module] = _count_pair(masks[a], masks[b], kept[a], kept[b])
    return counts


def _check_common(pairs: Sequence[Pair], masked: Mapping[str, Sequence[str]]) -> None:
    for a, b in pairs:
        if not set(masked[a]) & set(masked[b]):
            shown = [f"{name!r} has {', '.join(masked[name][:3]) or 'no masks'}" for name in (a, b)]
            raise ValueError(
                f"two entries must have a masked module in common besides the head {HEAD!r}, but {' and '.join(shown)}; compare "
                "entries of runs that mask the same modules"
            )


def sort_modules(modules: Iterable[str]) -> list[str]:
    """Each module once: what belongs to no layer first, then layer by layer, else as they came."""
    return sorted(dict.fromkeys(modules), key=_layer_number)


def layer_of(module: str) -> str:
    """``3`` for ``w2v_model.encoder.layers.3.fc1``; a module that belongs to no layer is its own: ``post_extract_proj``."""
    number = _layer_number(module)
    return short_name(module) if number < 0 else str(number)


def short_name(module: str) -> str:
    """The module's name without what all of them begin with."""
    return module.removeprefix(f"{ENCODER}.").removeprefix("encoder.")


def _layer_number(module: str) -> int:
    found = _LAYER.search(module)
    return int(found.group(1)) if found else -1
