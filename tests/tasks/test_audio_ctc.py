"""`audio_ctc` end to end: the real `fairseq-generate` on tiny random stock models and generated audio."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

fairseq = pytest.importorskip("fairseq")

from fairseq import options  # noqa: E402
from fairseq.dataclass.configs import FairseqConfig  # noqa: E402
from fairseq.models import MODEL_DATACLASS_REGISTRY  # noqa: E402
from fairseq_cli import generate  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import s3distill  # noqa: E402
from s3distill.scoring.s3_wer import S3WerConfig, S3WerScorer  # noqa: E402
from s3distill.tasks.audio_ctc import AudioCtcConfig, AudioCtcTask  # noqa: E402

LETTERS = ("|", "A", "B", "C", "D", "E")
LABELS = ["A B | C |", "D E A D |", "B E | A | D E |", "C A B |", "E |"]
WORDS = ["AB C", "DEAD", "BE A DE", "CAB", "E"]
SAMPLES = [9000, 16000, 4000, 12345, 7001]
SIZES = dict(
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    conv_feature_layers="[(8,10,5),(8,8,4),(8,4,4),(8,4,4)]",
    conv_pos=8,
    conv_pos_groups=2,
    extractor_mode="layer_norm",  # stock GroupNorm takes its statistics over the padding, too
)


# file -> (fine-tuned model, its encoder, the encoder's task, options that differ)
KINDS = {
    "wav2vec_ctc": ("wav2vec_ctc", "wav2vec2", {"_name": "audio_pretraining"}, {}),
    "hubert_ctc": (
        "hubert_ctc",
        "hubert",
        {"_name": "hubert_pretraining", "label_rate": 50.0, "labels": ["ltr"]},
        {"label_rate": 50.0},
    ),
    "student": ("wav2vec_ctc", "ssl_student", {"_name": "audio_distill"}, {"extractor_mode": "default"}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    lines = ["audio"]
    for i, size in enumerate(SAMPLES):
        sf.write(folder / "audio" / f"{i}.flac", rng.normal(0, 0.1, size).astype(np.float32), 16000)
        lines.append(f"{i}.flac\t{size}")
    for split in ("test", "words"):
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.ltr").write_text("\n".join(LABELS) + "\n")
    (folder / "words.wrd").write_text("\n".join(["OTHER", *WORDS[1:]]) + "\n")
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    return folder


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: _write_checkpoint(kind, corpus, folder / f"{kind}.pt") for kind in KINDS}


def _plain(config: object) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=False, enum_to_str=True)


def _write_checkpoint(kind: str, corpus: Path, path: Path) -> Path:
    """A randomly initialised fine-tuned checkpoint, with the keys that fairseq's trainer writes."""
    model_name, encoder_name, encoder_task, options_that_differ = KINDS[kind]
    encoder = MODEL_DATACLASS_REGISTRY[encoder_name]()
    model = MODEL_DATACLASS_REGISTRY[model_name](w2v_path="nowhere.pt", no_pretrained_weights=True)
    cfg = OmegaConf.create(_plain(FairseqConfig()))
    cfg.task = OmegaConf.create({**_plain(AudioCtcConfig(data=str(corpus), labels="ltr")), "_name": "audio_ctc"})
    cfg.model = OmegaConf.create({**_plain(model), "_name": model_name})
    cfg.model.w2v_args = {
        "model": {**_plain(encoder), "_name": encoder_name, **SIZES, **options_that_differ},
        "task": {"data": str(corpus), "normalize": False, **encoder_task},
        "common": {"fp16": False, "tpu": False, "seed": 1},
    }
    task = AudioCtcTask(cfg.task)
    torch.manual_seed(1)
    built = task.build_model(cfg.model)
    with torch.no_grad():
        built.w2v_encoder.proj.weight.mul_(20)  # random frames then differ, so that the transcripts are not empty
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": built.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CtcCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 1,
            }
        ],
        "task_state": {"target_dictionary": task.target_dictionary},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(state, path)
    return path


