"""The language models: what they compute, what they write to the depth stream, and their sizes."""

import io
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moda_ops.nn import (
    Depth,
    DepthAttention,
    MoDAAttention,
    MoDAConfig,
    MoDALanguageModel,
    Norm,
    Slot,
    layers,
    rotary_angles,
    rotate,
)

CONFIG = MoDAConfig(vocab_size=61, layers=3, width=36, heads=6, kv_heads=2, head_dim=6, hidden=50)
every_depth = pytest.mark.parametrize("depth", get_args(Depth))
every_norm = pytest.mark.parametrize("norm", get_args(Norm))


def make_model(**options: Any) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(replace(CONFIG, **options))


def on_meta(config: MoDAConfig) -> MoDALanguageModel:
    with torch.device("meta"):
        return MoDALanguageModel(config)


@pytest.fixture
def model() -> MoDALanguageModel:
    return make_model()


def tokens_like(batch: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator())


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(loss: Tensor, model: MoDALanguageModel) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


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
            module.register_forward_pre_hook(lambda _, x: reads.append(len(x[2]) + depth_alone))
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


@pytest.mark.parametrize(
    ("depth", "per_block"), [("residual", 0), ("kv", 1), ("kv+ffn", 2), ("kv+ffn+attn", 2)]
)
def test_the_last_block_writes_only_if_told_to(depth: Depth, per_block: int) -> None:
    for write_last in (False, True):
        model, stream = make_model(depth=depth, write_last=write_last), []
        x, rotary = torch.randn(1, 5, CONFIG.width), model.rotary(5)
        for block in model.blocks:
            x, stream = block(x, rotary, stream)
        assert len(stream) == per_block * (CONFIG.layers - 1 + write_last)
        assert {tuple(part.shape) for slot in stream for part in slot} <= {(1, 5, 2, 6)}


@every_depth
def test_blocks_do_not_change_the_stream_they_are_given(depth: Depth) -> None:
    model, stream = make_model(depth=depth), list[Slot]()
    model.blocks[0](torch.randn(1, 5, CONFIG.width), model.rotary(5), stream)
    assert stream == []


@every_norm
@pytest.mark.parametrize("depth", ["kv", "kv+ffn", "kv+ffn+attn"])
def test_what_a_block_writes(depth: Depth, norm: Norm) -> None:
    """Attention its own key and value or a projection of its input, feed-forward a projection."""
    block, rotary = make_model(depth=depth, norm=norm).blocks[0], make_model().rotary(5)
    inputs: dict[str, Tensor] = {}
    for name in ("attention", "feed_forward"):
        getattr(block, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    _, stream = block(torch.randn(1, 5, CONFIG.width), rotary, [])
    own = block.attention.project(inputs["attention"], rotary)[1:]
    if depth == "kv+ffn+attn":
        own = block.attention_write(inputs["attention"], rotary)
    expected = [own]
    if depth != "kv":
        expected.append(block.feed_forward_write(inputs["feed_forward"], rotary))
    for slot, (k, v) in zip(stream, expected, strict=True):
        assert torch.equal(slot[0], k) and torch.equal(slot[1], v)


@every_depth
@pytest.mark.parametrize("position", [1, 1000])
def test_depth_scores_do_not_depend_on_the_position(position: int, depth: Depth) -> None:
    """One token, so only depth is read: its position must not matter, in any block."""
    model, x = make_model(depth=depth), torch.randn(3, 1, CONFIG.width)

    def last_output(at: int) -> Tensor:
        y, stream = x, list[Slot]()
        rotary = rotary_angles(torch.tensor([at]), CONFIG.head_dim, CONFIG.rope_base)
        for block in model.blocks:
            y, stream = block(y, rotary, stream)
        return y

    torch.testing.assert_close(last_output(position), last_output(0))


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
        q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], causal: bool
    ) -> Tensor:
        assert k_depth == v_depth == []
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    model, tokens = make_model(depth="residual", norm=norm).double(), tokens_like(2, 19)
    logits = model(tokens)
    monkeypatch.setattr(layers, "moda_attention", sdpa)
    expected = model(tokens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        gradients(loss_of(logits, tokens), model), gradients(loss_of(expected, tokens), model)
    )


