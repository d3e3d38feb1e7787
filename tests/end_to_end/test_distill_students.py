"""Students of another shape than their teacher, through the criterion and the real commands: what is copied, shared, kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.initialize import hydra_init

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from tests.end_to_end.test_distill_options import CONSTANT_LR, NO_GATES, Training

ROOT = Path(__file__).parents[2]

FIRST_TWO = (*NO_GATES, "++model.init_layers='first:2'", "model.distill_layers='1,2,3'", "model.head_mode=predlayer")
SHARED = (*NO_GATES, "++model.shares_extractor=true", "model.feature_grad_mult=0")
# of another width than the teacher, behind its extractor
NARROW = (
    *("++model.init_layers=none", "++model.encoder_layers=2", "++model.encoder_embed_dim=24"),
    *("++model.encoder_ffn_embed_dim=48", "++model.encoder_attention_heads=4"),
    *("++model.layer_norm_first=true", "++model.conv_pos=16", "++model.conv_pos_groups=4"),
)


@pytest.fixture(scope="module")
def build(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    hydra_init("stage1")
    before = Path.cwd()
    os.chdir(ROOT)
    yield lambda *overrides: Training(kit, tmp_path_factory.mktemp("training"), *overrides)
    os.chdir(before)


def teacher_state(run: Training) -> dict[str, torch.Tensor]:
    path = run.task.cfg.teacher_path
    return parse_checkpoint(compat.load_checkpoint(path), path).encoder_state


# ---------------------------------------------------------------- what is copied


def test_a_student_of_chosen_layers_starts_as_they_are(build: Callable[..., Training]) -> None:
    run = build(*NO_GATES, "++model.init_layers='2,0'", "model.distill_layers='0'")
    teacher, student = teacher_state(run), run.model.state_dict()
    assert run.model.config.num_layers == 2
    for new, old in enumerate((2, 0)):
        names = [n for n in student if n.startswith(f"encoder.layers.{new}.")]
        assert len(names) == 16
        for name in names:
            assert torch.equal(student[name], teacher[name.replace(f"layers.{new}.", f"layers.{old}.")]), name
    for name in ("feature_extractor.conv_layers.3.0.weight", "post_extract_proj.weight", "encoder.pos_conv.0.weight_v"):
        assert torch.equal(student[name], teacher[name])
    assert run.loss()["l1"] < 1e-5, "what enters the first layer is the teacher's, and its head the identity"


def test_distilhubert_in_small_learns(build: Callable[..., Training]) -> None:
    run = build(*FIRST_TWO, *CONSTANT_LR, "criterion.cosine_type=log_sig")
    before = run.loss()
    run.train(25)
    assert run.loss()["loss_distill"] < 0.9 * before["loss_distill"]
    # the two layers' heads are dropped where it fine-tunes
    run.model.remove_pretraining_modules()
    assert not any(name.startswith("heads.") for name in run.model.state_dict())


def test_the_extractor_alone_is_copied(build: Callable[..., Training]) -> None:
    run = build(*NO_GATES, *NARROW, "model.distill_layers='2:3'")
    teacher, student = teacher_state(run), run.model.state_dict()
    assert (run.model.config.embed_dim, run.model.config.num_layers) == (24, 2)
    extractor = {n for n in student if n.startswith(("feature_extractor.", "layer_norm."))}
    assert len(extractor) == 11 and all(torch.equal(student[n], teacher[n]) for n in extractor)
    assert student["post_extract_proj.weight"].shape == (24, 16)
    run.train(2)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["++model.init_layers='0,3'"], ["0 to 2", "layers [3]"]),
        (["++model.init_layers=all"], ["'first:2', 'every:4'", "'all'"]),
        (["++model.init_layers='first:2'", "model.student_path=null"], ["`model.init_layers`", "model.student_path"]),
        (
            ["++model.init_layers='first:2'", "++model.encoder_embed_dim=24"],
            ["`model.encoder_embed_dim` is 24", "first:2", "it is 32", "random weights"],
        ),
        (
            ["++model.init_layers='first:2'", "++model.encoder_layers=5"],
            ["`model.encoder_layers` is 5", "where it is 2"],
        ),
        (
            [*NARROW, "++model.conv_feature_layers='[(16, 10, 5)]'"],
            ["`model.conv_feature_layers`", "(16, 10, 5), (16, 3, 2)"],
        ),
        (["model.head_mode=none", *NARROW], ["same width", "24 and 32"]),
        (["++model.init_layers='first:2'", "model.distill_layers='3'"], ["layer 3 of the student", "0 to 2"]),
    ],
)
def test_what_contradicts(build: Callable[..., Training], options: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build(*NO_GATES, "model.distill_layers='2:3'", *options)
    assert all(part in str(error.value) for part in parts), error.value


def test_no_heads_compares_hidden_states(build: Callable[..., Training]) -> None:
    run = build(*NO_GATES, "model.head_mode=none")
    assert list(run.model.heads.parameters()) == [] and run.loss()["l1"] < 1e-5
    batch = run.batches[0]["net_input"]
    out = run.model.eval()(batch["source"], batch["padding_mask"])
    assert all(
        a is out["hidden_states"][s] for a, (s, _) in zip(out["predictions"], run.model.heads.pairs, strict=True)
    )


# ---------------------------------------------------------------- convolutions that run once


def counted(module: torch.nn.Module) -> list[int]:
    """Calls of a module, one entry each, from now on."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_convolutions_run_once_for_both(build: Callable[..., Training]) -> None:
    shared, apart = build(*SHARED), build(*NO_GATES, "model.feature_grad_mult=0")
    assert shared.loss() == apart.loss()
    calls = {run: counted(run.model.feature_extractor) for run in (shared, apart)}
    teachers = {run: counted(run.task.teacher._encoder.feature_extractor) for run in (shared, apart)}
    for run in (shared, apart):
        run.train(2)
    assert (len(calls[shared]), len(teachers[shared])) == (2, 0)
    assert (len(calls[apart]), len(teachers[apart])) == (2, 2)
    same = apart.model.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in shared.model.state_dict().items())


