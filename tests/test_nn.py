"""The language models: what they compute, what they write to the depth stream, and their sizes."""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import assert_accurate
from moda_ops import DepthSlots, DepthStream
from moda_ops.nn import (
    Depth,
    DepthAttention,
    MoDAAttention,
    MoDAConfig,
    MoDALanguageModel,
    Norm,
    depth_use,
    layers,
    rotary_angles,
    rotate,
)
from moda_ops.nn.pipeline import PipelineStage

CONFIG = MoDAConfig(vocab_size=61, layers=3, width=36, heads=6, kv_heads=2, head_dim=6, hidden=50)
ROUNDINGS = 8
every_depth = pytest.mark.parametrize("depth", get_args(Depth))
every_norm = pytest.mark.parametrize("norm", get_args(Norm))
every_stream = pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
Kind = type[DepthStream] | type[DepthSlots]
Stream = DepthStream | DepthSlots


def make_model(**options: Any) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(replace(CONFIG, **options))


def on_meta(config: MoDAConfig) -> MoDALanguageModel:
    with torch.device("meta"):
        return MoDALanguageModel(config)


def tokens_like(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator())


def begin(model: MoDALanguageModel, kind: Kind, batch: int, length: int) -> Stream:
    """An empty stream of either kind, as large as the model fills it."""
    if kind is DepthSlots:
        return DepthSlots()
    c, dtype = model.config, model.embedding.weight.dtype
    return DepthStream.allocate(c.depth_slots(), batch, length, c.kv_heads, c.head_dim, dtype=dtype)


def slots_of(stream: Stream) -> list[tuple[Tensor, Tensor]]:
    """Key and value of every written slot."""
    if isinstance(stream, DepthSlots):
        return list(zip(stream.k, stream.v, strict=True))
    return [slot.tensor_split(2, -1) for slot in stream.buffer[: stream.written]]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(loss: Tensor, model: MoDALanguageModel, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


# What every model does


@every_norm
@every_depth
def test_a_token_changes_no_earlier_logits(depth: Depth, norm: Norm) -> None:
    model, tokens = make_model(depth=depth, norm=norm), tokens_like(2, 23)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax((0, 2)).min() > 1e-5


@pytest.mark.parametrize("extra", [{}, {"qk_norm": True, "bias": True}], ids=["plain", "extra"])
@every_norm
@every_depth
def test_a_step_moves_every_parameter(depth: Depth, norm: Norm, extra: dict[str, bool]) -> None:
    model, tokens = make_model(depth=depth, norm=norm, **extra), tokens_like(2, 17)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = loss_of(model(tokens), tokens)
    before.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    optimizer.step()
    assert loss_of(model(tokens), tokens) < before


@every_norm
@every_depth
def test_state_dict_round_trip(depth: Depth, norm: Norm) -> None:
    options = {"depth": depth, "norm": norm, "qk_norm": True, "write_last": True}
    model, file = make_model(**options), io.BytesIO()
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    copy = MoDALanguageModel(MoDAConfig(**loaded["config"]))
    tokens = tokens_like(1, 9)
    assert not torch.equal(copy(tokens), model(tokens))
    copy.load_state_dict(loaded["model"])
    assert torch.equal(copy(tokens), model(tokens))


@every_norm
@every_depth
def test_logits_at_initialization_are_near_uniform(depth: Depth, norm: Norm) -> None:
    tokens = tokens_like(4, 32)
    loss = loss_of(make_model(depth=depth, norm=norm)(tokens), tokens)
    uniform = torch.tensor(float(CONFIG.vocab_size)).log()
    assert abs(loss - uniform) < 0.1


def test_norm_keeps_bfloat16_beside_float32_gains() -> None:
    norm, x = layers.RMSNorm(8), torch.randn(3, 8).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), eps=1e-6))
    tiny = torch.full((2,), 1e-6)  # mean square 1e-12, next to 1e-6
    torch.testing.assert_close(layers.RMSNorm(2, gain=False)(tiny), torch.full((2,), 1e-3))


# Who writes the depth stream, and who reads it


