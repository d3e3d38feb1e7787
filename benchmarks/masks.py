"""What connection masks cost: selecting, training steps, evaluation and switching, side by side with dense models.

    python benchmarks/masks.py [--threads 2] [--json masks.json] [--device cuda] [--dtype float16] [--small] [--check]
    python benchmarks/masks.py --threads 1 --clock cpu    # on a machine that does other things too

Everything that is compared is measured in one run, in turns, and the least of the repeats counts: what else the machine does then
falls on all alike. wav2vec 2.0 base's shape (post-LN, GroupNorm, 12 x 768/3072), random weights, 2 x 4 s of noise, no
SpecAugment, no dropout, a frozen extractor (feature_grad_mult=0), torch's fused AdamW: a slower optimizer, such as fairseq's
Adam on a CPU, brings all ratios nearer to 1. ``--dtype`` is that of autocast; parameters stay float32, and losses are
not scaled, which time does not depend on.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from timing import least_seconds, progress
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import s3distill
from s3distill import compat, kernels
from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import options_from_config
from s3distill.encoder.training_config import TrainingConfig
from s3distill.masks.bank import BankEntry, MaskBank
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.modules import Masked
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import MaskOptions
from s3distill.masks.selection import num_removed, select

DENSITY = 0.9
NUM_SYMBOLS, BATCH = 32, 2
LANGUAGES = ("nl", "fr")
MAX_NORM = 1.0  # of gradient clipping
STEP_LIMITS = {1: 1.15, 4: 1.05}  # update_freq -> most that a step may take, dense = 1; all linears masked
EVAL_LIMIT = 1.02
SWITCH_LIMIT = 1.0  # loading a model = 1


@dataclass(frozen=True)
class Form:
    """A network that is compared: ``masks`` are options of `MaskOptions`, None = dense; ``sorts``: as the original does it."""

    name: str
    masks: Mapping[str, Any] | None = None
    sorts: bool = False


ALL_LINEARS = {"prune_rate": DENSITY, "no_prune_post_extract_proj": True, "trainable_proj": True}
DENSE = Form("dense, all weights learn")
MASKED = Form("masks on all linears", ALL_LINEARS)
MASKED_FFN = Form("masks on the FFN", {**ALL_LINEARS, "fix_attn": True})
SORTED = Form("sort per forward, all linears", ALL_LINEARS, sorts=True)
SORTED_FFN = Form("sort per forward, FFN", {**ALL_LINEARS, "fix_attn": True}, sorts=True)
FORMS = (DENSE, MASKED, MASKED_FFN, SORTED, SORTED_FFN)


class Settings(timing.Settings):
    """The shapes."""

    @property
    def matrix(self) -> tuple[int, int]:
        return (256, 512) if self.small else (768, 3072)

    @property
    def num_samples(self) -> int:
        return SAMPLE_RATE if self.small else 4 * SAMPLE_RATE

    @property
    def num_targets(self) -> int:
        return self.num_samples // 1600  # 10 symbols a second

    def config(self) -> EncoderConfig:
        if self.small:
            convs = parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2")
            return EncoderConfig(convs, 64, uniform_layers(2, 4, 16, 128), pos_conv_kernel=16, pos_conv_groups=4)
        convs = parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2")
        return EncoderConfig(convs, 768, uniform_layers(12, 12, 64, 3072))


@dataclass
class Row:
    """One line of the table. ``ratio`` is to the first row of the section; ``limit`` the most that it may be."""

    section: str
    form: str
    value: float
    unit: str
    ratio: float
    limit: float | None = None
    passed: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.passed = None if self.limit is None else self.ratio <= self.limit

    def line(self) -> str:
        required = "" if self.limit is None else f"<= {self.limit:.2f}x  {'PASS' if self.passed else 'FAIL'}"
        return f"  {self.form:<32}{self.value:>10.4f} {self.unit}{self.ratio:>8.3f}x  {required}".rstrip()


def rows(section: str, values: Mapping[str, float], unit: str, limits: Mapping[str, float] | None = None) -> list[Row]:
    first = next(iter(values.values()))
    return [Row(section, name, value, unit, value / first, (limits or {}).get(name)) for name, value in values.items()]


class SortedMask(torch.autograd.Function):
    """The rule as S3-Router's code has it: sort all |scores|, set the smallest to 0 and the others to 1."""

    @staticmethod
    def forward(ctx: Any, magnitudes: Tensor, density: float) -> Tensor:
        mask = magnitudes.clone()
        order = magnitudes.flatten().sort().indices
        num_zeros = num_removed(density, magnitudes.numel())
        flat = mask.flatten()  # a view of mask, which is contiguous
        flat[order[:num_zeros]] = 0
        flat[order[num_zeros:]] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def mask_by_topk(scores: Tensor) -> Tensor:
    flat, num_zeros = scores.abs().flatten(), num_removed(DENSITY, scores.numel())
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.topk(num_zeros, largest=False, sorted=False).indices] = False  # the smaller side at this density
    return mask.view_as(scores)


