"""What ``moda-ops digits`` runs: an image classifier beside its twin without depth.

The images are scikit-learn's handwritten digits, 8 x 8 pixels, 1797 in all, of which a third is
held out. Twins have the same seed, sizes, batches and steps; only ``depth`` differs. Those of
``"residual"`` and ``"kv"`` begin with the same weights, and have the same number of them.
"""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moda_ops.nn import Depth, MoDAClassifier, VisionConfig
from moda_ops.tools.demo import schedule

DEPTHS: tuple[Depth, ...] = ("residual", "kv", "kv+ffn")
CONFIG = VisionConfig(
    image_size=8,
    patch_size=2,
    channels=1,
    classes=10,
    layers=6,
    width=48,
    heads=4,
    kv_heads=2,
    head_dim=12,
    hidden=96,
)
BATCH = 32
LEARNING_RATE = 2e-3
FILE = "digits.json"
Images = tuple[Tensor, Tensor]
"""Images (N, 1, 8, 8) in [-1, 1], and their classes (N,)."""


def load() -> tuple[Images, Images]:
    """Training and held-out images: always the same, every class in both in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    classes = torch.from_numpy(digits.target).long()
    x, x_held, y, y_held = train_test_split(
        images, classes, test_size=1 / 3, stratify=classes, random_state=0
    )
    return (x, y), (x_held, y_held)


def train(
    depth: Depth,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    advance: Callable[[int], object] | None = None,
) -> tuple[MoDAClassifier, float]:
    """A trained classifier, and its accuracy on the held-out images."""
    training, held_out = load()
    x, y = (part.to(device) for part in training)
    torch.manual_seed(seed)
    model = MoDAClassifier(replace(CONFIG, depth=depth)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / steps)
        drawn = torch.randint(len(x), (BATCH,), generator=generator).to(device)
        F.cross_entropy(model(x[drawn]), y[drawn]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if advance is not None:
            advance(1)
    return model, accuracy(model, held_out)


@torch.no_grad()
def accuracy(model: MoDAClassifier, images: Images) -> float:
    """Share of images whose class has the largest logit."""
    device = model.head.weight.device
    x, y = (part.to(device) for part in images)
    return (model(x).argmax(1) == y).float().mean().item()


def run(
    output: Path,
    *,
    depths: Sequence[Depth],
    steps: int,
    seeds: int,
    device: torch.device,
    echo: Callable[[str], object],
) -> dict[str, list[float]]:
    """Train every kind with every seed, report accuracies in percent, and write ``FILE``."""
    from tqdm import tqdm

    results: dict[str, list[float]] = {depth: [] for depth in depths}
    with tqdm(total=len(depths) * seeds * steps, unit=" steps") as bar:
        for seed in range(seeds):
            for depth in depths:
                bar.set_postfix_str(f"{depth}, seed {seed}")
                _, share = train(depth, steps=steps, seed=seed, device=device, advance=bar.update)
                results[depth].append(100 * share)
    content = {"config": asdict(CONFIG), "steps": steps, "held_out_accuracy_percent": results}
    unfinished = output / f"{FILE}.tmp"
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, output / FILE)
    for line in table(results):
        echo(line)
    echo(f"wrote {output / FILE}")
    return results


def table(results: dict[str, list[float]]) -> list[str]:
    """One line per kind: mean and spread over seeds, and both of the difference to the first.

    A single seed has no spread.

    Example:
        >>> print("\\n".join(table({"residual": [90.0, 92.0], "kv": [93.0, 93.0]})))
        depth       accuracy (%)  minus residual
        residual    91.00 +- 1.41
        kv          93.00 +- 0.00  2.00 +- 1.41
        >>> print("\\n".join(table({"residual": [90.0], "kv": [93.0]})))
        depth       accuracy (%)  minus residual
        residual    90.00
        kv          93.00         3.00
    """

    def spread(values: list[float]) -> str:
        mean = f"{statistics.fmean(values):.2f}"
        return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean

    first, *_ = results
    lines = [f"depth       accuracy (%)  minus {first}"]
    for depth, values in results.items():
        line = f"{depth:<11} {spread(values):<13}"
        if depth != first:
            pairs = zip(values, results[first], strict=True)
            line += f"  {spread([x - y for x, y in pairs])}"
        lines.append(line.rstrip())
    return lines
