"""`wav2vec_ctc_student` through the real commands: joint compression, resuming, pruning, baking, decoding, starting anew."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from tests.models import ctc_models

JOINT = {
    "++model.distill_layers": "'1,2'",
    "++model.prune_units": "[conv,head,ffn]",
    "++criterion.hidden_weight": "1.0",
    "++criterion.target_sparsity": "0.4",
    "++criterion.sparsity_warmup": "0",
    "++optimizer.gate_lr": "3.0",
    "++optimizer.multiplier_lr": "5.0",
    "model.feature_grad_mult": "1.0",
}
MASKS = {
    "++model.masks": "true",
    "++model.prune_rate": "0.6",
    "++model.init_score": "weight_magnitude",
    "++model.trainable_proj": "true",
}


MATCHING = {
    **{"++criterion.alpha": "0.3", "++criterion.mixup_alpha": "1.0", "++criterion.mixup_prob": "0.5"},
    **{
        "++criterion.teacher_mask": "same",
        "++criterion.confidence": "frames",
        "++criterion.confidence_relative": "true",
    },
    **{"++model.shares_extractor": "true", "model.feature_grad_mult": "0.0", "model.apply_mask": "true"},
    **{"model.mask_prob": "0.3", "++model.mask_length": "4", "model.dropout": "0.1"},
    **{"++task.unlabelled_subset": "more", "++task.unlabelled_weight": "0.4", "dataset.batch_size": "2"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ctc")


@pytest.fixture(scope="module")
def data(kit: Any, folder: Path) -> Path:
    data = kit.write_corpus(folder / "data", num_train=8, num_valid=3)
    shutil.copy(data / "valid.tsv", data / "more.tsv")
    return data


@pytest.fixture(scope="module")
def ctc_teacher(folder: Path) -> Path:
    return ctc_models.write_ctc(folder / "teacher.pt")


def command(data: Path, teacher: Path | None, out: Path, options: dict[str, str], max_update: int = 8) -> list[str]:
    values = {
        **{"hydra.run.dir": out, "task._name": "audio_ctc_distill", "task.data": data, "task.normalize": "false"},
        **{"model._name": "wav2vec_ctc_student", "model.w2v_path": "null", "model.freeze_finetune_updates": "0"},
        **{"criterion._name": "ctc_distill", "optimization.max_update": max_update, "dataset.batch_size": "4"},
        **{"dataset.validate_after_updates": "0", "common.log_interval": "1", "optimization.lr": "[0.003]"},
        **{"lr_scheduler.phase_ratio": "null", "++lr_scheduler.hold_steps": "8", "++lr_scheduler.decay_steps": "1"},
        **({"++task.teacher_path": teacher, "++model.student_path": teacher} if teacher else {}),
    }
    values |= options
    head = ["fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"]
    return [*head, *(f"{key}={value}" for key, value in values.items())]


def logged(output: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in re.findall(rf"\[{part}\]\[INFO\] - (\{{.*\}})", output)]


def last(out: Path) -> dict[str, Any]:
    return compat.load_checkpoint(out / "checkpoints" / "checkpoint_last.pt")


def decode(kit: Any, path: Path, data: Path, out: Path) -> str:
    options = ["--task", "audio_ctc", "--labels", "ltr", "--path", path, "--gen-subset", "valid", "--results-path", out]
    options += ["--scoring", "s3_wer", "--user-dir", "s3distill", "--batch-size", "3", "--cpu"]
    kit.commands.run("fairseq-generate", data, *options).succeeded()
    return next(out.glob("hypo.units*")).read_text()


@pytest.fixture(scope="module", params=[False, True], ids=["gates", "gates and masks"])
def joint(request: pytest.FixtureRequest, kit: Any, data: Path, ctc_teacher: Path, folder: Path) -> tuple[Path, str]:
    out = folder / f"joint{request.param}"
    options = JOINT | (MASKS if request.param else {})
    return out, kit.commands.run(*command(data, ctc_teacher, out, options)).succeeded().output


def test_every_term_is_logged_and_acts(joint: tuple[Path, str], ctc_teacher: Path) -> None:
    out, output = joint
    lines = logged(output, "train_inner")
    assert [line["num_updates"] for line in lines] == [str(i) for i in range(1, 9)]
    assert {"loss", "loss_ctc", "loss_logits", "loss_hidden", "loss_layer1", "loss_layer2", "penalty"} <= set(lines[0])
    assert float(lines[-1]["lambda2"]) > 0 and float(lines[-1]["expected_sparsity"]) > float(
        lines[0]["expected_sparsity"]
    )
    assert lines[-1]["kept_ffn_0"] != lines[0]["kept_ffn_0"]
    first = {name: float(lines[0][name]) for name in ("loss", "loss_ctc", "loss_logits", "loss_hidden", "penalty")}
    total = 0.5 * first["loss_ctc"] + 0.5 * first["loss_logits"] + first["loss_hidden"] + first["penalty"]
    num_tokens = float(lines[0]["ntokens"])  # frames: the terms are means, and so is the loss
    assert num_tokens > 0 and abs(first["loss"] - total) < 2e-3
    assert {"wer", "uer"} <= {name.removeprefix("valid_") for name in logged(output, "valid")[-1]}
    state, start = last(out)["model"], compat.load_checkpoint(ctc_teacher)["model"]
    changed = {name for name in start if not torch.equal(state[name], start[name])}
    assert "w2v_encoder.proj.weight" in changed
    assert any("heads." in n for n in state) and any(n.startswith("gates.") for n in state)
    masked = any(name.endswith(".scores") for name in state)
    assert masked == ("gates and masks" not in str(joint[0]) and "True" in out.name)
    assert ("w2v_encoder.w2v_model.encoder.layers.0.fc1.weight" in changed) is not masked, "masked weights stay"


@pytest.mark.parametrize("kind", ["joint, masks", "function matching, unlabelled audio"])
def test_a_resumed_run_is_the_same(kind: str, kit: Any, data: Path, ctc_teacher: Path, tmp_path: Path) -> None:
    options = JOINT | MASKS if kind.startswith("joint") else MATCHING
    for updates in (4, 8):
        kit.commands.run(*command(data, ctc_teacher, tmp_path, options, updates)).succeeded()
    kit.commands.run(*command(data, ctc_teacher, tmp_path / "whole", options)).succeeded()
    resumed, whole = last(tmp_path), last(tmp_path / "whole")
    states = [{**state["model"], **(state["criterion"] or {})} for state in (resumed, whole)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), f"{name} differs by {(states[0][name] - value).abs().max()}"
    if kind.startswith("function"):
        assert states[0]["confidence.relative.mean"] > 0
    start = compat.load_checkpoint(ctc_teacher)["model"]
    assert not torch.equal(states[0]["w2v_encoder.proj.bias"], start["w2v_encoder.proj.bias"])


def test_pruned_is_what_was_masked_and_goes_on(
    joint: tuple[Path, str], kit: Any, data: Path, ctc_teacher: Path, tmp_path: Path
) -> None:
    run, compact = joint[0] / "checkpoints" / "checkpoint_last.pt", tmp_path / "compact.pt"
    output = kit.commands.run("s3distill", "prune", run, compact).succeeded().output
    assert ("masks of" in output) is ("True" in joint[0].name)
    error = float(re.search(r"relative error (\S+)", output)[1])  # type: ignore[index]
    assert error <= 1e-5
    before, after = s3distill.load(run), s3distill.load(compact)
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())
    waveforms = torch.randn(2, 9000, generator=torch.Generator().manual_seed(1))
    expected, got = before(waveforms, torch.tensor([9000, 7000])), after(waveforms, torch.tensor([9000, 7000]))
    valid = ~expected.padding_mask
    assert torch.allclose(got.logits[valid], expected.logits[valid], atol=1e-4) and after.symbols == before.symbols
    assert decode(kit, compact, data, tmp_path / "compact") == decode(kit, run, data, tmp_path / "gated")
    # as backbone, and as teacher of a student that starts from it with its heads
    options = {"model.w2v_path": str(compact), "++model.student_path": "null", "++criterion.alpha": "1"}
    kit.commands.run(*command(data, None, tmp_path / "w2v", options, 1)).succeeded()
    again = {k: v for k, v in JOINT.items() if "prune" not in k and "sparsity" not in k}
    second = kit.commands.run(*command(data, compact, tmp_path / "second", again, 1)).succeeded().output
    assert "its heads come along" in second
    first = logged(second, "train_inner")[0]
    assert abs(float(first["loss_logits"])) < 1e-6, "the student starts as its teacher"


def test_bake_works_on_a_masked_student(kit: Any, data: Path, ctc_teacher: Path, tmp_path: Path) -> None:
    options = MASKS | {"++model.distill_layers": "'2'", "++criterion.hidden_weight": "1.0"}
    kit.commands.run(*command(data, ctc_teacher, tmp_path, options, 2)).succeeded()
    run, dense = tmp_path / "checkpoints" / "checkpoint_last.pt", tmp_path / "dense.pt"
    kit.commands.run("s3distill", "masks", "bake", run, dense).succeeded()
    assert parse_checkpoint(compat.load_checkpoint(dense)).model_name == "wav2vec_ctc"
    assert decode(kit, dense, data, tmp_path / "a") == decode(kit, run, data, tmp_path / "b")


@pytest.mark.parametrize("joint", [True], indirect=True, ids=["gates and masks"])
def test_gates_are_not_baked(joint: tuple[Path, str], kit: Any, tmp_path: Path) -> None:
    failed = kit.commands.run(
        "s3distill", "masks", "bake", joint[0] / "checkpoints" / "checkpoint_last.pt", tmp_path / "x.pt"
    )
    assert failed.status != 0 and "s3distill prune" in failed.output and not (tmp_path / "x.pt").exists()


@pytest.mark.slow
def test_two_ranks_train_and_save_the_threshold(kit: Any, data: Path, ctc_teacher: Path, tmp_path: Path) -> None:
    """A criterion with a parameter that does not learn is wrapped by fairseq's DDP, too."""
    options = MATCHING | {"dataset.batch_size": "4", "++criterion.mixup_alpha": "0.0", "++criterion.mixup_prob": "1.0"}
    for each in kit.start_ranks(command(data, ctc_teacher, tmp_path, options, 2)):
        each.succeeded()
    state = last(tmp_path)
    assert state["criterion"]["confidence.relative.num_updates"] == 2
    assert 0 < state["criterion"]["confidence.relative.mean"] < 1
