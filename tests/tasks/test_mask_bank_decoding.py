"""`fairseq-generate --mask-bank`: a backbone and a bank entry give the text of the run that was packed, and so does a baked model."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils, options
from fairseq.scoring import SCORER_REGISTRY  # noqa: F401  the registry must be there before the parser is built
from fairseq_cli import generate

import s3distill
from s3distill.cli.main import main
from s3distill.masks.bank import MaskBank
from s3distill.masks.masked_model import MaskedModel
from s3distill.tasks._bank_model import dictionary_of
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask
from tests.masks import runs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # hydra's, about fairseq's use of it

RUNS: dict[str, dict[str, Any]] = {
    "nl": {},
    "everything": runs.EVERYTHING,
    "half": {**runs.EVERYTHING, "dtype": torch.float16},
    "rows": {"linear_st_op": "linear_st_outstr", "no_prune_pos": False},
    "blank": {"prune_rate": 0.9, "fix_attn": True, "blank_weight": 2.0},
    "other": {},  # another dictionary
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, backbone, runs and a bank of all of them."""
    folder = tmp_path_factory.mktemp("bank")
    runs.write_corpus(folder / "data")
    runs.write_corpus(folder / "other_data", runs.OTHER_LETTERS)
    backbone = runs.write_backbone(folder / "backbone.pt")
    for i, (name, run_options) in enumerate(RUNS.items()):
        runs.write_run(folder / f"{name}.pt", backbone, data_of(folder, name), seed=i + 1, **run_options)
        assert (
            main(["masks", "pack", str(folder / f"{name}.pt"), "--name", name, "--bank", str(folder / "bank.st")]) == 0
        )
    return folder


def data_of(folder: Path, name: str) -> Path:
    return folder / ("other_data" if name == "other" else "data")


def command(data: Path, model: Path, *more: str, batch_size: int = 3) -> list[str]:
    arguments = [
        str(data),
        "--task",
        "audio_ctc",
        "--labels",
        "ltr",
        "--path",
        str(model),
        "--gen-subset",
        "test",
        "--cpu",
    ]
    arguments += [
        "--batch-size",
        str(batch_size),
        "--num-workers",
        "0",
        "--scoring",
        "s3_wer",
        "--post-process",
        "letter",
    ]
    return [*arguments, *more]


def decode(data: Path, model: Path, *more: str, batch_size: int = 3) -> list[str]:
    """fairseq-generate in this process; the transcripts in letters."""
    parser = options.get_generation_parser()
    parser.add_argument("--arch", "-a", default="wav2vec2")
    scorer = generate.main(options.parse_args_and_arch(parser, command(data, model, *more, batch_size=batch_size)))
    return [transcript.hypothesis for transcript in scorer.transcripts.in_order()]


@functools.cache
def text_of(folder: Path, name: str) -> list[str]:
    """What the run itself decodes."""
    return decode(data_of(folder, name), folder / f"{name}.pt")


def with_bank(folder: Path, name: str) -> list[str]:
    return ["--mask-bank", str(folder / "bank.st"), "--mask-name", name]


@pytest.mark.parametrize("name", RUNS)
def test_backbone_and_bank_decode_as_the_run_did(name: str, folder: Path) -> None:
    data = data_of(folder, name)
    expected = text_of(folder, name)
    assert len(set(expected)) == len(runs.SAMPLES) and all(len(text) > 4 for text in expected), "noise, but transcribed"
    assert decode(data, folder / "backbone.pt", *with_bank(folder, name)) == expected
    assert decode(data, folder / "backbone.pt", *with_bank(folder, name), batch_size=1) == expected
    if name == "other":
        assert set("".join(expected)) <= {*runs.OTHER_LETTERS, " "}
    elif name != "nl":
        assert decode(data, folder / "backbone.pt", *with_bank(folder, "nl")) != expected


def logits_of_run(path: Path, data: Path, waveforms: torch.Tensor) -> torch.Tensor:
    """What the run's own fairseq model gives, [B, T, V]."""
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides={"data": str(data)})
    with torch.no_grad():
        return models[0].eval()(source=waveforms, padding_mask=None)["encoder_out"].transpose(0, 1)


