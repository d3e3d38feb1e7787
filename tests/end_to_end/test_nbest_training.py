"""Training on n-best lists through the real commands: each weighting acts, the terms add up, and what does not fit is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill import compat
from s3distill.data.manifest import read_manifest
from s3distill.data.nbest import Hypothesis, NbestEntry, nbest_path, write_nbest

GUESSES = (Hypothesis("A B |", -0.5, 0.9), Hypothesis("B A |", -0.9, 0.6), Hypothesis("B |", -3.0, 0.5))


@pytest.fixture(scope="module")
def data(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No `valid.nbest.jsonl`: validation is on labels."""
    folder = kit.write_corpus(tmp_path_factory.mktemp("nbest"), num_train=8, num_valid=2)
    entries = [
        NbestEntry(audio, GUESSES[: 1 + i % 3])
        for i, (audio, _) in enumerate(read_manifest(folder / "train.tsv").entries)
    ]
    write_nbest(nbest_path(folder / "train.tsv"), entries)
    return folder


def command(kit: Any, data: Path, out: Path, *overrides: str) -> list[str]:
    options = {
        **{"hydra.run.dir": out, "task._name": "audio_ctc_distill", "task.data": data, "++task.nbest": "true"},
        **{"model._name": "wav2vec_ctc_student", "model.w2v_path": kit.teacher, "model.freeze_finetune_updates": "0"},
        **{"criterion._name": "ctc_distill", "++criterion.alpha": "1", "++criterion.seq_kd": "ranked"},
        **{"optimization.max_update": "2", "dataset.batch_size": "4", "dataset.validate_after_updates": "0"},
        **{"common.log_interval": "1", "lr_scheduler.phase_ratio": "[0,0.5,0.5]"},
    }
    options |= dict(override.split("=", 1) for override in overrides)
    start = ["fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"]
    return [*start, *(f"{key}={value}" for key, value in options.items())]


def losses(output: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", output)]
    return [{name: float(line[name]) for name in line if name.startswith(("loss", "seq_"))} for line in lines]


def test_each_weighting_trains_something_else(kit: Any, data: Path, tmp_path: Path) -> None:
    weights = {}
    for kind in ("one_best", "uniform", "ranked"):
        output = kit.commands.run(*command(kit, data, tmp_path / kind, f"++criterion.seq_kd={kind}")).succeeded().output
        found = losses(output)
        assert len(found) == 2
        assert all(line["loss"] == pytest.approx(line["loss_seq"], abs=2e-3) for line in found)
        assert all(line["seq_impossible"] == 0 for line in found)
        assert '"valid_wer"' in output
        state = compat.load_checkpoint(kit.last_checkpoint(tmp_path / kind))["model"]
        weights[kind] = state["w2v_encoder.proj.weight"]
    assert not torch.equal(weights["one_best"], weights["uniform"])
    assert not torch.equal(weights["ranked"], weights["uniform"])


def test_labels_can_stand_beside_the_list(kit: Any, data: Path, tmp_path: Path) -> None:
    output = kit.commands.run(*command(kit, data, tmp_path, "++criterion.gold_weight=0.25")).succeeded().output
    for line in losses(output):
        assert line["loss"] == pytest.approx(0.25 * line["loss_ctc"] + 0.75 * line["loss_seq"], abs=2e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["++task.nbest=false"],
            r"`criterion.seq_kd=ranked` needs n-best lists, but task.nbest is false; pass task.nb",
        ),
        (
            ["++criterion.seq_kd=none"],
            r"`task.nbest=true` reads n-best lists, but criterion.seq_kd=none does not use them",
        ),
        (["++criterion.seq_beta=-1"], r"`criterion.seq_beta` must be at least 0 and finite, but is -1"),
        (["++criterion.gold_weight=2"], r"`criterion.gold_weight` is the share of the labels and must be in \[0, 1\]"),
        (["++criterion.alpha=0"], r"stands in the place of the labels, whose weight criterion.alpha is 0"),
        (["dataset.train_subset=valid"], r"valid\.nbest\.jsonl: the n-best file must be a readable file"),
    ],
)
def test_bad_combinations_are_refused(overrides: list[str], message: str, kit: Any, data: Path, tmp_path: Path) -> None:
    run = kit.commands.run(*command(kit, data, tmp_path, *overrides))
    assert run.status != 0 and re.search(message, run.output), run.output[-2000:]
    assert not kit.last_checkpoint(tmp_path).exists()
