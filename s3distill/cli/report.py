"""`s3distill report RUN...`: runs beside each other, error rate or loss against parameters, MACs and real-time factor."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from s3distill.analysis.comparison import Point, collect, find_runs
from s3distill.analysis.comparison_report import markdown_table, write_comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="folder of a training, of several that followed each other, of a sweep (all of its jobs), or a checkpoint",
    )
    parser.add_argument("--teacher", metavar="[NAME=]RUN", help="what the runs are held against, drawn dashed")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE.html", help="(%(default)s)")
    parser.add_argument("--subset", default="test", help="the decoded split whose error rates count (%(default)s)")
    parser.add_argument("--join", action="store_true", help="join all runs by one line, as those of a sweep are")
    parser.add_argument("--title", default="s3distill: runs compared")
    parser.add_argument("--no-rtf", action="store_true", help="do not measure speed")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the audio that is timed (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (torch's own choice)")


def run(args: argparse.Namespace) -> int:
    if Path(args.output).suffix != ".html":
        raise ValueError(f"`--output` must end in .html, but is {args.output}; its figures go into a .csv beside it")
    teachers = find_runs([args.teacher], args.subset) if args.teacher else []
    if len(teachers) > 1:
        raise ValueError(
            f"`--teacher` must be one run, but {args.teacher} is a sweep of {len(teachers)}; name one of its jobs"
        )
    runs = find_runs(args.runs, args.subset)
    if args.join:
        runs = [dataclasses.replace(run, series=args.title) for run in runs]
    points = collect([*teachers, *runs], not args.no_rtf, args.seconds, args.threads)
    teacher: Point | None = points.pop(0) if teachers else None
    written = write_comparison(args.output, points, teacher, args.title)
    print("\n".join(markdown_table([*([teacher] if teacher else []), *points])))
    print("wrote " + ", ".join(map(str, written)))
    return 0
