"""The tokens that prepare_text.py writes: batches for training, windows of held-out text."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Text:
    """A memory-mapped file of tokens, cut into windows of ``length`` tokens and their targets.

    Args:
        path: what prepare_text.py was given as --output.
        length: T, tokens of a window.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.about = json.loads(Path(f"{path}.json").read_text())
        self.length = length
        self.hash: str = self.about["sha256"]
        self.tokens = np.memmap(path, dtype=self.about["dtype"], mode="r")
        self.held_out_from: int = self.about["held_out_from"]
        self.windows = (self.held_out_from - 1) // length
        files = self.about["held_out_files"]
        self.kinds = sorted({file["kind"] for file in files})
        self._starts = np.array([file["start"] for file in files])
        self._kind_of_file = np.array([self.kinds.index(file["kind"]) for file in files])

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Training windows (size, T + 1) of a step, which depend on nothing but the arguments.

        Every pass over the text is shuffled by itself; a batch may hold the end of one and the
        start of the next.
        """
        places = np.arange(step * size, (step + 1) * size)
        orders = {n: self._order(seed, n) for n in sorted({*(places // self.windows).tolist()})}
        chosen = [orders[place // self.windows][place % self.windows] for place in places.tolist()]
        return self._read(np.array(chosen) * self.length)

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` windows (count, T + 1), evenly spread, and each target's kind (count, T)."""
        room = len(self.tokens) - self.held_out_from - self.length - 1
        if room < 0:
            raise ValueError(f"length must be shorter than the held-out text, got {self.length}")
        starts = self.held_out_from + np.linspace(0, room, count).astype(np.int64)
        targets = starts[:, None] + np.arange(1, self.length + 1)
        files = np.searchsorted(self._starts, targets, side="right") - 1
        return self._read(starts), torch.from_numpy(self._kind_of_file[files])

    def _order(self, seed: int, pass_number: int) -> np.ndarray:
        if getattr(self, "_kept", (None,))[0] != (seed, pass_number):
            order = np.random.default_rng((seed, pass_number)).permutation(self.windows)
            self._kept = (seed, pass_number), order
        return self._kept[1]

    def _read(self, starts: np.ndarray) -> Tensor:
        rows = self.tokens[starts[:, None] + np.arange(self.length + 1)]
        return torch.from_numpy(rows.astype(np.int64))