@pytest.mark.parametrize("name", RUNS)
def test_the_python_api_gives_the_logits_of_the_run(name: str, folder: Path) -> None:
    waveforms = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    model = MaskedModel.load(s3distill.load(folder / "backbone.pt"), folder / "bank.st")
    for _ in range(2):
        with torch.no_grad():
            logits = model.use(name)(waveforms).logits
        torch.testing.assert_close(
            logits, logits_of_run(folder / f"{name}.pt", data_of(folder, name), waveforms), rtol=1e-4, atol=1e-4
        )
        model.use("nl")
    assert model.use(name).symbols == dictionary_from(data_of(folder, name))


def dictionary_from(data: Path) -> list[str]:
    return AudioCtcTask(AudioCtcConfig(data=str(data), labels="ltr")).target_dictionary.symbols


@pytest.mark.parametrize("name", ["nl", "everything", "half", "other"])
@pytest.mark.parametrize("source", ["run", "bank"])
def test_a_baked_model_decodes_as_the_run_did(source: str, name: str, folder: Path, tmp_path: Path) -> None:
    baked, data = tmp_path / "baked.pt", data_of(folder, name)
    given = [str(folder / f"{name}.pt")]
    if source == "bank":
        given = ["--bank", str(folder / "bank.st"), "--name", name, "--backbone", str(folder / "backbone.pt")]
    assert main(["masks", "bake", *given, str(baked)]) == 0
    assert decode(data, baked) == text_of(folder, name)
    model = checkpoint_utils.load_model_ensemble([str(baked)], arg_overrides={"data": str(data)})[0][0]
    assert type(model).__name__ == "Wav2VecCtc" and type(model.w2v_encoder.w2v_model).__name__ == "Wav2Vec2Model"
    loaded = s3distill.load(baked)
    assert loaded.symbols == dictionary_from(data) and not loaded.normalize


_STOCK = """
import sys, torch
from fairseq import checkpoint_utils
models, _, task = checkpoint_utils.load_model_ensemble_and_task([sys.argv[1]], arg_overrides={"data": sys.argv[2]})
assert "s3distill" not in sys.modules
waveforms = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = models[0].eval()(source=waveforms, padding_mask=torch.zeros(2, 8000, dtype=torch.bool))["encoder_out"]
torch.save((logits.transpose(0, 1), task.target_dictionary.symbols), sys.argv[3])
"""


