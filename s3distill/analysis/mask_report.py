"""The report on a bank's masks: one HTML file that opens offline, and its figures as CSV files."""

from __future__ import annotations

import html
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from s3distill.analysis.mask_plots import MAX_LINES, plot_dendrogram, plot_groups, plot_heat_map, plot_scatter
from s3distill.analysis.mask_similarity import (
    CORRELATIONS,
    MantelTest,
    MaskComparison,
    cluster,
    mantel_test,
    sort_by_cluster,
)
from s3distill.analysis.report import STYLE, captioned
from s3distill.data.manifest import write_lines
from s3distill.data.similarity_csv import SimilarityMatrix, write_csv, write_similarity
from s3distill.masks.similarity import MEASURES, Overlap, Pair

EXPLANATION = (
    "Two masks that have nothing to do with each other and keep a fraction d each already have cosine d (0.9 at 10% sparsity), so "
    "read kappa, the agreement beyond chance: 1 for the same mask, 0 for independent ones, below 0 for masks that avoid each other."
)
STARTING_POINT = (
    "Runs that start from the same scores (one seed, or the size of the weights) share what training never changed, so kappa lies "
    "above 0 for any two languages: it says which are closer, not that all of it was learned."
)

_OTHER = "other modules"  # than those of layers
_COUNTS = ("num_connections", "density_a", "density_b", "cosine", "chance_cosine", "jaccard", "kappa")


@dataclass(frozen=True)
class ReferenceTest:
    """The masks against a reference: per measure and kind of correlation a Mantel test."""

    source: str
    matrix: SimilarityMatrix
    unused: tuple[str, ...]
    tests: dict[tuple[str, str], MantelTest]


def compare_with_reference(
    comparison: MaskComparison, reference: SimilarityMatrix, source: str, permutations: int = 9999, seed: int = 0
) -> ReferenceTest:
    """Holds the masks against another similarity of the same names, such as of phoneme inventories.

    Raises:
        ValueError: it lacks an entry, or there are too few of them; see `mantel_test`.
    """
    matrix = reference.select(comparison.names, f"the reference {source}")
    tests = {
        (measure, kind): mantel_test(matrix, comparison.matrix(measure), permutations, seed, kind)
        for measure, kind in itertools.product(MEASURES, CORRELATIONS)
    }
    unused = tuple(name for name in reference.names if name not in comparison.names)
    return ReferenceTest(source, matrix, unused, tests)


def write_mask_report(
    folder: str | os.PathLike[str], comparison: MaskComparison, source: str, reference: ReferenceTest | None = None
) -> list[Path]:
    """Writes ``similarity.html``, ``pairs.csv``, ``layers.csv`` (or ``modules.csv``) and ``kappa.csv``.

    The last is square, as a reference is, so that another bank can be held against this one.

    Args:
        source: what the masks were read from, as it is to be called.
    Returns:
        The files.
    Raises:
        RuntimeError: matplotlib or scipy is not installed; nothing is written.
    """
    page = _page(f"What the masks say: {source}", _sections(comparison, reference))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("similarity.html", "pairs.csv", f"{comparison.grouping}s.csv", "kappa.csv")]
    write_lines(paths[0], [page])
    header = ["a", "b", "num_modules", *_COUNTS]
    write_csv(paths[1], header, [_csv_row(pair, overlap) for pair, overlap in comparison.pairs.items()])
    rows = [[g, *_csv_row(pair, o)] for g, found in comparison.groups.items() for pair, o in found.items()]
    write_csv(paths[2], [comparison.grouping, *header], rows)
    write_similarity(paths[3], comparison.matrix("kappa"))
    return paths


def _csv_row(pair: Pair, overlap: Overlap) -> list[object]:
    return [*pair, overlap.num_modules, *(getattr(overlap, name) for name in _COUNTS)]


