"""The CTC head of a foreign model in fairseq's order of symbols: blank first, then the other special symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# fairseq's special symbols; `<s>` stands for the blank. Beside each, what a vocabulary of `transformers` may call it.
SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
_TOKENS = {"<pad>": ("<s>", "[CLS]"), "</s>": ("</s>", "[SEP]"), "<unk>": ("<unk>", "[UNK]")}

NEVER = -1e4  # bias of a symbol that the model does not have: probability 0, and finite in half precision


def fairseq_order(
    head: Mapping[str, Tensor], vocab: Mapping[str, Any], blank: Any, name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Rows of a head, ordered as fairseq's dictionaries are.

    Models that were converted from fairseq keep their rows: `transformers` calls the blank ``<pad>`` and fairseq's pad ``<s>``.
    Of others the rows of blank, ``<s>``, ``</s>`` and ``<unk>`` come first; one that they lack can never win.

    Args:
        head: ``weight`` [V, C] and ``bias`` [V].
        vocab: token -> row.
        blank: row of the blank symbol (``pad_token_id``).
        name: what messages call the model.
    Returns:
        The head in the new order, [V'] rows, and the symbols of its rows.
    Raises:
        ValueError: the vocabulary does not fit the head.
    """
    size = len(head["weight"])
    rows = _tokens_of_rows(vocab, size, name)
    if isinstance(blank, bool) or not isinstance(blank, int) or not 0 <= blank < size:
        raise ValueError(
            f"`pad_token_id` in config.json of {name} names the blank, so it must be one of its {size} symbols, but is {blank!r}"
        )
    found = {token: row for row, token in enumerate(rows) if row != blank}
    special: list[int | None] = [blank]
    special += [next((found[t] for t in _TOKENS[symbol] if t in found), None) for symbol in SPECIAL_SYMBOLS[1:]]
    rest = [row for row in range(size) if row not in special]
    symbols = [*SPECIAL_SYMBOLS, *(rows[row] for row in rest)]
    if len(set(symbols)) < len(symbols):
        twice = sorted({s for s in symbols if symbols.count(s) > 1})
        raise ValueError(f"the symbols of {name} must differ, but its vocab.json has {', '.join(twice)} twice")
    weight, bias = head["weight"], head["bias"]
    none = size  # one more row, for what the model lacks
    weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
    bias = torch.cat([bias, bias.new_full((1,), NEVER)])
    order = torch.tensor([none if row is None else row for row in (*special, *rest)])
    return {"weight": weight[order], "bias": bias[order]}, symbols


def _tokens_of_rows(vocab: Mapping[str, Any], size: int, name: str) -> list[str]:
    """Token of each row; a row without one (heads are padded to round sizes) gets fairseq's name for that."""
    nested = [language for language, value in vocab.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"vocab.json of {name} holds several vocabularies ({', '.join(nested[:5])}, ...), but the head has one; write the one of "
            "its language into vocab.json"
        )
    rows = {int(row): str(token) for token, row in vocab.items()}
    outside = sorted(row for row in rows if not 0 <= row < size)
    if outside or len(rows) < len(vocab):
        raise ValueError(
            f"vocab.json of {name} must number its symbols from 0 to {size - 1}, the rows of lm_head, each once, but has "
            f"{f'{outside[:5]}' if outside else 'a number twice'}; are the files of one model?"
        )
    return [rows.get(row, f"madeupword{row:04d}") for row in range(size)]