def mask_by_kthvalue(scores: Tensor) -> Tensor:
    magnitudes = scores.abs()
    return magnitudes > magnitudes.flatten().kthvalue(num_removed(DENSITY, scores.numel())).values


def different_scores(number: int, generator: torch.Generator | None = None) -> Tensor:
    """Shuffled scores of different size in [-1, 1], since of equal ones each way to select may take others."""
    signs = 1 - 2 * torch.randint(2, (number,), generator=generator)
    return (
        (torch.randperm(number, generator=generator) + 1) * signs / number
    )  # below 2**24 all are different in float32


def measure_selection(settings: Settings) -> tuple[list[Row], dict[str, bool]]:
    num_scores = settings.matrix[0] * settings.matrix[1]
    scores = different_scores(num_scores).view(settings.matrix).to(settings.device)
    ways: dict[str, Callable[[], Tensor]] = {
        "full sort (the original)": lambda: SortedMask.apply(scores.abs(), DENSITY).bool(),
        "topk of the smaller side": lambda: mask_by_topk(scores),
        "kthvalue": lambda: mask_by_kthvalue(scores),
        "s3distill's select": lambda: select(scores, DENSITY),
    }
    section = f"one mask of {settings.matrix[0]} x {settings.matrix[1]}"
    expected = SortedMask.apply(scores.abs(), DENSITY).bool()
    checks = {f"{name}: the mask of the full sort": bool(torch.equal(way(), expected)) for name, way in ways.items()}
    return rows(section, least_seconds(section, ways, settings), "s"), checks


