"""`audio_ctc`: labelled audio for CTC fine-tuning, and decoding it with `fairseq-generate`."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
import importlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.audio_finetuning import AudioFinetuningConfig, AudioFinetuningTask
from omegaconf import II, OmegaConf

from s3distill.data.manifest import read_dictionary, read_labels, read_manifest
from s3distill.encoder.model import SpeechEncoder
from s3distill.scoring._nbest_lists import NbestLists
from s3distill.scoring.s3_wer import S3WerScorer
from s3distill.tasks._audio import check_split, set_root
from s3distill.tasks._autocast import AUTOCAST_DTYPES, AutocastSteps, check_autocast
from s3distill.tasks._bank_model import BankModel, dictionary_of, open_entry
from s3distill.tasks._ctc_generator import CtcGenerator
from s3distill.tasks._decoding import DecodingConfig, build_search, refuse_decoders
from s3distill.tasks._seq2seq_generator import Seq2SeqGenerator

logger = logging.getLogger(__name__)


@dataclass
class AudioCtcConfig(DecodingConfig, AudioFinetuningConfig):
    """fairseq's `audio_finetuning` options, those of decoding, and a mask bank for it: `--path` is then the backbone."""

    mask_bank: Optional[str] = field(
        default=None, metadata={"help": "decoding: lay masks of this bank over the model of --path, their backbone"}
    )
    mask_name: Optional[str] = field(default=None, metadata={"help": "entry of mask_bank, e.g. nl"})
    autocast_dtype: ChoiceEnum(list(AUTOCAST_DTYPES)) = field(  # type: ignore[valid-type]
        default="none",
        metadata={
            "help": "bfloat16: matrix products of the model in bfloat16, on CPU and GPU; parameters and the loss stay "
            "float32. Not beside common.fp16, bf16 or amp"
        },
    )
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")