def _command(corpus: Path, model: Path | str, subset: str = "test", batch_size: int = 3) -> list[str]:
    arguments = [
        str(corpus),
        "--task",
        "audio_ctc",
        "--labels",
        "ltr",
        "--path",
        str(model),
        "--gen-subset",
        subset,
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
    return arguments


def _generate(arguments: list[str], results: Path | None = None) -> Any:
    """fairseq-generate in this process; returns the scorer."""
    parser = options.get_generation_parser()
    parser.add_argument("--arch", "-a", default="wav2vec2")
    if results is not None:
        arguments = [*arguments, "--results-path", str(results)]
    return generate.main(options.parse_args_and_arch(parser, arguments))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_fairseq_generate_decodes_scores_and_writes_its_files(
    corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The command as a user types it, in a process of its own."""
    results, package = tmp_path / "results", Path(s3distill.__file__).parent
    arguments = [
        *_command(corpus, checkpoints["wav2vec_ctc"]),
        "--results-path",
        str(results),
        "--user-dir",
        str(package),
    ]
    code = "from fairseq_cli.generate import cli_main; cli_main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--print-alignment"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = (results / "generate-test.txt").read_text()
    last = printed.strip().splitlines()[-1]
    assert re.match(r"Generate test with beam=5: WER \d+\.\d\d% \(\d+ errors in 8 words: .*UER .* in 24 units", last), (
        last
    )
    detokenized = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", printed, re.MULTILINE))
    assert sorted(detokenized) == list("01234"), "no utterance may be left out, whatever the size of the last batch"
    hypotheses = _lines(results / "hypo.word-wav2vec_ctc.pt-test.txt")
    assert hypotheses == [f"{' '.join(detokenized[str(i)].split())} (None-{i})" for i in range(5)]
    assert any(len(line) > len("(None-0)") + 1 for line in hypotheses), "the model must have said something"
    assert _lines(results / "ref.word-wav2vec_ctc.pt-test.txt") == [f"{w} (None-{i})" for i, w in enumerate(WORDS)]
    assert _lines(results / "ref.units-wav2vec_ctc.pt-test.txt") == [f"{u} (None-{i})" for i, u in enumerate(LABELS)]
    units = _lines(results / "hypo.units-wav2vec_ctc.pt-test.txt")
    joined = [" ".join(u.rpartition(" (")[0].replace(" ", "").replace("|", " ").split()) for u in units]
    assert joined == [h.rpartition(" (")[0].strip() for h in hypotheses]
    first_positions = re.search(r"^A-0\t(\S+) (\S+)", printed, re.MULTILINE)
    assert first_positions and re.fullmatch(r"\d+-0", first_positions[1]) and re.fullmatch(r"\d+-1", first_positions[2])
    scores = json.loads((results / "scores-test.json").read_text())
    assert (
        f"WER {scores['wer']:.2f}%" in last and scores["num_utterances"] == 5 and scores["word_references"] == "labels"
    )
    assert scores["audio_seconds"] == pytest.approx(sum(SAMPLES) / 16000) and scores["decode_seconds"] > 0
    assert not [p.name for p in results.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_single_decoding_give_the_same_text(
    kind: str, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Also for `hubert_ctc`, whose logits of padded frames look like any other, and for our GroupNorm extractor."""
    texts = []
    for batch_size in (1, 5):
        _generate(_command(corpus, checkpoints[kind], batch_size=batch_size), tmp_path / str(batch_size))
        texts.append(_lines(tmp_path / str(batch_size) / f"hypo.units-{kind}.pt-test.txt"))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 5 and all(len(line) > 12 for line in texts[0])


def test_words_come_from_wrd_where_it_is(corpus: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    scorer = _generate(_command(corpus, checkpoints["wav2vec_ctc"], "words"), tmp_path)
    assert _lines(tmp_path / "ref.word-wav2vec_ctc.pt-words.txt")[:2] == ["OTHER (None-0)", "DEAD (None-1)"]
    scores = json.loads((tmp_path / "scores-words.json").read_text())
    assert scores["word_references"] == "wrd" and scores["word"]["num_reference"] == 7  # OTHER stands for two words
    assert scorer.score() == scores["wer"]


def test_an_ensemble_is_decoded(corpus: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    one = str(checkpoints["wav2vec_ctc"])
    other = tmp_path / "other.pt"
    state = torch.load(one, weights_only=False)
    state["model"]["w2v_encoder.proj.weight"] = state["model"]["w2v_encoder.proj.weight"].flip(0)
    torch.save(state, other)
    hypotheses = {}
    for name, path in (("one", one), ("both", f"{one}:{other}")):
        scorer = _generate(_command(corpus, path))
        hypotheses[name] = [t.hypothesis for t in scorer.transcripts.in_order()]
    assert hypotheses["one"] != hypotheses["both"]


def test_short_utterances_are_skipped_with_their_words(corpus: Path) -> None:
    task = AudioCtcTask(AudioCtcConfig(data=str(corpus), labels="ltr", min_sample_size=5000, tpu=False, seed=1))
    task.load_dataset("words", OmegaConf.structured(task.cfg))
    assert task.words["words"] == ["OTHER", "DEAD", "CAB", "E"]
    assert len(task.datasets["words"]) == 4


def test_validation_of_the_stock_criterion_reports_the_same_error_rates(
    corpus: Path, checkpoints: dict[str, Path]
) -> None:
    pytest.importorskip("editdistance")
    from fairseq import checkpoint_utils
    from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig

    scorer = _generate(_command(corpus, checkpoints["wav2vec_ctc"]))
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoints["wav2vec_ctc"])], arg_overrides={"data": str(corpus)}
    )
    task.load_dataset("test")
    dataset = task.datasets["test"]
    sample = dataset.collater([dataset[i] for i in range(5)])
    _, _, log = CtcCriterion(CtcCriterionConfig(sentence_avg=False), task)(models[0].eval(), sample)
    rates, _ = scorer._score()
    assert (log["w_errors"], log["w_total"]) == (rates.words.errors, rates.words.num_reference)
    assert log["c_total"] == rates.units.num_reference


def test_autocast_in_the_steps_of_the_task(corpus: Path, checkpoints: dict[str, Path]) -> None:
    pytest.importorskip("editdistance")
    from fairseq import checkpoint_utils
    from fairseq.criterions.ctc import CtcCriterion, CtcCriterionConfig

    losses, dtypes = {}, {}
    for dtype in ("none", "bfloat16"):
        (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(checkpoints["wav2vec_ctc"])],
            arg_overrides={"data": str(corpus)},
        )
        task.cfg.autocast_dtype = dtype
        task.load_dataset("test")
        sample = task.datasets["test"].collater([task.datasets["test"][i] for i in range(5)])
        seen = []
        model.w2v_encoder.proj.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.dtype))
        loss, _, _ = task.valid_step(sample, model, CtcCriterion(CtcCriterionConfig(sentence_avg=False), task))
        losses[dtype], dtypes[dtype] = float(loss), seen
        assert loss.dtype == torch.float32
    assert dtypes == {"none": [torch.float32], "bfloat16": [torch.bfloat16]}
    assert losses["bfloat16"] == pytest.approx(losses["none"], rel=0.05) and losses["bfloat16"] != losses["none"]


