"""`s3distill pseudo-label MANIFEST --teacher CKPT -o DIR`: a fine-tuned teacher transcribes audio, and filters keep what is plausible."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import s3distill
from s3distill.data.labelled_split import gold_split, join_splits
from s3distill.data.manifest import label_path, validate_for_training
from s3distill.data.manifest_check import RECEPTIVE_FIELD
from s3distill.data.manifest_lines import Manifest
from s3distill.data.pseudo_label_files import OutputFiles, read_reference, select
from s3distill.data.pseudo_label_journal import Decoded, Journal
from s3distill.data.pseudo_label_report import report, table
from s3distill.data.pseudo_label_search import DecodeOptions
from s3distill.data.pseudo_labels import PseudoLabeller
from s3distill.data.text_filters import CODECS, DEFAULT_RATIO, TextFilters

_LIMITS = {
    "max-loop": (int, "a phrase of 1 to 4 words stands there more than N times in a row"),
    "min-chars-per-second": (float, "fewer characters per second of audio"),
    "max-chars-per-second": (float, "more characters per second of audio"),
    "min-word-ratio": (float, "fewer words for each word of --reference"),
    "max-word-ratio": (float, "more words for each word of --reference"),
    "min-confidence": (float, "a lower mean posterior of its symbols"),
    "min-score": (float, "a lower log-probability per symbol, all paths counted (at most 0)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = DecodeOptions()
    parser.add_argument("manifest", metavar="MANIFEST.tsv")
    parser.add_argument("--teacher", required=True, metavar="CKPT", help="CTC model: checkpoint or folder")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="folder of NAME.tsv .ltr .wrd .nbest.jsonl .conf, the dictionary and the report",
    )
    parser.add_argument("--name", metavar="NAME", help="split that is written (default: the manifest's)")
    parser.add_argument(
        "--nbest", type=int, default=defaults.nbest, metavar="K", help="hypotheses of each utterance (%(default)s)"
    )
    parser.add_argument(
        "--beam",
        type=int,
        metavar="N",
        help="width of the search (default: greedy for --nbest 1, else the larger of 10 and 2 K; 50 with a lexicon or language model)",
    )
    parser.add_argument(
        "--dict", metavar="PATH", help="dictionary that the labels are written in (default: the teacher's)"
    )
    parser.add_argument(
        "--teacher-dict", metavar="PATH", help="the teacher's dictionary, where its checkpoint holds none"
    )
    parser.add_argument(
        "--add",
        metavar="LABELLED.tsv",
        help="put the utterances of a labelled manifest in front, with their .ltr as only hypothesis",
    )
    parser.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, help="utterances at a time (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="e.g. cuda (%(default)s)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="decode one of N parts, from 1/N to N/N, and write no labels; --merge follows",
    )
    parser.add_argument("--merge", action="store_true", help="write the labels of what all shards decoded")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace labels that are there; drop what was decoded with other settings",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    language_model = parser.add_argument_group("lexicon and language model (pip install 's3distill[decode]')")
    language_model.add_argument("--lexicon", metavar="PATH", help="words and their spellings")
    language_model.add_argument(
        "--ngram-lm", metavar="PATH", help="KenLM file: over words with a lexicon, over symbols without"
    )
    language_model.add_argument("--lm-weight", type=float, default=0.0, metavar="X", help="of the model (%(default)s)")
    language_model.add_argument("--word-score", type=float, default=0.0, metavar="X", help="of each word (%(default)s)")
    _add_filters(parser)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    filters = parser.add_argument_group(
        "filters", "an utterance is removed if its best hypothesis has, a worse hypothesis if its own text has:"
    )
    filters.add_argument(
        "--codec",
        choices=[*CODECS, "none"],
        default="zlib",
        help="of the compression ratio len(utf8)/len(compressed); none: no such filter (%(default)s)",
    )
    filters.add_argument(
        "--max-compression-ratio",
        type=float,
        metavar="X",
        help="a higher ratio, so repeats itself (zlib: 2.4, gzip: 1.5)",
    )
    for name, (kind, text) in _LIMITS.items():
        filters.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=text)
    filters.add_argument(
        "--keep-best",
        type=float,
        default=1.0,
        metavar="X",
        help="keep the share X of what is left with the highest log-probability per symbol (%(default)s)",
    )
    filters.add_argument(
        "--reference", metavar="ltr|PATH", help="labels to compare with: an ending beside the manifest, or a path"
    )


def run(args: argparse.Namespace) -> int:
    options, filters = _options(args), _filters(args)
    if not 0 < args.keep_best <= 1:  # not first when all is decoded
        raise ValueError(f"--keep-best must be in (0, 1], but is {args.keep_best}; 0.8 keeps the surest 80%")
    manifest = validate_for_training(args.manifest, min_samples=RECEPTIVE_FIELD)
    files = OutputFiles(Path(args.output), args.name or Path(args.manifest).stem)
    may_replace = args.overwrite or args.shard is not None  # a shard writes none of them
    files.check(args.manifest, None, may_replace)
    device = _device(args.device)
    labeller = PseudoLabeller(s3distill.load(args.teacher), args.teacher, args.teacher_dict, args.dict)
    files.check(args.manifest, labeller.text, may_replace)
    reference = None
    if args.reference:
        reference = read_reference(label_path(args.manifest, args.reference), manifest, labeller.text)
    gold = gold_split(args.add, labeller.text, manifest) if args.add else None
    journal = Journal(files.path("journal"), labeller.settings(manifest, options))
    if args.overwrite:
        journal.drop_foreign()
    labeller.model.to(device)
    decoded = _decode(args, labeller, manifest, journal, options)
    if args.shard is not None:
        return 0
    selection = select(manifest, decoded, labeller.text, filters, reference, args.keep_best)
    values = report(manifest, decoded, selection, labeller.text, reference)
    values |= {"nbest": options.nbest, "beam": options.beam, "filters": filters.to_dict(), "keep_best": args.keep_best}
    print("\n".join(table(values)))
    split = selection.split(manifest)
    if gold is not None:
        split = join_splits(gold, split)
        values["labelled_utterances"] = len(gold.entries)
    files.write(split, labeller.text, values)
    print(f"wrote {files.path('tsv')} of {len(split.entries)} utterances, and its labels")
    return 0


def _decode(
    args: argparse.Namespace, labeller: PseudoLabeller, manifest: Manifest, journal: Journal, options: DecodeOptions
) -> Decoded:
    """What is decoded when this command is done; all of it, unless it is a shard's."""
    if args.merge:
        decoded, _ = journal.read()
    else:
        decoded = labeller.decode(manifest, journal, options, progress=not args.no_progress)
    number, missing = len(manifest.entries), len(manifest.entries) - len(decoded)
    if args.shard is not None:
        rest = f"{missing} are left to other shards" if missing else "all are; write the labels with --merge"
        print(f"{args.manifest}: {number - missing} of {number} utterances decoded, {rest}")
    elif missing:
        raise ValueError(
            f"--merge needs every utterance decoded, but {missing} of {number} are missing in {journal.folder}; run the shards that are "
            "left, with the same --teacher, --nbest, --beam and --batch-size"
        )
    return decoded


