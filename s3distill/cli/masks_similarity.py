"""`s3distill masks similarity BANK`: how much the masks of each two entries share, beyond chance."""

from __future__ import annotations

import argparse
from pathlib import Path

from s3distill.analysis.mask_report import compare_with_reference, rank_pairs, write_mask_report
from s3distill.analysis.mask_similarity import GROUPINGS, compare_masks
from s3distill.cli.masks import add_bank_or_path
from s3distill.data.similarity_csv import read_similarity
from s3distill.masks.bank import MaskBank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bank_or_path(parser)
    parser.add_argument("--by", choices=list(GROUPINGS), default="layer", help="what the curves run over (%(default)s)")
    parser.add_argument(
        "--reference",
        metavar="CSV",
        help="similarity of the same names to hold the masks against: a square table, as masks inventory writes",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=9999,
        metavar="N",
        help="of the Mantel test (%(default)s; all, where no more exist)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random permutations (%(default)s)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="folder for similarity.html and its CSV files"
    )


def run(args: argparse.Namespace) -> int:
    path = args.bank or args.path
    comparison = compare_masks(MaskBank.open(path), args.by)
    reference = None
    if args.reference:
        matrix = read_similarity(args.reference)
        reference = compare_with_reference(comparison, matrix, Path(args.reference).name, args.permutations, args.seed)
    paths = write_mask_report(args.output, comparison, Path(path).name, reference)
    for (a, b), overlap in rank_pairs(comparison.pairs):
        print(
            f"{a} {b}: kappa {overlap.kappa:.4f}, cosine {overlap.cosine:.4f} (by chance {overlap.chance_cosine:.4f})"
        )
    if reference:
        test = reference.tests["kappa", "pearson"]
        print(
            f"kappa against {reference.source}: Pearson r {test.correlation:.3f}, Mantel p {test.p_two_sided:.4f} two-sided, "
            f"{test.p_greater:.4f} greater"
        )
    print(f"wrote {', '.join(map(str, paths))}")
    return 0