def slots_read(model: MoDALanguageModel) -> list[int]:
    """Slots given to each call of the operator, of those that have any or could."""
    reads: list[int] = []
    depth_alone = model.config.depth == "attention"
    for module in model.modules():
        if isinstance(module, DepthAttention if depth_alone else MoDAAttention):
            # DepthAttention is called before it writes the slot that it reads last.
            module.register_forward_pre_hook(lambda _, x: reads.append(x[2].written + depth_alone))
    model(tokens_like(1, 5))
    return reads


@pytest.mark.parametrize(
    ("depth", "reads"),
    [
        ("residual", [0, 0, 0]),
        ("attention", [2, 3, 4, 5, 6, 7]),
        ("kv", [0, 1, 2]),
        ("kv+ffn", [0, 2, 4]),
        ("kv+ffn+attn", [0, 2, 4]),
    ],
)
def test_slots_that_each_layer_reads(depth: Depth, reads: list[int]) -> None:
    model = make_model(depth=depth)
    assert slots_read(model) == reads == model.config.depth_reads()
    assert slots_read(make_model(depth=depth, write_last=True)) == reads


@every_stream
@pytest.mark.parametrize(
    ("depth", "per_block"), [("residual", 0), ("kv", 1), ("kv+ffn", 2), ("kv+ffn+attn", 2)]
)
def test_the_last_block_writes_only_if_told_to(depth: Depth, per_block: int, kind: Kind) -> None:
    for write_last in (False, True):
        model = make_model(depth=depth, write_last=write_last)
        stream, rotary = begin(model, kind, 1, 5), model.rotary(5)
        x = torch.randn(1, 5, CONFIG.width)
        for block in model.blocks:
            x, stream = block(x, rotary, stream)
        assert stream.written == per_block * (CONFIG.layers - 1 + write_last)
        assert {tuple(part.shape) for slot in slots_of(stream) for part in slot} <= {(1, 5, 2, 6)}


@every_depth
@pytest.mark.parametrize("write_last", [False, True])
def test_the_default_stream_has_as_many_slots_as_the_blocks_write(
    write_last: bool, depth: Depth
) -> None:
    model, streams = make_model(depth=depth, write_last=write_last), list[Stream]()
    model.blocks[-1].register_forward_hook(lambda *args: streams.append(args[-1][1]))
    model(tokens_like(2, 5))
    (stream,) = streams
    assert stream.written == model.config.depth_slots()
    if depth != "residual":
        assert isinstance(stream, DepthStream)
        assert stream.slots == stream.written


@every_stream
@every_depth
def test_blocks_do_not_change_the_stream_they_are_given(depth: Depth, kind: Kind) -> None:
    model, rotary = make_model(depth=depth), make_model().rotary(5)
    x, stream = torch.randn(1, 5, CONFIG.width), begin(model, kind, 1, 5)
    for block in model.blocks:
        before = [part.clone() for slot in slots_of(stream) for part in slot]
        x, continued = block(x, rotary, stream)
        after = [part for slot in slots_of(stream) for part in slot]
        assert len(after) == len(before) and all(map(torch.equal, after, before))
        kept = [part for slot in slots_of(continued) for part in slot][: len(before)]
        assert all(map(torch.equal, kept, before))
        stream = continued


