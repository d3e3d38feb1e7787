"""`s3distill quickstart`: the whole chain on demo speech through the real commands, each shown so that it can be copied."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import s3distill
from s3distill.cli.quickstart_chain import Step, chain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="outputs/quickstart", help="folder for everything (default outputs/quickstart)"
    )
    parser.add_argument(
        "--data",
        help="folder of wav2vec manifests (train, valid, test with .ltr and dict.ltr.txt) instead of demo speech",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove what an earlier run wrote there first instead of going on where it stopped",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one minute of speech and a few updates per step: a test of the commands"
    )


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    steps = chain(out, args.smoke, args.data)
    if args.fresh:  # what the chain writes, and nothing else that may lie there
        for path in (*(step.output for step in steps), *(out / f"{step.name}.log" for step in steps), out / "done"):
            _remove(path)
    print(_statement(args.data), flush=True)
    key = ""
    for number, step in enumerate(steps, 1):
        key = _run_step(step, f"[{number}/{len(steps)}]", out, key)
    start = time.monotonic()
    results = {"data": args.data or "synthetic speech (espeak-ng)", **_collect(out, steps)}
    # the steps that were done before count with the time that they took then
    results["wall_clock_s"] = round(sum(results["seconds"].values()) + time.monotonic() - start, 1)
    _finish(out, results, steps, _statement(args.data))
    return 0


def _statement(data: str | None) -> str:
    if data:
        return f"Speech: {data}"
    return "The quickstart's speech is SYNTHETIC (espeak-ng). Its error rates say nothing about real speech."


def _run_step(step: Step, number: str, out: Path, before: str) -> str:
    """Runs one command unless it has already left its product, and returns what identifies it.

    A step is identified by its command, its recipe and the step ``before`` it, so that an edited recipe runs again, and all behind it.
    """
    record = out / "done" / f"{step.name}.json"
    line = shlex.join(step.command)
    recipe = step.recipe.read_text(encoding="utf-8") if step.recipe else ""
    key = hashlib.sha256("\n".join((before, line, recipe)).encode()).hexdigest()
    print(f"\n{number} {step.title}\n    {line}", flush=True)
    earlier = json.loads(record.read_text()) if record.is_file() else {}
    if earlier.get("key") == key and "seconds" in earlier and step.product.exists():
        print("    done before", flush=True)
        return key
    if earlier and earlier.get("key") != key:
        print("    done before by another recipe: starting over", flush=True)
        _remove(step.output)
        _remove(out / f"{step.name}.log")
        earlier = {}
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"key": key, "command": line, "spent_s": earlier.get("spent_s", 0.0)}))
    log = out / f"{step.name}.log"
    begun = time.monotonic() - earlier.get("spent_s", 0.0)  # an interrupted attempt counts
    command = [*_executable(step.command[0]), *step.command[1:]]
    try:
        with (
            log.open("a", encoding="utf-8") as sink,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process,
        ):
            assert process.stdout is not None
            for text in process.stdout:
                sink.write(text)
                _show_progress(text)
    finally:
        spent = {"key": key, "command": line, "spent_s": round(time.monotonic() - begun, 1)}
        record.write_text(json.dumps(spent))
    seconds = time.monotonic() - begun
    if process.returncode != 0 or not step.product.exists():
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        raise RuntimeError(
            f"step {step.name} failed with exit status {process.returncode} after {seconds:.0f} s; the end of {log}:\n{tail}\n"
            "Mend the cause and run the quickstart again: it goes on with this step"
        )
    record.write_text(json.dumps({"key": key, "command": line, "seconds": round(seconds, 1)}))
    print(f"\r    {seconds:.0f} s{'':<70}", flush=True)
    return key


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _executable(name: str) -> list[str]:
    """The command of this environment, also where its scripts are not on PATH or s3distill runs from a checkout."""
    script = Path(sys.executable).parent / name
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", "s3distill.cli.main"] if name == "s3distill" else [name]


def _show_progress(text: str) -> None:
    """One changing line per command: updates, loss, sparsity, error rate."""
    found = re.search(r"\[(?:train_inner|valid)\].*?(\{.*\})", text)
    if found is None:
        return
    try:
        values = json.loads(found.group(1))
    except json.JSONDecodeError:
        return
    names = {
        "num_updates": "update",
        "valid_num_updates": "update",
        "loss": "loss",
        "valid_loss": "valid loss",
        "expected_sparsity": "sparsity",
        "valid_wer": "valid WER",
    }
    shown = "  ".join(f"{label} {values[key]}" for key, label in names.items() if key in values)
    print(f"\r    {shown:<78}", end="" if sys.stdout.isatty() else "\n", flush=True)


def _collect(out: Path, steps: list[Step]) -> dict[str, Any]:
    """Measures teacher and student side by side and reads their error rates."""
    from s3distill.analysis.measure import describe, measure_rtf, measure_speedup

    models, results = {}, {}
    for name, step in (("teacher", "teacher"), ("student", "finetune")):
        path = next(s.product for s in steps if s.name == step)
        facts = describe(path)
        models[name] = s3distill.load(path)
        scores = json.loads((out / f"decode_{name}" / "scores-test.json").read_text())
        results[name] = {
            "params": facts["params"]["total"],
            "macs_per_second": facts["macs_per_second"],
            "rtf": measure_rtf(models[name]).rtf,
            "wer": scores["wer"],
            "uer": scores["uer"],
            "checkpoint_bytes": path.stat().st_size,
        }
    results["speedup"] = measure_speedup(models["teacher"], models["student"]).speedup
    results["params_removed"] = 1 - results["student"]["params"] / results["teacher"]["params"]
    results["seconds"] = {s.name: json.loads((out / "done" / f"{s.name}.json").read_text())["seconds"] for s in steps}
    return results


def _finish(out: Path, results: dict[str, Any], steps: list[Step], statement: str) -> None:
    """Writes results.json and report.html, and prints the table."""
    from s3distill import compat
    from s3distill.analysis.report import write_report
    from s3distill.encoder.checkpoint import parse_checkpoint

    temporary = out / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(out / "results.json")
    shapes = {}
    for name, path in (("teacher", steps[1].product), ("student", steps[5].product)):
        shapes[name] = parse_checkpoint(compat.load_checkpoint(path), str(path)).config
    t, s = shapes["teacher"], shapes["student"]
    kept_units = {
        "conv": [(a.channels, b.channels) for a, b in zip(s.conv_layers, t.conv_layers, strict=True)],
        "head": [(a.num_heads, b.num_heads) for a, b in zip(s.layers, t.layers, strict=True)],
        "ffn": [(a.ffn_dim, b.ffn_dim) for a, b in zip(s.layers, t.layers, strict=True)],
    }
    runs = {name: out / f"{name}.log" for name in ("teacher", "stage1", "stage2", "finetune")}
    write_report(
        out / "report.html",
        results,
        runs,
        kept_units,
        commands=[shlex.join(step.command) for step in steps],
        data_statement=statement,
    )
    print(f"\n{'':<12}{'params':>12}{'MACs/s':>12}{'RTF':>10}{'WER %':>8}{'bytes':>12}")
    for name in ("teacher", "student"):
        r = results[name]
        print(
            f"{name:<12}{r['params']:>12,}{r['macs_per_second'] / 1e6:>11.0f}M{r['rtf']:>10.4f}{r['wer']:>8.2f}{r['checkpoint_bytes']:>12,}"
        )
    print(
        f"\n{results['params_removed']:.1%} fewer parameters, encoder {results['speedup']:.2f}x faster on this CPU ({results['data']})"
    )
    print(f"{out / 'report.html'}\n{out / 'results.json'}")