class Training:
    """One form and its optimizer. All forms start from the same weights and, where they have them, scores."""

    def __init__(self, form: Form, settings: Settings) -> None:
        torch.manual_seed(1)
        self.settings = settings
        self.network = MaskedNetwork(settings.config(), NUM_SYMBOLS, TrainingConfig(feature_grad_mult=0.0))
        self.network.w2v_model.feature_extractor.requires_grad_(False)
        if form.masks is not None:
            self.network.add_masks(MaskOptions(**form.masks))
            for index, module in enumerate(self.network.masked_modules().values()):
                generator = torch.Generator().manual_seed(index)
                with torch.no_grad():
                    module.scores.copy_(different_scores(module.scores.numel(), generator).view_as(module.scores))
        if form.sorts:
            for module in self.network.masked_modules().values():
                module.masked_weight = functools.partial(sorted_weight, module)  # type: ignore[method-assign]
        self.network.to(settings.device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = kernels.fused_adamw(self.parameters, lr=1e-4)
        self.audio = torch.randn(BATCH, settings.num_samples).to(settings.device)
        self.targets = torch.randint(1, NUM_SYMBOLS, (BATCH, settings.num_targets)).to(settings.device)

    def loss(self) -> Tensor:
        with self.settings.autocast():
            logits = self.network(self.audio)[0]
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)  # [B, T, V] -> [T, B, V]
        frames, symbols = (torch.full((BATCH,), x.shape[dim]) for x, dim in ((log_probs, 0), (self.targets, 1)))
        return F.ctc_loss(log_probs, self.targets, frames, symbols, zero_infinity=True)

    def step(self, update_freq: int) -> None:
        """One update: forward and backward ``update_freq`` times, clipping, the optimizer, gradients to None."""
        for _ in range(update_freq):
            self.loss().backward()
        kernels.clip_grad_norm(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def logits(self) -> Tensor:
        with self.settings.autocast():
            logits: Tensor = self.network(self.audio)[0]
        return logits


def sorted_weight(module: Masked) -> Tensor:
    mask: Tensor = SortedMask.apply(module.scores.abs(), module.rule.density)
    return module.dense_weight() * mask


def measure_steps(forms: dict[str, Training], settings: Settings) -> list[Row]:
    found = []
    for update_freq, limit in STEP_LIMITS.items():
        section = f"training step, update_freq {update_freq}"
        runs = {name: functools.partial(training.step, update_freq) for name, training in forms.items()}
        least = least_seconds(section, runs, settings, slow=(SORTED.name, SORTED_FFN.name))
        found += rows(section, least, "s", {MASKED.name: limit, MASKED_FFN.name: limit})
    return found


def check_forms(forms: dict[str, Training]) -> dict[str, bool]:
    """Whether those that mask the same compute the same: logits and the gradient of the scores, before any update."""
    checks = {}
    for masked, sorts in ((MASKED, SORTED), (MASKED_FFN, SORTED_FFN)):
        ours, theirs = forms[masked.name], forms[sorts.name]
        for training in (ours, theirs):
            training.loss().backward()
        checks[f"{masked.name}: the logits of the sort"] = close(ours.logits(), theirs.logits())
        checks[f"{masked.name}: the gradients of the sort"] = all(
            p.grad is None if q.grad is None else p.grad is not None and close(p.grad, q.grad)
            for p, q in zip(ours.parameters, theirs.parameters, strict=True)
        )
        for training in (ours, theirs):
            training.optimizer.zero_grad()
    return checks


def close(a: Tensor, b: Tensor) -> bool:
    """To 1e-4 of the largest value: threads and, on a GPU, atomic additions change the order of sums."""
    return bool(a.isfinite().all()) and float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


def measure_evaluation(forms: dict[str, Training], settings: Settings) -> tuple[list[Row], dict[str, bool]]:
    """Forward passes without gradients, in evaluation mode; masks as the last update left them."""
    baked = copy.copy(forms[MASKED.name])
    baked.network = copy.deepcopy(baked.network)
    baked.network.bake()
    networks = {
        DENSE.name.split(",")[0]: forms[DENSE.name],
        "masked": forms[MASKED.name],
        "masked, baked": baked,
        "sort per forward": forms[SORTED.name],
    }
    for training in networks.values():
        training.network.eval()
    section = "evaluation, forward"
    checks = {"baked: the logits of the masked": close(baked.logits(), forms[MASKED.name].logits())}
    runs = {name: training.logits for name, training in networks.items()}
    least = least_seconds(section, runs, settings, slow=("sort per forward",))
    return rows(section, least, "s", {"masked": EVAL_LIMIT, "masked, baked": EVAL_LIMIT}), checks


def write_bank(folder: Path, settings: Settings) -> tuple[Path, Path]:
    """A backbone with random weights, and a bank with masks on the FFN and a head for two languages over it."""
    torch.manual_seed(1)
    config = settings.config()
    encoder = SpeechEncoder(config)
    state = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    backbone, bank = folder / "backbone.pt", folder / "bank.safetensors"
    options = options_from_config(config, "wav2vec2", False)
    compat.write_checkpoint(backbone, state, options, {"_name": "audio_pretraining", "normalize": False})
    weights = {f"w2v_model.{name}": value for name, value in state.items()}
    ffn = [f"w2v_model.encoder.layers.{i}.{fc}" for i in range(len(config.layers)) for fc in ("fc1", "fc2")]
    entries = []
    for name in LANGUAGES:
        masks = {module: torch.rand(weights[f"{module}.weight"].shape) < DENSITY for module in ffn}
        head = {"proj.weight": torch.randn(NUM_SYMBOLS, config.embed_dim), "proj.bias": torch.zeros(NUM_SYMBOLS)}
        entries.append(BankEntry(name, masks, head))
    MaskBank.create(bank, backbone_checksum(state), sum(value.numel() for value in state.values()), entries)
    return backbone, bank


def measure_switching(settings: Settings) -> tuple[list[Row], dict[str, bool]]:
    """To the other language of a bank, against loading a model; the files were just written, so they come from memory."""
    section = "switching the language"
    with tempfile.TemporaryDirectory() as folder:
        backbone, bank = write_bank(Path(folder), settings)

        def load_masked(name: str) -> s3distill.MaskedModel:
            model = s3distill.MaskedModel.load(backbone, bank).to(settings.device)
            return model.use(name)

        model, turns = load_masked(LANGUAGES[0]), itertools.cycle(reversed(LANGUAGES))
        runs: dict[str, Callable[[], Any]] = {
            "load a model": lambda: s3distill.load(backbone, settings.device),
            "load backbone and bank, use": lambda: load_masked(LANGUAGES[0]),
            "use": lambda: model.use(next(turns)),
            "digest, at an entry's first use": lambda: MaskBank.open(bank).check_intact(LANGUAGES[0]),
        }
        least = least_seconds(section, runs, settings)
        waveforms = torch.randn(BATCH, settings.num_samples).to(settings.device)
        with torch.no_grad():
            switched, fresh = (m(waveforms).logits for m in (model.use(LANGUAGES[0]), load_masked(LANGUAGES[0])))
    checks = {"switched: the logits of a fresh model": bool(torch.equal(switched, fresh))}
    return rows(section, least, "s", {"use": SWITCH_LIMIT}), checks


def measure_memory(settings: Settings) -> list[Row]:
    """Peak of two training steps of each form, in a process of its own, forked while this one has not done anything yet."""
    peaks = {}
    for form in FORMS:
        peaks[form.name] = timing.in_own_process(peak_memory, form, settings)
        progress(f"memory: {form.name}: {peaks[form.name]:.0f} MiB")
    return rows(f"peak memory of training at update_freq 1, {timing.memory_of_what(settings)}", peaks, "MiB")


def peak_memory(form: Form, settings: Settings) -> float:
    training = Training(form, settings)
    for _ in range(2):
        training.step(1)
    return timing.peak_memory(settings)


def measure(settings: Settings) -> dict[str, Any]:
    memory = measure_memory(settings)
    selection, checks = measure_selection(settings)
    forms = {form.name: Training(form, settings) for form in FORMS}
    checks |= check_forms(forms)
    steps = measure_steps(forms, settings)
    evaluation, same = measure_evaluation(forms, settings)
    del forms  # a model is loaded beside nothing else
    switching, switched = measure_switching(settings)
    return {"rows": [*selection, *steps, *evaluation, *switching, *memory], "checks": checks | same | switched}


def print_table(found: list[Row], checks: Mapping[str, bool]) -> None:
    section = None
    for row in found:
        if row.section != section:
            section = row.section
            print(f"\n{section}")
        print(row.line())
    print("\nequality")
    for name, same in checks.items():
        print(f"  {name:<56} {'PASS' if same else 'FAIL'}")


def main() -> int:
    parser = timing.parser((__doc__ or "").splitlines()[0], repeats="of what sorts, a third of them")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of autocast")
    options = parser.parse_args()
    settings = Settings(options.device, options.dtype, options.threads, options.clock, options.repeats, options.small)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    found = measure(settings)
    print_table(found["rows"], found["checks"])
    as_dicts = [asdict(row) for row in found["rows"]]
    values = {"environment": timing.environment(settings), "rows": as_dicts, "checks": found["checks"]}
    timing.write_json(options.json, values)
    passed = all(found["checks"].values()) and not any(row.passed is False for row in found["rows"])
    return int(options.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
