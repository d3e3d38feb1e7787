"""Fisher information: a slow loop over fairseq's own model, the batched mistake, sampling, and the file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("fairseq")

import s3distill
from s3distill.analysis.fisher import (
    Fisher,
    _sample,
    combine_fishers,
    estimate_fisher,
    find_utterances,
    parameter_names,
)
from s3distill.analysis.fisher_file import read_fisher, write_fisher
from tests.data.ctc_corpus import SHAPE, TEXTS, write_corpus
from tests.encoder import checkpoints


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=["wav2vec2", "hubert", "data2vec_audio"])
def recogniser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(our model, fairseq's) of one checkpoint, in float64."""
    state, reference = checkpoints.fine_tuned(request.param, SHAPE)
    path = checkpoints.save(state, tmp_path_factory.mktemp("model") / "ctc.pt")
    reference.w2v_encoder.w2v_model.feature_grad_mult = (
        1.0  # fine-tuning scales the gradient of the convolutions, to 0 as a rule
    )
    return s3distill.load(path).double(), reference.double().eval()


def estimate(model: s3distill.encoder.speech_model.SpeechModel, corpus: Path, **options: object) -> Fisher:
    return estimate_fisher(model, find_utterances(corpus, model, model.symbols, **options), model.symbols)


def slow_gradients(model: torch.nn.Module, corpus: Path) -> list[dict[str, Tensor]]:
    """Per utterance the gradient of log p(y | x), by `backward` through fairseq's model."""
    letters = {symbol: i + 4 for i, symbol in enumerate(checkpoints.LETTERS)}
    gradients = []
    for i, text in enumerate(TEXTS):
        source = torch.from_numpy(soundfile.read(corpus.parent / f"{i}.flac", dtype="float32")[0])[None].double()
        model.zero_grad()
        out = model(source=source, padding_mask=torch.zeros_like(source, dtype=torch.bool))
        log_probs = out["encoder_out"].log_softmax(-1)  # [T, 1, V]
        target = torch.tensor([[letters[letter] for letter in text.split()]])
        loss = F.ctc_loss(log_probs, target, [len(log_probs)], [target.shape[1]], blank=0, reduction="sum")
        (-loss).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return gradients


def test_a_slow_loop_over_fairseqs_model(recogniser: tuple, corpus: Path) -> None:
    model, reference = recogniser
    fisher = estimate(model, corpus)
    gradients = slow_gradients(reference, corpus)
    assert fisher.num_utterances == 4 and fisher.targets == "labels" and fisher.symbols == tuple(model.symbols)
    parameters = dict(reference.named_parameters())
    assert set(fisher.values) <= set(parameters) and set(gradients[0]) <= set(fisher.values)
    for name, value in fisher.values.items():
        torch.testing.assert_close(fisher.means[name], parameters[name].detach().float())
        if name not in gradients[0]:
            assert name == "w2v_encoder.w2v_model.mask_emb" and not value.any()
            continue
        expected = torch.stack([g[name] for g in gradients]).square().mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-9)  # norms of fairseq are float32
        assert value.max() > 1e-9 or name.endswith("k_proj.bias")  # which softmax does not hear


def test_a_batch_that_is_squared_whole_is_something_else(recogniser: tuple, corpus: Path) -> None:
    model, reference = recogniser
    fisher = estimate(model, corpus)
    gradients = slow_gradients(reference, corpus)
    name = "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight"
    mistake = torch.stack([g[name] for g in gradients]).mean(0).square()
    assert fisher.values[name].sum() > 1.5 * mistake.sum()


def one_model(tmp_path: Path, seed: int = 0) -> s3distill.encoder.speech_model.SpeechModel:
    state, _ = checkpoints.fine_tuned("wav2vec2", {**SHAPE, "encoder_layers": 1}, seed=seed)
    return s3distill.load(checkpoints.save(state, tmp_path / f"model{seed}.pt"))


def test_combined_is_the_union(tmp_path: Path, corpus: Path) -> None:
    model = one_model(tmp_path)
    utterances = list(find_utterances(corpus, model, model.symbols))
    whole = estimate_fisher(model, utterances, model.symbols)
    parts = [estimate_fisher(model, some, model.symbols) for some in (utterances[:3], utterances[3:])]
    combined = combine_fishers(parts, ["a", "b"])
    assert combined.num_utterances == 4 and combined.targets == "labels"
    for name, value in whole.values.items():
        torch.testing.assert_close(combined.values[name], value)
    name = "w2v_encoder.proj.weight"
    assert (whole.values[name] - (parts[0].values[name] + parts[1].values[name]) / 2).abs().max() > 1e-4


def test_what_cannot_be_combined(tmp_path: Path, corpus: Path) -> None:
    parts = [estimate(one_model(tmp_path, seed), corpus, max_utterances=1) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"must be of one model, but b is of another than a; .*criterion.ewc_paths"):
        combine_fishers(parts, ["a", "b"])
    sampled = estimate(one_model(tmp_path), corpus, labels=None, max_utterances=1)
    with pytest.raises(ValueError, match="one kind of transcripts, but b is of sampled, a of labels"):
        combine_fishers([parts[0], sampled], ["a", "b"])