@register_task("audio_ctc", dataclass=AudioCtcConfig)
class AudioCtcTask(AutocastSteps, AudioFinetuningTask):
    """fairseq's `audio_finetuning` with manifests checked before training, relative roots, and decoding."""

    cfg: AudioCtcConfig

    def __init__(self, cfg: AudioCtcConfig) -> None:
        if not cfg.labels:
            raise ValueError(
                "`task.labels` must name the label files' ending, but is empty; pass task.labels=ltr (--labels ltr)"
            )
        check_autocast(cfg)
        super().__init__(cfg)
        self.bank = open_entry(cfg.mask_bank, cfg.mask_name)
        self.frames_of: Any = None  # of a model in training: samples -> frames
        self.words: dict[str, list[str]] = {}  # per split, what `.wrd` says of each utterance of the dataset

    def load_target_dictionary(self) -> Any:
        symbols = None if self.bank is None else self.bank.symbols(self.cfg.mask_name)
        if symbols is not None:  # `_check_dictionary` holds it against the data's
            return dictionary_of(symbols)
        if self.cfg.labels:  # read here first for its errors, which name line, rule and remedy
            read_dictionary(Path(self.cfg.target_dictionary or self.cfg.data) / f"dict.{self.cfg.labels}.txt")
        return super().load_target_dictionary()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.bank is not None:  # the dictionary of a fine-tuned backbone is another language's
            state_dict = {k: v for k, v in state_dict.items() if k != "target_dictionary"}
        super().load_state_dict(state_dict)

    def build_model(self, model_cfg: Any, from_checkpoint: bool = False) -> Any:
        if self.bank is None:
            model = super().build_model(model_cfg, from_checkpoint)
            encoders = [m for m in model.modules() if isinstance(m, SpeechEncoder)]
            ctc = not self.cfg.autoregressive  # which alone needs a frame for every label
            if ctc and encoders and encoders[0].config.time_reduction > 1 and not from_checkpoint:
                self.frames_of = encoders[0].config.num_frames
            return model
        if not from_checkpoint:
            raise ValueError(
                "`mask_bank` is for decoding and must not be set in training; remove task.mask_bank and task.mask_name"
            )
        return BankModel(self.bank, self.cfg.mask_name)

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if getattr(cfg, "_name", None) in ("ctc", "ctc_distill"):
            try:
                importlib.import_module("editdistance")
            except ImportError as error:  # fairseq's criterion would fail at the first validation, an epoch later
                raise RuntimeError(
                    f"criterion `{cfg._name}` needs the package editdistance to validate; run: pip install editdistance"
                ) from error
        return super().build_criterion(cfg, from_checkpoint)

    def load_dataset(self, split: str, task_cfg: Any = None, **kwargs: Any) -> None:
        """Loads a split; decoding passes the checkpoint's own ``task_cfg``, so its ``normalize`` counts, not the command's."""
        if (
            self.bank is not None
        ):  # the checkpoint is a backbone, pre-trained by any task: what the entry's run did counts
            task_cfg = self.cfg
            task_cfg.normalize = bool(self.bank.info(self.cfg.mask_name).get("normalize", False))
        options = task_cfg or self.cfg
        if options.get("multi_corpus_keys") and ":" not in split:  # one manifest, for a model that learned from several
            task_cfg = options = OmegaConf.merge(options, {"multi_corpus_keys": None})
        parts = _parts(split, options.get("multi_corpus_keys"))
        roots = {}
        if not options.get("binarized_dataset", False):
            for key, name in parts:
                roots[key] = check_split(
                    self.cfg.data, name, options.labels, self.cfg.target_dictionary, self.frames_of
                )
            self._check_dictionary(options.labels)
        super().load_dataset(split, task_cfg, **kwargs)
        for key, root in roots.items():
            set_root(self.datasets[split] if key is None else self.dataset_map[split][key], root)
        if parts[0][0] is None:
            self._report_crops(split)
            words = Path(self.cfg.data) / f"{split}.wrd"
            if words.is_file():
                self.words[split] = self._utterances_of(split, words)

    def _check_dictionary(self, labels: str) -> None:
        """The dictionary in use (a checkpoint's own, when decoding) must number the symbols as the data's file does."""
        path = Path(self.cfg.target_dictionary or self.cfg.data) / f"dict.{labels}.txt"
        from_file, in_use = (
            list(read_dictionary(path)),
            self.target_dictionary.symbols[self.target_dictionary.nspecial :],
        )
        # fairseq pads dictionaries of checkpoints to a multiple of 8 with madeupword symbols
        in_use = [s for s in in_use if not s.startswith("madeupword")]
        if from_file != in_use:
            differing = sorted(set(from_file) ^ set(in_use)) or ["their order"]
            raise ValueError(
                f"{path} must be the dictionary that the model was trained with, but differs in {', '.join(differing[:8])}; copy the "
                "dictionary of the training data there"
            )

    def _report_crops(self, split: str) -> None:
        limit = self.cfg.max_sample_size
        num_long = 0 if limit is None else sum(int(size) > limit for size in _audio(self.datasets[split]).sizes)
        if num_long:
            logger.warning(
                "%d utterances of %s are longer than task.max_sample_size = %d: their audio is cropped, their labels are not",
                num_long,
                split,
                limit,
            )

    def _utterances_of(self, split: str, path: Path) -> list[str]:
        """Lines of a label file that belong to the dataset's utterances (too short ones were skipped)."""
        lines, dataset = read_labels(path), self.datasets[split]
        skipped = getattr(_audio(dataset), "skipped_indices", set())
        if len(lines) != len(dataset) + len(skipped):
            raise ValueError(
                f"{path} must have a line for each of the {len(dataset) + len(skipped)} utterances of its manifest, but has {len(lines)}; "
                "write both again, together, or remove it to score against the labels"
            )
        return [line for i, line in enumerate(lines) if i not in skipped]

    def _files_of(self, split: str) -> list[str]:
        """The files of the dataset's utterances, as the manifest has them."""
        skipped = getattr(_audio(self.datasets[split]), "skipped_indices", set())
        entries = read_manifest(Path(self.cfg.data) / f"{split}.tsv").entries
        return [name for i, (name, _) in enumerate(entries) if i not in skipped]

    def get_batch_iterator(self, dataset: Any, max_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        longest = max((int(size) for size in getattr(_audio(dataset), "sizes", ())), default=0)
        if max_tokens is not None and longest > max_tokens:
            raise ValueError(
                f"a batch must hold the longest utterance, {longest} samples, but --max-tokens is {max_tokens} (without one, "
                "fairseq-generate takes 12000, meant for text); pass --batch-size, or more --max-tokens (samples per batch; in training "
                "dataset.batch_size and dataset.max_tokens)"
            )
        # fairseq drops the last batch, the shortest utterances, where its size is no multiple of this option (8 by default)
        kwargs["required_batch_size_multiple"] = 1
        return super().get_batch_iterator(dataset, max_tokens, *args, **kwargs)

    def build_generator(self, models: Any, args: Any, *rest: Any, **options: Any) -> Any:
        dictionary, blank = self.target_dictionary, self.target_dictionary.index(self.blank_symbol)
        has_decoder = any(hasattr(model, "decoder") for model in models)
        if has_decoder:
            search = super().build_generator(models, args, *rest, **options)
            if args is self.cfg.eval_wer_config:
                return search  # fairseq's own, for error rates in validation
            refuse_decoders(self.cfg)
        else:
            search = build_search(self.cfg, args, dictionary, blank)
        if args.nbest > 1 and self.cfg.multi_corpus_keys:
            raise ValueError(
                "--nbest writes a file for one manifest, and must be 1 with multi_corpus_keys; decode one by one"
            )
        audio = {} if self.cfg.multi_corpus_keys else {split: self._files_of(split) for split in self.datasets}
        lists = NbestLists(audio, args.nbest) if args.nbest > 1 else None
        generator: Seq2SeqGenerator | CtcGenerator
        if has_decoder:
            generator = Seq2SeqGenerator(search, dictionary, self.words, lists)
        else:
            generator = CtcGenerator(dictionary, blank, search, self.words, audio, lists)
        S3WerScorer.nbest = lists
        S3WerScorer.run = generator.transcripts
        return generator


def _parts(split: str, multi_corpus_keys: str | None) -> list[tuple[str | None, str]]:
    """(corpus, manifest name) pairs of a split; fairseq writes several corpora as ``key:name,key:name``."""
    if multi_corpus_keys is None:
        return [(None, split)]
    return [(key.strip(), name.strip()) for key, name in (part.split(":") for part in split.split(","))]


def _audio(dataset: Any) -> Any:
    """The audio dataset inside wrappers (labels, subsets)."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset
