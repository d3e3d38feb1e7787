"""`s3distill.load`: what goes in and out, for fairseq's checkpoints and ours; compact students in stock fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, LayerConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.speech_model import SpeechModel, normalize_waveforms
from s3distill.models.ssl_student import SslStudentConfig
from tests.encoder import checkpoints

UNEVEN = EncoderConfig(  # as pruning leaves it
    (ConvLayerConfig(5, 10, 5), ConvLayerConfig(7, 8, 4), ConvLayerConfig(6, 4, 4), ConvLayerConfig(9, 4, 4)),
    12,
    (LayerConfig(3, 5, 7), LayerConfig(0, 5, 20), LayerConfig(2, 5, 9, attention=False), LayerConfig(1, 5, 0)),
    pos_conv_kernel=8,
    pos_conv_groups=2,
)


def write_compact(path: Path, config: EncoderConfig = UNEVEN, normalize: bool = False) -> SpeechEncoder:
    """A compact student's file with random weights, as `s3distill prune` writes it."""
    encoder = checkpoints.fill(SpeechEncoder(config)).eval()
    model, task = student_options(normalize, encoder=config.to_json(), encoder_embed_dim=config.embed_dim)
    compat.write_checkpoint(path, encoder.state_dict(), model, task)
    return encoder


