"""Temporal relations, masked distillation, normalised targets, several teachers: through the criterion and the real commands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.initialize import hydra_init

from s3distill import compat
from s3distill.losses import (
    FrameWeights,
    LossWeights,
    TemporalWeights,
    masked_hidden_state_loss,
    normalize_target,
    temporal_relation_loss,
)
from tests.end_to_end.test_distill_options import CONSTANT_LR, NO_GATES, SHAPE, Training
from tests.end_to_end.test_resume import assert_equal_runs, last_update, state_of

ROOT = Path(__file__).parents[2]

MASKS = ("criterion.mask_student=true", "model.mask_prob=0.5", "model.mask_length=3")
ARMHUBERT = (*MASKS, "criterion.unmasked_weight=1", "criterion.unmasked_target=masked")
STAR = ("criterion.temporal_layer_weight=1", "criterion.temporal_intra_weight=1", "criterion.temporal_layers='1,2,3'")
NO_HEADS = (
    *("model.distill_layers=''", "criterion.l1_weight=0", "criterion.l2_weight=0", "criterion.cosine_weight=0"),
    *NO_GATES,
)


@pytest.fixture(scope="module")
def second_teacher(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deeper and wider than the first, at the same frame rate."""
    return kit.write_teacher(
        tmp_path_factory.mktemp("second") / "second.pt", seed=2, encoder_layers=4, encoder_embed_dim=48
    )


@pytest.fixture(scope="module")
def two_teachers(second_teacher: Path) -> tuple[str, ...]:
    return (
        f"task.extra_teacher_paths=[{second_teacher}]",
        "task.teacher_weights=[1,0.25]",
        "model.distill_layers='0,1,3;0:0,3:4'",
    )


