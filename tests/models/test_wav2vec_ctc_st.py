"""`wav2vec_ctc_st` as fairseq builds, loads and steps it: over every backbone, and in half precision."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import config_from_options, parse_checkpoint
from s3distill.encoder.model import SpeechEncoder
from s3distill.masks.selection import select
from s3distill.models.wav2vec_ctc_st import Wav2VecCtcSt, Wav2VecCtcStConfig
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask
from tests.encoder import checkpoints, folders
from tests.masks.students import write_compact_student

WAVEFORM = torch.randn(2, 6000, generator=torch.Generator().manual_seed(1))
PADDING = torch.zeros(WAVEFORM.shape, dtype=torch.bool)
PADDING[1, 5000:] = True


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the task reads when it builds a model: a dictionary."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in checkpoints.LETTERS))
    return folder


BACKBONES = (*checkpoints.FAMILIES, "ssl_student", "wavlm", "large wav2vec2", "fine-tuned wav2vec2")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, large = tmp_path_factory.mktemp("backbones"), checkpoints.LARGE | checkpoints.SMALL

    def path_of(kind: str) -> Path:
        path = folder / f"{kind.replace(' ', '_')}.pt"
        if path.exists():
            return path
        if kind == "ssl_student":
            return write_compact_student(path)
        if kind == "wavlm":  # as `s3distill convert` writes it
            encoder = checkpoints.fill(SpeechEncoder(config_from_options(folders.SMALL_CFG, "wavlm")))
            options = {"_name": "ssl_student", "encoder": encoder.config.to_json()}
            compat.write_checkpoint(path, encoder.state_dict(), options, {"normalize": False})
            return path
        if kind == "fine-tuned wav2vec2":
            return checkpoints.save(checkpoints.fine_tuned("wav2vec2")[0], path)
        shape, normalize = (large, True) if kind.startswith("large") else (checkpoints.SMALL, False)
        return checkpoints.save(checkpoints.pretrained(kind.split()[-1], shape, normalize=normalize)[0], path)

    return path_of


def whole_config(data: Path, w2v_path: Path | None, normalize: bool = False, **options: Any) -> Any:
    """What `fairseq-hydra-train` hands to the trainer."""
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.task = OmegaConf.structured(AudioCtcConfig(data=str(data), labels="ltr", normalize=normalize))
    cfg.task._name = "audio_ctc"
    values = {"w2v_path": str(w2v_path), "apply_mask": False, "feature_grad_mult": 0.0, "prune_rate": 0.5, **options}
    cfg.model = OmegaConf.merge(OmegaConf.structured(Wav2VecCtcStConfig), values)
    cfg.model._name = "wav2vec_ctc_st"
    cfg.criterion = {"_name": "ctc", "zero_infinity": True}
    cfg.optimizer = {"_name": "adam", "adam_betas": "(0.9,0.98)", "adam_eps": 1e-8, "weight_decay": 0.0, "lr": [0.05]}
    cfg.lr_scheduler = {"_name": "fixed", "force_anneal": None, "lr_shrink": 0.1, "warmup_updates": 0, "lr": [0.05]}
    cfg.optimization.lr, cfg.optimization.sentence_avg, cfg.optimization.max_update = [0.05], True, 10
    cfg.distributed_training.distributed_world_size = 1
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    OmegaConf.set_struct(cfg, True)
    return cfg


def build(cfg: Any) -> Wav2VecCtcSt:
    torch.manual_seed(0)
    return AudioCtcTask(cfg.task).build_model(cfg.model)


@torch.no_grad()
def logits_of(model: Any, source: Tensor = WAVEFORM, padding: Tensor | None = PADDING) -> Tensor:
    """[B, T, V] of a fairseq CTC model in evaluation."""
    model.eval()
    return model(source=source, padding_mask=padding)["encoder_out"].transpose(0, 1)


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize("kind", BACKBONES)
def test_it_is_built_on_every_backbone(kind: str, data: Path, backbones: Callable[[str], Path]) -> None:
    path = backbones(kind)
    model = build(whole_config(data, path, normalize=kind.startswith("large")))
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    own = dict(model.w2v_encoder.w2v_model.named_parameters())
    for name, value in parsed.encoder_state.items():
        assert torch.equal(own[name], value), f"{name} is not the backbone's"
    assert {name for name in own if not name.endswith(".scores")} == set(parsed.encoder_state)
    out = model(WAVEFORM, PADDING)
    num_frames = int(parsed.config.num_frames(torch.tensor(6000)))
    assert out["encoder_out"].shape == (num_frames, 2, 4 + len(checkpoints.LETTERS))
    assert out["padding_mask"].shape == (2, num_frames) and out["padding_mask"][1].any()
    assert len(out["layer_results"]) == parsed.config.num_layers
    model.get_normalized_probs(out, log_probs=True)[:, :, 5].sum().backward()
    masked = model.w2v_encoder.masked_modules()
    learned = [name for name, module in masked.items() if module.scores.grad is not None]
    assert learned == list(masked) and learned
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {f"w2v_encoder.{n}.scores" for n in masked}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_checkpoint_rebuilds_alone(kind: str, data: Path, backbones: Callable[[str], Path], tmp_path: Path) -> None:
    """Without the backbone's file: what was read of it stands in ``w2v_args``."""
    path = tmp_path / "gone.pt"
    path.write_bytes(backbones(kind).read_bytes())
    normalize = kind.startswith("large")
    cfg = whole_config(data, path, normalize=normalize, init_score="weight_rank")
    model = build(cfg)
    path.unlink()
    lengths = (~PADDING).sum(1)
    source = (
        torch.stack([standardized(row, n) for row, n in zip(WAVEFORM, lengths, strict=True)]) if normalize else WAVEFORM
    )
    expected = logits_of(model, source)
    saved = checkpoints.save(trained_checkpoint(cfg, model), tmp_path / "run.pt")
    (again,), saved_cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(saved)])
    assert isinstance(again, Wav2VecCtcSt) and saved_cfg.model.w2v_args is not None
    torch.testing.assert_close(logits_of(again, source), expected, rtol=0, atol=0)
    again.prepare_for_inference_(saved_cfg)
    assert not any(name.endswith(".scores") for name in again.state_dict())
    torch.testing.assert_close(logits_of(again, source), expected, rtol=1e-5, atol=1e-5)

    loaded = s3distill.load(saved)  # ours, without fairseq; it normalizes itself
    ours = loaded(WAVEFORM, lengths).logits
    for i, length in enumerate(parse_checkpoint(compat.load_checkpoint(saved)).config.num_frames(lengths).tolist()):
        torch.testing.assert_close(ours[i, :length], expected[i, :length], rtol=1e-4, atol=1e-4)


