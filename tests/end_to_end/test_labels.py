"""Utterance classification with masks, through the real command: training, resuming, eval_only, and what comes out of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.data.manifest import read_manifest, write_manifest
from s3distill.data.utterance_labels import read_utterance_labels
from tests.models import labels

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "s3_router" / "labels.sh"
MAX_UPDATE = 4
SMALL = (
    *("common.log_interval=1", "optimization.lr=[0.03]", "lr_scheduler.phase_ratio=[0,0.75,0.25]"),
    *(f"optimization.max_update={MAX_UPDATE}", "dataset.batch_size=12", "dataset.batch_size_valid=2"),
    "checkpoint.save_interval_updates=3",  # in the middle of epoch 2
)
FULL = ("model.prune_rate=1", "model.co_train=true", "optimization.lr=[0.01]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_corpus(tmp_path_factory.mktemp("pitches"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labels.write_backbone(tmp_path_factory.mktemp("backbone") / "backbone.pt")


def command(data: Path, backbone: Path, out: Path, *overrides: str) -> list[str]:
    given = {
        "common.user_dir": "s3distill",
        "task.data": str(data),
        "task.labels": "pitch",
        "model.w2v_path": str(backbone),
        "hydra.run.dir": str(out),
    }
    given |= dict(override.split("=", 1) for override in (*SMALL, *overrides))
    start = ["fairseq-hydra-train", "--config-dir", "config/s3_router", "--config-name", "labels"]
    return [*start, *(f"{key}={value}" for key, value in given.items())]


@pytest.fixture(scope="module")
def trained(kit: Any, data: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder and its log."""
    out = tmp_path_factory.mktemp("run")
    return out, kit.commands.run(*command(data, backbone, out)).succeeded().output


def logged(output: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in re.findall(rf"\[{part}\]\[INFO\] - (\{{.*\}})", output)]


def accuracy(checkpoint: Path, manifest_path: Path, batch_size: int = 3) -> float:
    """Per cent, with `s3distill.load` alone."""
    model, manifest = s3distill.load(checkpoint), read_manifest(manifest_path)
    targets = read_utterance_labels(manifest_path.with_suffix(".pitch"), manifest)
    found = []
    for start in range(0, len(targets), batch_size):
        rows = range(start, min(start + batch_size, len(targets)))
        waveforms = [torch.from_numpy(soundfile.read(manifest.audio_path(i), dtype="float32")[0]) for i in rows]
        lengths = torch.tensor([len(w) for w in waveforms])
        with torch.no_grad():
            logits = model(torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), lengths).logits
        found += [model.symbols[i] for i in logits.argmax(-1).tolist()]
    return 100 * sum(map(str.__eq__, found, targets)) / len(targets)


def test_the_loss_falls_and_the_run_says_how_good_it_is(kit: Any, trained: tuple[Path, str], data: Path) -> None:
    out, output = trained
    assert "3 classes of" in output and "high, low, middle" in output
    losses = [float(entry["loss"]) for entry in logged(output, "train_inner")]
    assert len(losses) == MAX_UPDATE and losses[-1] < 0.8 * losses[0], losses
    validations = logged(output, "valid")
    assert float(validations[-1]["valid_loss"]) < 0.8 * float(validations[0]["valid_loss"])
    final = float(validations[-1]["valid_accuracy"])
    assert final > 50
    last = kit.last_checkpoint(out)
    assert accuracy(last, data / "valid.tsv") == pytest.approx(final, abs=0.01)
    best = compat.load_checkpoint(last.with_name("checkpoint_best.pt"))
    assert best["extra_state"]["best"] == pytest.approx(max(float(v["valid_accuracy"]) for v in validations), abs=0.01)
    state = compat.load_checkpoint(last)
    assert state["task_state"]["classes"] == labels.CLASSES
    assert sum(key.endswith(".scores") for key in state["model"]) == 12


def test_weights_stay_and_masks_change(kit: Any, trained: tuple[Path, str], backbone: Path) -> None:
    out, _ = trained
    before = compat.load_checkpoint(backbone)["model"]
    after = compat.load_checkpoint(kit.last_checkpoint(out))["model"]
    frozen = {name: value for name, value in before.items() if f"w2v_encoder.w2v_model.{name}" in after}
    assert len(frozen) > 30
    for name, value in frozen.items():
        assert name == "mask_emb" or torch.equal(after[f"w2v_encoder.w2v_model.{name}"], value), name
    first = compat.load_checkpoint(out / "checkpoints" / "checkpoint_2_3.pt")["model"]
    name = "w2v_encoder.w2v_model.encoder.layers.0.fc1.scores"
    assert not torch.equal(first[name], after[name])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    kit: Any, trained: tuple[Path, str], data: Path, backbone: Path, tmp_path: Path
) -> None:
    out, _ = trained
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(out / "checkpoints" / "checkpoint_2_3.pt", kit.last_checkpoint(tmp_path))
    resumed = kit.commands.run(*command(data, backbone, tmp_path)).succeeded()
    assert "@ 3 updates)" in resumed.output and len(logged(resumed.output, "train_inner")) == 1
    expected, found = (compat.load_checkpoint(kit.last_checkpoint(folder)) for folder in (out, tmp_path))
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert found["optimizer_history"][-1] == expected["optimizer_history"][-1]
    assert found["task_state"] == expected["task_state"]


