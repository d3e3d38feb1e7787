"""Whether bfloat16 changes what a student learns: stage 1 of the quickstart in each precision, same seeds, same batches.

    python benchmarks/precision_curves.py DATA TEACHER OUT [--updates 200] [--threads 2] [--override OPTION=VALUE]...

DATA is a folder that ``s3distill demo-data`` made, TEACHER a checkpoint such as the quickstart's teacher. Each precision is a
training with ``fairseq-hydra-train`` of this checkout's config/quickstart/stage1.yaml; a second float32 run with another seed
(order of the batches, noise of the gates) shows how far apart runs are that differ by nothing that matters. Writes
OUT/curves.csv and OUT/curves.svg.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from s3distill.analysis.curves import Curve, TrainingCurves, read_curves
from s3distill.analysis.plots import plot_curves

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {
    "float32": (),
    "teacher bf16": ("task.teacher_dtype=bfloat16",),
    "teacher bf16, student autocast": ("task.teacher_dtype=bfloat16", "task.autocast_dtype=bfloat16"),
    "float32, another seed": ("common.seed=2",),
}


def train(run_dir: Path, data: Path, teacher: Path, updates: int, threads: int, overrides: tuple[str, ...]) -> None:
    """One training; a run that finished before is left as it is.

    Raises:
        SystemExit: the training failed; the message names its log.
    """
    done = run_dir / "done"
    if done.exists() and done.read_text() == str(updates):
        return
    every = max(1, updates // 10)
    command = [
        *(str(Path(sys.executable).with_name("fairseq-hydra-train")), "--config-dir", str(ROOT / "config/quickstart")),
        *("--config-name", "stage1", f"common.user_dir={ROOT / 's3distill'}", f"hydra.run.dir={run_dir}"),
        *(f"task.data={data}", f"task.teacher_path={teacher}", f"model.student_path={teacher}"),
        *(f"optimization.max_update={updates}", f"lr_scheduler.warmup_updates={updates // 8}"),
        *(f"criterion.sparsity_warmup={updates // 4}", f"common.log_interval={every}"),
        *(
            f"dataset.validate_interval_updates={every}",
            "checkpoint.save_interval_updates=0",
            "checkpoint.no_save=true",
        ),
        *overrides,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "output.log").open("w") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if status != 0:
        raise SystemExit(f"the training ended with status {status}; see {run_dir / 'output.log'}")
    done.write_text(str(updates))


def write_csv(path: Path, runs: dict[str, TrainingCurves]) -> None:
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["precision", "split", "figure", "update", "value"])
        for precision, run in runs.items():
            for split, curves in (("train", run.train), ("valid", run.valid)):
                for name in ("loss", "loss_distill", "expected_sparsity"):
                    curve = curves.get(name, Curve([], []))
                    rows.writerows(
                        [precision, split, name, update, value]
                        for update, value in zip(curve.updates, curve.values, strict=True)
                    )


def summary(runs: dict[str, TrainingCurves]) -> list[str]:
    """Validation loss of each precision at the end, and the largest distance of its curve from float32's."""
    reference = runs["float32"].valid["loss_distill"]
    lines = [f"{'':<34}{'valid loss_distill':>20}{'sparsity':>10}{'largest distance':>18}"]
    for precision, run in runs.items():
        curve = run.valid["loss_distill"]
        distance = max(abs(a - b) for a, b in zip(curve.values, reference.values, strict=True))
        sparsity = run.valid["expected_sparsity"].values[-1]
        lines.append(f"{precision:<34}{curve.values[-1]:>20.4f}{sparsity:>10.4f}{distance:>18.4f}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the manifests")
    parser.add_argument("teacher", type=Path, help="checkpoint that is teacher and start of the student")
    parser.add_argument("out", type=Path, help="folder of the runs, the CSV and the plot")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--override", action="append", default=[], help="option of every run, e.g. dataset.batch_size=2"
    )
    options = parser.parse_args()
    runs = {}
    for precision, overrides in PRECISIONS.items():
        run_dir = options.out.resolve() / precision.replace(",", "").replace(" ", "_")
        print(f"{precision}: {run_dir}", file=sys.stderr, flush=True)
        paths = options.data.resolve(), options.teacher.resolve()
        train(run_dir, *paths, options.updates, options.threads, (*options.override, *overrides))
        runs[precision] = read_curves(run_dir / "output.log")
    write_csv(options.out / "curves.csv", runs)
    curves = {precision: run.valid["loss_distill"] for precision, run in runs.items()}
    plot = plot_curves("Validation loss of stage 1 by precision", curves)
    (options.out / "curves.svg").write_text(plot)
    print("\n".join(summary(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
