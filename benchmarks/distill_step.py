"""What an update of distillation costs: stage 1 (gates on everything) and stage 2 (compact student), against what its matmuls cost.

    python benchmarks/distill_step.py [--threads 2] [--json distill_step.json] [--device cuda] [--small] [--check]
    python benchmarks/distill_step.py --threads 1 --clock cpu    # on a machine that does other things too

HuBERT Base's shape, random weights, 2 x 4 s of noise, DPHuBERT's losses, dropout 0.1, torch's fused AdamW. The pieces are the
core's, put together as the model `ssl_student` and the criterion `layer_distill` do. Everything that is compared is measured in
one run, in turns, and the least of the repeats counts.

The floor of a variant is the time of its matmuls alone: FLOPs counted from the shapes, over the rate at which this machine
multiplies large matrices of their type, measured in the same run. A limit in seconds holds at REFERENCE_RATES and is scaled by
the floors here and there.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from s3distill import kernels
from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import (
    SAMPLE_RATE,
    ConvLayerConfig,
    EncoderConfig,
    LayerConfig,
    parse_conv_layers,
    uniform_layers,
)
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.teacher import Teacher
from s3distill.encoder.training_config import TrainingConfig
from s3distill.gates import GateCounts, GateSet, Lagrangian, sparsity
from s3distill.gates.cost import mac_breakdown
from s3distill.heads import HeadsConfig, LayerHeads
from s3distill.losses import DistillationTerms, TeacherStates, distillation_loss

BATCH = 2
MAX_NORM = 10.0  # of gradient clipping, as in DPHuBERT's recipe
TARGET_SPARSITY = 0.75
PARTS = ("teacher", "student forward", "backward", "optimizer")

REFERENCE_RATES = {"float32": 192e9, "bfloat16": 430e9}  # FLOP/s of matmuls where the limits in seconds hold
MOST_OF_FLOOR = 1.3
LEAST_SPEEDUP = 3.3  # of the student at 25% of the MACs
MOST_MEMORY_MIB = 2600.0  # stage 1

# what pruning leaves of HuBERT Base: a little less of everything, most of the lower layers' FFNs, widths of any number
STAGE2_CONVS = (369, 449, 441, 467, 449, 463, 487)
STAGE2_HEADS = (6, 5, 4, 4, 4, 4, 4, 3, 3, 3, 3, 2)
STAGE2_FFN = (643, 497, 421, 389, 373, 347, 341, 353, 317, 281, 149, 191)
QUARTER_CONVS = (209, 277, 293, 311, 331, 367, 431)
QUARTER_HEADS = (5, 5, 4, 4, 4, 4, 4, 4, 3, 3, 3, 2)
QUARTER_FFN = (653, 521, 433, 397, 379, 353, 347, 367, 331, 269, 139, 173)


@dataclass(frozen=True)
class Variant:
    """Precisions of a step; ``autocast``: the student's matmuls are bfloat16, its parameters, gates and losses float32."""

    name: str
    stage: int
    teacher_dtype: str = "float32"
    autocast: bool = False
    limit_s: float | None = None

    @property
    def student_dtype(self) -> str:
        return "bfloat16" if self.autocast else "float32"


VARIANTS = tuple(
    Variant(f"stage {stage}, {what}", stage, dtype, autocast, limits.get(stage))
    for stage in (1, 2)
    for what, dtype, autocast, limits in (
        ("float32", "float32", False, {}),
        ("teacher bf16", "bfloat16", False, {1: 2.6}),
        ("teacher bf16, student autocast", "bfloat16", True, {1: 1.8}),
    )
)


