"""What the options of distillation do, through fairseq's own trainer in this process; fine-tuning through the commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq import tasks, utils
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.dataclass.utils import omegaconf_no_object_check
from fairseq.optim import FP16Optimizer
from fairseq.trainer import Trainer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

import s3distill
from s3distill import compat
from s3distill.gates import MEASURES, UNITS

ROOT = Path(__file__).parents[2]


class Training:
    """Stage 1 at a small shape, built as `fairseq-hydra-train` builds it, update by update."""

    def __init__(self, kit: Any, out: Path, *overrides: str) -> None:
        command = kit.stage1_command(out, *overrides)
        options = [o for o in command[command.index("stage1") + 1 :] if not o.startswith("hydra.")]
        with initialize_config_dir(str(ROOT / "config" / "quickstart"), version_base="1.1"):
            cfg = compose("stage1", [*options, f"checkpoint.save_dir={out}"])
        add_defaults(cfg)
        with omegaconf_no_object_check():
            cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
        utils.import_user_module(cfg.common)
        add_defaults(cfg)
        OmegaConf.set_struct(cfg, True)
        torch.manual_seed(cfg.common.seed)
        self.cfg = cfg
        self.task = tasks.setup_task(cfg.task)
        self.model = self.task.build_model(cfg.model)
        self.criterion = self.task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, self.task, self.model, self.criterion)
        self.batches = list(self.trainer.get_train_iterator(1).next_epoch_itr(shuffle=False))

    def train(self, num_updates: int) -> None:
        for i in range(num_updates):
            self.trainer.train_step([self.batches[i % len(self.batches)]])

    @torch.no_grad()
    def loss(self) -> dict[str, Any]:
        """Evaluation on the first batch."""
        self.model.eval()
        _, _, log = self.criterion(self.model, self.batches[0])
        self.model.train()
        return {name: float(value) / log["sample_size"] for name, value in log.items() if name != "sample_size"}


@pytest.fixture(scope="module")
def build(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    hydra_init("stage1")
    before = Path.cwd()
    os.chdir(ROOT)
    yield lambda *overrides: Training(kit, tmp_path_factory.mktemp("training"), *overrides)
    os.chdir(before)


NO_GATES = ("model.prune_units=[]", "criterion.target_sparsity=0")
CONSTANT_LR = ("lr_scheduler.warmup_updates=0", "lr_scheduler.total_num_update=1000000")
STEADY = (*CONSTANT_LR, "optimizer.gate_lr=0.3", "optimizer.multiplier_lr=0.5")


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize(
    ("unit", "measure"), [*((unit, "params") for unit in UNITS), ("conv", "macs"), ("ffn_layer", "macs")]
)
def test_each_unit_on_its_own_reaches_its_target(build: Callable[..., Training], unit: str, measure: str) -> None:
    assert set(MEASURES) == {"params", "macs"}
    target = {("conv", "params"): 0.06, ("ffn_layer", "macs"): 0.03}.get((unit, measure), 0.15)
    run = build(
        *(f"model.prune_units=[{unit}]", f"model.prune_measure={measure}", f"criterion.target_sparsity={target}"),
        *CONSTANT_LR,
        *("optimizer.gate_lr=0.5", "optimizer.multiplier_lr=1.0", "criterion.sparsity_warmup=0"),
        *("task.enable_padding=false", "task.max_sample_size=6400", "dataset.batch_size=2"),
    )
    gates, lagrangian = run.model.gates, run.model.lagrangian
    assert gates.units == (unit,)
    assert 0 <= float(run.model.expected_sparsity()) < 0.01
    full = sum(gates.kept_units()[unit])
    assert full == sum(gate.num_gates for gate in gates.gates(unit).values())

    run.train(3)
    assert lagrangian.lambda1 < 0 < lagrangian.lambda2, "below the target both terms of the penalty must grow"
    num_updates, lambda2 = 3, float(lagrangian.lambda2)
    while run.model.expected_sparsity() < target:
        assert num_updates < 120, f"it is still at {float(run.model.expected_sparsity()):.3f} of {target}"
        run.train(1)
        num_updates += 1
    at_target, kept = float(lagrangian.lambda1), sum(gates.kept_units()[unit])
    run.train(30)
    # single gates of whole layers may all still round to open at the target
    assert (min(kept, sum(gates.kept_units()[unit])) if unit.endswith("_layer") else kept) < full
    assert lagrangian.lambda1 > at_target or run.model.expected_sparsity() < target, (
        "above the target lambda1 must rise"
    )
    assert lagrangian.lambda2 > lambda2, "lambda2 only grows"


def test_the_target_rises_linearly(build: Callable[..., Training]) -> None:
    run = build("criterion.target_sparsity=0.4", "criterion.sparsity_warmup=4")
    targets = []
    for _ in range(6):
        run.train(1)
        targets.append(run.loss()["size_target_sparsity"])  # of the update that was just done
    assert targets == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_groups_have_learning_rates_of_their_own(build: Callable[..., Training]) -> None:
    run = build(
        "optimizer.gate_lr=0.3",
        "optimizer.multiplier_lr=0.05",
        "optimization.lr=[0.001]",
        "lr_scheduler.warmup_updates=2",
    )
    run.train(1)
    groups = run.trainer.optimizer.param_groups
    by_lr = {round(group["lr"] / groups[0]["lr"], 6): group for group in groups}
    assert set(by_lr) == {1.0, 300.0, 50.0}
    assert {id(p) for p in by_lr[300.0]["params"]} == {id(p) for p in run.model.gates.parameters()}
    assert {id(p) for p in by_lr[50.0]["params"]} == {id(p) for p in run.model.lagrangian.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_gates_stay_float32(build: Callable[..., Training], cast: str) -> None:
    model = build().model
    before = [parameter.clone() for parameter in (*model.gates.parameters(), *model.lagrangian.parameters())]
    getattr(model, cast)()
    after = [*model.gates.parameters(), *model.lagrangian.parameters()]
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(after, before, strict=True))
    assert model.encoder.layers[0].fc1.weight.dtype == getattr(torch, cast)
    assert {getattr(p, "param_group", "main") for p in model.parameters()} == {"main", "gate", "multiplier"}


def test_bf16_training_keeps_groups_and_gates(build: Callable[..., Training]) -> None:
    """fairseq casts the model and keeps float32 copies in its FP16Optimizer; the groups must survive both."""
    run = build("common.bf16=true", *STEADY, "criterion.sparsity_warmup=0")
    assert type(run.trainer.optimizer).__name__ == "FP16Optimizer"
    scales = sorted(group["lr_scale"] for group in run.trainer.optimizer.param_groups)
    assert scales == pytest.approx([1.0, 300.0, 500.0])
    before = run.model.gates.gates("ffn")[0].log_alpha.clone()
    run.train(3)
    after = run.model.gates.gates("ffn")[0].log_alpha
    assert after.dtype == torch.float32 and run.model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    assert (after - before).abs().max() > 0.3, "gates move at their own learning rate"
    assert (after != after.bfloat16()).any(), "gates are not rounded to bfloat16"


def test_fp16_keeps_groups(build: Callable[..., Training]) -> None:
    """One flat buffer would lose the groups: fairseq is told so, and asks for `common.fp16_no_flatten_grads`."""
    run = build("++common.fp16_no_flatten_grads=true", *STEADY)
    with open_dict(run.cfg):
        run.cfg.common.fp16 = True
    optimizer = FP16Optimizer.build_optimizer(run.cfg, [p for p in run.model.half().parameters() if p.requires_grad])
    assert sorted(group["lr_scale"] for group in optimizer.param_groups) == pytest.approx([1.0, 300.0, 500.0])
    assert optimizer.fp32_optimizer.supports_flat_params is False
    optimizer.set_lr(0.0005)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.0005, 0.15, 0.25])


# ---------------------------------------------------------------- heads and losses


@pytest.mark.parametrize(
    ("overrides", "num_linears", "reads"),
    [
        (["model.head_mode=predlayer", "model.head_init=default"], 3, (3, 3, 3)),
        (["model.head_sharing=own"], 3, (0, 1, 3)),
        (["model.head_sharing=shared"], 2, (0, 1, 3)),
        (["model.head_sharing=own", "model.distill_layers='0:0,1:2,2:3'"], 3, (0, 1, 2)),
    ],
    ids=["predlayer", "own", "shared", "pairs"],
)
def test_heads(build: Callable[..., Training], overrides: list[str], num_linears: int, reads: tuple[int, ...]) -> None:
    run = build(*NO_GATES, *overrides, *CONSTANT_LR, "model.student_path=null", *SHAPE)
    assert len(run.model.heads.linears) == num_linears
    assert run.model.heads.config.student_layers == reads
    before = run.loss()
    heads_before = [p.clone() for p in run.model.heads.parameters()]
    run.train(25)
    after = run.loss()
    assert after["loss_distill"] < before["loss_distill"] - 0.05
    for layer in [name for name in before if name.startswith("loss_layer")]:
        assert after[layer] < before[layer], layer
    assert all(not torch.equal(p, b) for p, b in zip(run.model.heads.parameters(), heads_before, strict=True))


# a student of another shape than the teacher, from random weights
SHAPE = (
    "++model.conv_feature_layers='[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2'",
    "++model.encoder_layers=3",
    "++model.encoder_embed_dim=24",
    "++model.encoder_ffn_embed_dim=48",
    "++model.encoder_attention_heads=4",
    "++model.layer_norm_first=true",
    "++model.conv_pos=16",
    "++model.conv_pos_groups=4",
)


def test_least_squares_heads_start_lower(build: Callable[..., Training]) -> None:
    losses = {}
    for init in ("identity", "default", "least_squares"):
        run = build(
            *NO_GATES, "model.student_path=null", *SHAPE, f"model.head_init={init}", "model.head_sharing=own", *L2_ONLY
        )
        assert run.model.heads.linears[0].weight.shape == (32, 24)
        losses[init] = run.loss()["l2"]
    assert losses["least_squares"] < 0.8 * losses["identity"] and losses["least_squares"] < 0.8 * losses["default"], (
        losses
    )


def test_identity_heads_start_at_nothing_from_the_teacher_itself(build: Callable[..., Training]) -> None:
    log = build(*NO_GATES).loss()
    assert log["l1"] < 1e-5 and log["cosine"] == pytest.approx(-3, abs=1e-5)


L2_ONLY = ("criterion.l1_weight=0", "criterion.l2_weight=1", "criterion.cosine_weight=0")


def test_weights_and_kinds_of_loss(build: Callable[..., Training]) -> None:
    run = build(
        *NO_GATES,
        "model.student_path=null",
        *SHAPE,
        *(
            "criterion.l1_weight=0.5",
            "criterion.l2_weight=2",
            "criterion.cosine_weight=3",
            "criterion.cosine_type=log_sig",
        ),
        "criterion.layer_weights='1,0.25,4'",
    )
    batch = run.batches[0]
    inputs = batch["net_input"]
    assert inputs["padding_mask"].any()
    run.model.eval()
    loss, num_frames, _ = run.criterion(run.model, batch)
    expected, valid = torch.tensor(0.0), 0
    for i in range(len(batch["id"])):  # one utterance at a time, unpadded
        source = inputs["source"][i : i + 1, : int((~inputs["padding_mask"][i]).sum())]
        targets, _ = run.task.teacher.hidden_states(source, None, [0, 1, 3])
        predictions = run.model(source)["predictions"]
        valid += targets[0].shape[1]
        for weight, p, t in zip((1, 0.25, 4), predictions, targets, strict=True):
            terms = 0.5 * (p - t).abs().mean(-1) + 2 * (p - t).square().mean(-1)
            terms = terms - 3 * F.logsigmoid(F.cosine_similarity(p, t, dim=-1))
            expected = expected + weight * terms.sum()
    assert num_frames == valid
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------- the teacher stays out


def test_teacher_is_in_no_checkpoint_and_no_optimizer(build: Callable[..., Training]) -> None:
    run = build("task.teacher_dtype=bfloat16")
    run.train(1)
    teacher = run.task.teacher
    weights = {id(p) for p in teacher._encoder.parameters()}
    assert teacher._encoder.training is False and all(p.dtype == torch.bfloat16 for p in teacher._encoder.parameters())
    assert not any(p.requires_grad for p in teacher._encoder.parameters())
    assert not weights & {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    run.trainer.consolidate_optimizer()  # as fairseq does in front of every save
    state = run.trainer.state_dict()
    assert set(state["model"]) == set(run.model.state_dict())
    assert not weights & {id(p) for p in run.model.parameters()}
    encoder = set(compat.load_checkpoint(run.cfg.task.teacher_path)["model"])
    rest = {name.split(".")[0] for name in set(state["model"]) - encoder}
    assert rest == {"heads", "gates", "lagrangian"}
    assert state["criterion"] is None and not state["task_state"]
    num_saved = sum(value.numel() for value in state["model"].values())
    assert num_saved == sum(p.numel() for p in run.model.parameters())


def test_students_fine_tune_when_the_teacher_is_gone(kit: Any, tmp_path: Path) -> None:
    """Stock wav2vec_ctc on a gated and on a compact student, with nothing left but their own files."""
    teacher = kit.write_teacher(tmp_path / "teacher.pt")
    out, compact = tmp_path / "stage1", tmp_path / "compact.pt"
    kit.stage1(
        out,
        *(f"task.teacher_path={teacher}", f"model.student_path={teacher}"),
        *("optimizer.gate_lr=1.0", "optimizer.multiplier_lr=1.0", "criterion.target_sparsity=0.5"),
        max_update=15,
    ).succeeded()
    kit.commands.run("s3distill", "prune", kit.last_checkpoint(out), compact).succeeded()
    teacher.unlink()
    num_parameters = {}
    for name, path in (("gated", kit.last_checkpoint(out)), ("compact", compact)):
        kit.commands.run(
            *("fairseq-hydra-train", "--config-dir", "config/quickstart", "--config-name", "finetune"),
            *("common.user_dir=s3distill", f"hydra.run.dir={tmp_path / name}", f"task.data={kit.corpus}"),
            *(f"model.w2v_path={path}", "optimization.max_update=3", "dataset.validate_after_updates=0"),
            *("model.mask_prob=0.3", "model.apply_mask=true", "++model.mask_length=2", "common.log_interval=1"),
        ).succeeded()
        path.unlink()
        state = compat.load_checkpoint(kit.last_checkpoint(tmp_path / name))
        assert not any(".heads." in key or ".lagrangian." in key for key in state["model"])
        num_parameters[name] = sum(value.numel() for value in state["model"].values())
        model = s3distill.load(kit.last_checkpoint(tmp_path / name))
        torch.manual_seed(0)
        logits = model(torch.randn(2, 8000)).logits
        assert logits.shape[-1] >= 7 and torch.isfinite(logits).all()
    assert num_parameters["compact"] < 0.9 * num_parameters["gated"]


# ---------------------------------------------------------------- autocast


def test_autocast_rounds_matrix_products_and_nothing_else(build: Callable[..., Training]) -> None:
    steady = (*STEADY, "task.enable_padding=true")
    exact, rounded = build(*steady), build(*steady, "task.autocast_dtype=bfloat16")
    types: set[torch.dtype] = set()
    rounded.model.encoder.layers[0].fc1.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    rounded.model.encoder.layers[0].register_forward_hook(lambda _, __, output: types.add(output[0].dtype))
    losses = {}
    for name, run in (("exact", exact), ("rounded", rounded)):
        loss, num_frames, log = run.task.valid_step(run.batches[0], run.model, run.criterion)
        losses[name] = float(loss) / num_frames
        assert loss.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        run.train(3)
        after, num_frames, log = run.task.valid_step(run.batches[0], run.model, run.criterion)
        losses[f"{name}, trained"] = float(after) / num_frames
        assert log["size_expected_sparsity"] > 0
    assert types == {torch.bfloat16, torch.float32}, "products of fc1, and the residual stream"
    assert losses["rounded"] != losses["exact"], "autocast must be on"
    assert losses["rounded"] == pytest.approx(losses["exact"], abs=0.02)
    assert losses["rounded, trained"] == pytest.approx(losses["exact, trained"], abs=0.02)
    assert losses["exact, trained"] != pytest.approx(losses["exact"], abs=0.1), "the updates must have done something"
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())
    state = rounded.trainer.optimizer.optimizer.state
    assert {moment.dtype for values in state.values() for moment in values.values()} == {torch.float32}
    for (name, p), q in zip(rounded.model.gates.named_parameters(), exact.model.gates.parameters(), strict=True):
        assert p.grad is None or p.grad.dtype == torch.float32
        torch.testing.assert_close(p, q, atol=0.5, rtol=0, msg=f"{name}, after 3 updates of at most 0.3")


@pytest.mark.parametrize("name", ["fp16", "bf16", "amp"])
def test_autocast_is_refused_beside_another_precision(build: Callable[..., Training], name: str) -> None:
    with pytest.raises(ValueError) as caught:
        build("task.autocast_dtype=bfloat16", f"++common.{name}=true")
    text = str(caught.value)
    assert "task.autocast_dtype=bfloat16" in text and f"came with common.{name}=true; pass common.{name}=false" in text