def standardized(waveform: Tensor, num_valid: Tensor) -> Tensor:
    """Zero mean and unit variance over the valid samples, as fairseq's datasets do it; padding stays zero."""
    valid = waveform[: int(num_valid)]
    return torch.cat([torch.nn.functional.layer_norm(valid, valid.shape), torch.zeros(len(waveform) - len(valid))])


def trained_checkpoint(cfg: Any, model: Any) -> dict[str, Any]:
    """What fairseq's trainer saves."""
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CtcCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 5,
            }
        ],
        "task_state": {"target_dictionary": checkpoints.make_dictionary()},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 5}},
        "last_optimizer_state": None,
    }


def test_inference_is_without_dropout_and_masks(data: Path, backbones: Callable[[str], Path]) -> None:
    """fairseq-generate calls nothing else that would end training mode."""
    options = {"dropout": 0.5, "layerdrop": 0.5, "apply_mask": True, "mask_prob": 0.5, "mask_length": 2}
    cfg = whole_config(data, backbones("wav2vec2"), **options)
    model = build(cfg)
    assert model.training
    expected = logits_of(copy.deepcopy(model))
    model.prepare_for_inference_(cfg)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        out = model(source=WAVEFORM, padding_mask=PADDING)["encoder_out"].transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_no_pretrained_weights(data: Path, backbones: Callable[[str], Path]) -> None:
    """Only the shape is the file's."""
    path = backbones("wav2vec2")
    model = build(whole_config(data, path, no_pretrained_weights=True))
    state = parse_checkpoint(compat.load_checkpoint(path)).encoder_state
    own = dict(model.w2v_encoder.w2v_model.named_parameters())
    assert not torch.equal(own["encoder.layers.0.fc1.weight"], state["encoder.layers.0.fc1.weight"])
    assert own["encoder.layers.0.fc1.weight"].shape == state["encoder.layers.0.fc1.weight"].shape


