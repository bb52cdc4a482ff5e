"""One training run: the model, its optimizer, its schedule, and its checkpoint."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from study_measure import HeldOut, attention_report, autocast, finite, token_losses
from study_plan import Record, Run, append, read_records
from study_text import Text
from torch import Tensor

from moda_ops.nn import MoDAConfig, MoDALanguageModel, compile_blocks
from moda_ops.tools.bench.report import machine


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return token_losses(logits, targets).mean()


class Training:
    """A model, its optimizer, and how far they are: what a checkpoint holds."""

    def __init__(
        self, run: Run, config: MoDAConfig, settings: Record, device: torch.device, compiler: str
    ) -> None:
        self.run, self.settings, self.device, self.compiler = run, settings, device, compiler
        self.step = 0
        self.timed_steps, self.seconds, self.warm = 0, 0.0, False
        torch.manual_seed(run.seed)
        with device:
            self.model = MoDALanguageModel(config)
        self.loss: Callable[[Tensor, Tensor], Tensor] = mean_loss
        if compiler != "none":
            torch._dynamo.reset()
            compile_blocks(self.model, backend=compiler)
            self.loss = torch.compile(mean_loss, backend=compiler)
        options = run.training
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=matrices, weight_decay=options["weight_decay"]),
                dict(params=gains, weight_decay=0.0),
            ],
            lr=settings["lr"],
            betas=tuple(options["betas"]),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._fraction)

    def _fraction(self, step: int) -> float:
        """Of the highest learning rate: linear warm-up, then a cosine down to ``last_lr``."""
        options = self.run.training
        warm_up = max(1, round(options["warm_up"] * self.run.steps))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.run.steps - warm_up)
        last = options["last_lr"]
        return last + (1 - last) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def train(self, text: Text, until: int, bar: Any) -> float:
        """Train to a step; the mean loss of the steps."""
        options = self.run.training
        total, first, start = torch.zeros((), device=self.device), self.step, time.perf_counter()
        for step in range(first, until):
            rows = text.batch(self.run.seed, step, options["batch"]).to(self.device)
            with autocast(self.device):
                logits = self.model(rows[:, :-1])
            loss = self.loss(logits, rows[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options["clip"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            total += loss.detach()
            bar.update(rows[:, 1:].numel())
            if self.warm:
                self.timed_steps += 1
            else:  # the first step of a process compiles
                synchronize(self.device)
                self.warm, start = True, time.perf_counter()
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        self.step = until
        return total.item() / (until - first)

    @property
    def tokens_per_s(self) -> float | None:
        per_step = self.run.training["batch"] * self.run.training["length"]
        return per_step * self.timed_steps / self.seconds if self.timed_steps else None

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"settings": self.settings}
        state |= {name: getattr(self, name) for name in ("step", "timed_steps", "seconds")}
        for name in ("model", "optimizer", "schedule"):
            state[name] = getattr(self, name).state_dict()
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{path} is of a run with other settings: move it away")
        for name in ("step", "timed_steps", "seconds"):
            setattr(self, name, state[name])
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(training: Training, text: Text, records: Path, checkpoints: Path, bar: Any) -> None:
    """Train one run to its end, from its checkpoint if there is one."""
    run = training.run
    options, device = run.training, training.device
    checkpoint = checkpoints / f"{run.name}.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    bar.reset(run.steps * options["batch"] * options["length"])
    bar.set_description(run.name)
    bar.update(training.step * options["batch"] * options["length"])
    recorded = {(record["run"], record.get("step")) for record in read_records([records])}
    held_out = HeldOut(text, options["held_out_windows"], options["batch"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    every, lost = options["evaluate_every"], False
    while training.step < run.steps and not lost:
        until = min(training.step - training.step % every + every, run.steps)
        loss = training.train(text, until, bar)
        tokens = until * options["batch"] * options["length"]
        rate = training.tokens_per_s
        record: Record = dict(what="evaluation", run=run.name, step=until, tokens=tokens)
        record["device_s"] = None if rate is None else tokens / rate
        record["training_loss"] = finite(loss)
        record["held_out_loss"] = held_out.loss(training.model)
        if (run.name, until) not in recorded:  # or it was interrupted between these two
            append(records, record)
        training.save(checkpoint)
        lost = record["training_loss"] is None  # and no step brings it back
    end = ending(training, text, held_out)
    append(records, end)
    speed = "" if end["tokens_per_s"] is None else f", {end['tokens_per_s']:,.0f} tokens/s"
    bar.write(f"{run.name}: held-out loss {end['held_out_loss']}{speed}")
    checkpoint.unlink(missing_ok=True)


def ending(training: Training, text: Text, held_out: HeldOut) -> Record:
    """The record of a run that has ended."""
    run, model, device = training.run, training.model, training.device
    length = run.training["length"]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    tokens, rate = training.step * run.training["batch"] * length, training.tokens_per_s
    return dict(
        what="end",
        run=run.name,
        group=run.group,
        model=run.model,
        lr_from=run.lr_from,
        **training.settings,
        predicted_s=run.predicted_s,
        compile=training.compiler,
        trained_tokens=tokens,
        parameters=model.num_parameters(),
        forward_flops_per_token=model.flops(1, length) / length,
        tokens_per_s=rate,
        device_s=None if rate is None else tokens / rate,
        peak_gib=peak,
        bytes_per_token=text.about["held_out"]["bytes"] / text.about["held_out"]["tokens"],
        machine=machine(device),
        depth_keep=model.config.depth_keep,
        **held_out.report(model),
        # Of training text: a policy may choose slots by it.
        **attention_report(model, text.batch(run.seed, 0, min(8, run.training["batch"]))[:, :-1]),
    )