def dense_model(p: dict[str, Tensor], tokens: Tensor, config: MoDAConfig) -> Tensor:
    """Table 3's rows from the weights alone: one softmax over a dense row of all scores, rotation
    by complex numbers, heads spelled out."""
    T, D = tokens.shape[1], config.head_dim
    pre, reads_kv = config.norm == "pre", config.depth != "residual"
    angles = rotary_angles(torch.arange(T), D, config.rope_base)  # float32, so the model's own
    turn = torch.complex(*angles).squeeze(1).cdouble()

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def norm(x: Tensor, name: str) -> Tensor:
        return unit(x) * p[f"{name}.weight"]

    def heads(x: Tensor, name: str) -> Tensor:  # [B, HQ, T, D]
        y = (x @ p[f"{name}.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2)
        return y.repeat_interleave(config.heads // y.shape[1], 1)

    def rotated(x: Tensor, name: str) -> Tensor:
        y = heads(x, f"{name}_proj")
        if config.qk_norm:
            y = unit(y) * p.get(f"{name}_norm.weight", 1.0)
        y = torch.complex(*y.chunk(2, -1)) * turn
        return torch.cat((y.real, y.imag), -1)

    x, keys, values = p["embedding.weight"][tokens], list[Tensor](), list[Tensor]()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(config.layers):
        block, last = f"blocks.{i}", i + 1 == config.layers
        h = norm(x, f"{block}.attention_norm") if pre else x
        q, k = (rotated(h, f"{block}.attention.{name}") for name in "qk")
        v = heads(h, f"{block}.attention.v_proj")
        sequence = (q @ k.mT).masked_fill(future, float("-inf"))
        depth = [torch.einsum("bhtd,bhtd->bht", q, key)[..., None] for key in keys]
        weights = (torch.cat((sequence, *depth), -1) / D**0.5).softmax(-1)
        out = weights[..., :T] @ v
        for slot, value in enumerate(values, T):
            out = out + weights[..., slot, None] * value
        if config.depth.endswith("attn") and not last:
            k = rotated(h, f"{block}.attention_write.k")
            v = heads(h, f"{block}.attention_write.v_proj")
        if reads_kv:
            keys.append(k)
            values.append(v)
        x = x + out.transpose(1, 2).flatten(2) @ p[f"{block}.attention.out_proj.weight"].T
        x = x if pre else norm(x, f"{block}.attention_norm")

        h = norm(x, f"{block}.feed_forward_norm") if pre else x
        if "ffn" in config.depth and not last:
            keys.append(rotated(h, f"{block}.feed_forward_write.k"))
            values.append(heads(h, f"{block}.feed_forward_write.v_proj"))
        gate, up, down = (
            p[f"{block}.feed_forward.{name}_proj.weight"] for name in ("gate", "up", "out")
        )
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
        x = x if pre else norm(x, f"{block}.feed_forward_norm")
    return (norm(x, "norm") if pre else x) @ p["embedding.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
@every_norm
@pytest.mark.parametrize("depth", ["residual", "kv", "kv+ffn", "kv+ffn+attn"])
def test_table_3_rows_against_a_dense_computation(depth: Depth, norm: Norm, qk_norm: bool) -> None:
    model = make_model(depth=depth, norm=norm, qk_norm=qk_norm).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # gains other than 1
    tokens = tokens_like(2, 13)
    logits = model(tokens)
    expected = dense_model(dict(model.named_parameters()), tokens, model.config)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        gradients(loss_of(logits, tokens), model), gradients(loss_of(expected, tokens), model)
    )


@every_norm
def test_depth_attention_against_a_dense_computation(norm: Norm) -> None:
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
                (lambda x, f=f: f(x, rotary, [])[0]) if name == "attention" else f
            )
            y = call(norm_of(x)) if norm == "pre" else norm_of(call(x))
            slots.append((heads(y, depth.write.k_proj), heads(y, depth.write.v_proj)))
            x = read(heads(y, depth.q_proj))
    expected = model.norm(x) @ model.embedding.weight.T
    logits = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)  # rotations are float32
    actual_grads = gradients(loss_of(logits, tokens), model)
    expected_grads = gradients(loss_of(expected, tokens), model)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-5, atol=1e-6)


def test_compiles_as_one_graph_and_trains_as_in_eager(model: MoDALanguageModel) -> None:
    tokens = tokens_like(2, 19)
    eager = loss_of(model(tokens), tokens)
    compiled = torch.compile(lambda: loss_of(model(tokens), tokens), fullgraph=True)()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, model), gradients(eager, model))


@pytest.mark.parametrize("depth", ["kv+ffn+attn", "attention"])
def test_traces_as_one_graph(depth: Depth) -> None:
    model = make_model(depth=depth, norm="pre", qk_norm=True, bias=True)
    tokens = tokens_like(2, 11)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens)
    expected = model(tokens)
    torch.testing.assert_close(traced, expected)
    torch.testing.assert_close(
        gradients(loss_of(traced, tokens), model), gradients(loss_of(expected, tokens), model)
    )


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
    """Matrix products as PyTorch counts them; attention by summing over what each query sees."""
    model, B, T = make_model(depth=depth, norm=norm), 2, 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens_like(B, T))
    assert not any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
    visible = sum(t + 1 for t in range(T)) * CONFIG.layers + T * sum(slots_read(model))
    attention = B * CONFIG.heads * visible * (2 * CONFIG.head_dim + 2 * CONFIG.head_dim)
    assert model.flops(B, T) == counter.get_total_flops() + attention


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