def test_what_is_built_is_reported(
    data: Path, backbones: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build(
            whole_config(data, backbones("wav2vec2"), prune_rate=0.75, fix_attn=True, no_prune_post_extract_proj=True)
        )
    # 3 layers with 2 x 48 x 32 in the FFN, and mask_emb
    assert (
        "6 masks (unstructured) with 9,216 scores keep 75.00% of their connections; other parameters that learn: 32"
        in (caplog.text)
    )


# ---------------------------------------------------------------- options that reach the network


def test_scores_of_the_extractor_learn_though_its_weights_are_frozen(
    data: Path, backbones: Callable[[str], Path]
) -> None:
    """The recipes say feature_grad_mult=0, under which the original's scores get no gradient."""
    for fixed in (False, True):
        cfg = whole_config(data, backbones("wav2vec2"), no_prune_extractor=False, fix_mask=fixed, trainable_proj=True)
        model = build(cfg)
        model(WAVEFORM, PADDING)["encoder_out"].sum().backward()
        module = model.w2v_encoder.masked_modules()["w2v_model.feature_extractor.conv_layers.0.0"]
        assert (module.scores.grad is None) == fixed and module.weight.grad is None


def test_freeze_finetune_updates(data: Path, backbones: Callable[[str], Path]) -> None:
    model = build(whole_config(data, backbones("wav2vec2"), freeze_finetune_updates=3, trainable_proj=True)).train()
    for update, learns in ((0, False), (2, False), (3, True)):
        model.set_num_updates(update)
        model.zero_grad()
        model(WAVEFORM, PADDING)["encoder_out"].square().sum().backward()
        scores = model.w2v_encoder.masked_modules()["w2v_model.encoder.layers.0.fc1"].scores
        assert (scores.grad is not None) == learns and model.w2v_encoder.proj.weight.grad is not None


def test_freezing_the_encoder_where_only_scores_learn_is_refused(data: Path, backbones: Callable[[str], Path]) -> None:
    """Nothing would have a gradient; the first backward pass would fail."""
    with pytest.raises(ValueError, match=r"`freeze_finetune_updates`=3 .*trainable_proj=true") as caught:
        build(whole_config(data, backbones("wav2vec2"), freeze_finetune_updates=3))
    assert "freeze_finetune_updates=0" in str(caught.value)
    build(whole_config(data, backbones("wav2vec2"), freeze_finetune_updates=3, no_prune_proj=False))
    build(whole_config(data, backbones("wav2vec2"), freeze_finetune_updates=3, eval_only=True))


def test_specaugment_is_for_training(data: Path, backbones: Callable[[str], Path]) -> None:
    options = {
        "apply_mask": True,
        "mask_prob": 0.5,
        "mask_length": 2,
        "mask_channel_prob": 0.5,
        "mask_channel_length": 4,
    }
    model = build(whole_config(data, backbones("wav2vec2"), **options))
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    outs = [model(WAVEFORM, PADDING)["encoder_out"] for _ in range(2)]
    assert not torch.equal(*outs)
    outs[0].sum().backward()
    assert bool(model.w2v_encoder.w2v_model.mask_emb.grad.any())


def test_dropouts_reach_the_encoder(data: Path, backbones: Callable[[str], Path]) -> None:
    for option in ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "final_dropout", "layerdrop"):
        model = build(whole_config(data, backbones("wav2vec2"), **{option: 0.5})).train()
        torch.manual_seed(1)
        outs = [model(WAVEFORM, None)["encoder_out"] for _ in range(4)]
        assert any(not torch.equal(outs[0], out) for out in outs[1:]), option


