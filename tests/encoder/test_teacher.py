"""The frozen teacher: masks that it shares with a student, waveforms that it normalises itself; and how those masks are drawn."""

from __future__ import annotations

import pytest
import torch

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.speech_model import normalize_waveforms
from s3distill.encoder.teacher import Teacher
from s3distill.encoder.training_config import MaskConfig
from s3distill.gates import GateSet

CONFIG = EncoderConfig(
    conv_layers=(ConvLayerConfig(8, 10, 5), ConvLayerConfig(8, 3, 2)),
    layers=uniform_layers(2, 2, 4, 16),
    embed_dim=8,
    pos_conv_kernel=4,
    pos_conv_groups=2,
)
MASKING = MaskConfig(mask_prob=0.4, mask_length=4, require_same_masks=False)


def make_encoder(seed: int = 0, masking: MaskConfig = MASKING) -> SpeechEncoder:
    torch.manual_seed(seed)
    return SpeechEncoder(CONFIG, masking=masking).eval()


def make_teacher(encoder: SpeechEncoder, normalize: bool = False) -> Teacher:
    return Teacher(ParsedCheckpoint("wav2vec2", CONFIG, dict(encoder.state_dict()), normalize))


def batch(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(len(lengths), max(lengths), generator=generator)
    padding_mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return source.masked_fill(padding_mask, 0), padding_mask


LENGTHS = [900, 500, 700]
SEEDS = [(1, 7, i) for i in range(3)]


@pytest.mark.parametrize("units", [("conv", "head", "ffn"), ("ffn",)])
def test_gates_that_were_not_pruned_act_as_in_evaluation(units: tuple[str, ...]) -> None:
    encoder = make_encoder()
    gates = GateSet(CONFIG, units, init_drop=0.5)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_(std=4)
    state = {f"gates.{name}": value for name, value in gates.state_dict().items()}
    options = {"encoder": CONFIG.to_json(), "prune_units": list(units)}
    parsed = ParsedCheckpoint(
        "ssl_student", CONFIG, dict(encoder.state_dict()), False, extra_state=state, pretraining_options=options
    )
    gated = Teacher(parsed)
    source, padding_mask = batch(LENGTHS)
    (found,), found_padding = gated.hidden_states(source, padding_mask, [2])
    with torch.inference_mode():
        expected = encoder(source, padding_mask, gates=gates.eval().deterministic())
    assert torch.equal(found_padding, expected.padding_mask)
    torch.testing.assert_close(found[~found_padding], expected.x[~found_padding], rtol=1e-5, atol=1e-5)
    (plain,), _ = make_teacher(encoder).hidden_states(source, padding_mask, [2])
    assert (plain - found).abs().max() > 1e-3
    assert gated.has_extractor_of(encoder) == ("conv" not in units)


# ---------------------------------------------------------------- masks from seeds


def test_masks_depend_on_seeds_and_lengths_only() -> None:
    encoder = make_encoder()
    source, padding_mask = batch(LENGTHS)
    torch.manual_seed(1)
    masks = encoder.draw_masks(source, padding_mask, SEEDS)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(encoder.draw_masks(2 * source, padding_mask, SEEDS), masks)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator must not be used"
    frames = [int(CONFIG.num_frames(n)) for n in LENGTHS]
    assert masks.shape == (3, max(frames)) and masks.dtype == torch.bool
    for i, n in enumerate(frames):  # each as if it were alone
        alone = encoder.draw_masks(source[i : i + 1, : LENGTHS[i]], None, SEEDS[i : i + 1])
        assert torch.equal(alone[0], masks[i, :n]) and not masks[i, n:].any()
        assert 0 < alone.sum() < n
    others = [
        encoder.draw_masks(source, padding_mask, seeds)
        for seeds in ([(1, 8, i) for i in range(3)], [(2, 7, i) for i in range(3)])
    ]
    assert all(not torch.equal(other, masks) for other in others)
    assert not torch.equal(masks[0, : frames[1]], masks[1, : frames[1]])


def test_equally_many_frames_on_request() -> None:
    source, padding_mask = batch(LENGTHS)
    masks = make_encoder(masking=MaskConfig(mask_prob=0.4, mask_length=4)).draw_masks(source, padding_mask, SEEDS)
    assert len(set(masks.sum(1).tolist())) == 1


def test_a_waveform_without_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least 20 samples"):
        make_encoder().draw_masks(torch.zeros(1, 12), None, SEEDS[:1])


def test_masked_frames_are_given_on_and_change_every_layer() -> None:
    encoder = make_encoder()
    source, padding_mask = batch(LENGTHS)
    masked = encoder.draw_masks(source, padding_mask, SEEDS)
    clean, out = encoder(source, padding_mask), encoder(source, padding_mask, masked=masked)
    assert clean.masked is None and torch.equal(out.masked, masked)
    nothing = encoder(source, padding_mask, masked=torch.zeros_like(masked))
    for a, b, c in zip(clean.hidden_states, out.hidden_states, nothing.hidden_states, strict=True):
        assert torch.equal(a, c) and (a - b)[masked].abs().max() > 1e-3
    single = encoder(source[1:2, : LENGTHS[1]], None, masked=masked[1:2, : int(CONFIG.num_frames(LENGTHS[1]))])
    torch.testing.assert_close(single.x[0], out.x[1, : single.x.shape[1]], rtol=1e-4, atol=1e-5)
    encoder.zero_grad()
    out.x.sum().backward()
    assert encoder.mask_emb.grad is not None and encoder.mask_emb.grad.abs().sum() > 0


# ---------------------------------------------------------------- the teacher


def test_the_teacher_puts_its_own_embedding_where_the_student_is_masked() -> None:
    encoder = make_encoder(3)
    teacher = make_teacher(encoder)
    source, padding_mask = batch(LENGTHS)
    masked = make_encoder(4).draw_masks(source, padding_mask, SEEDS)
    states, _ = teacher.hidden_states(source, padding_mask, [0, 2], masked)
    expected = encoder(source, padding_mask, masked=masked).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states, (expected[0], expected[2]), strict=True))
    clean, _ = teacher.hidden_states(source, padding_mask, [0, 2])
    assert not torch.equal(clean[1], states[1])


def test_a_teacher_that_normalises_waveforms_itself() -> None:
    teacher = make_teacher(make_encoder(5), normalize=True)
    source, padding_mask = batch(LENGTHS)
    source = 3 * source + (~padding_mask) * 0.5
    expected, _ = teacher.hidden_states(normalize_waveforms(source, padding_mask), padding_mask, [2])
    raw, _ = teacher.hidden_states(source, padding_mask, [2])
    teacher.normalizes_itself = True
    got, _ = teacher.hidden_states(source, padding_mask, [2])
    assert torch.equal(got[0], expected[0]) and not torch.equal(got[0], raw[0])


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_students_autocast_is_not_the_teachers(dtype: str) -> None:
    teacher = Teacher(ParsedCheckpoint("wav2vec2", CONFIG, dict(make_encoder().state_dict()), False), dtype)
    source, padding_mask = batch(LENGTHS)
    expected, _ = teacher.hidden_states(source, padding_mask, [0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = teacher.hidden_states(source, padding_mask, [0, 2])
        assert torch.is_autocast_enabled("cpu"), "it goes on for the student"
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert all(state.dtype == torch.float32 for state in states)