def student_options(normalize: bool = False, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of the model, resolved as in training (fairseq overrides only what is listed), and the task's."""
    student = OmegaConf.structured(SslStudentConfig(**options, normalize=normalize, seed=1))
    model = {**OmegaConf.to_container(student, enum_to_str=True), "_name": "ssl_student"}
    return model, {"_name": "audio_distill", "data": "", "normalize": normalize, "teacher_path": None}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    written = {}
    for family in checkpoints.FAMILIES:
        written[family] = checkpoints.save(checkpoints.pretrained(family, normalize=True)[0], folder / f"{family}.pt")
        state, _ = checkpoints.fine_tuned(family, normalize=family == "hubert")
        written[f"{family}_ctc"] = checkpoints.save(state, folder / f"{family}_ctc.pt")
    write_compact(folder / "compact.pt")
    return {**written, "compact": folder / "compact.pt"}


KINDS = [*checkpoints.FAMILIES, *(f"{family}_ctc" for family in checkpoints.FAMILIES), "compact"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.05


@every_kind
@torch.no_grad()
def test_shapes(kind: str, paths: dict[str, Path]) -> None:
    model = s3distill.load(paths[kind])
    assert isinstance(model, SpeechModel) and not model.training
    config = model.encoder.config
    batch, samples = 2, 6000
    out = model(noise(batch, samples))
    frames = config.num_frames(samples)
    assert len(out.hidden_states) == config.num_layers + 1
    assert all(h.shape == (batch, frames, config.embed_dim) and h.dtype == torch.float32 for h in out.hidden_states)
    assert out.x.shape == (batch, frames, config.embed_dim)
    assert out.padding_mask is None
    if kind.endswith("_ctc"):
        assert out.logits is not None and out.logits.shape == (batch, frames, 4 + len(checkpoints.LETTERS))
        assert model.symbols is not None and len(model.symbols) == out.logits.shape[-1]
        torch.testing.assert_close(out.logits, out.x @ model.head.weight.T + model.head.bias)
    else:
        assert out.logits is None and model.head is None and model.symbols is None


@every_kind
@torch.no_grad()
def test_padded_is_single(kind: str, paths: dict[str, Path]) -> None:
    model = s3distill.load(str(paths[kind]))
    lengths = [6000, 2500, 4001]
    waveforms = noise(3, 6000)  # what stands behind a length is noise, not zeros: it must not be heard
    out = model(waveforms, torch.tensor(lengths))
    assert out.padding_mask is not None and out.padding_mask.dtype == torch.bool
    for i, length in enumerate(lengths):
        single = model(waveforms[i : i + 1, :length])
        frames = model.encoder.config.num_frames(length)
        assert out.padding_mask[i].tolist() == [False] * frames + [True] * (out.x.shape[1] - frames)
        pairs = [*zip(out.hidden_states, single.hidden_states, strict=True), (out.x, single.x)]
        if out.logits is not None:
            pairs.append((out.logits, single.logits))
        for ours, theirs in pairs:
            error = (ours[i, :frames] - theirs[0]).abs().max() / theirs.abs().max()
            assert error <= 1e-5


@torch.no_grad()
def test_lengths_may_be_none_a_list_or_any_integers(paths: dict[str, Path]) -> None:
    model = s3distill.load(paths["hubert_ctc"])
    waveforms = noise(2, 5000)
    whole = model(waveforms)
    for lengths in (torch.tensor([5000, 5000]), torch.tensor([5000, 5000], dtype=torch.int32)):
        out = model(waveforms, lengths)
        assert out.padding_mask is None
        torch.testing.assert_close(out.x, whole.x)
    partial = [model(waveforms, lengths).x for lengths in (torch.tensor([5000, 3000]), [5000, 3000])]
    assert torch.equal(partial[0], partial[1]) and not torch.allclose(partial[0][1], whole.x[1])


@pytest.mark.parametrize("bad", [torch.zeros(5000), torch.zeros(2, 1, 5000)])
def test_waveforms_of_another_shape_are_refused(bad: Tensor, paths: dict[str, Path]) -> None:
    model = s3distill.load(paths["compact"])
    with pytest.raises(
        ValueError, match=r"`waveforms` must be \[B, S\], but has shape .*; use waveform\[None\] for one"
    ):
        model(bad)


@pytest.mark.parametrize("lengths", [[5000], [5000, 5001], [5000, 0], [5000, -3], [[5000, 5000]]])
def test_impossible_lengths_are_refused(lengths: list, paths: dict[str, Path]) -> None:
    model = s3distill.load(paths["compact"])
    with pytest.raises(ValueError, match=r"`lengths` must be \[B\] = \[2\] integers from 1 to S = 5000, but is \["):
        model(noise(2, 5000), torch.tensor(lengths))


def test_audio_without_a_frame_is_refused(paths: dict[str, Path]) -> None:
    model = s3distill.load(paths["wav2vec2"])
    with pytest.raises(ValueError, match=r"at least 400 samples \(25 ms at 16 kHz\).*the shortest has 399"):
        model(noise(2, 5000), torch.tensor([5000, 399]))


@torch.no_grad()
def test_normalisation_is_done_here_where_the_model_was_trained_so(paths: dict[str, Path]) -> None:
    waveforms = 7 * noise(2, 5000) + 0.5
    for kind, normalized in (("hubert_ctc", True), ("compact", False)):
        model = s3distill.load(paths[kind])
        assert model.normalize is normalized
        heard: list[Tensor] = []
        model.encoder.register_forward_pre_hook(lambda _, inputs, heard=heard: heard.append(inputs[0]))
        model(waveforms)
        expected = torch.nn.functional.layer_norm(waveforms, (5000,)) if normalized else waveforms
        torch.testing.assert_close(heard[0], expected)
        model(waveforms, torch.tensor([5000, 3000]))
        assert not heard[1][1, 3000:].any()
        expected = torch.nn.functional.layer_norm(waveforms[1, :3000], (3000,)) if normalized else waveforms[1, :3000]
        torch.testing.assert_close(heard[1][1, :3000], expected)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(2, 80), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_normalised_waveforms_are_a_loop(lengths: list[int], seed: int) -> None:
    waveforms = 3 * noise(len(lengths), max(lengths), seed=seed) + 1
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    ours = normalize_waveforms(waveforms, padding_mask)
    assert not ours[padding_mask].any()
    for i, length in enumerate(lengths):
        single = waveforms[i, :length].double()
        expected = (single - single.mean()) / (single.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(ours[i, :length].double(), expected, rtol=1e-3, atol=1e-3)
    shortest = waveforms[:, : min(lengths)]
    nothing_padded = torch.zeros(shortest.shape, dtype=torch.bool)
    torch.testing.assert_close(
        normalize_waveforms(shortest), normalize_waveforms(shortest, nothing_padded), rtol=1e-3, atol=1e-3
    )


def test_the_device_is_taken(paths: dict[str, Path]) -> None:
    model = s3distill.load(paths["wav2vec2_ctc"], device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.device.type for p in s3distill.load(paths["wav2vec2_ctc"]).parameters()} == {"cpu"}


@torch.no_grad()
def test_a_compact_file_gives_the_encoder_that_was_written(tmp_path: Path) -> None:
    encoder = write_compact(tmp_path / "compact.pt")
    model = s3distill.load(tmp_path / "compact.pt")
    assert model.encoder.config == UNEVEN and model.family == "ssl_student"
    source = noise(2, 5000)
    assert torch.equal(model(source).x, encoder(source).x)


def test_a_file_whose_weights_do_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "compact.pt"
    write_compact(path)
    state = torch.load(path, weights_only=True)
    del state["model"]["encoder.layers.0.fc1.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"compact\.pt does not fit .*missing: \['encoder\.layers\.0\.fc1\.weight'\]"):
        s3distill.load(path)


def build_fine_tuning(w2v_path: Path, data: Path, task_name: str, **options: Any) -> Any:
    """Stock `wav2vec_ctc` on top of a file, as `fairseq-hydra-train` builds it: (task, model)."""
    (data / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in checkpoints.LETTERS))
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.task = {"_name": task_name, "data": str(data), "labels": "ltr", "normalize": False}
    cfg.model = {"_name": "wav2vec_ctc", "w2v_path": str(w2v_path), "data": str(data), "normalize": False, **options}
    task = tasks.setup_task(cfg.task)
    return task, task.build_model(cfg.model)


@pytest.mark.parametrize("task_name", ["audio_finetuning", "audio_ctc"])
def test_stock_wav2vec_ctc_fine_tunes_a_compact_student(task_name: str, tmp_path: Path) -> None:
    path = tmp_path / "compact.pt"
    encoder = write_compact(path)
    options = {"apply_mask": True, "mask_prob": 0.5, "mask_length": 3, "feature_grad_mult": 1.0, "layerdrop": 0.0}
    task, model = build_fine_tuning(path, tmp_path, task_name, **options)
    student = model.w2v_encoder.w2v_model
    assert type(student).__name__ == "SslStudent" and student.config == UNEVEN
    assert student.masking.mask_prob == 0.5 and student.masking.mask_length == 3
    for name, value in encoder.named_parameters():
        assert torch.equal(value, dict(student.named_parameters())[name]), name

    source = noise(2, 6000)
    padding_mask = torch.arange(6000) >= torch.tensor([6000, 4000])[:, None]
    model.eval()
    out = model(source=source.masked_fill(padding_mask, 0), padding_mask=padding_mask)
    frames = UNEVEN.num_frames(6000)
    assert out["encoder_out"].shape == (frames, 2, len(task.target_dictionary))  # [T, B, V]
    assert torch.equal(out["padding_mask"].sum(-1), torch.tensor([0, frames - UNEVEN.num_frames(4000)]))

    model.train()
    out = model(source=source.masked_fill(padding_mask, 0), padding_mask=padding_mask)
    log_probs = model.get_normalized_probs(out, log_probs=True)
    num_frames = (~out["padding_mask"]).sum(-1)
    targets = torch.tensor([[5, 6, 7], [6, 4, 5]])
    loss = torch.nn.functional.ctc_loss(log_probs, targets, num_frames, torch.tensor([3, 3]))
    assert torch.isfinite(loss)
    loss.backward()
    for name in ("encoder.layers.0.fc1.weight", "feature_extractor.conv_layers.0.0.weight", "mask_emb"):
        gradient = dict(student.named_parameters())[name].grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name


def test_a_student_that_still_has_heads_fine_tunes_too(tmp_path: Path) -> None:
    """The checkpoint of a distillation, heads and all, is a pre-trained model like any other."""
    written, task_options = student_options(**checkpoints.SMALL, distill_layers="0,2,3", teacher_dim=32)
    task = tasks.setup_task(OmegaConf.create(task_options))
    student = checkpoints.fill(task.build_model(OmegaConf.create(written), from_checkpoint=True))
    assert student.heads is not None and any(key.startswith("heads.") for key in student.state_dict())
    path = tmp_path / "checkpoint_best.pt"
    compat.write_checkpoint(path, student.state_dict(), written, task_options)
    _, model = build_fine_tuning(path, tmp_path, "audio_finetuning")
    tuned = model.w2v_encoder.w2v_model
    assert tuned.heads is None
    for name, value in tuned.named_parameters():
        assert torch.equal(value, dict(student.named_parameters())[name]), name


def test_a_fine_tuned_student_loads_everywhere(tmp_path: Path) -> None:
    path, tuned_path = tmp_path / "compact.pt", tmp_path / "tuned.pt"
    write_compact(path)
    task, model = build_fine_tuning(path, tmp_path, "audio_finetuning")
    encoder_cfg = OmegaConf.to_container(model.cfg.w2v_args, resolve=False, enum_to_str=True)
    written = checkpoints.fine_tuning_config(encoder_cfg)
    state = {**checkpoints.checkpoint_of(model, written), "task_state": task.state_dict()}
    checkpoints.save(state, tuned_path)
    path.unlink()  # what the fine-tuning started from is no longer needed

    loaded = s3distill.load(tuned_path)
    assert loaded.encoder.config == UNEVEN and loaded.symbols == task.target_dictionary.symbols
    (rebuilt,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tuned_path)])
    source = noise(1, 5000)
    with torch.no_grad():
        theirs = rebuilt.eval()(source=source, padding_mask=None)["encoder_out"].transpose(0, 1)
        torch.testing.assert_close(loaded(source).logits, theirs)


def test_normalisation_that_disagrees_is_refused_by_stock_fine_tuning(tmp_path: Path) -> None:
    path = tmp_path / "compact.pt"
    write_compact(path, normalize=True)
    with pytest.raises(AssertionError, match="data normalization is the same"):
        build_fine_tuning(path, tmp_path, "audio_finetuning")