def test_recomputed_layers_give_the_same_gradients(data: Path, backbones: Callable[[str], Path]) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build(whole_config(data, backbones("wav2vec2"), checkpoint_activations=checkpointed)).train()
        model(WAVEFORM, PADDING)["encoder_out"].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_padded_frames_are_blanks(data: Path, backbones: Callable[[str], Path]) -> None:
    model = build(whole_config(data, backbones("wav2vec2"))).eval()
    out = model(WAVEFORM, PADDING)
    probabilities = model.get_normalized_probs(out, log_probs=False)
    assert bool((probabilities[:, 1][out["padding_mask"][1]][:, 0] == 1).all())
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:2]))


def test_beam_search_may_reorder_the_batch(data: Path, backbones: Callable[[str], Path]) -> None:
    model = build(whole_config(data, backbones("wav2vec2"))).eval()
    out = model(WAVEFORM, PADDING)
    turned = model.w2v_encoder.reorder_encoder_out(out, torch.tensor([1, 0]))
    assert torch.equal(turned["encoder_out"], out["encoder_out"].flip(1))
    assert torch.equal(turned["padding_mask"], out["padding_mask"].flip(0))


# ---------------------------------------------------------------- errors


def test_a_missing_file(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist; check the path"):
        build(whole_config(data, tmp_path / "none.pt"))


def test_a_file_that_is_no_backbone(data: Path, tmp_path: Path) -> None:
    path = checkpoints.save(
        {"model": {"encoder.weight": torch.ones(2)}, "cfg": {"model": {"_name": "lstm"}}}, tmp_path / "lstm.pt"
    )
    with pytest.raises(ValueError, match=r"lstm\.pt is of model 'lstm'"):
        build(whole_config(data, path))


def test_a_student_whose_gates_were_not_pruned(data: Path, tmp_path: Path) -> None:
    path = write_compact_student(tmp_path / "gated.pt", {"gates.ffn.0.log_alpha": torch.zeros(48)})
    with pytest.raises(
        ValueError, match=r"has gates that were not pruned yet; cut them first: s3distill prune .*gated\.pt"
    ):
        build(whole_config(data, path))


@pytest.mark.parametrize(("kind", "normalize"), [("wav2vec2", True), ("large wav2vec2", False)])
def test_another_normalisation(kind: str, normalize: bool, data: Path, backbones: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"`task\.normalize` must be what the backbone was trained with") as caught:
        build(whole_config(data, backbones(kind), normalize=normalize))
    assert f"pass task.normalize={str(not normalize).lower()}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"prune_rate": 1.5}, "`prune_rate` is the kept fraction"),
        ({"prune_rate": 1.0}, "nothing would be trained: no module is masked"),
        ({"fix_mask": True}, "nothing would be trained: the scores of all"),
        ({"layerwise_prune_rate": [0.9, 0.9]}, "each of the 3 encoder layers, but has 2"),
        ({"layerwise_prune_rate": [0.9] * 3, "no_prune_proj": False}, "leaves what is outside of the layers whole"),
        ({"load_mask_before": 4}, "must be at most 3, the encoder's layers, but is 4"),
    ],
)
def test_options_are_checked(options: dict[str, Any], part: str, data: Path, backbones: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=part):
        build(whole_config(data, backbones("wav2vec2"), **options))


def test_eval_only_needs_nothing_that_learns(data: Path, backbones: Callable[[str], Path]) -> None:
    model = build(whole_config(data, backbones("wav2vec2"), fix_mask=True, eval_only=True))
    scores = [parameter for name, parameter in model.named_parameters() if name.endswith(".scores")]
    assert scores and not any(parameter.requires_grad for parameter in scores)


