"""What ``moda-ops demo`` runs: train a small MoDA language model on real text, then check it.

The text is the Python standard library's own source, byte by byte; every sixteenth file is held
out. Losses are in bits per byte.
"""

import math
import os
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from moda_ops.nn import MoDABlock, MoDAConfig, MoDALanguageModel, generate
from moda_ops.stream.depth_slots import DepthSlots
from moda_ops.tools.selfcheck import operator_errors

FILES = ("checkpoint.pt", "loss.png", "sample.txt")
PROMPT = b"def "
EVALUATIONS = 12


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, and how it is trained: batch sequences of context bytes in each step."""

    model: MoDAConfig
    context: int
    batch: int
    learning_rate: float


RECIPES = {
    "cpu": Recipe(
        model=MoDAConfig(
            vocab_size=256, layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384
        ),
        context=128,
        batch=8,
        learning_rate=3e-3,
    ),
    "cuda": Recipe(
        model=MoDAConfig(
            vocab_size=256, layers=8, width=512, heads=8, kv_heads=4, head_dim=64, hidden=1536
        ),
        context=512,
        batch=32,
        learning_rate=1e-3,
    ),
}


@dataclass
class History:
    """Points (step, bits per byte)."""

    training: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def prepare_output(output: Path, *, parents: bool) -> None:
    """Create the folder, see that it takes files, and clear away an earlier run's.

    Raises:
        OSError: the parent is missing (unless ``parents``), it is no folder, or not writable.
    """
    output.mkdir(exist_ok=True, parents=parents)
    with tempfile.TemporaryFile(dir=output):
        pass
    for name in FILES:
        (output / name).unlink(missing_ok=True)


def run(
    output: Path, *, seconds: float, steps: int | None, seed: int, device: torch.device
) -> bool:
    """Train, write FILES, and return whether the operator agrees with the NumPy reference."""
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the model's matrices
    recipe, (train_text, valid_text) = RECIPES[device.type], read_corpus()
    model = MoDALanguageModel(recipe.model).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    bigram = bigram_bits(train_text, valid_text)
    threads = f"a CPU with {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    click.echo(
        f"{parameters / 1e6:.1f} M parameters, {recipe.model.layers} layers, on {where}; "
        f"{len(train_text) / 1e6:.1f} MB of text; a bigram model needs {bigram:.2f} bits per byte"
    )
    history = History()
    try:
        train(model, recipe, train_text, valid_text, seconds, steps, history, output / FILES[0])
    finally:
        if history.validation:
            title = f"MoDA language model, {parameters / 1e6:.1f} M parameters, on {where}"
            plot(history, bigram, title, recipe, output / FILES[1])

    text = sample(model, recipe.context, length=400, seed=seed).decode(errors="replace")
    (output / FILES[2]).write_text(text, encoding="utf-8")
    click.echo(f"\n{text}\n")
    final = history.validation[-1][1]
    click.echo(f"held-out loss {final:.3f} bits per byte (bigram {bigram:.2f})")
    click.echo(f"wrote {', '.join(str(output / name) for name in FILES)}")
    return check(model, valid_text[None, : recipe.context])


def read_corpus() -> tuple[Tensor, Tensor]:
    """Training and held-out text, uint8: the standard library's modules in order of path.

    Tests, installed packages and the character tables of ``encodings`` are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    chosen = sorted(path.as_posix() for path in paths if skipped.isdisjoint(path.parts))
    files = [(root / path).read_bytes() for path in chosen]
    held_out, training = files[::16], [f for i, f in enumerate(files) if i % 16]

    def tensor(parts: list[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)

    return tensor(training), tensor(held_out)


def bigram_bits(train_text: Tensor, valid_text: Tensor) -> float:
    """Held-out bits per byte of a bigram model: counts of the training text plus one.

    Example:
        >>> alternating = torch.tensor([65, 66], dtype=torch.uint8).repeat(100_000)
        >>> round(bigram_bits(alternating, alternating), 2)  # the next byte is certain
        0.0
    """
    pairs = 256 * train_text[:-1].long() + train_text[1:]
    counts = torch.bincount(pairs, minlength=256**2).view(256, 256).double() + 1
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    return bits[valid_text[:-1].long(), valid_text[1:].long()].mean().item()


def draw(text: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the text: bytes (batch, context) and the byte after each."""
    size = (recipe.batch, 1)
    start = torch.randint(len(text) - recipe.context, size, generator=generator)
    window = text[start + torch.arange(recipe.context + 1)].long()
    return window[:, :-1], window[:, 1:]


def train(
    model: MoDALanguageModel,
    recipe: Recipe,
    train_text: Tensor,
    valid_text: Tensor,
    seconds: float,
    steps: int | None,
    history: History,
    checkpoint: Path,
) -> None:
    """AdamW, warm-up and cosine decay over the time (or the steps) given; fills ``history``."""
    from tqdm import tqdm

    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(torch.initial_seed())
    fixed = torch.Generator().manual_seed(0)
    held_out = [draw(valid_text, recipe, fixed) for _ in range(16)]

    @torch.compile(fullgraph=True)
    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / math.log(2)

    def loss_on(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(*(x.to(device) for x in batch))

    def validate(step: int) -> float:
        # With gradients enabled, as in training, so that one compiled graph serves both.
        loss = sum(loss_on(batch).item() for batch in held_out) / len(held_out)
        history.validation.append((step, loss))
        save(model, step, loss, checkpoint)
        return loss

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    click.echo("compiling ...")
    start = time.perf_counter()
    loss_on(held_out[0]).backward()
    optimizer.zero_grad()
    click.echo(f"compiled in {time.perf_counter() - start:.0f} s; losses are in bits per byte")

    step, recent, valid_loss = 0, [], validate(0)
    start = reported = time.perf_counter()
    progress, evaluations = 0.0, 1
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(progress)
            loss = loss_on(draw(train_text, recipe, generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            recent.append(loss.detach())

            now = time.perf_counter()
            progress = max((now - start) / seconds, step / steps if steps else 0.0)
            if now - reported >= 1 or progress >= 1:
                mean = torch.stack(recent).mean().item()
                speed = len(recent) * recipe.batch * recipe.context / (now - reported)
                history.training.append((step, mean))
                bar.n = round(100 * min(progress, 1))
                bar.set_postfix_str(
                    f"step {step}, loss {mean:.2f}, held-out {valid_loss:.2f}, "
                    f"{speed:,.0f} tokens/s"
                )
                recent, reported = [], now
            if progress >= evaluations / EVALUATIONS:
                valid_loss = validate(step)
                evaluations = int(progress * EVALUATIONS) + 1


def schedule(progress: float) -> float:
    """Fraction of the peak learning rate: up over the first 5%, then a cosine down to 10%.

    Example:
        >>> [round(schedule(p), 2) for p in (0.0, 0.025, 0.05, 1.0)]
        [0.0, 0.5, 1.0, 0.1]
    """
    warmup = 0.05
    if progress < warmup:
        return progress / warmup
    done = (min(progress, 1.0) - warmup) / (1 - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def save(model: MoDALanguageModel, step: int, loss: float, path: Path) -> None:
    """Write a checkpoint that torch.load(weights_only=True) reads; whole or not at all."""
    content = {
        "config": asdict(model.config),
        "model": model.state_dict(),
        "step": step,
        "bits_per_byte": loss,
    }
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def plot(history: History, bigram: float, title: str, recipe: Recipe, path: Path) -> None:
    """Both losses against the step, and the bigram model's as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if history.training:
        axes.plot(*zip(*history.training, strict=True), label="training", linewidth=1)
    axes.plot(*zip(*history.validation, strict=True), "o-", label="held-out files")
    axes.axhline(bigram, color="gray", linestyle="--", label=f"bigram model, {bigram:.2f}")
    axes.set(title=title, ylabel="loss (bits per byte)", ylim=(0, None))
    axes.set_xlabel(f"step ({recipe.batch} x {recipe.context} bytes each)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def sample(
    model: MoDALanguageModel, context: int, length: int, seed: int, temperature: float = 0.8
) -> bytes:
    """PROMPT and the model's continuation of it, from contexts no longer than in training.

    When one is full, the next begins with its second half.
    """
    text, end = list(PROMPT), len(PROMPT) + length
    while len(text) < end:
        prompt = text[-(context // 2) :]
        room = min(context - len(prompt), end - len(text))
        at = (seed + len(text)) % 2**64
        (new,) = generate(model, [prompt], room, temperature=temperature, seed=at)
        text += new.tolist()
    return bytes(text)


@torch.no_grad()
def last_attention_inputs(
    model: MoDALanguageModel, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """q, k, v, k_depth, v_depth of the model's last attention layer, for tokens (B, T)."""
    x, rotary = model.embedding(tokens), model.rotary(tokens.shape[1])
    stream = DepthSlots()
    *body, last = model.blocks
    for block in body:
        x, stream = block(x, rotary, stream)
    assert isinstance(last, MoDABlock)
    q, k, v = last.attention.project(x, rotary)
    return q, k, v, list(stream.k), list(stream.v)


def check(model: MoDALanguageModel, tokens: Tensor) -> bool:
    """Compare the operator with the NumPy reference on the trained model's own last layer."""
    torch.set_float32_matmul_precision("highest")
    device = model.embedding.weight.device
    errors = operator_errors(*last_attention_inputs(model, tokens.long().to(device)))
    ok = all(error.ok for error in errors)
    click.echo("operator against moda_reference (float64), last layer, relative errors:")
    click.echo("  " + "\n  ".join(map(str, errors)))
    click.echo("all within tolerance" if ok else "FAILED: an error is above its tolerance")
    return ok