def test_transcripts_are_sampled_as_the_model_gives_them() -> None:
    """Frequencies against p(y | x) summed over all paths of 3 frames."""
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]).log()
    expected: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=3):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != 0)
        expected[text] = expected.get(text, 0) + math.exp(sum(log_probs[t, v].item() for t, v in enumerate(path)))
    number = 4000
    drawn = [tuple(_sample(log_probs, [1, i]).tolist()) for i in range(number)]
    assert drawn == [tuple(_sample(log_probs, [1, i]).tolist()) for i in range(number)]
    for text, probability in expected.items():
        tolerance = 4 * math.sqrt(probability * (1 - probability) / number)
        assert drawn.count(text) / number == pytest.approx(probability, abs=tolerance)


def test_the_models_own_transcripts(tmp_path: Path, corpus: Path) -> None:
    model = one_model(tmp_path)
    fisher = estimate(model, corpus, labels=None)
    again, labelled = estimate(model, corpus, labels=None), estimate(model, corpus)
    name = "w2v_encoder.proj.weight"
    assert fisher.targets == "sampled" and torch.equal(fisher.values[name], again.values[name])
    assert fisher.values[name].max() > 0 and not torch.allclose(fisher.values[name], labelled.values[name])


def test_an_empty_transcript_counts(tmp_path: Path) -> None:
    model = one_model(tmp_path)
    fisher = estimate_fisher(model, [("a", torch.randn(4000), torch.zeros(0, dtype=torch.long))], model.symbols)
    assert fisher.values["w2v_encoder.proj.bias"][0] > 0


def test_max_utterances_are_spread(tmp_path: Path, corpus: Path) -> None:
    model = one_model(tmp_path)
    assert find_utterances(corpus, model, model.symbols, max_utterances=2).indices == [0, 2]
    assert find_utterances(corpus, model, model.symbols, max_utterances=9).indices == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="`max_utterances` must be at least 1, but is 0"):
        find_utterances(corpus, model, model.symbols, max_utterances=0)


def test_labels_of_another_task_are_refused(tmp_path: Path) -> None:
    model, manifest = one_model(tmp_path), write_corpus(tmp_path)
    manifest.with_suffix(".ltr").write_text("A T E\nT T Ж\nE\nO A |\n")
    with pytest.raises(ValueError, match=r"train.ltr:2: a label must be in the dictionary, but 'Ж' is not"):
        find_utterances(manifest, model, model.symbols)
    manifest.with_suffix(".ltr").write_text("A T E\nT T O\n" + "A " * 30 + "\nO A |\n")
    with pytest.raises(ValueError, match=r"train.ltr:3: CTC needs a frame for each of 30 labels"):
        find_utterances(manifest, model, model.symbols)
    with pytest.raises(ValueError, match="there must be one at least, but there are 0"):
        estimate_fisher(model, [], model.symbols)


def test_names_are_those_of_fairseqs_models(recogniser: tuple) -> None:
    model, reference = recogniser
    names = set(parameter_names(model).values())
    assert {n for n, _ in reference.named_parameters() if n.startswith("w2v_encoder.")} == names


def test_file(tmp_path: Path, corpus: Path) -> None:
    fisher = estimate(one_model(tmp_path), corpus, max_utterances=2)
    path = tmp_path / "fisher.safetensors"
    write_fisher(path, fisher)
    read = read_fisher(path)
    assert (read.num_utterances, read.targets, read.symbols) == (2, "labels", fisher.symbols)
    assert read.fingerprint() == fisher.fingerprint() and set(read.values) == set(fisher.values)
    assert all(
        torch.equal(read.values[n], v) and torch.equal(read.means[n], fisher.means[n]) for n, v in fisher.values.items()
    )
    assert [p.name for p in tmp_path.glob("*fisher*")] == ["fisher.safetensors"]


def test_damaged_files(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    write_fisher(path, estimate(one_model(tmp_path), corpus, max_utterances=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"fisher.safetensors must be a Fisher file, but is damaged"):
        read_fisher(path)
    at = whole.index(b"{", 9) and len(whole) - 3
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="is damaged: its means are not those"):
        read_fisher(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"must be a Fisher file of s3distill fisher, but has no s3distill.fisher"):
        read_fisher(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"s3distill.fisher": '{"version": 2}'})
    with pytest.raises(ValueError, match="has version 2 of Fisher files, but this s3distill reads 1; upgrade"):
        read_fisher(path)
    with pytest.raises(FileNotFoundError, match="there is no Fisher file"):
        read_fisher(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        write_fisher(tmp_path / "model.pt", estimate(one_model(tmp_path), corpus, max_utterances=1))