def test_options_are_checked_before_the_backbone_is_read(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`prune_rate`"):
        build(whole_config(data, tmp_path / "none.pt", prune_rate=0.0))


# ---------------------------------------------------------------- fairseq's trainer, half precision included


def make_trainer(cfg: Any) -> Trainer:
    task = AudioCtcTask(cfg.task)
    torch.manual_seed(0)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def precision(cfg: Any, name: str) -> Any:
    cfg.common.fp16 = name.startswith("fp16")
    cfg.common.bf16 = name == "bf16"
    cfg.common.fp16_no_flatten_grads = name == "fp16, not flat"
    cfg.common.memory_efficient_fp16 = name == "fp16, memory efficient"
    cfg.common.fp16_init_scale = 4
    return cfg


PRECISIONS = ("fp32", "fp16", "fp16, not flat", "fp16, memory efficient", "bf16")


@pytest.fixture(params=PRECISIONS)
def kind_of_precision(request: pytest.FixtureRequest) -> Any:
    # the flat copy is made on the current GPU; on a CPU its place has no number
    with mock.patch.object(torch.cuda, "current_device", lambda: None):
        yield request.param


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first step of the pruning recipe: a dense model with other weights than the backbone."""
    state, _ = checkpoints.fine_tuned("wav2vec2", seed=5)
    return checkpoints.save(state, tmp_path_factory.mktemp("fine_tuned") / "fine_tuned.pt")


def master_copies(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizer steps on, by the parameter's name; half precision keeps it in float32."""
    learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    copies = getattr(trainer.optimizer, "fp32_params", None)
    if copies is None:
        return {name: p.detach() for name, p in learning.items()}
    if isinstance(copies, dict):
        (flat,) = copies.values()
        sizes = [p.numel() for p in learning.values()]
        return {n: c.view(p.shape) for (n, p), c in zip(learning.items(), flat.detach().split(sizes), strict=True)}
    return {name: copy.detach() for name, copy in zip(learning, copies, strict=True)}


SAMPLE: dict[str, Any] = {
    "id": torch.arange(2),
    "net_input": {"source": WAVEFORM, "padding_mask": PADDING},
    "target": torch.tensor([[5, 6, 4], [7, 4, 1]]),
    "target_lengths": torch.tensor([3, 2]),
    "ntokens": 5,
}
PRUNING = {"init_score": "weight_magnitude_with_scale", "prune_rate": 0.3, "no_prune_post_extract_proj": True}


def start(cfg: Any, path: Path) -> Trainer:
    """As `fairseq.checkpoint_utils.load_checkpoint` starts from ``finetune_from_model``."""
    cfg.checkpoint.finetune_from_model = str(path)
    trainer = make_trainer(cfg)
    trainer.load_checkpoint(str(path), reset_optimizer=True, reset_lr_scheduler=True, reset_meters=True)
    return trainer


def test_the_optimizer_steps_on_the_loaded_scores(
    kind_of_precision: str, data: Path, backbones: Callable[[str], Path], fine_tuned: Path
) -> None:
    """In the original the optimizer's copy silently brings back the scores from before the load."""
    cfg = precision(whole_config(data, backbones("wav2vec2"), trainable_proj=True, **PRUNING), kind_of_precision)
    trainer = start(cfg, fine_tuned)
    loaded = compat.load_checkpoint(fine_tuned)["model"]
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(kind_of_precision, torch.float16)
    copies = master_copies(trainer)
    masked = trainer.model.w2v_encoder.masked_modules()
    assert len(masked) == 18
    for name, module in masked.items():
        # the weights that were loaded, in the precision that the model computes in
        wanted = loaded[f"w2v_encoder.{name}.weight"].to(half).float()
        assert module.scores.dtype == torch.float32 and torch.equal(module.scores, wanted), name
        assert torch.equal(copies[f"w2v_encoder.{name}.scores"], wanted), name

    before = {name: module.scores.detach().clone() for name, module in masked.items()}
    for update in range(3):
        trainer.train_step([copy.deepcopy(SAMPLE)] * 2)
        assert trainer.get_num_updates() == update + 1
        assert {module.num_refreshes for module in masked.values()} == {update + 1}
    copies = master_copies(trainer)
    for name, module in masked.items():
        moved = (module.scores.detach() - before[name]).abs()
        assert 0 < float(moved.max()) <= 3 * 0.05 * 1.01, f"{name} moved by more than Adam can in three steps"
        assert torch.equal(copies[f"w2v_encoder.{name}.scores"], module.scores), name
        assert torch.equal(module.masked_weight() != 0, select(module.scores, 0.3) & (module.weight != 0)), name
        assert torch.equal(module.weight, loaded[f"w2v_encoder.{name}.weight"].to(half)), (
            f"the weight of {name} is frozen"
        )


def test_a_resumed_run_keeps_its_scores(
    kind_of_precision: str, data: Path, backbones: Callable[[str], Path], fine_tuned: Path, tmp_path: Path
) -> None:
    """With ``finetune_from_model`` still set, two updates and then two are four, bit by bit."""

    def configured() -> Any:
        return precision(whole_config(data, backbones("wav2vec2"), **PRUNING), kind_of_precision)

    trainer = start(configured(), fine_tuned)
    for _ in range(2):
        trainer.train_step([copy.deepcopy(SAMPLE)])
    path = tmp_path / "checkpoint_last.pt"
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 2}})
    cfg = configured()
    cfg.checkpoint.finetune_from_model = str(fine_tuned)
    resumed = make_trainer(cfg)
    resumed.load_checkpoint(str(path))
    for run in (trainer, resumed):
        for _ in range(2):
            run.train_step([copy.deepcopy(SAMPLE)])
    ours, theirs = resumed.model.state_dict(), trainer.model.state_dict()
    assert ours.keys() == theirs.keys() and resumed.get_num_updates() == 4
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    start_scores = compat.load_checkpoint(path)["model"]
    name = "w2v_encoder.w2v_model.encoder.layers.0.fc1.scores"
    assert not torch.equal(ours[name], start_scores[name]) and start_scores[name].dtype == torch.float32


