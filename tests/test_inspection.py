"""What a watched stream shows, and what is read off it."""

import matplotlib.colors
import pytest
import torch
from torch.nn import functional as F

from moda_ops import DepthSlots, DepthStream
from moda_ops.nn import (
    DepthUse,
    MoDAConfig,
    MoDALanguageModel,
    WatchedStream,
    attention_map,
    depth_use,
    measure_depth_mass,
    plot_attention,
)
from moda_ops.policies import every

CONFIG = MoDAConfig(vocab_size=61, layers=4, width=24, heads=4, kv_heads=2, head_dim=6, hidden=20)
DEPTHS = ("residual", "kv", "kv+ffn", "kv+ffn+attn", "attention")
every_depth = pytest.mark.parametrize("depth", DEPTHS)


def make_model(bound=None, **options):
    torch.manual_seed(0)
    config = MoDAConfig(**vars(CONFIG) | options)
    return MoDALanguageModel(config if bound is None else config.bounded(*bound)).double()


def make_tokens(batch=2, length=9):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def readings_of(model, tokens, stream):
    readings = []
    logits = model(tokens, WatchedStream(stream, readings.append))
    return logits, readings


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
@pytest.mark.parametrize("bound", [None, (3, every(4))], ids=["all", "bounded"])
@every_depth
def test_watching_changes_nothing(depth, bound, kind):
    """Logits and gradients are those of the stream that does the work."""
    if depth == "residual":
        bound = None
    model, tokens = make_model(bound, depth=depth), make_tokens()
    results = []
    for watch in (False, True):
        stream = model.stream(2, 9) if kind is DepthStream else DepthSlots()
        stream = WatchedStream(stream, DepthUse.of) if watch else stream
        logits = model(tokens, stream)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([logits, *(g for g in grads if g is not None)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm() + 1e-16


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
@pytest.mark.parametrize("bound", [None, (3, every(4))], ids=["all", "bounded"])
@every_depth
def test_readings_are_what_the_layers_computed(depth, bound, kind):
    """Probabilities sum to 1, and the slots are those of the config."""
    if depth == "residual":
        bound = None
    model, tokens = make_model(bound, depth=depth), make_tokens()
    stream = model.stream(2, 9) if kind is DepthStream else DepthSlots()
    _, readings = readings_of(model, tokens, stream)
    calls = 3 if depth == "attention" else 1
    assert [r.layer for r in readings] == list(range(4 * calls))
    deep = [r for r in readings if r.k is None] if depth == "attention" else readings
    assert [len(r.slots) for r in deep] == model.config.depth_reads()
    if bound and depth != "attention":
        assert tuple(r.slots for r in deep) == model.config.depth_keep
    if bound is None:
        assert all(r.slots == tuple(range(len(r.slots))) for r in deep)
    for reading in readings:
        assert len(reading.k_depth) == len(reading.slots)
        assert not reading.q.requires_grad and not reading.lse.requires_grad
        use = DepthUse.of(reading, sink_keys=9)
        total = use.mass.sum(-1) + (0 if use.sink is None else use.sink)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)


@every_depth
def test_use_is_the_mean_of_the_map(depth):
    model, tokens = make_model(depth=depth), make_tokens()
    for layer, use in enumerate(depth_use(model, tokens, sink_keys=2)):
        p = attention_map(model, tokens, layer)
        assert p.slots == use.slots
        torch.testing.assert_close(p.depth.mean(2), use.mass, rtol=1e-12, atol=1e-15)
        if use.sink is None:
            assert p.sequence.shape[-1] == 0
        else:
            sink = p.sequence[..., :2].sum(-1).mean(-1)
            torch.testing.assert_close(sink, use.sink, rtol=1e-12, atol=1e-15)
            hidden = torch.ones(9, 9).triu(1).bool()
            assert not p.sequence[..., hidden].any()


def test_measured_mass_is_the_mean_over_batches():
    model, batches = make_model(), [make_tokens(), make_tokens(3, 5)]
    mass = measure_depth_mass(model, iter(batches))
    for layer, row in enumerate(mass):
        means = [depth_use(model, tokens)[layer].mass.mean((0, 1)) for tokens in batches]
        torch.testing.assert_close(torch.tensor(row).double(), (means[0] + means[1]) / 2)


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_options_of_a_layer_reach_the_figures(kind):
    q, k, v = torch.randn(3, 1, 7, 2, 8)
    readings = []
    empty = DepthSlots() if kind is DepthSlots else DepthStream.allocate(2, 1, 7, 2, 8)
    stream = WatchedStream(empty, readings.append).write(k.sin(), v)
    options = dict(softcap=1.5, scale=0.7, window=(3, 2), causal=False)
    stream.attend(q, k, v, **options, plan="fused")
    use = DepthUse.of(readings[0], sink_keys=7)
    torch.testing.assert_close(use.mass.sum(-1) + use.sink, torch.ones(1, 2))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    stream.attend(q, k, v, cu_seqlens=(cu, cu))
    use = DepthUse.of(readings[1], sink_keys=7)
    torch.testing.assert_close(use.mass.sum(-1) + use.sink, torch.ones(1, 2))


def test_watched_in_a_compiled_model():
    torch._dynamo.reset()
    model, tokens = make_model(), make_tokens()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tokens):
        uses = []
        stream = WatchedStream(model.stream(2, 9), lambda r: uses.append(DepthUse.of(r)))
        return model(tokens, stream), [use.mass for use in uses], [use.sink for use in uses]

    logits, masses, sinks = step(tokens)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-12, atol=1e-12)
    for mass, sink, use in zip(masses, sinks, depth_use(model, tokens), strict=True):
        assert not mass.requires_grad and not sink.requires_grad
        torch.testing.assert_close(mass, use.mass, rtol=1e-12, atol=0)
        torch.testing.assert_close(sink, use.sink, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("depth", "layer", "columns"), [("kv+ffn", 3, 9 + 6), ("attention", 4, 4)])
