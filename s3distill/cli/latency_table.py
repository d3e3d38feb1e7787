"""`s3distill latency-table CKPT`: times the parts of an encoder on this machine, for `model.prune_measure=latency`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from s3distill import compat
from s3distill.analysis.latency import measure_latency
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.gates import GateCounts, LatencyTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="the encoder that is to be pruned: the student's start")
    parser.add_argument("-o", "--output", required=True, metavar="TABLE.json", help="table to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the audio that is timed (%(default)s)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (torch's own choice)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the minimum counts (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of torch, e.g. cuda (%(default)s)")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if not output.parent.is_dir():
        raise ValueError(f"the folder of the table must exist, but {output.parent} does not; make it first")
    parsed = parse_checkpoint(compat.load_checkpoint(args.checkpoint), args.checkpoint)
    table = measure_latency(parsed.config, args.seconds, args.threads, args.repeats, args.device, progress=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_text(table.to_json())
    os.replace(temporary, output)
    _report(table)
    print(f"wrote {output}")
    return 0


def _report(table: LatencyTable) -> None:
    """Seconds by kind of part with everything open, and what all of it takes."""
    kinds: dict[str, float] = {}
    for name, seconds in table.breakdown(GateCounts.full(table.config)).items():
        kind = name.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    total = sum(kinds.values())
    facts = ", ".join(f"{key} {value}" for key, value in table.machine.items())
    print(f"{table.audio_s:g} s of audio on {facts}")
    for kind, seconds in kinds.items():
        print(f"{kind:<12}{1e3 * seconds:>10.2f} ms{seconds / total:>8.1%}")
    print(f"{'all parts':<12}{1e3 * total:>10.2f} ms, the whole encoder {1e3 * table.whole_s:.2f} ms")
    print(f"real-time factor {table.whole_s / table.audio_s:.4f}")
