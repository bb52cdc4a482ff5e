"""What is measured of a model on held-out text."""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from study_text import Text
from torch import Tensor
from torch.nn import functional as F

from moda_ops.nn import MoDALanguageModel, depth_use

PARTS = 16  # of a window, for the loss by position


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Bfloat16 on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T), the loss of every token, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(
        targets.shape
    )


def finite(number: float) -> float | None:
    """The number, or None, which JSON knows, unlike infinity and NaN."""
    return number if math.isfinite(number) else None


class HeldOut:
    """Held-out windows (N, T + 1), which are the same for all runs, and their targets' kinds."""

    def __init__(self, text: Text, count: int, batch: int) -> None:
        self.windows, self.kinds = text.held_out(count)
        self.names, self.batch = text.kinds, batch

    @torch.no_grad()
    def losses(self, model: MoDALanguageModel) -> Tensor:
        """(N, T), in float64."""
        device = model.embedding.weight.device
        rows = []
        for tokens, targets in self._batches(device):
            with autocast(device):
                logits = model(tokens)
            rows.append(token_losses(logits, targets).cpu())
        return torch.cat(rows).double()

    def loss(self, model: MoDALanguageModel) -> float | None:
        return finite(self.losses(model).mean().item())

    def report(self, model: MoDALanguageModel) -> dict[str, Any]:
        """The loss, by position and by kind of file too."""
        losses = self.losses(model)
        by_position = [finite(part.mean().item()) for part in losses.tensor_split(PARTS, 1)]
        index, count = self.kinds.flatten(), len(self.names)
        sums = torch.bincount(index, losses.flatten(), minlength=count).tolist()
        tokens = torch.bincount(index, minlength=count).tolist()
        return dict(
            held_out_loss=finite(losses.mean().item()),
            loss_by_position=by_position,
            loss_by_kind={
                name: dict(loss=finite(total / n), tokens=n)
                for name, total, n in zip(self.names, sums, tokens, strict=True)
                if n
            },
        )

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.windows.split(self.batch):
            rows = rows.to(device)
            yield rows[:, :-1], rows[:, 1:]


def attention_report(model: MoDALanguageModel, tokens: Tensor) -> dict[str, Any]:
    """Mass of every depth slot and of the first key, by read, mean over heads and tokens (B, T)."""
    plain = copy.deepcopy(model)  # which is not compiled
    device = model.embedding.weight.device
    with autocast(device):
        uses = depth_use(plain, tokens.to(device))
    means = [use.mass.double().mean((0, 1)).tolist() for use in uses]
    return dict(
        depth_slots=[list(use.slots) for use in uses],
        depth_mass=[[finite(mass) for mass in row] for row in means],
        sink_mass=[None if u.sink is None else finite(u.sink.mean().item()) for u in uses],
    )
