"""Lexicons: which words there are, and how each is spelled in the symbols of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

MAX_NAMED = 5


def read_lexicon(path: str | os.PathLike[str], symbols: Mapping[str, int]) -> dict[str, list[list[int]]]:
    """Reads a lexicon in flashlight's form, a line per spelling: ``WORD<TAB>W O R D |``.

    Args:
        path: the file; a word may have several lines.
        symbols: symbol -> index in the model's output.
    Returns:
        Word -> its spellings, in the file's order, each once.
    Raises:
        ValueError: the file cannot be read, a line has no spelling, or the model lacks a symbol (all such symbols are named).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the lexicon must be a readable UTF-8 file, but {path} is not: {error}") from error
    lexicon: dict[str, list[list[int]]] = {}
    unknown: dict[str, int] = {}  # symbol -> its first line
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break  # behind the last newline
        word, *spelling = line.split() or [""]
        if not spelling:
            raise ValueError(
                f"{path}:{number}: a line of a lexicon must be a word, a tab and the symbols that spell it, but is {line!r}"
            )
        for symbol in spelling:
            if symbol not in symbols:
                unknown.setdefault(symbol, number)
        indices = [symbols.get(symbol, -1) for symbol in spelling]
        if indices not in lexicon.setdefault(word, []):
            lexicon[word].append(indices)
    _refuse_unknown(path, unknown, symbols)
    if not lexicon:
        raise ValueError(f"a lexicon must have a word at least, but {path} is empty")
    return lexicon


def _refuse_unknown(path: str | os.PathLike[str], unknown: Mapping[str, int], symbols: Mapping[str, int]) -> None:
    if unknown:
        named = ", ".join(f"{symbol!r} (line {line})" for symbol, line in list(unknown.items())[:MAX_NAMED])
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        raise ValueError(
            f"words of {path} must be spelled in the model's symbols, but it has no {named}{more}; its symbols are "
            f"{' '.join(list(symbols)[:40])}: mind upper and lower case, and the sign between words"
        )