def test_criterion_ctc_without_editdistance_is_refused_before_training(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "editdistance", None)
    task = AudioCtcTask(AudioCtcConfig(data=str(corpus), labels="ltr"))
    with pytest.raises(RuntimeError, match="criterion `ctc` needs the package editdistance"):
        task.build_criterion(OmegaConf.create({"_name": "ctc"}))


def _broken(corpus: Path, folder: Path, name: str, text: str) -> Path:
    shutil.copytree(corpus, folder / "broken")
    (folder / "broken" / name).write_text(text)
    return folder / "broken"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "test.ltr",
            "A B |\n",
            r"test\.ltr: a label file must have a line for each of the 5 utterances .* but it has 1",
        ),
        ("test.ltr", "A Q |\n" + "A |\n" * 4, r"test\.ltr:1: a label must be in the dictionary, but 'Q' is not"),
        ("test.wrd", "AB C\n", r"test\.wrd must have a line for each of the 5 utterances of its manifest, but has 1"),
        (
            "dict.ltr.txt",
            "".join(f"{x} 1\n" for x in (*LETTERS, "F")),
            r"dictionary that the model was trained with.* in F;",
        ),
        (
            "dict.ltr.txt",
            "".join(f"{x} 1\n" for x in LETTERS[::-1]),
            r"dictionary that the model was trained with.* in their order",
        ),
        ("test.tsv", "audio\nmissing.flac\t9000\n", r"test\.tsv:2: an audio file must exist"),
    ],
)
def test_faults_of_the_data_are_named_before_decoding(
    name: str, text: str, message: str, corpus: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _generate(_command(_broken(corpus, tmp_path, name, text), checkpoints["wav2vec_ctc"]))


def test_options_that_cannot_work_are_refused(
    corpus: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = _command(corpus, checkpoints["wav2vec_ctc"])
    with pytest.raises(
        ValueError, match=r"longest utterance, 16000 samples, but --max-tokens is 12000 .*pass --batch-size"
    ):
        _generate([*command, "--max-tokens", "12000"])
    with pytest.raises(ValueError, match=r"`task\.labels` must name"):
        AudioCtcTask(AudioCtcConfig(data=str(corpus)))
    monkeypatch.setattr(S3WerScorer, "run", None)
    with pytest.raises(RuntimeError, match=r"^`--scoring s3_wer` scores what `--task audio_ctc` decodes"):
        S3WerScorer(S3WerConfig())