def test_the_shared_extractor_stays_and_is_the_students_own(build: Callable[..., Training], kit: Any) -> None:
    run = build(*SHARED, "optimizer.weight_decay=0.1")
    before = {n: v.clone() for n, v in run.model.state_dict().items() if n.startswith("feature_extractor.")}
    run.train(3)
    run.trainer.consolidate_optimizer()
    state = run.trainer.state_dict()["model"]
    assert len(before) == 9 and all(torch.equal(state[name], value) for name, value in before.items())
    assert not torch.equal(state["layer_norm.weight"], torch.ones_like(state["layer_norm.weight"]))
    assert not any(p.requires_grad for p in run.model.feature_extractor.parameters())
    run.model.remove_pretraining_modules()
    assert all(p.requires_grad for p in run.model.feature_extractor.parameters()), "fine-tuning decides anew"


def test_shared_convolutions_serve_masked_distillation_and_a_bf16_teacher(build: Callable[..., Training]) -> None:
    masks = ("criterion.mask_student=true", "model.mask_prob=0.5", "model.mask_length=3")
    targets = ("criterion.unmasked_weight=1", "criterion.unmasked_target=masked")
    run = build(*SHARED, *masks, *targets, "task.teacher_dtype=bfloat16")
    calls, teacher = counted(run.model.feature_extractor), counted(run.task.teacher._encoder.feature_extractor)
    run.train(1)
    assert (len(calls), len(teacher)) == (1, 0)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["model.feature_grad_mult=0.1"], ["`model.shares_extractor`", "feature_grad_mult is 0.1", "pass 0"]),
        (["model.student_path=OTHER"], ["`model.shares_extractor`", "differ from those of", "task.teacher_path"]),
        (["task.extra_teacher_paths=[TEACHER]"], ["`model.shares_extractor`", "2 teachers"]),
    ],
)
def test_extractors_that_cannot_be_shared(
    kit: Any, build: Callable[..., Training], tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    other = kit.write_teacher(tmp_path / "other.pt", seed=9)
    with pytest.raises(ValueError) as error:
        build(*SHARED, *(o.replace("OTHER", str(other)).replace("TEACHER", str(kit.teacher)) for o in options))
    assert all(part in str(error.value) for part in parts), error.value


def test_gated_convolutions_are_not_shared(build: Callable[..., Training]) -> None:
    with pytest.raises(ValueError, match=r"`model.shares_extractor`.*model.prune_units has conv.*take it out"):
        build("++model.shares_extractor=true", "model.feature_grad_mult=0", "model.prune_units=[conv]")
    run = build("++model.shares_extractor=true", "model.feature_grad_mult=0", "model.prune_units=[head,ffn]")
    calls = counted(run.task.teacher._encoder.feature_extractor)
    run.train(1)
    assert calls == [] and run.model.gates is not None


# ---------------------------------------------------------------- heads at inference


@pytest.mark.parametrize("layers", ["3", "all"])
def test_kept_heads_fine_tune_through_stock_wav2vec_ctc(kit: Any, tmp_path: Path, layers: str) -> None:
    """A narrow student whose output has the teacher's width: its heads' prediction, which nothing but its own file is needed for."""
    out, kept = tmp_path / "student", tmp_path / "kept.pt"
    kit.stage1(
        out, *NO_GATES, *NARROW, "model.distill_layers='1,2,3'", "model.head_mode=predlayer", max_update=2
    ).succeeded()
    last = kit.last_checkpoint(out)
    printed = kit.commands.run("s3distill", "keep-heads", last, kept, "--layers", layers).succeeded().output
    assert "width 32" in printed
    model, student = s3distill.load(kept), s3distill.load(last)
    torch.manual_seed(0)
    waveforms = torch.randn(2, 8000)
    whole = compat.load_checkpoint(last)
    heads = {n.removeprefix("heads."): v for n, v in whole["model"].items() if n.startswith("heads.")}
    hidden = student(waveforms).hidden_states[-1]
    inner = torch.nn.functional.gelu(hidden @ heads["hidden.weight"].T + heads["hidden.bias"]).chunk(3, -1)
    predictions = [x @ heads[f"linears.{i}.weight"].T + heads[f"linears.{i}.bias"] for i, x in enumerate(inner)]
    expected = predictions[2] if layers == "3" else sum(predictions) / 3
    torch.testing.assert_close(model(waveforms).x, expected, rtol=1e-4, atol=1e-5)
    folder = tmp_path / "folder"
    kit.commands.run("s3distill", "convert", kept, folder).succeeded()
    torch.testing.assert_close(s3distill.load(folder)(waveforms).x, model(waveforms).x)

    kit.commands.run(
        *("fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"),
        *("common.user_dir=s3distill", f"hydra.run.dir={tmp_path / 'tuned'}", f"task.data={kit.corpus}"),
        *(f"model.w2v_path={kept}", "optimization.max_update=3", "dataset.validate_after_updates=0"),
        *("model.freeze_finetune_updates=0", "common.log_interval=1"),
    ).succeeded()
    tuned = compat.load_checkpoint(kit.last_checkpoint(tmp_path / "tuned"))["model"]
    names = {n for n in tuned if n.startswith("w2v_encoder.w2v_model.output_heads.")}
    assert len(names) == (4 if layers == "3" else 9)
    assert tuned["w2v_encoder.proj.weight"].shape[1] == 32
    if layers == "all":
        learnt = tuned["w2v_encoder.w2v_model.output_heads.layer_weights"]
        assert learnt.shape == (3,) and learnt.abs().max() > 0, "fine-tuning learns which layer it reads"
    logits = s3distill.load(kit.last_checkpoint(tmp_path / "tuned"))(waveforms).logits
    assert logits is not None and logits.isfinite().all()


def test_what_has_no_heads_to_keep(kit: Any, tmp_path: Path) -> None:
    out = tmp_path / "student"
    kit.stage1(out, max_update=1).succeeded()
    done = kit.commands.run("s3distill", "keep-heads", kit.last_checkpoint(out), tmp_path / "kept.pt")
    assert done.status == 2 and "s3distill prune" in done.output
    done = kit.commands.run("s3distill", "keep-heads", kit.teacher, tmp_path / "kept.pt", "--layers", "3")
    assert done.status == 2 and "must be an ssl_student with prediction heads" in done.output
    assert not (tmp_path / "kept.pt").exists()


# ---------------------------------------------------------------- another frame rate

HALF_RATE = (*NO_GATES, "model.student_path=null", *NARROW[1:], "++model.time_reduction=2", "model.head_sharing=own")
CONVS = "++model.conv_feature_layers='[(8, 10, 5), (16, 1, 1)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2'"


def test_heads_bring_reduced_frames_back_whatever_the_padding(build: Callable[..., Training]) -> None:
    """FitHuBERT's: the loss of a padded batch is that of its utterances, each without the frames that no head predicts."""
    run = build(*HALF_RATE, CONVS, "model.head_init=default", "model.distill_layers='1:1,2:3'")
    batch, model = run.batches[0], run.model.eval()
    inputs = batch["net_input"]
    assert inputs["padding_mask"].any()
    loss, num_frames, _ = run.criterion(model, batch)
    expected, counted = 0.0, 0
    odd = []
    for i in range(len(batch["id"])):
        source = inputs["source"][i : i + 1, : int((~inputs["padding_mask"][i]).sum())]
        out = model(source)
        targets, _ = run.task.teacher.hidden_states(source, None, [1, 3])
        num_pairs = targets[0].shape[1] // 2
        odd.append(targets[0].shape[1] % 2)
        assert out["hidden_states"][0].shape[1] == num_pairs
        for prediction, target in zip(out["predictions"], targets, strict=True):
            assert prediction.shape == target.shape
            p, t = prediction[:, : 2 * num_pairs], target[:, : 2 * num_pairs]
            terms = (p - t).abs().mean(-1) - torch.nn.functional.cosine_similarity(p, t, dim=-1)
            expected += terms.sum().item()
        counted += 2 * num_pairs
    assert sum(odd) > 0, "no utterance has a frame left over"
    assert num_frames == counted
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_student_at_half_the_frame_rate_learns(build: Callable[..., Training]) -> None:
    masks = ("criterion.mask_student=true", "model.mask_prob=0.5", "model.mask_length=3", "criterion.unmasked_weight=1")
    run = build(*HALF_RATE, *masks, *CONSTANT_LR, "model.distill_layers='1:1,2:3'", "optimization.lr=[0.002]")
    before = run.loss()
    run.train(25)
    assert run.loss()["loss_distill"] < before["loss_distill"] - 0.1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["model.head_mode=none"], ["same width", "24 and 32"]),
        (["model.head_init=least_squares"], ["cannot be least_squares", "2 frames made of one"]),
        (
            ["criterion.temporal_layer_weight=1"],
            ["must have the same frames", "time_reduction=2", "temporal relations"],
        ),
        (
            ["++model.conv_feature_layers='[(16, 10, 5)] + [(16, 3, 2)] * 3'"],
            ["the same frames", "the teacher's convolutions"],
        ),
    ],
)
def test_frame_rates_that_do_not_meet(build: Callable[..., Training], options: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build(*HALF_RATE, "model.distill_layers='1:1,2:3'", *options)
    assert all(part in str(error.value) for part in parts), error.value


def test_options_of_heads_are_refused_without_any(build: Callable[..., Training]) -> None:
    no_heads = ("criterion.l1_weight=0", "criterion.cosine_weight=0", "model.distill_layers=''")
    temporal = ("criterion.temporal_layer_weight=1", "criterion.temporal_layers='1,3'")
    build(*no_heads, *temporal)
    for option in ("masked_weight=0.5", "target_norm=layer", "layer_weights='1,1'", "unmasked_weight=1"):
        name = option.partition("=")[0]
        with pytest.raises(
            ValueError, match=rf"`criterion.{name}` is about prediction heads, but is .* there are none"
        ):
            build(*no_heads, *temporal, f"criterion.{option}")


def test_shape_options_that_a_file_overrules_are_refused(build: Callable[..., Training]) -> None:
    with pytest.raises(ValueError, match=r"`model.encoder_embed_dim` is 48, but .* takes the shape of"):
        build("++model.encoder_embed_dim=48")
    with pytest.raises(ValueError, match=r"`model.conv_pos` is 7, but .* takes the shape of"):
        build("++model.conv_pos=7")


def test_student_layers_mean_nothing_to_heads_on_the_last_layer(build: Callable[..., Training]) -> None:
    with pytest.raises(
        ValueError, match=r"`model.distill_layers` names layers of the teacher .* but has 1:2, 2:3; leave"
    ):
        build("model.head_mode=predlayer", "model.head_init=default", "model.distill_layers='1:2,2:3'")