@every_stream
@every_norm
@pytest.mark.parametrize("depth", ["kv", "kv+ffn", "kv+ffn+attn"])
def test_what_a_block_writes(depth: Depth, norm: Norm, kind: Kind) -> None:
    """Attention its own key and value or a projection of its input, feed-forward a projection."""
    model, inputs = make_model(depth=depth, norm=norm), dict[str, Tensor]()
    block, rotary = model.blocks[0], model.rotary(5)
    for name in ("attention", "feed_forward"):
        getattr(block, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    _, stream = block(torch.randn(1, 5, CONFIG.width), rotary, begin(model, kind, 1, 5))
    own = block.attention.project(inputs["attention"], rotary)[1:]
    if depth == "kv+ffn+attn":
        own = block.attention_write(inputs["attention"], rotary)
    expected = [own]
    if depth != "kv":
        expected.append(block.feed_forward_write(inputs["feed_forward"], rotary))
    for slot, (k, v) in zip(slots_of(stream), expected, strict=True):
        assert torch.equal(slot[0], k) and torch.equal(slot[1], v)


@every_stream
@every_depth
@pytest.mark.parametrize("position", [1, 1000])
def test_depth_scores_do_not_depend_on_the_position(
    position: int, depth: Depth, kind: Kind
) -> None:
    """One token, so only depth is read: its position must not matter, in any block."""
    model, x = make_model(depth=depth), torch.randn(3, 1, CONFIG.width)

    def last_output(at: int) -> Tensor:
        y, stream = x, begin(model, kind, 3, 1)
        rotary = rotary_angles(torch.tensor([at]), CONFIG.head_dim, CONFIG.rope_base)
        for block in model.blocks:
            y, stream = block(y, rotary, stream)
        return y

    torch.testing.assert_close(last_output(position), last_output(0))


class Counted:
    """A stream of somebody else: what the protocol asks for, no base class, no tuple."""

    def __init__(self, slots: DepthSlots, reads: list[int]) -> None:
        self.slots, self.reads = slots, reads

    @property
    def written(self) -> int:
        return self.slots.written

    def write(self, k: Tensor, v: Tensor) -> "Counted":
        return Counted(self.slots.write(k, v), self.reads)

    def keep(self, slots: Sequence[int]) -> "Counted":
        return Counted(self.slots.keep(slots), self.reads)

    def attend(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, causal: bool = True
    ) -> "tuple[Tensor, Counted]":
        self.reads.append(self.written - (k is None))
        return self.slots.attend(q, k, v, causal=causal)[0], self

    def attend_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
    ) -> "tuple[Tensor, Counted]":
        return self.slots.attend_sequence(q, k, v, causal=causal)[0], self

    def attend_depth(self, q: Tensor) -> "tuple[Tensor, Counted]":
        self.reads.append(self.written)
        return self.slots.attend_depth(q)[0], self


@every_depth
def test_a_stream_of_your_own(depth: Depth) -> None:
    bounded = replace(CONFIG, depth=depth).bounded(2).depth_keep
    for kept in (None, bounded):
        model, tokens = make_model(depth=depth, depth_keep=kept), tokens_like(2, 5)
        reads: list[int] = []
        logits = model(tokens, Counted(DepthSlots(), reads))
        assert torch.equal(logits, model(tokens, DepthSlots()))
        assert reads == model.config.depth_reads()


def test_rotation_makes_scores_relative() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        angles = [rotary_angles(torch.tensor([at]), 16, 1e4) for at in (query_at, key_at)]
        return (rotate(q, angles[0]) * rotate(k, angles[1])).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-5, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


@pytest.mark.parametrize("depth", ["kv+ffn+attn", "attention"])
def test_qk_norm_takes_the_size_out_of_queries_and_keys(depth: Depth) -> None:
    model, tokens = make_model(depth=depth, qk_norm=True).double(), tokens_like(2, 9)

    def logits_after_scaling(factor: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter *= factor
        return model(tokens)

    large = logits_after_scaling(1e3)  # beside which eps is nothing
    torch.testing.assert_close(logits_after_scaling(1e3), large, rtol=1e-6, atol=1e-6)


# Against other computations of the same model


@every_norm
def test_the_baseline_is_the_same_model_through_sdpa(
    norm: Norm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_depth: list[Tensor],
        v_depth: list[Tensor],
        *,
        causal: bool,
        scale: None,
        window: None,
        softcap: None,
        plan: str,
        return_lse: bool,
    ) -> tuple[Tensor, None]:
        assert k_depth == v_depth == []
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2), None

    model, tokens = make_model(depth="residual", norm=norm).double(), tokens_like(2, 19)
    logits = model(tokens)
    empty = model(tokens, begin(model, DepthStream, 2, 19))
    monkeypatch.setattr("moda_ops.stream.depth_slots.moda_attention", sdpa)
    expected = model(tokens)
    for actual in (logits, empty):
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            gradients(loss_of(actual, tokens), model),
            gradients(loss_of(expected, tokens), model, retain_graph=True),
        )