def _options(args: argparse.Namespace) -> DecodeOptions:
    if args.merge and args.shard:
        raise ValueError("--merge and --shard exclude each other: first each shard, then --merge alone")
    beam = args.beam
    if beam is None and (args.lexicon or args.ngram_lm):
        beam = max(50, args.nbest)
    elif beam is None:
        beam = 1 if args.nbest == 1 else max(10, 2 * args.nbest)
    language_model = (args.lexicon, args.ngram_lm, args.lm_weight, args.word_score)
    return DecodeOptions(args.nbest, beam, args.batch_size, *language_model, *(args.shard or (1, 1)))


def _filters(args: argparse.Namespace) -> TextFilters:
    ratio = args.max_compression_ratio
    if args.codec == "none" and ratio is not None:
        raise ValueError("--max-compression-ratio needs a --codec, but that is none; pass zlib or gzip")
    limits = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _LIMITS}
    if args.codec == "none":
        filters = TextFilters(**limits)
    else:
        filters = TextFilters(args.codec, DEFAULT_RATIO[args.codec] if ratio is None else ratio, **limits)
    if filters.needs_reference and not args.reference:
        raise ValueError(
            "--min-word-ratio and --max-word-ratio compare with labels that are there; pass --reference ltr, or leave them out"
        )
    return filters


def _shard(text: str) -> tuple[int, int]:
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be I/N, as in 1/4, but is {text!r}")
    return int(index), int(number)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that is there, but {name!r} is not; pass cpu") from error