# ---------------------------------------------------------------- starts and resumption


@pytest.fixture
def masked_run(data: Path, backbones: Callable[[str], Path], tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A trained run: scores, head and mask embedding are not those of a fresh start."""
    cfg = whole_config(data, backbones("wav2vec2"), trainable_proj=True)
    model = build(cfg)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = trained_checkpoint(cfg, model)
    return checkpoints.save(state, tmp_path / "masked_run.pt"), state["model"]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, {"scores of all layers", "scores of the first layer", "head"}),
        ({"load_mask_only": True}, {"scores of all layers", "scores of the first layer"}),
        ({"load_mask_before": 1}, {"scores of the first layer"}),
    ],
)
@pytest.mark.parametrize("resumes", [False, True])
def test_masks_alone_are_taken_at_the_start_only(
    options: dict[str, Any],
    taken: set[str],
    resumes: bool,
    data: Path,
    backbones: Callable[[str], Path],
    masked_run: tuple[Path, dict[str, Tensor]],
) -> None:
    """In the original, resuming with load_mask_only loses the trained head."""
    path, state = masked_run
    cfg = whole_config(data, backbones("wav2vec2"), trainable_proj=True, **options)
    if resumes:
        cfg.checkpoint.finetune_from_model = "another.pt"
        trainer = make_trainer(cfg)
        trainer.load_checkpoint(str(path), reset_optimizer=True)
    else:
        trainer = start(cfg, path)
    own = trainer.model.state_dict()

    def same(*names: str) -> bool:
        return all(torch.equal(own[name], state[name]) for name in names)

    layers = [[n for n in state if f".layers.{i}." in n and n.endswith(".scores")] for i in range(3)]
    found = {
        "scores of all layers": same(*layers[0], *layers[1], *layers[2]),
        "scores of the first layer": same(*layers[0]),
        "head": same("w2v_encoder.proj.weight", "w2v_encoder.proj.bias"),
    }
    everything = set(found)
    assert {what for what, equal in found.items() if equal} == (everything if resumes else taken)


def test_masks_alone_are_taken_from_a_restored_run(
    data: Path, backbones: Callable[[str], Path], masked_run: tuple[Path, dict[str, Tensor]]
) -> None:
    """``restore_file`` with ``reset_optimizer`` starts a new run, as ``finetune_from_model`` does; without it goes on."""
    path, state = masked_run
    head = "w2v_encoder.proj.weight"
    for reset, taken in ((True, False), (False, True)):
        cfg = whole_config(data, backbones("wav2vec2"), load_mask_only=True)
        cfg.checkpoint.restore_file, cfg.checkpoint.reset_optimizer = str(path), reset
        trainer = make_trainer(cfg)
        trainer.load_checkpoint(str(path), reset_optimizer=True)
        own = trainer.model.state_dict()
        assert all(torch.equal(own[name], state[name]) for name in state if name.endswith(".scores"))
        assert torch.equal(own[head], state[head]) is taken


@pytest.mark.parametrize("option", ["load_mask_only", "eval_only"])
def test_what_is_about_a_loaded_model_is_refused_without_one(
    option: str, data: Path, backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    trainer = make_trainer(whole_config(data, backbones("wav2vec2"), **{option: True}))
    missing = tmp_path / "checkpoint_last.pt"
    with pytest.raises(ValueError, match=rf"`model.{option}` is about a trained model, but .* no file {missing}; pass"):
        trainer.load_checkpoint(str(missing))
    make_trainer(whole_config(data, backbones("wav2vec2"))).load_checkpoint(str(missing))  # others start from nothing


@pytest.mark.parametrize(
    ("option", "value"),
    [("freeze_regex", "proj"), ("load_ema", True), ("layer_decay", 0.9), ("zero_mask", True), ("drop_path", 0.1)],
)
def test_options_without_effect_are_refused(
    option: str, value: Any, data: Path, backbones: Callable[[str], Path]
) -> None:
    with pytest.raises(
        ValueError, match=rf"`model.{option}` has no effect on a model with masks and must stay .*{value}"
    ):
        build(whole_config(data, backbones("wav2vec2"), **{option: value}))


@pytest.mark.parametrize("feature_grad_mult", [0.0, 0.5])
def test_a_frozen_extractor_learns_scores_alone(
    feature_grad_mult: float, data: Path, backbones: Callable[[str], Path]
) -> None:
    options = {"no_prune_extractor": False, "co_train": True, "feature_grad_mult": feature_grad_mult}
    model = build(whole_config(data, backbones("wav2vec2"), **options)).train()
    model(WAVEFORM, PADDING)["encoder_out"].square().sum().backward()
    extractor = model.w2v_encoder.w2v_model.feature_extractor
    learned = {name for name, p in extractor.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any(name.endswith(".scores") for name in learned)
    assert any(not name.endswith(".scores") for name in learned) is (feature_grad_mult > 0)


def test_a_start_from_a_model_without_masks(data: Path, backbones: Callable[[str], Path], fine_tuned: Path) -> None:
    cfg = whole_config(data, backbones("wav2vec2"), load_mask_only=True)
    with pytest.raises(Exception, match="Cannot load model parameters") as caught:
        start(cfg, fine_tuned)
    assert "has none for" in str(caught.value.__context__) and "checkpoint with masks" in str(caught.value.__context__)


def test_a_state_for_one_rank_loads_whatever_the_wrapper(data: Path, backbones: Callable[[str], Path]) -> None:
    """fairseq passes ``model_cfg`` and ``args`` along, which this model has no use for."""
    model = build(whole_config(data, backbones("wav2vec2")))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True, model_cfg=None, args=None)
    state["w2v_encoder.proj.bias"] += 1
    model.load_state_dict(state)
    assert torch.equal(model.w2v_encoder.proj.bias, state["w2v_encoder.proj.bias"])