class Dense:
    """The models from their weights alone: one softmax over a dense row of all scores, rotation by
    complex numbers, heads spelled out."""

    def __init__(self, model: MoDALanguageModel, length: int) -> None:
        self.weights, self.config = dict(model.named_parameters()), model.config
        angles = rotary_angles(torch.arange(length), self.config.head_dim, self.config.rope_base)
        dtype = model.embedding.weight.dtype  # of the rotation, not of its float32 angles
        self.turn = torch.complex(*angles).squeeze(1).to(dtype.to_complex())
        self.future = torch.full((length, length), self.config.causal).triu(1)

    def unit(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.unit(x) * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def heads(self, x: Tensor, name: str) -> Tensor:  # [B, HQ, T, D]
        y = self.linear(x, name).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return y.repeat_interleave(self.config.heads // y.shape[1], 1)

    def rotated(self, x: Tensor, name: str) -> Tensor:
        y = self.heads(x, f"{name}_proj")
        if self.config.qk_norm:
            y = self.unit(y) * self.weights.get(f"{name}_norm.weight", 1.0)
        y = torch.complex(*y.chunk(2, -1)) * self.turn
        return torch.cat((y.real, y.imag), -1)

    def attend(
        self, q: Tensor, sequence: list[Tensor], keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """Attention to ``sequence``, its k and v or nothing, and to the slots; heads merged."""
        scores = [torch.einsum("bhtd,bhtd->bht", q, key)[..., None] for key in keys]
        if sequence:
            scores.insert(0, (q @ sequence[0].mT).masked_fill(self.future, float("-inf")))
        p = (torch.cat(scores, -1) / self.config.head_dim**0.5).softmax(-1)
        depth = p[..., p.shape[-1] - len(keys) :]
        out = p[..., : len(self.future)] @ sequence[1] if sequence else torch.zeros_like(q)
        for i, value in enumerate(values):
            out = out + depth[..., i, None] * value
        return out.transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        gate, up = (self.linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self.linear(F.silu(gate) * up, f"{name}.out_proj")

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.weights["embedding.weight"][tokens]
        x = self.depth_attention(x) if self.config.depth == "attention" else self.moda(x)
        x = self.norm(x, "norm") if self.config.norm == "pre" else x
        return x @ self.weights["embedding.weight"].T

    def moda(self, x: Tensor) -> Tensor:
        """The rows of Table 3."""
        pre, writes = self.config.norm == "pre", self.config.depth.split("+")
        keys, values = list[Tensor](), list[Tensor]()
        for i in range(self.config.layers):
            block, last = f"blocks.{i}", i + 1 == self.config.layers
            h = self.norm(x, f"{block}.attention_norm") if pre else x
            q, k = (self.rotated(h, f"{block}.attention.{name}") for name in "qk")
            v = self.heads(h, f"{block}.attention.v_proj")
            out = self.attend(q, [k, v], keys, values)
            if "attn" in writes and not last:
                k = self.rotated(h, f"{block}.attention_write.k")
                v = self.heads(h, f"{block}.attention_write.v_proj")
            if "kv" in writes:
                keys.append(k)
                values.append(v)
            x = x + self.linear(out, f"{block}.attention.out_proj")
            x = x if pre else self.norm(x, f"{block}.attention_norm")

            h = self.norm(x, f"{block}.feed_forward_norm") if pre else x
            if "ffn" in writes and not last:
                keys.append(self.rotated(h, f"{block}.feed_forward_write.k"))
                values.append(self.heads(h, f"{block}.feed_forward_write.v_proj"))
            x = x + self.feed_forward(h, f"{block}.feed_forward")
            x = x if pre else self.norm(x, f"{block}.feed_forward_norm")
        return x

    def depth_attention(self, x: Tensor) -> Tensor:
        """Mechanism (c): a layer's input is the read by the last output's query."""
        pre, x = self.config.norm == "pre", self.unit(x)
        keys = [self.rotated(x, "embedding_write.k")]
        values = [self.heads(x, "embedding_write.v_proj")]
        x = values[0].transpose(1, 2).flatten(2)
        for i, part in product(range(self.config.layers), ("attention", "feed_forward")):
            layer = f"blocks.{i}.{part}"
            y = self.norm(x, f"{layer}_norm") if pre else x
            if part == "attention":
                q, k = (self.rotated(y, f"{layer}.{name}") for name in "qk")
                y = self.attend(q, [k, self.heads(y, f"{layer}.v_proj")], [], [])
                y = self.linear(y, f"{layer}.out_proj")
            else:
                y = self.feed_forward(y, layer)
            y = y if pre else self.norm(y, f"{layer}_norm")
            keys.append(self.rotated(y, f"{layer}_depth.write.k"))
            values.append(self.heads(y, f"{layer}_depth.write.v_proj"))
            x = self.attend(self.rotated(y, f"{layer}_depth.q"), [], keys, values)
        return x


class Expected(NamedTuple):
    """Logits and gradients by ``Dense``: in float64, in float32, and what rounding the weights
    to float32 once more changes."""

    exact: list[Tensor]
    plain: list[Tensor]
    floor: list[float]


def logits_and_gradients(
    model: MoDALanguageModel, run: Callable[[Tensor], Tensor], tokens: Tensor
) -> list[Tensor]:
    logits = run(tokens)
    return [logits.detach(), *gradients(loss_of(logits, tokens), model)]


def with_gains(config: MoDAConfig, dtype: torch.dtype) -> MoDALanguageModel:
    model = make_model(**asdict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


@cache
def dense_results(config: MoDAConfig) -> Expected:
    tokens = tokens_like(2, 13)

    def dense(model: MoDALanguageModel) -> list[Tensor]:
        return logits_and_gradients(model, Dense(model, 13).logits, tokens)

    plain, exact = (dense(with_gains(config, dtype)) for dtype in (torch.float32, torch.float64))
    floor = [0.0] * len(exact)
    for seed in range(ROUNDINGS):
        rounded = with_gains(config, torch.float64)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in rounded.parameters():
                signs = torch.randint_like(parameter, 2) * 2 - 1
                parameter *= 1 + torch.finfo(torch.float32).eps * signs
        for i, (x, e) in enumerate(zip(dense(rounded), exact, strict=True)):
            floor[i] = max(floor[i], (x - e).abs().max().item())
    return Expected(exact, plain, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("reads", "qk_norm"), [(12, False), (6, True)], ids=["12", "6-qk_norm"])
@every_stream
@every_norm
@every_depth
def test_logits_and_gradients_against_a_dense_computation(
    depth: Depth, norm: Norm, kind: Kind, reads: int, qk_norm: bool, dtype: torch.dtype
) -> None:
    layers = reads // 2 if depth == "attention" else reads
    config = replace(CONFIG, depth=depth, norm=norm, layers=layers, qk_norm=qk_norm)
    expected, model, tokens = dense_results(config), with_gains(config, dtype), tokens_like(2, 13)
    actual = logits_and_gradients(model, lambda x: model(x, begin(model, kind, *x.shape)), tokens)
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, x, exact, plain, floor in zip(names, actual, *expected, strict=True):
        if dtype == torch.float64:  # errors in units of eps, also those of ``exact`` itself
            units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            floor = units * (floor + (plain - exact).abs().max().item())
            plain = exact + units * (plain - exact)
        assert_accurate(name, x, exact, plain, floor)


@every_stream
@every_norm
@every_depth
def test_every_token_sees_all_if_not_causal(depth: Depth, norm: Norm, kind: Kind) -> None:
    model, tokens = make_model(depth=depth, norm=norm, causal=False).double(), tokens_like(2, 13)
    expected = logits_and_gradients(model, Dense(model, 13).logits, tokens)
    actual = logits_and_gradients(model, lambda x: model(x, begin(model, kind, *x.shape)), tokens)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # sums of float32 rotations


@every_stream
@every_norm
def test_depth_attention_against_a_dense_computation_without_rotation(
    norm: Norm, kind: Kind
) -> None:
    """Mechanism (c) step by step: a layer's input is the read by the last output's query."""
    model, tokens = make_model(depth="attention", norm=norm).double(), tokens_like(2, 7)
    rotary, slots = model.rotary(7), list[tuple[Tensor, Tensor]]()

    def heads(x: Tensor, projection: torch.nn.Module) -> Tensor:  # [B, T, HQ, D]
        y = projection(x).unflatten(-1, (-1, CONFIG.head_dim))
        return y.repeat_interleave(CONFIG.heads // y.shape[2], 2)

    def read(q: Tensor) -> Tensor:
        k, v = (torch.stack(parts, -2) for parts in zip(*slots, strict=True))  # [B, T, HQ, L, D]
        p = (torch.einsum("bthd,bthld->bthl", q, k) / CONFIG.head_dim**0.5).softmax(-1)
        return torch.einsum("bthl,bthld->bthd", p, v).flatten(2)

    x = F.rms_norm(model.embedding(tokens), (CONFIG.width,), eps=1e-6)
    slots.append((heads(x, model.embedding_write.k_proj), heads(x, model.embedding_write.v_proj)))
    x = read(torch.randn_like(slots[0][0]))  # one slot: the query does not matter
    for block in model.blocks:
        for name in ("attention", "feed_forward"):
            f, norm_of, depth = (getattr(block, name + s) for s in ("", "_norm", "_depth"))
            call: Callable[[Tensor], Tensor] = (
                (lambda x, f=f: f(x, rotary, DepthSlots(), write=False)[0])
                if name == "attention"
                else f
            )
            y = call(norm_of(x)) if norm == "pre" else norm_of(call(x))
            slots.append((heads(y, depth.write.k_proj), heads(y, depth.write.v_proj)))
            x = read(heads(y, depth.q_proj))
    expected = model.norm(x) @ model.embedding.weight.T
    logits = model(tokens, begin(model, kind, 2, 7))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)  # rotations are float32
    actual_grads = gradients(loss_of(logits, tokens), model)
    expected_grads = gradients(loss_of(expected, tokens), model)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-5, atol=1e-6)


# Sizes: arXiv 2603.15619, Tables 1, 3 and 6

TABLE_3 = MoDAConfig(
    vocab_size=100_278, layers=36, width=1024, heads=16, kv_heads=8, head_dim=64, hidden=4096
)
TABLE_6 = MoDAConfig(
    vocab_size=50_304, layers=48, width=384, heads=6, kv_heads=2, head_dim=64, hidden=1536,
    qk_norm=True, bias=True, write_last=True,
)  # fmt: skip
TABLE_3_ROWS = [
    # depth, layers, parameters, FLOPs
    ("residual", 36, "669.0 M", "8.01 T"),
    ("residual", 38, "700.5 M", "8.41 T"),
    ("kv", 36, "669.0 M", "8.02 T"),
    ("kv+ffn", 36, "705.7 M", "8.33 T"),
    ("kv+ffn+attn", 36, "742.4 M", "8.63 T"),
]


@pytest.mark.parametrize(("depth", "layers", "parameters", "flops"), TABLE_3_ROWS)
def test_table_3(depth: Depth, layers: int, parameters: str, flops: str) -> None:
    model = on_meta(replace(TABLE_3, depth=depth, layers=layers))
    assert f"{model.num_parameters() / 1e6:.1f} M" == parameters
    # The paper does not say how it counts FLOPs. This fits its column: masked pairs count, and
    # six operations on each score.
    T = 4096
    masked = layers * T * (T - 1) // 2
    theirs = model.flops(1, T) + 4 * 1024 * masked + 6 * 16 * layers * T**2
    assert f"{theirs / 1e12:.2f} T" == flops


def test_table_3_flops_that_depth_adds() -> None:
    rows = ("residual", "kv", "kv+ffn", "kv+ffn+attn")
    flops = [on_meta(replace(TABLE_3, depth=depth)).flops(1, 4096) for depth in rows]
    added = [f"{(after - before) / 1e12:.2f}" for before, after in pairwise(flops)]
    assert added == ["0.01", "0.31", "0.30"]  # 8.02 - 8.01, 8.33 - 8.02, 8.63 - 8.33


@pytest.mark.parametrize(
    ("depth", "layers", "parameters"),
    [
        ("residual", 48, "123.38 M"),
        ("kv", 48, "123.38 M"),
        ("kv+ffn", 48, "128.11 M"),
        ("residual", 24, "71.35 M"),
        ("kv", 24, "71.35 M"),
        ("kv+ffn", 24, "73.72 M"),
    ],
)
def test_table_6(depth: Depth, layers: int, parameters: str) -> None:
    model = on_meta(replace(TABLE_6, depth=depth, layers=layers))
    assert f"{model.num_parameters() / 1e6:.2f} M" == parameters


@every_norm
def test_the_last_writes_cost_one_projection_each(norm: Norm) -> None:
    light = 2 * TABLE_3.width * TABLE_3.kv_width
    for depth, projections in (("residual", 0), ("kv", 0), ("kv+ffn", 1), ("kv+ffn+attn", 2)):
        config = replace(TABLE_3, depth=depth, norm=norm)
        with_last = on_meta(replace(config, write_last=True)).num_parameters()
        assert with_last - on_meta(config).num_parameters() == projections * light


def test_table_1() -> None:
    """What depth costs in parameters: G^2 L H^2 D^2 + 2 G L H^2 D^2 for depth attention, of which
    MoDA has the second term; L counts attention and feed-forward layers."""
    G, L, H, D = 2, 72, 8, 64
    baseline = on_meta(replace(TABLE_3, depth="residual")).num_parameters()
    everything = replace(TABLE_3, depth="kv+ffn+attn", write_last=True)
    light = 2 * G * H**2 * D**2
    assert on_meta(everything).num_parameters() - baseline == light * L
    depth_attention = on_meta(replace(TABLE_3, depth="attention")).num_parameters()
    embedding = light  # the slot of the embedding, whose query nobody needs
    assert depth_attention - baseline == (G**2 * H**2 * D**2 + light) * L + embedding


@every_norm
@every_depth
def test_flops(depth: Depth, norm: Norm) -> None:
    """As FlopCounterMode counts them; attention by summing over what each query sees."""
    model, B, T = make_model(depth=depth, norm=norm), 2, 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_like(B, T))
    visible = sum(t + 1 for t in range(T)) * CONFIG.layers + T * sum(slots_read(model))
    attention = B * CONFIG.heads * visible * (2 * CONFIG.head_dim + 2 * CONFIG.head_dim)
    counts = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counts.items() if str(op).startswith("moda.")) == attention
    assert model.flops(B, T) == counter.get_total_flops()


# Wrong sizes and options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "kv_heads = 2 must divide heads = 5"),
        ({"head_dim": 7}, "head_dim = 7 must be even for the rotary embedding"),
        ({"head_dim": 258}, "head_dim = 258 must be at most 256"),
        ({"layers": 0}, "layers = 0 must be at least 1"),
        ({"kv_heads": 0}, "kv_heads = 0 must be at least 1"),
        (
            {"depth": "ffn"},
            "depth = 'ffn' must be one of 'residual', 'attention', 'kv', 'kv+ffn', 'kv+ffn+attn'",
        ),
        ({"norm": "sandwich"}, "norm = 'sandwich' must be one of 'pre', 'post'"),
        (
            {"depth": "attention", "head_dim": 4},
            "heads * head_dim = 6 * 4 = 24 must equal width = 36 for depth = 'attention'",
        ),
    ],
)
def test_config_refuses_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole message is compared
        replace(CONFIG, **options)
    assert str(caught.value).startswith(message)