def test_heat_map(depth, layer, columns):
    """What is drawn is the map: hidden keys white, the boundary where the slots begin."""
    model, tokens = make_model(depth=depth), make_tokens(1)
    figure = plot_attention(model, tokens, layer, head=1)
    axes, bar = figure.axes
    drawn = torch.from_numpy(axes.images[0].get_array().filled(0.0))
    p = attention_map(model, tokens, layer)
    assert drawn.shape == (9, columns)
    torch.testing.assert_close(drawn, torch.cat([p.sequence, p.depth], -1)[0, 1])
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names[-1] == f"d{p.slots[-1]}"
    lines = [line.get_xdata()[0] for line in axes.lines]
    assert lines == ([8.5] if depth == "kv+ffn" else [])
    assert "query" in axes.get_ylabel() and "probability" in bar.get_ylabel()
    assert isinstance(axes.images[0].norm, matplotlib.colors.LogNorm)
    labelled = plot_attention(model, tokens, layer, 1, labels=list("abcdefghi")).axes[0]
    assert [text.get_text() for text in labelled.get_yticklabels()] == list("abcdefghi")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=make_tokens()), r"tokens must be one text, \(1, T\), got shape \(2, 9\)"),
        (dict(layer=4), "layer must be below the model's 4 attention calls, got 4"),
        (dict(layer=-1), "layer must be at least 0, got -1"),
        (dict(head=4), "head must be below the model's 4 query heads, got 4"),
        (dict(labels=["a"]), "labels must be one for each of the 9 tokens, got 1"),
    ],
)
def test_errors(changes, message):
    right = dict(model=make_model(), tokens=make_tokens(1), layer=1, head=0)
    with pytest.raises(ValueError, match=message):
        plot_attention(**right | changes)
