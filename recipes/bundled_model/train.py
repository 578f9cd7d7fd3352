"""Train the model stage by stage: dense attention, indexer warm-up, sparse attention.

    python -m recipes.bundled_model.train --plan recipes/bundled_model/plans/full.json --tokens TOKENS_DIR \
        --tokenizer tilery/bundled/tilery-books-26m --state STATE_FILE --out RUN_DIR [--stop-after SECONDS]

A plan is a JSON file: the model's sizes (differences from the defaults), the optimiser, and a list of stages. A stage
ends after its seconds, tokens or steps, whichever comes first; its learning-rate multiplier follows that fraction.
With --stop-after the run saves everything to STATE_FILE and ends; the same command then goes on where it stopped.
RUN_DIR receives `weights-*.safetensors` (BF16, checkpoint keys) and `train.json` (plan, loss curve, device, versions).
"""

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from recipes.bundled_model import optim
from recipes.bundled_model.data import Windows, blank_line_ids, load_stream
from recipes.bundled_model.export import checkpoint_tensors, write_pieces
from recipes.bundled_model.model import Attend, DeepSeekV32, ModelConfig


@dataclass(frozen=True)
class Stage:
    """One stage of training. Rates are multiples of the plan's peak rates."""

    name: str
    attend: str  # a name of `Attend`
    length: int  # tokens per sequence
    sequences: int  # sequences per micro-batch
    micro_batches: int = 1  # per step
    train: str = "all"  # "model" (no indexer), "indexer" (model frozen) or "all"
    seconds: float = math.inf
    tokens: float = math.inf
    steps: float = math.inf
    warmup: float = 0.0  # fraction of the stage
    hold: float = 0.0  # fraction of the stage until which the rate stays at `rate_from`
    rate_from: float = 1.0
    rate_to: float = 0.0
    indexer_rate_from: float = 1.0
    indexer_rate_to: float = 0.1
    mtp_weight: float = 0.2
    dialogue_share: float = 0.05
    balance_rate: float = 1e-3

    def fraction(self, done: "Progress") -> float:
        return min(1.0, max(done.seconds / self.seconds, done.tokens / self.tokens, done.steps / self.steps))

    def rate(self, fraction: float) -> float:
        return self._rate(fraction, self.rate_from, self.rate_to)

    def indexer_rate(self, fraction: float) -> float:
        return self._rate(fraction, self.indexer_rate_from, self.indexer_rate_to)

    def _rate(self, fraction: float, start: float, end: float) -> float:
        if fraction < self.warmup:
            return start * fraction / self.warmup
        decay = max(0.0, fraction - self.hold) / max(1e-9, 1 - self.hold)
        return start + (end - start) * decay


@dataclass(frozen=True)
class Progress:
    """What one stage has done so far; windows count both streams' positions in their reproducible orders."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    windows: int = 0
    dialogue_windows: int = 0


@dataclass(frozen=True)
class Plan:
    stages: tuple[Stage, ...]
    model: dict = field(default_factory=dict)
    optimizer: str = "muon"
    lr_matrix: float = 6e-3
    lr_other: float = 3e-3
    lr_indexer: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0

    @classmethod
    def read(cls, path: Path, override: dict) -> "Plan":
        values = json.loads(path.read_text(encoding="utf-8")) | override
        stages = tuple(Stage(**stage) for stage in values.pop("stages"))
        return cls(stages=stages, **values)


def lm_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the shared head. hidden [B, S, H]; labels [B, S]."""
    logits = F.linear(hidden.flatten(0, 1), weight.to(hidden.dtype))
    return F.cross_entropy(logits.float(), labels.flatten())


