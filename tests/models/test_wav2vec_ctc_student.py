"""`wav2vec_ctc_student`: what it starts from, what it carries together, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.models.wav2vec_ctc_student import Wav2VecCtcStudentConfig
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask
from tests.models import ctc_models
from tests.models.ctc_models import SYMBOLS, build

SOURCE = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([6000, 4500])
PADDING = torch.arange(6000) >= LENGTHS[:, None]
SOURCE[PADDING] = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ctc_models.write_dictionary(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def tuned(folder: Path) -> str:
    return str(ctc_models.write_ctc(folder / "tuned.pt"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> str:
    return str(ctc_models.write_encoder(folder / "encoder.pt"))


def student(folder: Path, **options: Any) -> Any:
    """Model alone; the criterion is `ctc`'s affair here."""
    return build(folder, options, {"alpha": 1.0})[1]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    out = model(SOURCE, PADDING)
    return out["encoder_out"].transpose(0, 1)[~out["padding_mask"]]


@torch.no_grad()
def loaded_logits(path: str) -> torch.Tensor:
    out = s3distill.load(path)(SOURCE, LENGTHS)
    return out.logits[~out.padding_mask]


def test_it_starts_as_the_fine_tuned_model(folder: Path, tuned: str) -> None:
    model = student(folder, student_path=tuned)
    assert torch.allclose(logits_of(model), loaded_logits(tuned), atol=1e-5)
    state = compat.load_checkpoint(tuned)["model"]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_of_the_head_follow_the_dictionary(tuned: str, tmp_path: Path) -> None:
    model = student(ctc_models.write_dictionary(tmp_path, SYMBOLS[::-1]), student_path=tuned)
    assert torch.allclose(logits_of(model), loaded_logits(tuned)[:, [0, 1, 2, 3, 6, 5, 4]], atol=1e-5)


def test_it_starts_as_a_pretrained_encoder_with_a_new_head(folder: Path, encoder: str) -> None:
    model = student(folder, w2v_path=encoder)
    own, start = model.state_dict(), compat.load_checkpoint(encoder)["model"]
    assert all(torch.equal(own[f"w2v_encoder.w2v_model.{name}"], value) for name, value in start.items())
    assert own["w2v_encoder.proj.bias"].abs().max() == 0


def test_it_rebuilds_alone_in_any_task(folder: Path, tuned: str, tmp_path: Path) -> None:
    options = {"distill_layers": "1,2", "prune_units": ["head", "ffn"], "student_path": tuned}
    _, model, _ = build(
        folder, options, {"hidden_weight": 1.0, "target_sparsity": 0.2}, teacher_path=tuned, symbol_map="exact"
    )
    cfg = model.cfg
    assert cfg.teacher_dim == 24 and cfg.reference_cost > 0 and cfg.w2v_args["model"]["_name"] == "wav2vec2"
    cfg.student_path = str(tmp_path / "gone.pt")
    again = AudioCtcTask(AudioCtcConfig(data=str(folder), labels="ltr")).build_model(cfg, from_checkpoint=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(again), logits_of(model))