def _page(title: str, parts: Sequence[str]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>'


def _sections(comparison: MaskComparison, reference: ReferenceTest | None) -> list[str]:
    kappa = comparison.matrix("kappa")
    linkage = cluster(kappa)
    ordered = kappa.select(sort_by_cluster(comparison.names, linkage))
    parts = [
        f'<p class="note">{html.escape(EXPLANATION)}</p>',
        f"<p>{html.escape(STARTING_POINT)}</p>",
        *_left_out(comparison),
    ]
    parts += ["<h2>Overlap beyond chance</h2>", captioned(plot_heat_map("kappa", ordered), "Kappa of each pair.")]
    if linkage is None:
        parts.append(
            "<p>No tree: kappa is not defined for every pair, since a mask keeps all or nothing everywhere.</p>"
        )
    else:
        tree = plot_dendrogram("average linkage", comparison.names, linkage)
        parts.append(captioned(tree, "Which masks are alike, by average linkage over 1 - kappa."))
    parts += ["<h2>Pairs</h2>", _pair_table(comparison.pairs), *_group_section(comparison)]
    return parts + ([] if reference is None else _reference_section(comparison, reference))


def _left_out(comparison: MaskComparison) -> list[str]:
    if not comparison.left_out:
        return []
    items = []
    for name, modules in comparison.left_out.items():
        shown = ", ".join(modules[:6]) + (", ..." if len(modules) > 6 else "")
        items.append(f"<li>{html.escape(f'{name}, {len(modules)} modules: {shown}')}</li>")
    return [
        "<p>The entries do not mask the same modules; each pair is compared on those that both mask. Masked by some only:</p>",
        f"<ul>{''.join(items)}</ul>",
    ]


def rank_pairs(pairs: Mapping[Pair, Overlap]) -> list[tuple[Pair, Overlap]]:
    """The most alike first by kappa; those without one last."""
    return sorted(pairs.items(), key=lambda item: (math.isnan(item[1].kappa), -item[1].kappa))


def _pair_table(pairs: Mapping[Pair, Overlap]) -> str:
    rows = [
        [
            "\u00a0-\u00a0".join(pair),
            str(o.num_modules),
            f"{o.num_connections / 1e6:.3f}",
            f"{o.density_a:.2%}",
            f"{o.density_b:.2%}",
        ]
        + [_number(value) for value in (o.kappa, o.cosine, o.chance_cosine, o.jaccard)]
        for pair, o in rank_pairs(pairs)
    ]
    titles = ["pair", "modules", "connections (millions)", "first keeps", "second keeps"]
    return _table([*titles, "kappa", "cosine", "cosine by chance", "Jaccard"], rows)


def _group_section(comparison: MaskComparison) -> list[str]:
    parts = [f"<h2>By {comparison.grouping}</h2>"]
    for title, groups in _panels(comparison).items():
        lines = {
            " - ".join(pair): [
                comparison.groups[g][pair].kappa if pair in comparison.groups[g] else math.nan for g in groups
            ]
            for pair in comparison.pairs
        }
        axis = "module" if title == _OTHER else "layer"
        svg = plot_groups(f"kappa, {title}", axis, [_tick(g, title) for g in groups], lines)
        thin = "" if len(lines) <= MAX_LINES else " Thin: one pair each."
        parts.append(
            captioned(svg, f"Kappa of each pair, {title}.{thin} All figures are in {comparison.grouping}s.csv.")
        )
    return parts


def _panels(comparison: MaskComparison) -> dict[str, list[str]]:
    """Title -> groups of one plot: all layers, or the modules of one kind."""
    if comparison.grouping == "layer":
        return {"over the layers": list(comparison.groups)}
    panels: dict[str, list[str]] = {}
    for module in comparison.groups:
        kind = module.split(".", 2)[2] if module.startswith("layers.") else _OTHER
        panels.setdefault(kind, []).append(module)
    return panels


def _tick(group: str, kind: str) -> str:
    return group.removeprefix("layers.").removesuffix(f".{kind}")


def _reference_section(comparison: MaskComparison, reference: ReferenceTest) -> list[str]:
    source = html.escape(reference.source)
    sample = max(reference.tests.values(), key=lambda test: test.num_permutations)  # 0 where a measure is not defined
    how = f"{'all ' if sample.exact else ''}{sample.num_permutations} {'' if sample.exact else 'random '}orders of the names"
    rows = [
        [f"{measure}, {kind.capitalize()}", _number(t.correlation), _number(t.p_two_sided), _number(t.p_greater)]
        for (measure, kind), t in reference.tests.items()
    ]
    unused = f" Not in the bank: {html.escape(', '.join(reference.unused))}." if reference.unused else ""
    scatter = plot_scatter(
        "masks and reference", reference.source, "kappa", reference.matrix, comparison.matrix("kappa")
    )
    return [
        f"<h2>Against {source}</h2>",
        f"<p>p-values are of Mantel's test, over {how}: pairs that share a language are not independent.{unused}</p>",
        _table(["masks by", "correlation", "p, two-sided", "p, greater"], rows),
        captioned(scatter, f"Each pair: similarity in {reference.source} and kappa of the masks."),
    ]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.4f}"