@pytest.mark.slow
def test_stock_fairseq_loads_a_baked_model_without_us(folder: Path, tmp_path: Path) -> None:
    baked = tmp_path / "baked.pt"
    assert main(["masks", "bake", str(folder / "everything.pt"), str(baked), "--no-dictionary"]) == 0
    arguments = [sys.executable, "-c", _STOCK, baked, folder / "data", tmp_path / "logits"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, symbols = torch.load(tmp_path / "logits")
    waveforms = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    expected = logits_of_run(folder / "everything.pt", folder / "data", waveforms)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert symbols == dictionary_from(folder / "data")


@pytest.mark.slow
def test_the_command_as_a_user_types_it(folder: Path, tmp_path: Path) -> None:
    package = Path(s3distill.__file__).parent
    arguments = command(folder / "data", folder / "backbone.pt", *with_bank(folder, "nl"), "--user-dir", str(package))
    code = "from fairseq_cli.generate import cli_main; cli_main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--results-path", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hypotheses = (tmp_path / "hypo.units-backbone.pt-test.txt").read_text().splitlines()
    assert [line.rpartition(" (")[0] for line in hypotheses] == text_of(folder, "nl")


def test_a_fine_tuned_backbone_keeps_its_dictionary_to_itself(folder: Path, tmp_path: Path) -> None:
    """Its own head, dictionary and normalisation are another language's."""
    state = torch.load(folder / "backbone.pt", weights_only=False)
    encoder = {f"w2v_encoder.w2v_model.{k}": v for k, v in state["model"].items()}
    head = {"w2v_encoder.proj.weight": torch.randn(5, 32), "w2v_encoder.proj.bias": torch.randn(5)}
    state["cfg"]["model"] = {"_name": "wav2vec_ctc", "w2v_args": state["cfg"], "normalize": True}
    state["cfg"] = {
        **state["cfg"],
        "task": {"_name": "audio_finetuning", "data": "", "labels": "phn", "normalize": True},
    }
    state |= {
        "model": encoder | head,
        "task_state": {"target_dictionary": dictionary_of(["<s>", "<pad>", "</s>", "<unk>", "Q"])},
    }
    state["cfg"]["model"]["w2v_args"] = {
        "model": torch.load(folder / "backbone.pt", weights_only=False)["cfg"]["model"]
    }
    torch.save(state, tmp_path / "tuned.pt")
    text = decode(folder / "data", tmp_path / "tuned.pt", *with_bank(folder, "nl"))
    assert text == text_of(folder, "nl")


def test_the_run_decides_on_normalisation(folder: Path, tmp_path: Path) -> None:
    backbone = runs.write_backbone(tmp_path / "backbone.pt", normalize=True)
    run = runs.write_run(tmp_path / "loud.pt", backbone, folder / "data", normalize=True)
    assert main(["masks", "pack", str(run), "--name", "loud", "--bank", str(tmp_path / "bank.st")]) == 0
    assert MaskBank.open(tmp_path / "bank.st").info("loud")["normalize"] is True
    text = decode(folder / "data", run)
    assert decode(folder / "data", backbone, *with_bank(tmp_path, "loud")) == text
    assert main(["masks", "bake", str(run), str(tmp_path / "baked.pt")]) == 0
    assert decode(folder / "data", tmp_path / "baked.pt") == text and s3distill.load(tmp_path / "baked.pt").normalize


@pytest.mark.parametrize("family", ["hubert", "data2vec_audio"])
def test_other_families_of_backbones(family: str, folder: Path, tmp_path: Path) -> None:
    """HuBERT is baked as the wav2vec 2.0 model of its shape, since stock `wav2vec_ctc` cannot build a HuBERT."""
    shape = {"conv_pos": 15, "pos_conv_depth": 3} if family == "data2vec_audio" else {}
    backbone = runs.write_backbone(tmp_path / "backbone.pt", family, **shape)
    run = runs.write_run(tmp_path / "nl.pt", backbone, folder / "data", **runs.EVERYTHING)
    bank, baked = tmp_path / "bank.st", tmp_path / "baked.pt"
    assert main(["masks", "pack", str(run), "--name", "nl", "--bank", str(bank)]) == 0
    assert main(["masks", "bake", str(run), str(baked)]) == 0
    expected = decode(folder / "data", run)
    assert decode(folder / "data", backbone, *with_bank(tmp_path, "nl")) == expected
    assert decode(folder / "data", baked, batch_size=1) == expected


# --- refusals


def test_what_cannot_be_decoded_is_refused_before_it_starts(folder: Path, tmp_path: Path) -> None:
    data, backbone = folder / "data", folder / "backbone.pt"
    with pytest.raises(
        ValueError, match=r"`mask_bank` and `mask_name` .* must come together, but are .*bank\.st' and None"
    ):
        decode(data, backbone, *with_bank(folder, "nl")[:2])
    with pytest.raises(ValueError, match=r"must come together, but are None and 'nl'"):
        decode(data, backbone, "--mask-name", "nl")
    with pytest.raises(ValueError, match=r"has no 'xx'; it has nl, everything, half"):
        decode(data, backbone, *with_bank(folder, "xx"))
    with pytest.raises(FileNotFoundError, match=r"mask bank .*gone\.st does not exist"):
        decode(data, backbone, "--mask-bank", str(tmp_path / "gone.st"), "--mask-name", "nl")
    with pytest.raises(
        ValueError,
        match=r"dict\.ltr\.txt must be the dictionary that the model was trained with, but differs in A, B, C, D, E, X, Y, Z",
    ):
        decode(data, backbone, *with_bank(folder, "other"))
    wrong = runs.write_backbone(tmp_path / "wrong.pt", seed=7)
    with pytest.raises(
        ValueError, match=r"bank\.st belongs to the backbone with checksum .*, but the checkpoint of --path has"
    ):
        decode(data, wrong, *with_bank(folder, "nl"))


def test_a_bank_is_not_for_training(folder: Path) -> None:
    options_of_task = AudioCtcConfig(
        data=str(folder / "data"), labels="ltr", mask_bank=str(folder / "bank.st"), mask_name="nl"
    )
    with pytest.raises(ValueError, match=r"`mask_bank` is for decoding and must not be set in training"):
        AudioCtcTask(options_of_task).build_model({"_name": "wav2vec_ctc"})


def test_a_dictionary_without_the_special_symbols_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must begin with <s> <pad> </s> <unk>, but begins with A B"):
        dictionary_of(["A", "B"])