@pytest.fixture(scope="module")
def two_classes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a test split only, in which one class does not occur."""
    folder = tmp_path_factory.mktemp("test_split")
    manifest = read_manifest(data / "train.tsv")
    names = read_utterance_labels(data / "train.pitch", manifest)
    rows = [i for i, name in enumerate(names) if name != "high"][:7]
    write_manifest(folder / "test.tsv", manifest.root, [manifest.entries[i] for i in rows])
    (folder / "test.pitch").write_text("".join(f"{names[i]}\n" for i in rows))
    return folder


def evaluate(trained: tuple[Path, str], two_classes: Path, backbone: Path, out: Path) -> list[str]:
    last = trained[0] / "checkpoints" / "checkpoint_last.pt"
    options = ("model.eval_only=true", "dataset.train_subset=test", "dataset.valid_subset=test")
    return command(two_classes, backbone, out, f"checkpoint.restore_file={last}", *options)


@pytest.fixture(scope="module")
def evaluated(
    kit: Any,
    trained: tuple[Path, str],
    two_classes: Path,
    backbone: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("eval")
    output = kit.commands.run(*evaluate(trained, two_classes, backbone, out)).succeeded().output
    assert "eval_only: validated test at update 4, nothing was trained" in output
    assert not logged(output, "train_inner") and not list(out.rglob("*.pt"))
    (entry,) = logged(output, "test")
    return entry


def test_eval_only_takes_the_classes_of_the_checkpoint(
    evaluated: dict[str, str], kit: Any, trained: tuple[Path, str], two_classes: Path
) -> None:
    expected = accuracy(kit.last_checkpoint(trained[0]), two_classes / "test.tsv")
    assert float(evaluated["test_accuracy"]) == pytest.approx(expected, abs=0.01)
    assert float(evaluated["test_accuracy"]) > 50


@pytest.mark.slow
def test_two_ranks_average_over_utterances(
    evaluated: dict[str, str],
    kit: Any,
    trained: tuple[Path, str],
    two_classes: Path,
    backbone: Path,
    tmp_path: Path,
) -> None:
    """7 utterances in batches of 2, 2, 2 and 1 on two ranks."""
    started = kit.start_ranks(evaluate(trained, two_classes, backbone, tmp_path))
    first, _ = (rank.succeeded() for rank in started)
    (entry,) = logged(first.output, "test")
    for name in ("test_accuracy", "test_loss"):
        assert float(entry[name]) == pytest.approx(float(evaluated[name]), abs=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_is_the_same_recipe(kit: Any, data: Path, backbone: Path, tmp_path: Path) -> None:
    output = kit.commands.run(*command(data, backbone, tmp_path, *FULL)).succeeded().output
    assert "0 masks" in output
    losses = [float(entry["loss"]) for entry in logged(output, "train_inner")]
    assert losses[-1] < 0.8 * losses[0], losses
    last = kit.last_checkpoint(tmp_path)
    state = compat.load_checkpoint(last)
    assert not any(key.endswith(".scores") for key in state["model"])
    start = compat.load_checkpoint(backbone)["model"]
    name = "encoder.layers.0.fc1.weight"
    assert not torch.equal(state["model"][f"w2v_encoder.w2v_model.{name}"], start[name])
    final = float(logged(output, "valid")[-1]["valid_accuracy"])
    assert accuracy(last, data / "valid.tsv") == pytest.approx(final, abs=0.01)


def test_a_label_that_training_lacks_stops_the_run(kit: Any, data: Path, backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    names = (folder / "valid.pitch").read_text().splitlines()
    (folder / "valid.pitch").write_text("\n".join([*names[:2], "lwo", *names[3:]]) + "\n")
    run = kit.commands.run(*command(folder, backbone, tmp_path / "out"))
    assert run.status != 0
    assert (
        f"{folder}/valid.pitch:3: a label must be one of the 3 classes of {folder}/train.pitch (high, low, middle)"
        in (run.output)
    )
    assert "it is 'lwo'" in run.output and not logged(run.output, "train_inner")


@pytest.fixture
def environment() -> dict[str, str]:
    """PATH has this Python's commands."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_the_example_runs_from_start_to_end(
    data: Path, backbone: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    given = {"DATA": data, "BACKBONE": backbone, "LABELS": "pitch", "TEST": "valid", "OUT": tmp_path}
    environment |= {key: str(value) for key, value in given.items()}
    environment["ARGS"] = "optimization.max_update=2 common.log_interval=1"
    done = subprocess.run([EXAMPLE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = (tmp_path / "table.md").read_text().splitlines()[-1].strip("| ").split(" | ")
    assert row[:4] == ["pitch", "3", "7", "42.9"]
    for kind, found in zip(("mask", "full", "head"), row[4:7], strict=True):
        expected = accuracy(tmp_path / f"{kind}_pitch" / "checkpoints" / "checkpoint_last.pt", data / "valid.tsv")
        assert float(found) == pytest.approx(expected, abs=0.06)
    mask, full, head = map(float, row[7:])
    assert 0 == head < mask < full / 10  # megabytes; this head has 99 parameters


def test_the_example_says_what_it_needs(environment: dict[str, str]) -> None:
    environment.pop("DATA", None)
    done = subprocess.run([EXAMPLE], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: DATA=DIR [OPTION=...] examples/s3_router/labels.sh" in done.stderr