def test_tokens_are_integers() -> None:
    """The embedding would take floats for hidden states."""
    model, tokens = make_model(), torch.zeros(2, CONFIG.width)
    for name, call in (("tokens", model), ("x", PipelineStage(model, 0, 1))):
        with pytest.raises(TypeError) as caught:
            call(tokens)
        assert str(caught.value) == f"{name} must be integers, got torch.float32"
    with pytest.raises(TypeError, match=r"tokens must be integers, got torch\.float32"):
        depth_use(model, tokens)


@every_depth
@pytest.mark.parametrize("functional", [False, True])
def test_on_the_meta_device(depth: Depth, functional: bool) -> None:
    """Shapes and gradients without memory, and weights that are assigned later."""
    model, tokens = make_model(depth=depth), torch.randint(7, (2, 5))
    expected = model(tokens, DepthSlots() if functional else None)
    expected.sum().backward()
    meta = make_model(depth=depth).to("meta")
    logits = meta(tokens.to("meta"), DepthSlots() if functional else None)
    logits.sum().backward()
    assert logits.is_meta and logits.shape == expected.shape and logits.dtype == expected.dtype
    for (name, x), y in zip(meta.named_parameters(), model.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        assert x.grad is None or (x.grad.is_meta and x.grad.shape == y.shape), name
    with torch.device("meta"):
        loaded = MoDALanguageModel(model.config)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(loaded(tokens), expected)


def test_autocast_leaves_float64_alone() -> None:
    model, tokens = make_model().double(), torch.randint(7, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens), model(tokens, DepthSlots()))
        assert model(tokens).dtype == model.stream(2, 5).buffer.dtype == torch.float64
