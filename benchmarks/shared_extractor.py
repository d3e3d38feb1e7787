"""What `model.shares_extractor` saves: one update of a DistilHuBERT student with frozen convolutions, run twice or once.

    python benchmarks/shared_extractor.py [--threads 2] [--seconds 4] [--repeats 5] [--json FILE]

HuBERT Base as the teacher, random weights, two utterances; the core alone, without fairseq. The two variants are timed in
turn, so that other load meets both; the figures are the fastest runs and their CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig
from s3distill.encoder.layer_choice import take_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import config_from_options
from s3distill.encoder.training_config import TrainingConfig
from s3distill.heads import HeadsConfig, LayerHeads
from s3distill.losses import LossWeights, hidden_state_loss

LAYERS = (4, 8, 12)  # that DistilHuBERT predicts


class Step:
    """Teacher, student, heads and optimizer of a distillation, as `ssl_student` and `layer_distill` put them together."""

    def __init__(self, config: EncoderConfig) -> None:
        torch.manual_seed(0)
        self.teacher = SpeechEncoder(config).eval().requires_grad_(False)
        shape, state = take_layers(config, self.teacher.state_dict(), (0, 1))
        self.student = SpeechEncoder(shape, TrainingConfig(dropout=0.1, attention_dropout=0.1, feature_grad_mult=0.0))
        self.student.load_encoder_state(state)
        self.student.feature_extractor.requires_grad_(False)
        pairs = tuple((2, layer) for layer in LAYERS)
        dim = config.embed_dim
        self.heads = LayerHeads(HeadsConfig(pairs, dim, dim, 2, mode="predlayer"))
        learnt = [p for m in (self.student, self.heads) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learnt, lr=2e-4, fused=True)

    def run(self, source: Tensor, shares: bool) -> float:
        """One update; returns the loss."""
        features = self.student.extract(source) if shares else None
        with torch.inference_mode():
            targets = self.teacher(source, conv_features=features).hidden_states
        targets = [targets[layer].clone() for layer in LAYERS]
        out = self.student(source, conv_features=features)
        weights = LossWeights(cosine_type="log_sig")
        losses = [
            hidden_state_loss(prediction, target, None, weights)
            for prediction, target in zip(self.heads(out.hidden_states), targets, strict=True)
        ]
        loss = torch.stack([found.total / found.num_frames for found in losses]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each of the two utterances (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny teacher, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    small = {"encoder_layers": 12, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
    small |= {"conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"}
    step = Step(config_from_options(small if args.small else {}, "hubert"))
    source = 0.1 * torch.randn(2, round(args.seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    figures = {name: {"seconds": float("inf"), "cpu_seconds": float("inf")} for name in ("twice", "once")}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, measured in figures.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step.run(source, shares=name == "once")
            found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            if repeat > 0:
                measured |= {key: min(measured[key], value) for key, value in found.items()}
    print(f"{'convolutions run':18}{'seconds':>10}{'CPU seconds':>14}")
    for name, measured in figures.items():
        print(f"{name:18}{measured['seconds']:>10.3f}{measured['cpu_seconds']:>14.3f}")
    ratio = figures["once"]["cpu_seconds"] / figures["twice"]["cpu_seconds"]
    print(f"once takes {ratio:.1%} of the CPU seconds of twice ({args.threads} threads, 2 x {args.seconds:g} s)")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**figures, "cpu_ratio": ratio, "threads": args.threads, "seconds": args.seconds}, file, indent=2)


if __name__ == "__main__":
    main()
