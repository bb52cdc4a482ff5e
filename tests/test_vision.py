"""The image classifier: what it computes, and that it learns, with depth and without."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional as F

from moda_ops import DepthSlots
from moda_ops.nn import Depth, MoDAClassifier, MoDAConfig, MoDALanguageModel, Norm, VisionConfig
from moda_ops.nn.cache import CachedStream, KVCache
from moda_ops.tools import cli, digits

CONFIG = VisionConfig(
    image_size=6, patch_size=2, channels=3, classes=7, layers=3, width=24, heads=4, kv_heads=2,
    head_dim=6, hidden=40,
)  # fmt: skip
every_depth = pytest.mark.parametrize("depth", get_args(Depth))
every_norm = pytest.mark.parametrize("norm", get_args(Norm))


def make_model(**options: Any) -> MoDAClassifier:
    torch.manual_seed(0)
    return MoDAClassifier(replace(CONFIG, **options)).double()


def make_images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 6, dtype=torch.float64)


# What it computes


def test_patches_are_squares_in_reading_order() -> None:
    model, images = make_model(), make_images()
    x = model.embedding(images)
    assert x.shape == (2, CONFIG.tokens, 24) == (2, 10, 24)
    weight, bias = model.embedding.proj.weight, model.embedding.proj.bias
    patch = images[:, :, 2:4, 4:6].flatten(1)  # second row, third column
    expected = patch @ weight.T + bias + model.embedding.positions.weight[5]
    torch.testing.assert_close(x[:, 5], expected)
    torch.testing.assert_close(x[0, -1], model.embedding.positions.weight[-1])


def dense_moda(model: MoDAClassifier, images: Tensor) -> Tensor:
    """Depth ``kv+ffn`` in post-norm by dense softmax over [sequence | depth], nothing masked."""
    groups = CONFIG.heads // CONFIG.kv_heads

    def heads(x: Tensor) -> Tensor:  # [B, HQ, T, D]
        y = x.unflatten(-1, (-1, CONFIG.head_dim)).transpose(1, 2)
        return y if y.shape[1] == CONFIG.heads else y.repeat_interleave(groups, 1)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    x, slots = model.embedding(images), list[tuple[Tensor, Tensor]]()
    for block in model.blocks:
        q, k, v = (heads(getattr(block.attention, f"{n}_proj")(x)) for n in "qkv")
        scores = [q @ k.mT, *((q * key).sum(-1, keepdim=True) for key, _ in slots)]
        p = (torch.cat(scores, -1) / CONFIG.head_dim**0.5).softmax(-1)
        out = p[..., : CONFIG.tokens] @ v
        for i, (_, value) in enumerate(slots):
            out = out + p[..., CONFIG.tokens + i, None] * value
        slots.append((k, v))
        y = block.attention.out_proj(out.transpose(1, 2).flatten(2))
        x = norm(x + y, block.attention_norm.weight)
        if block.feed_forward_write is not None:
            write = block.feed_forward_write
            slots.append((heads(write.k_proj(x)), heads(write.v_proj(x))))
        ffn = block.feed_forward
        y = ffn.out_proj(F.silu(ffn.gate_proj(x)) * ffn.up_proj(x))
        x = norm(x + y, block.feed_forward_norm.weight)
    return model.head(x[:, -1])


def test_logits_and_gradients_against_a_dense_computation() -> None:
    model, images = make_model(), make_images()

    def results(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        logits = run(images)
        loss = F.cross_entropy(logits, torch.tensor([3, 1]))
        return [logits, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = results(lambda x: dense_moda(model, x))
    for actual in (results(model), results(lambda x: model(x, DepthSlots()))):
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@every_norm
@every_depth
def test_every_patch_and_parameter_takes_part(depth: Depth, norm: Norm) -> None:
    model, images = make_model(depth=depth, norm=norm, qk_norm=True), make_images()
    images.requires_grad_()
    F.cross_entropy(model(images), torch.tensor([3, 1])).backward()
    assert images.grad is not None and (images.grad != 0).all()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_depth
def test_early_patches_see_later_ones_unless_causal(depth: Depth) -> None:
    images = make_images()
    changed = images.clone()
    changed[:, :, 4:, 4:] += 1  # the last patch

    def hidden(model: MoDAClassifier, x: Tensor) -> Tensor:
        return model.hidden(model.embedding(x), None, model.stream(2, CONFIG.tokens))

    for causal in (False, True):
        model = make_model(depth=depth, causal=causal)
        same = (hidden(model, images) - hidden(model, changed)).abs().amax((0, 2)) < 1e-12
        assert same.tolist() == [causal] * 8 + [False] * 2


def test_a_bidirectional_language_model_sees_all_and_does_not_generate() -> None:
    from moda_ops.nn import generate

    torch.manual_seed(0)
    sizes = dict(vocab_size=9, layers=2, width=24, heads=4, kv_heads=2, head_dim=6, hidden=40)
    model, tokens = MoDALanguageModel(MoDAConfig(**sizes, causal=False)), torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, -1] = 8
    assert ((model(tokens) - model(changed)).abs().amax(-1) > 1e-6).all()
    assert model.flops(1, 8) - MoDALanguageModel(MoDAConfig(**sizes)).flops(1, 8) == (
        4 * 24 * 2 * (8 * 7 // 2)  # hidden pairs in two layers
    )
    with pytest.raises(ValueError, match="model must be causal to generate"):
        generate(model, [[1]], 2)
    q, k = torch.randn(1, 1, 4, 6), torch.randn(1, 1, 2, 6)
    stream = CachedStream(KVCache.allocate(model.config, 1, 4), start=0)
    for attend in (stream.attend, stream.attend_sequence):
        with pytest.raises(ValueError, match="causal must be True with a cache"):
            attend(q, k, k, causal=False)


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (None, TypeError, "images must be a floating-point torch.Tensor, got NoneType"),
        (torch.ones(2, 3, 6, 6, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.ones(3, 6, 6), ValueError, r"\(B, 3, 6, 6\), got \(3, 6, 6\)"),
        (torch.ones(2, 3, 8, 6), ValueError, r"got \(2, 3, 8, 6\)"),
    ],
)
def test_images_that_do_not_fit(images: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_model()(images)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(patch_size=4), "patch_size = 4 must divide image_size = 6"),
        (dict(classes=0), "classes = 0 must be at least 1"),
        (dict(channels=0), "channels = 0 must be at least 1"),
        (dict(kv_heads=3), "kv_heads = 3 must divide heads = 4"),
        (dict(head_dim=257), "head_dim = 257 must be at most 256"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(CONFIG, **options)


def test_an_odd_head_dim_needs_no_rotation() -> None:
    assert make_model(head_dim=5)(make_images()).isfinite().all()


# moda-ops digits


def test_digits_are_split_once_and_for_all() -> None:
    (x, y), (x_held, y_held) = digits.load()
    assert x.shape == (1198, 1, 8, 8) and x_held.shape == (599, 1, 8, 8)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    for classes in (y, y_held):
        assert classes.bincount().min() > 0.09 * len(classes)
    seen = {image.numpy().tobytes() for image in x}
    assert not any(image.numpy().tobytes() in seen for image in x_held)
    assert torch.equal(digits.load()[1][0], x_held)


def test_twins_begin_with_the_same_weights() -> None:
    device = torch.device("cpu")
    (a, _), (b, _) = (
        digits.train(depth, steps=0, seed=3, device=device) for depth in ("residual", "kv")
    )
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def test_both_twins_learn_the_digits(tmp_path: Path) -> None:
    lines = list[str]()
    depths: list[Depth] = ["residual", "kv+ffn"]
    device = torch.device("cpu")
    results = digits.run(
        tmp_path, depths=depths, steps=60, seeds=1, device=device, echo=lines.append
    )
    assert all(accuracy > 85 for (accuracy,) in results.values()), results
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["held_out_accuracy_percent"] == results
    assert VisionConfig(**record["config"]) == digits.CONFIG
    assert [line.split()[0] for line in lines] == ["depth", "residual", "kv+ffn", "wrote"]


def test_digits_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    arguments = ["digits", "--device", "cpu", "--output", str(tmp_path / "new"), "--steps", "1"]
    result = run(cli.main, [*arguments, "--seeds", "2"])
    assert result.exit_code == 0
    record = json.loads((tmp_path / "new" / "digits.json").read_text())
    assert {depth: len(x) for depth, x in record["held_out_accuracy_percent"].items()} == {
        "residual": 2,
        "kv": 2,
        "kv+ffn": 2,
    }
    (tmp_path / "file").touch()
    result = run(cli.main, ["digits", "--output", str(tmp_path / "file")])
    assert result.exit_code == 1 and "Error: cannot write to --output" in result.stderr
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else True)
    result = run(cli.main, ["digits"])
    assert result.stderr == (
        "Error: moda-ops digits needs sklearn: pip install 'moda-ops[digits]'\n"
    )


@pytest.mark.gpu
@every_depth
def test_on_a_gpu_against_a_cpu(depth: Depth, device: torch.device) -> None:
    model, images = make_model(depth=depth).float(), make_images(5).float()
    expected = model(images).detach()
    actual = model.to(device)(images.to(device)).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
