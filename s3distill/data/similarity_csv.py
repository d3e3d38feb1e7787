"""Square tables of similarities as CSV files: names in the header row and in the first column."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3distill.data.manifest import write_lines

SYMMETRY_TOLERANCE = 1e-6  # of the largest value: figures that were rounded on one side of the diagonal only


@dataclass(frozen=True)
class SimilarityMatrix:
    """Similarities of named things: ``values[i, j]`` of ``names[i]`` and ``names[j]``, float64 [N, N], symmetric."""

    names: tuple[str, ...]
    values: np.ndarray

    def select(self, names: Sequence[str], source: str = "the similarity matrix") -> SimilarityMatrix:
        """The part for these names, in their order; ValueError where one is missing."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(
                f"{source} must have a row for every entry, but {', '.join(missing)} is missing; it has {', '.join(self.names)}"
            )
        order = [self.names.index(name) for name in names]
        return SimilarityMatrix(tuple(names), self.values[np.ix_(order, order)])


def read_similarity(path: str | os.PathLike[str]) -> SimilarityMatrix:
    """Reads a square, symmetric table of finite numbers; the diagonal may be anything finite.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"similarity matrix {path} does not exist; make one with `s3distill masks inventory --languages en,nl -o {path.name}`"
        )
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = [row for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    names = tuple(cell.strip() for cell in rows[0][1:]) if rows else ()
    row_names = tuple(row[0].strip() for row in rows[1:])
    if not names or row_names != names or len(set(names)) < len(names):
        raise ValueError(
            f"{path} must be a square table with the same names, each once, in the header row and in the first column, but has "
            f"columns {', '.join(names) or 'none'} and rows {', '.join(row_names) or 'none'}"
        )
    values = np.array([_numbers(path, row, len(names)) for row in rows[1:]])
    _check_symmetric(path, names, values)
    return SimilarityMatrix(names, values)


def _numbers(path: Path, row: Sequence[str], count: int) -> list[float]:
    try:
        numbers = [float(cell) for cell in row[1:]]
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers, but row {row[0]!r} does not ({error})") from error
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"{path} must have {count} finite numbers in each row, but row {row[0]!r} has {', '.join(row[1:]) or 'none'}"
        )
    return numbers


def _check_symmetric(path: Path, names: Sequence[str], values: np.ndarray) -> None:
    apart = np.abs(values - values.T)
    if apart.max() > SYMMETRY_TOLERANCE * max(np.abs(values).max(), 1.0):
        i, j = np.unravel_index(int(apart.argmax()), apart.shape)
        raise ValueError(
            f"{path} must be symmetric, but has {values[i, j]:g} for {names[i]}, {names[j]} and {values[j, i]:g} for {names[j]}, {names[i]}"
        )


def write_similarity(path: str | os.PathLike[str], matrix: SimilarityMatrix) -> None:
    """Writes what `read_similarity` reads; NaN stands as ``nan``."""
    write_csv(path, ["", *matrix.names], ([name, *row] for name, row in zip(matrix.names, matrix.values, strict=True)))


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file, whole or not at all; floats with 6 significant digits."""
    write_lines(path, [_csv_line(row) for row in [header, *rows]])


def _csv_line(row: Sequence[object]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(f"{c:.6g}" if isinstance(c, float) else c for c in row)
    return stream.getvalue()