def test_gates_act_under_masked_weights(folder: Path, tuned: str) -> None:
    options = {"student_path": tuned, "masks": True, "prune_rate": 0.5, "prune_units": ["head", "ffn", "width"]}
    _, model, _ = build(folder, options, {"alpha": 1.0, "target_sparsity": 0.2}, teacher_path=tuned)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in learns if n.endswith(".scores")} and any(n.startswith("gates.") for n in learns)
    assert "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight" not in learns
    before = logits_of(model)
    with torch.no_grad():
        for _, _, gate in model.gates.all_gates():
            gate.log_alpha[: gate.num_gates // 2] = -9.0
    closed = logits_of(model)
    assert (closed - before).abs().max() > 1e-2, "closed gates change the output"
    with torch.no_grad():
        fc1 = model.w2v_encoder.w2v_model.encoder.layers[0].fc1
        fc1.scores.copy_(torch.rand(fc1.scores.shape, generator=torch.Generator().manual_seed(5)))
    assert (logits_of(model) - closed).abs().max() > 1e-3, "another mask changes the output"
    model.train()(SOURCE, PADDING, predict=True)["encoder_out"].square().sum().backward()
    assert fc1.scores.grad.abs().max() > 0
    assert max(float(g.log_alpha.grad.abs().max()) for _, _, g in model.gates.all_gates()) > 0


def test_gates_of_training_follow_seed_and_update(folder: Path, tuned: str) -> None:
    options = {"student_path": tuned, "prune_units": ["ffn"], "gate_init_drop": 0.5}
    model = build(folder, options, {"alpha": 1.0, "target_sparsity": 0.2}, teacher_path=tuned)[1].train()

    def run(update: int) -> torch.Tensor:
        model.set_num_updates(update)
        return model(SOURCE, PADDING)["encoder_out"].detach()

    first = run(3)
    assert torch.equal(run(3), first) and not torch.equal(run(4), first)


def test_a_masked_model_is_multiplied_out_at_the_start(folder: Path, tuned: str, tmp_path: Path) -> None:
    task, model, _ = build(folder, {"student_path": tuned, "masks": True, "prune_rate": 0.4}, {"alpha": 1.0})
    options = OmegaConf.to_container(model.cfg, resolve=True, enum_to_str=True) | {"_name": "wav2vec_ctc_student"}
    path = tmp_path / "masked.pt"
    dictionary = {"target_dictionary": task.target_dictionary}
    compat.write_checkpoint(path, model.state_dict(), options, {"normalize": False}, dictionary)
    masked = logits_of(model)
    assert (masked - loaded_logits(tuned)).abs().max() > 1e-2
    started = student(folder, student_path=str(path))
    assert torch.allclose(logits_of(started), masked, atol=1e-5) and started.w2v_encoder.options is None
    dense = student(folder, student_path=tuned)
    with pytest.raises(ValueError, match=r"has masks beside its weights, which model\.masks=false would lose"):
        dense.load_state_dict(model.state_dict())


def test_heads_and_gates_of_another_student_are_refused(folder: Path, tuned: str) -> None:
    options = {"student_path": tuned, "prune_units": ["head"]}
    gated = build(folder, options, {"alpha": 1.0, "target_sparsity": 0.1}, teacher_path=tuned)[1]
    with pytest.raises(
        ValueError, match=r"must have the prediction heads and gates of this student, but gates\.head\.0"
    ):
        student(folder, student_path=tuned).load_state_dict(gated.state_dict())
    gated.load_state_dict(compat.load_checkpoint(tuned)["model"])  # one that was never distilled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must say what the student starts from, but neither is given; pass one"),
        ({"w2v_path": "E", "student_path": "T"}, "must say what the student starts from, but both are given"),
        (
            {"student_path": "E"},
            r"must be a fine-tuned CTC model, but .*encoder\.pt has no CTC head; pass it as model\.w2v_path",
        ),
        (
            {"student_path": "T", "no_pretrained_weights": True},
            r"`model\.no_pretrained_weights` is about model\.w2v_path",
        ),
        (
            {"student_path": "T", "prune_rate": 0.3},
            r"`model\.prune_rate` is about masks, but is 0\.3 where model\.masks=false",
        ),
        ({"student_path": "T", "layer_decay": 0.5}, r"`model\.layer_decay` has no effect"),
        (
            {"student_path": "T", "distill_layers": "1", "head_init": "least_squares"},
            r"`model\.head_init` least_squares is fitted",
        ),
        (
            {"student_path": "T", "shares_extractor": True, "masks": True, "no_prune_extractor": False},
            r"`model\.shares_extractor` leaves the convolutions",
        ),
        ({"student_path": "T", "prune_units": ["arm"]}, "arm"),
        (
            {"student_path": "T", "masks": True, "layerwise_prune_rate": [0.5]},
            "one kept fraction for each of the 2 encoder layers",
        ),
    ],
)
def test_starts_that_are_refused(options: dict, message: str, folder: Path, encoder: str, tuned: str) -> None:
    paths = {"E": encoder, "T": tuned}
    given = {name: paths.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        student(folder, **given)


def test_another_dictionary_is_refused(tuned: str, tmp_path: Path) -> None:
    other = ctc_models.write_dictionary(tmp_path, ("A", "B", "C"))
    with pytest.raises(ValueError, match=r"the student lacks '\|'; .*tuned\.pt lacks 'C'"):
        student(other, student_path=tuned)
    bare = str(ctc_models.write_ctc(tmp_path / "bare.pt", symbols=None))
    with pytest.raises(ValueError, match="carries no dictionary, so that nobody knows what its head's 7 outputs mean"):
        student(other, student_path=bare)


def test_heads_and_gates_need_a_distillation(folder: Path, tuned: str) -> None:
    task = AudioCtcTask(AudioCtcConfig(data=str(folder), labels="ltr"))
    cfg = Wav2VecCtcStudentConfig(student_path=tuned, prune_units=["head"], normalize=False, seed=1)
    with pytest.raises(ValueError, match=r"`model\.prune_units` is for a distillation, but the task is AudioCtcTask"):
        task.build_model(ctc_models._whole(Wav2VecCtcStudentConfig, vars(cfg), "wav2vec_ctc_student"))
