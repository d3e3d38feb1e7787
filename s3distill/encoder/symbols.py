"""Which output of one CTC model means what an output of another means: by the symbols of their dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SYMBOL_MAPS = ("exact", "by_symbol")

_FILLER = "madeupword"  # fairseq pads dictionaries with such symbols to round sizes; no model says them


@dataclass(frozen=True)
class SymbolMap:
    """The symbols that teacher and student have in common, in the student's order.

    Attributes:
        teacher, student: index of each in its model's dictionary, [K] int64.
        symbols: the K symbols.
    """

    teacher: Tensor
    student: Tensor
    symbols: tuple[str, ...]

    def select(self, logits: Tensor, indices: Tensor) -> Tensor:
        """[..., V] -> [..., K]; what is left out is a softmax's mass that the rest shares."""
        whole = len(indices) == logits.shape[-1] and bool((indices == torch.arange(len(indices))).all())
        return logits if whole else logits.index_select(-1, indices.to(logits.device))


def match_symbols(
    teacher: Sequence[str], student: Sequence[str], mode: str = "exact", teacher_name: str = "the teacher"
) -> SymbolMap:
    """Pairs the outputs of two dictionaries by symbol.

    Args:
        teacher, student: symbols by index; fillers (``madeupword0001``) are left out.
        mode: ``exact``: both must have the same symbols, in whatever order. ``by_symbol``: those in common; the probability of
            the others is dropped and the rest renormalised, in both.
    Raises:
        ValueError: an unknown mode, symbols that only one has (``exact``), a symbol that comes twice, or none in common.
    """
    if mode not in SYMBOL_MAPS:
        raise ValueError(f"`task.symbol_map` must be one of {', '.join(SYMBOL_MAPS)}, but is {mode!r}")
    theirs, ours = _indices(teacher, teacher_name), _indices(student, "the student")
    lacking = {
        f"the student lacks {_shown(set(theirs) - set(ours))}": set(theirs) - set(ours),
        f"{teacher_name} lacks {_shown(set(ours) - set(theirs))}": set(ours) - set(theirs),
    }
    faults = [fault for fault, symbols in lacking.items() if symbols]
    if faults and mode == "exact":
        raise ValueError(
            f"the dictionaries of teacher and student must have the same symbols, but {'; '.join(faults)}; train the student on the "
            "teacher's dictionary, or pass task.symbol_map=by_symbol to match what they have in common"
        )
    common = tuple(symbol for symbol in ours if symbol in theirs)
    if not common:
        raise ValueError(
            f"the dictionaries of teacher and student have no symbol in common: {'; '.join(faults)}; give the student the teacher's "
            "kind of units"
        )
    return SymbolMap(
        torch.tensor([theirs[symbol] for symbol in common]), torch.tensor([ours[symbol] for symbol in common]), common
    )


def _indices(symbols: Sequence[str], name: str) -> Mapping[str, int]:
    found = {symbol: i for i, symbol in enumerate(symbols) if not symbol.startswith(_FILLER)}
    if len(found) < sum(not symbol.startswith(_FILLER) for symbol in symbols):
        twice = sorted({s for s in symbols if symbols.count(s) > 1})
        raise ValueError(
            f"the symbols of {name} must differ, but {', '.join(twice[:8])} comes twice; correct its dictionary"
        )
    return found


def _shown(symbols: set[str]) -> str:
    return ", ".join(map(repr, sorted(symbols)[:8])) + (f" and {len(symbols) - 8} more" if len(symbols) > 8 else "")