class Settings(timing.Settings):
    """The shapes."""

    @property
    def num_samples(self) -> int:
        return SAMPLE_RATE if self.small else 4 * SAMPLE_RATE

    @property
    def matrix(self) -> int:
        """Side of the square matrices whose product gives the machine's rate."""
        return 256 if self.small else 2048

    def teacher_config(self) -> EncoderConfig:
        if self.small:
            convs = parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2")
            return EncoderConfig(convs, 64, uniform_layers(12, 4, 16, 128), pos_conv_kernel=16, pos_conv_groups=4)
        convs = parse_conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2")
        return EncoderConfig(convs, 768, uniform_layers(12, 12, 64, 3072))

    def compact_config(self, channels: tuple[int, ...], heads: tuple[int, ...], ffn: tuple[int, ...]) -> EncoderConfig:
        """The teacher's shape with fewer of everything; the toy's widths are their share of the full ones."""
        whole = self.teacher_config()
        wide, head_dim, inner = whole.conv_layers[0].channels, whole.layers[0].head_dim, whole.layers[0].ffn_dim
        convs = [
            ConvLayerConfig(max(1, kept * wide // 512), conv.kernel, conv.stride)
            for kept, conv in zip(channels, whole.conv_layers, strict=True)
        ]
        layers = [
            LayerConfig(max(1, h * whole.layers[0].num_heads // 12), head_dim, max(1, f * inner // 3072))
            for h, f in zip(heads, ffn, strict=True)
        ]
        return EncoderConfig(
            tuple(convs),
            whole.embed_dim,
            tuple(layers),
            pos_conv_kernel=whole.pos_conv_kernel,
            pos_conv_groups=whole.pos_conv_groups,
        )

    def student_config(self, stage: int) -> EncoderConfig:
        return self.teacher_config() if stage == 1 else self.compact_config(STAGE2_CONVS, STAGE2_HEADS, STAGE2_FFN)


class Stopwatch:
    """Seconds between laps, in the benchmark's clock, and the processor time of them all."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.laps: dict[str, Any] = {}
        self.start_cpu = time.process_time()
        self.last = self._now()

    def _now(self) -> Any:
        if self.settings.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.process_time() if self.settings.clock == "cpu" else time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = (self.last, now)
        self.last = now

    def stop(self) -> StepSeconds:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
            parts = {name: begin.elapsed_time(end) / 1000 for name, (begin, end) in self.laps.items()}
        else:
            parts = {name: end - begin for name, (begin, end) in self.laps.items()}
        return StepSeconds(parts, time.process_time() - self.start_cpu)


@dataclass
class StepSeconds:
    """One update: seconds by `PARTS`, and processor seconds of all threads."""

    parts: dict[str, float]
    cpu: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class Step:
    """Teacher, student, heads, gates (stage 1) and optimizer of one variant."""

    def __init__(self, variant: Variant, settings: Settings, teacher: Teacher | None = None) -> None:
        torch.manual_seed(1)
        self.variant, self.settings = variant, settings
        whole, config = settings.teacher_config(), settings.student_config(variant.stage)
        self.teacher = teacher or make_teacher(whole, variant.teacher_dtype)
        num_layers = len(whole.layers)
        pairs = tuple((layer, layer) for layer in range(0, num_layers + 1, num_layers // 3))  # 0, 4, 8, 12
        self.student = SpeechEncoder(config, TrainingConfig(dropout=0.1, attention_dropout=0.1))
        self.heads = LayerHeads(HeadsConfig(pairs, config.embed_dim, whole.embed_dim, num_layers))
        self.gates = GateSet(config, ("conv", "head", "ffn")) if variant.stage == 1 else None
        self.lagrangian = Lagrangian() if variant.stage == 1 else None
        modules = [m for m in (self.student, self.heads, self.gates, self.lagrangian) if m is not None]
        for module in modules:
            module.to(settings.device)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = kernels.fused_adamw(self.parameters, lr=1e-4)
        self.terms = DistillationTerms()
        self.audio = torch.randn(BATCH, settings.num_samples).to(settings.device)
        self.num_updates = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=self.variant.autocast)

    def step(self) -> StepSeconds:
        """One update: forward, backward, clipping, the optimizer, gradients to None."""
        watch = Stopwatch(self.settings)
        targets = self.targets()
        watch.lap("teacher")
        loss = self.loss(targets)
        watch.lap("student forward")
        loss.backward()
        watch.lap("backward")
        kernels.clip_grad_norm(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.lap("optimizer")
        self.num_updates += 1
        taken = watch.stop()
        if self.num_updates == 1 and self.settings.device == "cpu":
            kernels.return_freed_memory()  # as the tasks do
        return taken

    def targets(self) -> TeacherStates:
        layers = [layer for _, layer in self.heads.pairs]
        states, _ = self.teacher.hidden_states(self.audio, None, layers)
        return TeacherStates(dict(zip(layers, states, strict=True)))

    def loss(self, targets: TeacherStates) -> Tensor:
        """Mean over frames, and the size penalty in stage 1."""
        with self.autocast():
            gates = self.gates.sample(self.num_updates) if self.gates is not None else None
            out = self.student(self.audio, gates=gates, num_layers=self.heads.deepest_layer)
            predictions = self.heads(out.hidden_states)
        found = distillation_loss(self.terms, self.heads.pairs, predictions, targets)
        loss = found.total / found.num_frames
        if self.gates is not None and self.lagrangian is not None:
            expected = sparsity(self.student.config, self.gates.expected_counts())
            loss = loss + self.lagrangian(expected, TARGET_SPARSITY)
        return loss


def make_teacher(config: EncoderConfig, dtype: str) -> Teacher:
    torch.manual_seed(0)
    return Teacher(ParsedCheckpoint("hubert", config, SpeechEncoder(config).state_dict(), False), dtype)


def num_flops(config: EncoderConfig, seconds: float, with_heads: int = 0, backward: bool = False) -> float:
    """FLOPs of one pass over the batch's matmuls and convolutions, two per multiply-accumulate.

    The backward pass takes twice the forward's, but for the audio, which needs no gradient.

    Args:
        with_heads: number of Linears from the model's width to itself.
    """
    macs = sum(mac_breakdown(config, GateCounts.full(config), seconds).values())
    frames = config.num_frames(round(seconds * SAMPLE_RATE))
    macs = macs + with_heads * frames * config.embed_dim**2
    if backward:
        first = config.conv_layers[0]
        first_frames = (round(seconds * SAMPLE_RATE) - first.kernel) // first.stride + 1
        macs = 3 * macs - first_frames * first.kernel * first.channels
    return 2.0 * BATCH * float(macs)


def floor_seconds(variant: Variant, settings: Settings, rates: dict[str, float]) -> float:
    """Seconds of the step's matmuls at these rates."""
    duration = settings.num_samples / SAMPLE_RATE
    teacher = num_flops(settings.teacher_config(), duration)
    student = num_flops(settings.student_config(variant.stage), duration, with_heads=4, backward=True)
    return teacher / rates[variant.teacher_dtype] + student / rates[variant.student_dtype]


def matmul_runs(settings: Settings) -> dict[str, Any]:
    """Products of large square matrices, by type."""
    runs = {}
    for name in REFERENCE_RATES:
        a, b = (torch.randn(settings.matrix, settings.matrix).to(settings.device, getattr(torch, name)) for _ in "ab")
        runs[name] = lambda a=a, b=b: a @ b
    return runs


@dataclass
class Row:
    """One line of the table: a value, and the most (or least) that it may be."""

    section: str
    form: str
    value: float
    unit: str
    limit: float | None = None
    limit_is_least: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    passed: bool | None = field(init=False)

    def __post_init__(self) -> None:
        if self.limit is None:
            self.passed = None
        else:
            self.passed = self.value >= self.limit if self.limit_is_least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.limit_is_least else "<="
        required = "" if self.limit is None else f"  {sign} {self.limit:.3f}  {'PASS' if self.passed else 'FAIL'}"
        parts = "".join(f"  {name} {value:.3f}" for name, value in self.parts.items())
        return f"  {self.form:<40}{self.value:>10.3f} {self.unit}{required}{parts}".rstrip()


def measure_steps(settings: Settings) -> tuple[list[Row], dict[str, float]]:
    """All variants and the matmuls, in turns; per variant the least total, its parts, and the least processor time."""
    teachers = {dtype: make_teacher(settings.teacher_config(), dtype) for dtype in REFERENCE_RATES}
    steps = {v: Step(v, settings, teachers[v.teacher_dtype]) for v in VARIANTS}
    matmuls = matmul_runs(settings)
    least_matmul = dict.fromkeys(matmuls, float("inf"))
    best: dict[Variant, StepSeconds] = {}
    least_cpu = dict.fromkeys(VARIANTS, float("inf"))
    for step in steps.values():
        step.step()
    for repeat in range(settings.repeats):
        for name, matmul in matmuls.items():
            least_matmul[name] = min(least_matmul[name], *(timing.seconds(matmul, settings) for _ in range(3)))
        for variant, step in steps.items():
            taken = step.step()
            timing.progress(f"repeat {repeat + 1} of {settings.repeats}: {variant.name}: {taken.total:.3f} s")
            least_cpu[variant] = min(least_cpu[variant], taken.cpu)
            if variant not in best or taken.total < best[variant].total:
                best[variant] = taken
    rates = {name: 2 * settings.matrix**3 / taken for name, taken in least_matmul.items()}
    return step_rows(settings, best, least_cpu, rates), rates


def step_rows(
    settings: Settings, best: dict[Variant, StepSeconds], least_cpu: dict[Variant, float], rates: dict[str, float]
) -> list[Row]:
    found = [
        Row(f"matmul rate, {settings.matrix} x {settings.matrix}", name, rate / 1e9, "GFLOP/s")
        for name, rate in rates.items()
    ]
    floors = {v: floor_seconds(v, settings, rates) for v in VARIANTS}
    for v, taken in best.items():
        limit = None
        if v.limit_s is not None:
            limit = v.limit_s * floors[v] / floor_seconds(v, settings, REFERENCE_RATES)
        found.append(Row("one update", v.name, taken.total, "s", limit, parts=taken.parts))
    found += [Row("floor of its matmuls", v.name, floor, "s") for v, floor in floors.items()]
    found += [
        Row("one update over its floor", v.name, taken.total / floors[v], "x", MOST_OF_FLOOR)
        for v, taken in best.items()
    ]
    found += [Row("processor time of one update", v.name, cpu, "s") for v, cpu in least_cpu.items()]
    return found


def measure_inference(settings: Settings) -> list[Row]:
    """Teacher against compact students in evaluation mode, float32."""
    configs = {
        "teacher": settings.teacher_config(),
        "student of stage 2": settings.student_config(2),
        "student at 25% of the MACs": settings.compact_config(QUARTER_CONVS, QUARTER_HEADS, QUARTER_FFN),
    }
    audio = torch.randn(BATCH, settings.num_samples).to(settings.device)
    encoders = {name: SpeechEncoder(config).eval().to(settings.device) for name, config in configs.items()}

    def forward(encoder: SpeechEncoder) -> None:
        with torch.inference_mode():
            encoder(audio)

    runs = {name: (lambda encoder=encoder: forward(encoder)) for name, encoder in encoders.items()}
    least = timing.least_seconds("inference", runs, settings)
    duration = settings.num_samples / SAMPLE_RATE
    whole = num_flops(configs["teacher"], duration)
    shares = {name: num_flops(config, duration) / whole for name, config in configs.items()}
    found = [Row("inference", name, taken, "s", parts={"MACs": shares[name]}) for name, taken in least.items()]
    for name, taken in least.items():
        limit = LEAST_SPEEDUP if "25%" in name else None
        found.append(Row("inference, speed", name, least["teacher"] / taken, "x", limit, limit_is_least=True))
    return found


def measure_memory(settings: Settings) -> list[Row]:
    section = f"peak memory of training, {timing.memory_of_what(settings)}"
    found = []
    for variant in VARIANTS:
        peak = timing.in_own_process(peak_memory, variant, settings)
        timing.progress(f"memory: {variant.name}: {peak:.0f} MiB")
        limit = MOST_MEMORY_MIB if variant.limit_s is not None else None
        found.append(Row(section, variant.name, peak, "MiB", limit))
    return found


def peak_memory(variant: Variant, settings: Settings) -> float:
    step = Step(variant, settings)
    for _ in range(3):
        step.step()
    return timing.peak_memory(settings)


def print_table(found: list[Row]) -> None:
    section = None
    for row in found:
        if row.section != section:
            section = row.section
            print(f"\n{section}")
        print(row.line())


def main() -> int:
    options = timing.parser((__doc__ or "").splitlines()[0], repeats="of each variant, in turns").parse_args()
    settings = Settings(options.device, "float32", options.threads, options.clock, options.repeats, options.small)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    if settings.device == "cpu":
        kernels.keep_freed_memory()  # as the tasks do; the processes that measure memory inherit it
    memory = measure_memory(settings)
    steps, _ = measure_steps(settings)
    found = [*steps, *measure_inference(settings), *memory]
    print_table(found)
    values = {"environment": timing.environment(settings), "rows": [asdict(row) for row in found]}
    timing.write_json(options.json, values)
    return int(options.check and any(row.passed is False for row in found))


if __name__ == "__main__":
    sys.exit(main())