class Trainer:
    """Model, optimisers and data streams, with the position in the plan; `check` states its invariants."""

    def __init__(self, plan: Plan, tokens: Path, tokenizer: Path, device: torch.device, compiled: bool):
        self.plan, self.device = plan, device
        cfg = ModelConfig(**plan.model)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = DeepSeekV32(cfg, dtype).init_weights(plan.seed).to(device)
        rates = {"matrix": plan.lr_matrix, "indexer": plan.lr_indexer, "other": plan.lr_other}
        self.optimizers = optim.build(self.model, plan.optimizer, rates, plan.weight_decay)
        self.roles = optim.split_parameters(self.model)
        self.lm_loss = lm_loss
        if compiled:
            self.model.compile_layers()
            self.lm_loss = torch.compile(lm_loss, dynamic=False)
        blank = blank_line_ids(Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
        self.books = load_stream(sorted(tokens.glob("books-*.u16.xz")), blank, device)
        self.dialogue = load_stream([tokens / "dialogue.u16.xz"], [], device)
        self.stage_index = 0
        self.progress = Progress()
        self.finished: list[dict] = []
        self.curve: list[dict] = []

    def check(self) -> None:
        assert 0 <= self.stage_index <= len(self.plan.stages)
        assert len(self.finished) == self.stage_index
        assert self.progress.dialogue_windows <= self.progress.windows

    def save(self, path: Path) -> None:
        """Write everything that resuming needs; a crash while writing leaves the old file."""
        self.check()
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stage_index": self.stage_index,
            "progress": asdict(self.progress),
            "finished": self.finished,
            "curve": self.curve,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.stage_index, self.finished, self.curve = state["stage_index"], state["finished"], state["curve"]
        self.progress = Progress(**state["progress"])
        self.check()

    def batch(self, stage: Stage, windows: tuple[Windows, Windows]) -> Tensor:
        """Next micro-batch [sequences, length + 2]; every step the share of dialogue is the same up to rounding."""
        done = self.progress
        after = done.windows + stage.sequences
        talk = int(after * stage.dialogue_share) - int(done.windows * stage.dialogue_share)
        read = done.windows - done.dialogue_windows
        parts = [windows[0].batch(read, stage.sequences - talk)] if talk < stage.sequences else []
        parts += [windows[1].batch(done.dialogue_windows, talk)] if talk else []
        self.progress = replace(done, windows=after, dialogue_windows=done.dialogue_windows + talk)
        return torch.cat(parts)

    def losses(self, stage: Stage, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss to minimise, values for the log, tokens per expert)."""
        out = self.model(tokens[:, :-2], tokens[:, 1:-1], Attend[stage.attend])
        log, total = {}, torch.zeros((), device=self.device)
        if stage.train != "indexer":
            log["lm"] = self.lm_loss(out.hidden_BSH, self.model.lm_head.weight, tokens[:, 1:-1])
            log["mtp"] = self.lm_loss(out.mtp_BSH, self.model.lm_head.weight, tokens[:, 2:])
            total = log["lm"] + stage.mtp_weight * log["mtp"]
        if out.divergence is not None:
            log["kl"] = out.divergence
            total = total + out.divergence
        return total, {name: value.detach() for name, value in log.items()}, out.load_LE

    def step(self, stage: Stage, windows: tuple[Windows, Windows], fraction: float) -> dict[str, Tensor]:
        """One optimiser step; returns the mean losses as GPU scalars."""
        rate, indexer_rate = stage.rate(fraction), stage.indexer_rate(fraction)
        indexer = {id(p) for p in self.roles["indexer"]}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (indexer_rate if id(group["params"][0]) in indexer else rate)
        sums, load = {}, 0
        for _ in range(stage.micro_batches):
            total, log, load_LE = self.losses(stage, self.batch(stage, windows))
            (total / stage.micro_batches).backward()
            load = load + load_LE
            for name, value in log.items():
                sums[name] = sums.get(name, 0) + value / stage.micro_batches
        torch.nn.utils.clip_grad_norm_([p for p in self.roles["other"] if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if stage.train != "indexer":
            self.model.balance(load, stage.balance_rate * rate)
        sums["imbalance"] = (load.amax(-1) / load.mean(-1)).mean()
        return sums

    def run_stage(self, stop_at: float, log_every: int) -> bool:
        """Run the current stage from where it stands; False when `stop_at` (monotonic seconds) came first."""
        stage = self.plan.stages[self.stage_index]
        for role, params in self.roles.items():
            for p in params:
                p.requires_grad_(stage.train == "all" or (stage.train == "indexer") == (role == "indexer"))
        windows = tuple(
            Windows(stream, breaks, stage.length, self.plan.seed + self.stage_index)
            for stream, breaks in (self.books, self.dialogue)
        )
        # Compile outside the stage's time: one step without an update.
        self.losses(stage, windows[0].batch(0, stage.sequences))[0].backward()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.synchronize()
        print(f"{stage.name}: ready", flush=True)
        begun, spent = time.monotonic(), self.progress.seconds
        last, last_tokens = begun, self.progress.tokens
        while (fraction := stage.fraction(self.progress)) < 1.0:
            sums = self.step(stage, windows, fraction)
            if self.progress.steps % 4 == 0:
                self.synchronize()  # keep the clock that drives the schedule close to the device
            now = time.monotonic()
            self.progress = replace(
                self.progress,
                seconds=spent + now - begun,
                tokens=self.progress.tokens + stage.sequences * stage.length * stage.micro_batches,
                steps=self.progress.steps + 1,
            )
            if self.progress.steps % log_every == 0:
                values = {name: round(float(value), 4) for name, value in sums.items()}
                now = time.monotonic()
                speed = (self.progress.tokens - last_tokens) / max(now - last, 1e-9)
                last, last_tokens = now, self.progress.tokens
                row = {"stage": stage.name, "step": self.progress.steps, "tokens": self.progress.tokens, **values}
                self.curve.append(row)
                rate = stage.rate(fraction)
                print(*(f"{k} {v}" for k, v in row.items()), f"x{rate:.3f} {speed:.0f} tok/s", flush=True)
                if not math.isfinite(sum(values.values())):
                    raise FloatingPointError(
                        f"loss is not finite in {stage.name}, step {self.progress.steps}: {values}"
                    )
            if now > stop_at:
                return False
        self.synchronize()
        self.finished.append({"stage": stage.name, **asdict(self.progress)})
        self.stage_index += 1
        self.progress = Progress()
        return True

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def report(self) -> dict:
        """The log as plain data: what ran, on what, and the loss curve."""
        cuda = self.device.type == "cuda"
        stages = [{k: v for k, v in asdict(s).items() if v != math.inf} for s in self.plan.stages]
        return {
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "plan": {**asdict(self.plan), "stages": stages},
            "finished": self.finished,
            "unfinished": asdict(self.progress),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "curve": self.curve,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--state", type=Path, required=True, help="file to resume from and to save to")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and train.json")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of this process, start included")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--override", default="{}", help="JSON object of plan values that replace the file's")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    args = parser.parse_args()
    stop_at = time.monotonic() + args.stop_after
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan.read(args.plan, json.loads(args.override))
    trainer = Trainer(plan, args.tokens, args.tokenizer, device, compiled=not args.eager)
    if args.state.exists():
        trainer.load(args.state)
        print(f"resumed: stage {trainer.stage_index}, {trainer.progress}", flush=True)
    print(f"{trainer.report()['parameters']} parameters on {trainer.report()['device']}", flush=True)
    while trainer.stage_index < len(plan.stages) and trainer.run_stage(stop_at, args.log_every):
        print(f"finished: {trainer.finished[-1]}", flush=True)
    trainer.save(args.state)
    write_pieces(checkpoint_tensors(trainer.model), args.out)
    log = json.dumps(trainer.report())
    (args.out / "train.json").write_text(log + "\n", encoding="utf-8")
    print(f"saved: {args.state}, {args.out}; complete: {trainer.stage_index == len(plan.stages)}", flush=True)
    os._exit(0) if device.type == "cuda" else None  # compile workers can hold a normal exit back


if __name__ == "__main__":
    main()