@pytest.fixture(scope="module")
def build(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    hydra_init("stage1")
    before = Path.cwd()
    os.chdir(ROOT)
    yield lambda *overrides: Training(kit, tmp_path_factory.mktemp("training"), *overrides)
    os.chdir(before)


def loss_and_gradient(run: Training) -> tuple[float, torch.Tensor]:
    """Of the first batch, without dropout, in the state that the masks are drawn in at the first update."""
    run.model.eval()
    run.model.zero_grad()
    loss, num_frames, _ = run.criterion(run.model, run.batches[0])
    loss.backward()
    run.model.train()
    gradients = [p.grad.flatten() for n, p in run.model.named_parameters() if "fc1" in n and p.grad is not None]
    return loss.item() / num_frames, torch.cat(gradients)


# ---------------------------------------------------------------- the criterion


def test_everything_at_once_is_the_sum_over_single_utterances(
    build: Callable[..., Training], two_teachers: tuple[str, ...]
) -> None:
    run = build(
        *(*NO_GATES, *ARMHUBERT, *two_teachers, "model.student_path=null", *SHAPE),
        *("criterion.l1_weight=0.5", "criterion.l2_weight=2", "criterion.masked_weight=0.7"),
        *(
            "criterion.target_norm=instance",
            "criterion.temporal_layer_weight=0.3",
            "criterion.temporal_inter_weight=0.2",
        ),
        "criterion.temporal_layers='1,3;1:2,3:4'",
    )
    batch, model = run.batches[0], run.model.eval()
    inputs = batch["net_input"]
    assert inputs["padding_mask"].any()
    loss, num_frames, log = run.criterion(model, batch)
    weights, frames = LossWeights(0.5, 2.0, 1.0), FrameWeights(0.7, 1.0)
    temporal, temporal_pairs = TemporalWeights(layer=0.3, inter=0.2), (((1, 1), (3, 3)), ((1, 2), (3, 4)))
    expected, valid = 0.0, 0
    for i, utterance in enumerate(batch["id"].tolist()):  # one at a time, unpadded
        source = inputs["source"][i : i + 1, : int((~inputs["padding_mask"][i]).sum())]
        masked = model.draw_masks(source, None, [(run.cfg.common.seed, 0, utterance)])
        out = model(source, masked=masked, num_layers=3)
        assert 0 < masked.sum() < masked.numel() and out["padding_mask"] is None
        valid += masked.numel()
        for k, (weight, predictions) in enumerate(((1.0, out["predictions"]), (0.25, out["other_predictions"][0]))):
            teacher, layers = run.task.teachers[k], ([0, 1, 3], [0, 4])[k]
            clean, _ = teacher.hidden_states(source, None, list(range(teacher.config.num_layers + 1)))
            other, _ = teacher.hidden_states(source, None, list(range(teacher.config.num_layers + 1)), masked)
            assert len(predictions) == len(layers)
            for p, layer in zip(predictions, layers, strict=True):
                targets = [normalize_target(side[layer], None, "instance") for side in (clean, other)]
                terms = masked_hidden_state_loss(p, targets[0], masked, None, weights, frames, targets[1])
                expected += weight * terms.total.item()
            relation = temporal_relation_loss(
                *(dict(enumerate(out["hidden_states"])), dict(enumerate(clean)), temporal_pairs[k], None, temporal)
            )
            expected += weight * relation.total.item()
    assert num_frames == log["sample_size"] == valid
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    names = {
        "loss",
        "loss_distill",
        "loss_masked",
        "loss_unmasked",
        "l1",
        "l2",
        "cosine",
        "loss_teacher1",
        "loss_teacher2",
    }
    names |= {"temporal_layer", "temporal_inter", "loss_layer0", "loss_layer1", "loss_layer3", "teacher2_loss_layer4"}
    names |= {"teacher2_loss_layer0", "teacher2_l1", "teacher2_temporal_inter", "teacher2_loss_masked"}
    assert names <= set(log) and "temporal_intra" not in log
    teachers = log["loss_teacher1"] + 0.25 * log["loss_teacher2"]
    assert float(log["loss_distill"]) == pytest.approx(float(teachers), rel=1e-5)


def test_each_option_changes_the_gradient_and_no_default_does(
    build: Callable[..., Training], second_teacher: Path
) -> None:
    start = (*NO_GATES, "model.student_path=null", *SHAPE)
    reference = loss_and_gradient(build(*start))
    unused = (
        "model.mask_length=3",
        "criterion.masked_weight=3",
        "criterion.temporal_layers='1,2'",
        "criterion.temporal_norm=cosine",
    )
    same = loss_and_gradient(build(*start, *unused))
    assert same[0] == reference[0] and torch.equal(same[1], reference[1])
    found = [reference]
    for options in (
        ("criterion.temporal_layer_weight=0.1",),
        ("criterion.temporal_intra_weight=0.1",),
        ("criterion.temporal_inter_weight=0.1",),
        ("criterion.temporal_inter_weight=0.1", "criterion.temporal_norm=cosine"),
        ("criterion.target_norm=instance",),
        ("criterion.target_norm=layer",),
        MASKS,
        (*MASKS, "criterion.unmasked_weight=1"),
        ARMHUBERT,
        (f"task.extra_teacher_paths=[{second_teacher}]",),
        (f"task.extra_teacher_paths=[{second_teacher}]", "task.teacher_weights=[1,0.5]"),
    ):
        loss, gradient = loss_and_gradient(build(*start, *options))
        for other_loss, other in found:
            assert loss != pytest.approx(other_loss, rel=1e-6) and (gradient - other).abs().max() > 1e-7, options
        found.append((loss, gradient))


def test_masks_follow_seed_update_and_utterance(build: Callable[..., Training]) -> None:
    run = build(*MASKS)
    batch = run.batches[0]

    def masks() -> torch.Tensor:
        return run.criterion._draw_masks(run.model, batch)

    first = masks()
    torch.manual_seed(99)
    assert torch.equal(masks(), first)
    assert run.model(batch["net_input"]["source"], batch["net_input"]["padding_mask"], masked=first)["masked"] is first
    run.train(2)
    after = masks()
    assert not torch.equal(after, first)
    run.model.eval()
    assert torch.equal(masks(), first), "in validation they are always the same, so that losses compare"
    run.model.train()
    assert not torch.equal(build(*MASKS, "common.seed=2").criterion._draw_masks(run.model, batch), first)


def test_temporal_relations_need_no_heads(build: Callable[..., Training]) -> None:
    """A narrower student of two layers, nothing but Gram matrices."""
    narrow = [option.replace("encoder_layers=3", "encoder_layers=2") for option in SHAPE]
    run = build(
        *(*NO_HEADS, "model.student_path=null", *narrow, *CONSTANT_LR, "criterion.temporal_norm=cosine"),
        *(
            "criterion.temporal_layer_weight=1",
            "criterion.temporal_inter_weight=1",
            "criterion.temporal_layers='0:0,1:1,2:3'",
        ),
    )
    config = run.model.config
    assert run.model.heads is None and (config.num_layers, config.embed_dim) == (2, 24)
    before = run.loss()
    run.train(20)
    after = run.loss()
    assert after["temporal_layer"] < 0.9 * before["temporal_layer"], (before, after)
    assert after["temporal_inter"] < 0.9 * before["temporal_inter"], (before, after)


def test_masked_frames_are_learnt(build: Callable[..., Training]) -> None:
    run = build(*NO_GATES, *MASKS, *CONSTANT_LR)
    before = run.loss()
    assert before["loss_unmasked"] == 0
    run.train(25)
    assert run.loss()["loss_masked"] < before["loss_masked"] - 0.05


def test_least_squares_heads_fit_normalised_targets_of_each_teacher(
    build: Callable[..., Training], two_teachers: tuple[str, ...]
) -> None:
    start = (
        *NO_GATES,
        *two_teachers,
        "model.student_path=null",
        *SHAPE,
        "model.head_sharing=own",
        "criterion.target_norm=layer",
    )
    l2 = ("criterion.l1_weight=0", "criterion.l2_weight=1", "criterion.cosine_weight=0")
    fitted, default = (build(*start, *l2, f"model.head_init={init}").loss() for init in ("least_squares", "default"))
    assert fitted["l2"] < 0.8 * default["l2"] and fitted["teacher2_l2"] < 0.8 * default["teacher2_l2"]


def test_teachers_are_in_no_checkpoint(build: Callable[..., Training], two_teachers: tuple[str, ...]) -> None:
    run = build(*two_teachers, "task.teacher_dtype=bfloat16")
    run.train(1)
    first, second = run.task.teachers
    assert (first.config.embed_dim, second.config.embed_dim) == (32, 48)
    assert second.dtype == torch.bfloat16 and run.task.teacher is first
    weights = {id(p) for teacher in (first, second) for p in teacher._encoder.parameters()}
    assert not weights & {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    run.trainer.consolidate_optimizer()
    state = run.trainer.state_dict()
    extra = {name for name in state["model"] if name.startswith("heads.others.")}
    assert extra == {f"heads.others.0.linears.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert state["model"]["heads.others.0.linears.0.weight"].shape == (48, 32)
    assert sum(v.numel() for v in state["model"].values()) == sum(p.numel() for p in run.model.parameters())
    assert state["criterion"] is None and not state["task_state"]
    assert run.cfg.model.extra_teacher_dims == [48]


def test_bf16(build: Callable[..., Training], two_teachers: tuple[str, ...]) -> None:
    run = build(
        *two_teachers,
        *ARMHUBERT,
        *STAR,
        "criterion.temporal_layers=''",
        "criterion.target_norm=instance",
        "common.bf16=true",
    )
    run.train(4)
    assert run.model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    before = compat.load_checkpoint(run.cfg.task.teacher_path)["model"]["mask_emb"]
    assert not torch.equal(run.model.mask_emb.float(), before.bfloat16().float())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_another_teacher_may_hear_normalised_waveforms(
    kit: Any, build: Callable[..., Training], tmp_path: Path
) -> None:
    """task.normalize is the first teacher's; one that was trained on normalised waveforms normalises them itself."""
    raw = kit.write_teacher(tmp_path / "raw.pt", seed=4, normalize=False)
    run = build(
        *(f"task.teacher_path={raw}", f"model.student_path={raw}", "task.normalize=false"),
        f"task.extra_teacher_paths=[{kit.teacher}]",
    )
    assert [teacher.normalizes_itself for teacher in run.task.teachers] == [False, True]
    run.train(1)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["model.mask_prob=0.5"], ["`model.mask_prob`", "leave them at 0", "criterion.mask_student=true"]),
        (
            ["criterion.mask_student=true"],
            ["`criterion.mask_student` needs masks", "`model.mask_prob` must be positive"],
        ),
        ([*MASKS, "++model.mask_channel_prob=0.2"], ["`model.mask_channel_prob`", "leave them at 0"]),
        ([*MASKS, "criterion.masked_weight=0"], ["(masked, unmasked) frames", "one positive", "(0.0, 0.0)"]),
        ([*MASKS, "criterion.unmasked_weight=-1"], ["(masked, unmasked) frames", "at least 0", "-1"]),
        (
            [*MASKS, "criterion.unmasked_target=masked"],
            ["`criterion.unmasked_target=masked`", "criterion.unmasked_weight"],
        ),
        (["criterion.temporal_intra_weight=-1"], ["weights of temporal relations", "'intra': -1.0"]),
        (
            ["criterion.temporal_layer_weight=1", "criterion.temporal_layers='9:1'"],
            ["`criterion.temporal_layers`", "0 to 3", "student", "[9]"],
        ),
        (
            ["criterion.temporal_layer_weight=1", "criterion.temporal_layers='1:9'"],
            ["`criterion.temporal_layers`", "0 to 3", "teacher.pt", "[9]"],
        ),
        (
            ["criterion.temporal_layer_weight=1", "criterion.temporal_layers='one'"],
            ["'one'", "'0,4,8,12' or '0:0,2:4'"],
        ),
        (
            ["criterion.temporal_intra_weight=1", "criterion.temporal_layers='0'"],
            ["`intra` needs one pair of layers above 0"],
        ),
        ([*NO_HEADS, "criterion.temporal_layer_weight=1"], ["`criterion.temporal_layers` must name layers", "'1,2,3'"]),
        ([*NO_HEADS[1:], *STAR], ["`model.distill_layers` must be empty", "criterion.temporal_layers"]),
        ([*NO_HEADS], ["weights (l1, l2, cosine)", "one positive"]),
        (["task.teacher_weights=[1,2]"], ["`task.teacher_weights`", "one weight per teacher (1", "has 2"]),
        (["SECOND", "task.teacher_weights=[1]"], ["`task.teacher_weights`", "one weight per teacher (2", "has 1"]),
        (
            ["SECOND", "task.teacher_weights=[1,0]"],
            ["`task.teacher_weights` must be positive", "[1.0, 0.0]", "leave out"],
        ),
        (["SECOND", "task.teacher_weights=[1,-2]"], ["`task.teacher_weights` must be positive", "-2.0"]),
        (["task.extra_teacher_paths=['']"], ["`task.extra_teacher_paths` must name a checkpoint"]),
        (["task.extra_teacher_paths=[none.pt]"], ["none.pt", "does not exist"]),
        (["SECOND", "model.distill_layers='0,1;0,1;0,1'"], ["3 groups for 2 teachers"]),
        (["SECOND", "model.distill_layers='0,1;0:0,3:9'"], ["layers to match", "0 to 4", "second.pt", "[9]"]),
        (["SECOND", "++model.extra_teacher_dims=[32]"], ["`model.extra_teacher_dims`", "48", "32", "second.pt"]),
        (
            ["SECOND", "++model.teacher_dim=32", "++model.extra_teacher_dims=[48,48]"],
            ["`model.extra_teacher_dims`", "(1)", "has 2"],
        ),
        (["SECOND", "criterion.layer_weights='1,1,1'", "model.distill_layers='0,1,3;0,4'"], ["layer 4 of the student"]),
        (
            ["SECOND", "criterion.layer_weights='1,1,1'", "model.distill_layers='0,1,3;0,3'"],
            ["`criterion.layer_weights`", "(2)", "has 3"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and "=" in value[-1] else "",
)
def test_errors(build: Callable[..., Training], second_teacher: Path, options: list[str], parts: list[str]) -> None:
    options = [f"task.extra_teacher_paths=[{second_teacher}]" if option == "SECOND" else option for option in options]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        build(*options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_another_teacher_with_other_frames(kit: Any, build: Callable[..., Training], tmp_path: Path) -> None:
    slow = kit.write_teacher(
        tmp_path / "slow.pt", conv_feature_layers="[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 3"
    )
    with pytest.raises(ValueError) as error:
        build(f"task.extra_teacher_paths=[{slow}]")
    assert all(part in str(error.value) for part in ("same frames", str(slow), "320", "640")), str(error.value)


def test_another_teacher_without_normalisation(kit: Any, build: Callable[..., Training], tmp_path: Path) -> None:
    raw = kit.write_teacher(tmp_path / "raw.pt", normalize=False)
    with pytest.raises(ValueError) as error:
        build(f"task.extra_teacher_paths=[{raw}]")
    assert all(part in str(error.value) for part in (str(raw), "not normalised", "task.normalize=false")), str(
        error.value
    )


# ---------------------------------------------------------------- the real commands


def logged(output: str) -> dict[str, float]:
    """What the last line of training says."""
    found = [json.loads(line) for line in re.findall(r"train_inner\]\[INFO\] - (\{.*\})", output)]
    return {name: float(value) for name, value in found[-1].items()}


COMMANDS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "STaR": (STAR, {"temporal_layer", "temporal_intra", "loss_layer3"}),
    "STaR, no heads": ((*STAR, *NO_HEADS), {"temporal_layer", "temporal_intra"}),
    "LightHuBERT": (MASKS, {"loss_masked", "loss_unmasked"}),
    "ARMHuBERT": (ARMHUBERT, {"loss_masked", "loss_unmasked"}),
    "instance": (("criterion.target_norm=instance",), {"loss_layer3"}),
    "layer": (("criterion.target_norm=layer", "task.enable_padding=false"), {"loss_layer3"}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_three_updates(kit: Any, tmp_path: Path, name: str) -> None:
    options, parts = COMMANDS[name]
    student = kit.write_teacher(tmp_path / "student.pt", seed=5)  # a copy of the teacher would have nothing to learn
    options = (*options, f"model.student_path={student}", "dataset.validate_interval_updates=3")
    log = kit.stage1(tmp_path, *options, max_update=3).succeeded().output
    values = logged(log)
    assert values["num_updates"] == 3 and parts <= set(values), sorted(values)
    assert all(f"valid_{part}" in log for part in parts)
    state = state_of(kit, tmp_path)
    start = compat.load_checkpoint(student)["model"]
    assert not torch.equal(state["model"]["encoder.layers.1.fc1.weight"], start["encoder.layers.1.fc1.weight"])
    assert all(value.isfinite().all() for value in state["model"].values())
    masked = "masked" in "".join(parts)
    assert torch.equal(state["model"]["mask_emb"], start["mask_emb"]) is not masked, "it learns where it is used"


def test_two_teachers_through_both_stages(kit: Any, tmp_path: Path, two_teachers: tuple[str, ...]) -> None:
    """With masks and temporal relations too; pruned, and distilled on with both sets of heads; then the student stands alone."""
    out = tmp_path / "stage1"
    options = [o.replace("'1,2,3'", "''") for o in (*two_teachers, *STAR, *ARMHUBERT, "criterion.target_norm=layer")]
    log = kit.stage1(out, *options, "model.gate_init_drop=0.3", max_update=3).succeeded().output
    assert "second.pt: 4 layers, width 48, torch.float32, weight 0.25" in log
    assert {"loss_teacher1", "loss_teacher2", "teacher2_loss_layer4", "teacher2_temporal_intra"} <= set(logged(log))
    state = state_of(kit, out)
    assert state["cfg"]["model"]["extra_teacher_dims"] == [48]
    compact = tmp_path / "compact.pt"
    kit.commands.run("s3distill", "prune", kit.last_checkpoint(out), compact).succeeded()
    second = kit.stage1(
        tmp_path / "stage2", *options, *NO_GATES, f"model.student_path={compact}", max_update=3
    ).succeeded()
    assert "its heads come along" in second.output
    done = state_of(kit, tmp_path / "stage2")["model"]
    assert not any("teacher" in name for name in done) and "heads.others.0.linears.1.weight" in done
    kit.commands.run(
        *("fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"),
        *("common.user_dir=s3distill", f"hydra.run.dir={tmp_path / 'tuned'}", f"task.data={kit.corpus}"),
        *(f"model.w2v_path={kit.last_checkpoint(tmp_path / 'stage2')}", "optimization.max_update=2"),
        *("dataset.validate_after_updates=0",),
    ).succeeded()
    tuned = compat.load_checkpoint(kit.last_checkpoint(tmp_path / "tuned"))["model"]
    assert not any(".heads." in name for name in tuned)


def test_masked_distillation_resumes_to_the_same_end(kit: Any, tmp_path: Path, two_teachers: tuple[str, ...]) -> None:
    options = (*two_teachers, *ARMHUBERT, *STAR, "model.dropout=0.1", "checkpoint.save_interval_updates=5")
    whole, killed, other = (tmp_path / name for name in ("whole", "killed", "other"))
    kit.stage1(whole, *options, max_update=14).succeeded()
    command = kit.start_stage1(killed, *options, max_update=14)
    command.wait_until(lambda: last_update(command.output) > 6)
    command.kill()
    resumed = kit.stage1(killed, *options, max_update=14).succeeded()
    assert re.search(r"@ (5|10) updates\)", resumed.output), "it did not load the checkpoint"
    assert_equal_runs(state_of(kit, killed), state_of(kit, whole))
    kit.stage1(other, *options, "model.mask_prob=0.3", max_update=14).succeeded()
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_runs(state_of(kit, other), state_of(kit, whole))
