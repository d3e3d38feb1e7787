"""What several runs cost and reach: one point per run, from its checkpoint, its logs and its decoding results."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from s3distill import compat
from s3distill.analysis.curves import read_curves
from s3distill.analysis.measure import measure_rtfs
from s3distill.encoder.checkpoint import ParsedCheckpoint, parse_checkpoint
from s3distill.encoder.speech_model import SpeechModel
from s3distill.gates import GateCounts, count_macs_per_second, count_parameters
from s3distill.masks.state import baked
from s3distill.pruning.compact import load_gates
from s3distill.pruning.plan import plan_from_gates
from s3distill.pruning.surgery import cut
from s3distill.pruning.width import cut_ctc_head

logger = logging.getLogger(__name__)

CHECKPOINT = Path("checkpoints/checkpoint_last.pt")
LOG = "hydra_train.log"
SWEEP = "multirun.yaml"  # hydra leaves it in the folder of a sweep
_SECONDS = re.compile(r"done training in ([0-9.]+) seconds")


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        name: what the table and the plots call it.
        series: points of one series (a sweep) are joined by a line; None = stands alone.
        params: of the encoder without heads and gates, closed gates cut.
        macs_per_second: of the encoder, per second of audio.
        rtf: real-time factor of the encoder on this machine, None = not measured.
        wer, uer: percent, of the decoded split, or None.
        loss: distillation loss per frame at the last validation, without the size penalty, or None.
        minutes: of training, over the trainings of the run that came to an end, or None.
    """

    name: str
    params: int
    macs_per_second: float
    series: str | None = None
    rtf: float | None = None
    wer: float | None = None
    uer: float | None = None
    loss: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Run:
    """Where the parts of a point lie. A run is a folder of one training, or of several that followed each other."""

    name: str
    checkpoint: Path
    logs: tuple[Path, ...] = ()
    scores: Path | None = None
    series: str | None = None


def find_runs(paths: Iterable[str | os.PathLike[str]], subset: str = "test") -> list[Run]:
    """Runs by what the user names.

    Args:
        paths: a checkpoint file; the folder of one training (``checkpoints/``); a folder of trainings that followed each other
            (the last of them counts, as in ``stage1/ stage2/ finetune/``); or the folder of a sweep, which stands for all of its
            jobs. ``NAME=PATH`` names it; else it is called after its file or folder.
        subset: the split whose ``scores-SUBSET.json`` counts, anywhere below the folder.
    Raises:
        ValueError: nothing there, or two runs of one name.
    """
    runs: list[Run] = []
    for item in map(os.fspath, paths):
        name, equals, rest = item.partition("=")
        named = bool(equals) and not Path(item).exists()
        path = Path(rest if named else item)
        if (path / SWEEP).is_file():
            jobs = sorted((job for job in path.iterdir() if _trainings(job)), key=lambda job: job.name)
            if not jobs:
                raise ValueError(f"no job of the sweep {path} has written {CHECKPOINT}; let one finish")
            series = name if named else path.name
            runs += [_run(job, f"{series} {job.name}" if named else job.name, subset, series) for job in jobs]
        else:
            runs.append(_run(path, name if named else (path.stem if path.is_file() else path.name), subset, None))
    names = [run.name for run in runs]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"runs must have different names, but {', '.join(double)} came twice; name them: NAME=PATH")
    return runs


def _trainings(folder: Path) -> list[Path]:
    """Folders of trainings at or directly below a folder, the oldest first."""
    found = [folder / CHECKPOINT, *folder.glob(f"*/{CHECKPOINT}")] if folder.is_dir() else []
    there = sorted((path.stat().st_mtime, path) for path in found if path.is_file())
    return [path.parents[1] for _, path in there]


def _run(path: Path, name: str, subset: str, series: str | None) -> Run:
    if path.is_file() or (path / "config.json").is_file():  # the latter is a folder of Hugging Face
        return Run(name, path, series=series)
    trainings = _trainings(path)
    if not trainings:
        raise ValueError(
            f"a run must be a checkpoint, or a folder with {CHECKPOINT} in it or in a folder of it, but {path} is none; has its "
            "training begun?"
        )
    logs = tuple(folder / LOG for folder in trainings if (folder / LOG).is_file())
    scores = sorted(path.glob(f"**/scores-{subset}.json"))
    if len(scores) > 1:
        raise ValueError(
            f"{path} has several scores of {subset} ({', '.join(map(str, scores[:3]))}): keep one, or name the folder of one run"
        )
    return Run(name, trainings[-1] / CHECKPOINT, logs, scores[0] if scores else None, series)


def compact_checkpoint(parsed: ParsedCheckpoint, name: str) -> ParsedCheckpoint:
    """A gated student as pruning would leave it, in memory; others come back as they are."""
    if not any(key.startswith("gates.") for key in parsed.extra_state):
        return parsed
    parsed = baked(parsed, name)
    plan = plan_from_gates(parsed.config, load_gates(parsed, name).deterministic())
    config, state = cut(parsed.config, parsed.encoder_state, plan)
    extra = {key: value for key, value in parsed.extra_state.items() if not key.startswith(("gates.", "lagrangian."))}
    head = None if parsed.head_state is None else cut_ctc_head(parsed.head_state, plan.width)
    return dataclasses.replace(parsed, config=config, encoder_state=state, head_state=head, extra_state=extra)


def collect(
    runs: Sequence[Run], time_models: bool = True, seconds: float = 10.0, num_threads: int | None = None
) -> list[Point]:
    """A point per run; all models are timed in turns, so that other load meets them alike.

    Args:
        time_models: measure real-time factors.
        seconds: length of the audio that is timed.
        num_threads: CPU threads, None = torch's choice.
    Raises:
        ValueError: a checkpoint or scores that cannot be read.
    """
    points, models = [], []
    for run in runs:
        checkpoint = str(run.checkpoint)
        parsed = compact_checkpoint(parse_checkpoint(compat.load_checkpoint(checkpoint), checkpoint), checkpoint)
        counts = GateCounts.full(parsed.config)
        points.append(
            Point(
                run.name,
                int(count_parameters(parsed.config, counts)),
                float(count_macs_per_second(parsed.config, counts)),
                run.series,
                loss=_last_loss(run.logs),
                minutes=_minutes(run.logs),
                **_error_rates(run.scores),
            )
        )
        if time_models:
            models.append(SpeechModel(parsed, checkpoint))
    if not time_models:
        return points
    times = measure_rtfs(models, seconds, num_threads=num_threads)
    return [dataclasses.replace(point, rtf=time.rtf) for point, time in zip(points, times, strict=True)]


def _error_rates(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"wer": float(found["wer"]), "uer": float(found["uer"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the scores that s3_wer writes (wer, uer), but {type(error).__name__}: {error}; decode again"
        ) from error


def _last_loss(logs: Sequence[Path]) -> float | None:
    """The distillation loss at the last validation of the last training that has one."""
    for log in reversed(logs):
        try:
            curve = read_curves(log).valid.get("loss_distill")
        except ValueError as error:
            logger.warning("no loss is read from it: %s", error)
            continue
        if curve is not None:
            return curve.values[-1]
    return None


def _minutes(logs: Sequence[Path]) -> float | None:
    found = [float(s) for log in logs for s in _SECONDS.findall(log.read_text(encoding="utf-8", errors="replace"))]
    return sum(found) / 60 if found else None
