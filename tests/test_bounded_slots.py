"""Bounded depth slots: policies, streams that drop slots, models, memory."""

import gc
import weakref
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moda_ops import DepthSlots, DepthStream
from moda_ops.nn import MoDAConfig, MoDALanguageModel, generate, measure_depth_mass
from moda_ops.policies import every, first_and_recent, kept_slots, most_mass, positions, recent
from test_stream import (
    DV,
    PATTERNS,
    D,
    H,
    T,
    allocate,
    assert_same,
    layer,
    parts,
    random_input,
    results,
    widen,
)

CONFIG = MoDAConfig(vocab_size=61, layers=6, width=24, heads=4, kv_heads=2, head_dim=6, hidden=20)
DEPTHS = ("kv", "kv+ffn", "kv+ffn+attn", "attention")
POLICIES = dict(
    recent=recent,
    first=first_and_recent(1),
    every=every(3),
    own=lambda layer, slots, budget: slots[:2] if len(slots) > 3 else slots[::2],
)
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


# Streams that drop slots: DepthStream against DepthSlots, which is a list


def write_and_drop(x, stream, keeps, writes=1):
    """A layer per entry of ``keeps``: keep these, write, attend, write again."""
    for i, keep in enumerate(keeps):
        stream = stream.keep([n for n in keep if n < stream.written])
        x, stream = layer(x, stream, i)
        for j in range(writes):
            stream = stream.write(*parts(x, 5 + 5 * j + i)[1:])
    return x


def dropped_before_a_read(x, stream):
    """Dropped, written to and dropped again before anybody reads; then keys from outside."""
    for i in range(4):
        stream = stream.write(*parts(x, i)[1:])
    stream = stream.keep([0, 2, 3]).write(*parts(x, 4)[1:]).keep([0, 2, 3])
    q, k, v = parts(x, 5)
    out, stream = stream.attend(q, k, v)
    x = x + widen(out)
    return layer(x, stream.keep([1, 2]), 6)[0]


def dropped_unread(x, stream):
    """A slot that no layer reads, all slots dropped, and a stream that is kept but not read."""
    stream = stream.write(*parts(x, 0)[1:]).keep([])
    x, stream = layer(x, stream, 1)
    stream.keep([])
    x, stream = layer(x, stream.keep([0]), 2)
    return layer(x, stream.keep([]), 3)[0]


def dropped_with_an_unread_output(x, stream):
    """The reader that drops gets no gradient of its output, only that of the slots."""
    x, stream = layer(x, stream, 0)
    stream = stream.write(*parts(x, 1)[1:]).write(*parts(x, 2)[1:])
    _, stream = stream.keep([0, 2]).attend(parts(x, 3)[0], *parts(x, 3)[1:])
    return layer(x, stream, 4)[0]


def options(x, stream):
    for i in range(4):
        stream = stream.keep(range(stream.written)[-2:]).write(*parts(x, i)[1:])
        q, *_ = parts(x, 5 + i)
        x = x + widen(stream.attend(q, softcap=1.5, window=2)[0])
        out, stream = stream.attend_depth(q, scale=0.7)
        x = x + widen(out)
    return x


DROPPING = [
    partial(write_and_drop, keeps=[(), (0,), (0, 1), (1, 2)]),
    partial(write_and_drop, keeps=[(), (0,), (0, 2), (1, 2), (0, 2)]),
    partial(write_and_drop, keeps=[range(5)] * 2 + [(0, 3)] * 2, writes=2),
    dropped_before_a_read,
    dropped_unread,
    dropped_with_an_unread_output,
    options,
]


def gradient_run(pattern, kind, x):
    return results(pattern, allocate(16) if kind is DepthStream else DepthSlots(), x)


@pytest.mark.parametrize("pattern", DROPPING)
def test_a_list_of_slots_gives_the_same(pattern):
    x = random_input()
    assert_same(gradient_run(pattern, DepthStream, x), gradient_run(pattern, DepthSlots, x))


@pytest.mark.parametrize("pattern", DROPPING)
def test_gradcheck(pattern):
    x = random_input()[:1, :2].detach().requires_grad_()

    def f(x):
        return pattern(x, DepthStream.allocate(16, 1, 2, H, D, DV, dtype=x.dtype))

    assert torch.autograd.gradcheck(f, x)


def test_dropped_slots_are_not_read():
    """Of NaN, a dropped slot changes nothing."""
    x = random_input()

    def run(poison):
        stream = allocate(8)
        for i in range(3):
            _, k, v = parts(x, i)
            stream = stream.write(k * float("nan") if poison and i == 1 else k, v)
        return layer(x, stream.keep([0, 2]))[0]

    assert torch.equal(run(poison=True), run(poison=False))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_keeping_all_changes_nothing(pattern):
    class Kept:
        """A stream whose every value is the same after ``keep`` of all of it."""

        def __init__(self, stream):
            self.stream = stream.keep(range(stream.written))
            assert self.stream is stream

        def __getattr__(self, name):
            method = getattr(self.stream, name)

            def call(*args, **kwargs):
                result = method(*args, **kwargs)
                if isinstance(result, DepthStream):
                    return Kept(result)
                return result[0], Kept(result[1])

            return call

    x = random_input()
    expected = results(pattern, allocate(8), x)
    for a, e in zip(results(pattern, Kept(allocate(8)), x), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("pattern", DROPPING[1:3])
def test_compiled_whole_and_checkpointed(pattern, use_checkpoint):
    torch._dynamo.reset()
    x = random_input()

    def f(x, stream):
        if use_checkpoint:
            return checkpoint(pattern, x, stream, use_reentrant=False)
        return pattern(x, stream)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = gradient_run(pattern, DepthSlots, x)
    assert_same(results(compiled, allocate(16), x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_compiled_blocks_share_graphs(kind):
    """However many layers: once the budget is full no block recompiles."""
    x, graphs = random_input(), []

    def run(x, stream, block, layers):
        for i in range(layers):
            stream = stream.keep(range(stream.written)[-3:])
            x, stream = block(x, stream, torch.tensor(0.1 * i))
        return x

    def block(x, stream, step):
        return layer(x + step, stream)

    for layers in (7, 14):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        stream = allocate(layers) if kind is DepthStream else DepthSlots()
        actual = results(lambda x, s, n=layers, f=compiled: run(x, s, f, n), stream, x)
        assert_same(actual, results(lambda x, s, n=layers: run(x, s, block, n), DepthSlots(), x))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 8, graphs


def test_packed_documents():
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)

    def pattern(x, stream):
        for i in range(4):
            q, k, v = parts(x, i)
            stream = stream.keep(range(stream.written)[-2:]).write(k, v)
            out, stream = stream.attend(q, cu_seqlens=(cu, cu))
            x = x + widen(out)
        return x

    x = random_input()[:1].detach().requires_grad_()
    actual = results(pattern, DepthStream.allocate(4, 1, T, H, D, DV, dtype=x.dtype), x)
    assert_same(actual, results(pattern, DepthSlots(), x))
    alone = x[:, 2:].detach().requires_grad_()
    cu = torch.tensor([0, 4], dtype=torch.int32)
    assert_same([actual[0][:, 2:]], [results(pattern, DepthSlots(), alone)[0]])


MISUSES = [
    (lambda s: s.keep(3), TypeError, "slots must be a sequence of ints, got 3"),
    (lambda s: s.keep([True]), TypeError, "slots must be a sequence of ints, got [True]"),
    (lambda s: s.keep([1, 0]), ValueError, "slots must be ascending, got [1, 0]"),
    (lambda s: s.keep([3]), ValueError, "slots must be within 0..2, got 3"),
    (lambda s: s.keep([-1]), ValueError, "slots must be within 0..2, got -1"),
]


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES)
def test_misuse(misuse, error, message, kind):
    stream = allocate(8) if kind is DepthStream else DepthSlots()
    for i in range(3):
        stream = stream.write(*parts(random_input(), i)[1:])
    with pytest.raises(error) as caught:
        misuse(stream)
    assert str(caught.value) == message


def test_a_list_without_its_newest_slot_attends_to_the_newest_that_is_left():
    x, stream = random_input(), DepthSlots()
    for i in range(3):
        stream = stream.write(*parts(x, i)[1:])
    q, shorter = parts(x, 2)[0], DepthSlots(stream.k[:2], stream.v[:2])
    assert torch.equal(stream.keep([0, 1]).attend(q)[0], shorter.attend(q)[0])


def test_errors_of_the_operators():
    x = random_input()
    stream = allocate(4).write(*parts(x, 0)[1:]).write(*parts(x, 1)[1:])
    with pytest.raises(ValueError, match="the newest slot of the depth stream has been dropped"):
        stream.keep([0]).attend(parts(x, 2)[0])
    attend, arguments = torch.ops.moda.stream_attention, (parts(x, 2)[0], None, None, *stream[:2])
    for places, message in (
        ([0], "places must have an entry for each of the token's 2 rows, got 1"),
        ([0, 4], "places must be below the buffer's 4 slots, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*arguments, None, None, places)
    with pytest.raises(ValueError, match="slot must be at least 0, got -1"):
        torch.ops.moda.stream_write(*parts(x, 2)[1:], *stream[:2], -1)
    full = allocate(3)
    for i in range(3):
        full = full.keep([]).write(*parts(x, i)[1:])
    with pytest.raises(ValueError, match="too short: all of its 3 slots are written"):
        full.write(*parts(x, 3)[1:])


# Policies


def test_kept_slots_of_every_policy():
    writes = [0, 2, 2, 2, 2]
    assert kept_slots(writes, 3) == ((), (0, 1), (1, 2, 3), (3, 4, 5), (5, 6, 7))
    assert kept_slots(writes, 3, first_and_recent(2))[-1] == (0, 1, 7)
    assert kept_slots(writes, 2, first_and_recent(5))[-1] == (0, 1)
    assert kept_slots(writes, 4, first_and_recent(0)) == kept_slots(writes, 4)
    assert kept_slots(writes, 4, every(3))[2:] == ((0, 1, 2, 3), (0, 3, 4, 5), (0, 3, 6, 7))
    assert kept_slots(writes, 2, every(2)) == ((), (0, 1), (0, 2), (2, 4), (4, 6))
    assert kept_slots([1, 2, 2], 9)[-1] == (0, 1, 2, 3, 4)
    mass = [[], [0.5, 0.1], [0.1, 0.9, 0.3, 0.0], [0.3, 0.1, 0.4, 0.1, 0.0, 0.2]]
    kept = kept_slots([0, 2, 2, 2], 2, most_mass(mass))
    assert kept == ((), (0, 1), (1, 2), (2, 5))  # 0 has most in the first layer, 1 in what is left


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1], 0), ValueError, "budget must be at least 1, got 0"),
        (([1], 1.0), TypeError, "budget must be an int, got 1.0"),
        (([-1], 1), ValueError, "writes must be at least 0, got -1"),
        (([1], 1, "recent"), TypeError, "policy must be a function"),
        (([3], 2, lambda *a: a[1]), ValueError, "at most the budget of 2 slots, kept 3 before"),
        (([3], 2, lambda *a: (2, 1)), ValueError, r"must be ascending, got \[2, 1\]"),
        (([3, 1], 2, lambda n, s, b: (2 - n,)), ValueError, r"slot 1 cannot stay: only \[2, 3\]"),
    ],
)
def test_what_policies_may_not_do(arguments, error, message):
    with pytest.raises(error, match=message):
        kept_slots(*arguments)


def test_positions():
    assert positions((0, 4, 5, 9), (4, 9)) == (1, 3)
    with pytest.raises(ValueError, match="must be ascending"):
        positions((0, 1), (1, 1))


# Models


def make_model(config: MoDAConfig) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(config).double()


def loss_and_gradients(model, stream):
    tokens = torch.randint(61, (2, 9), generator=torch.Generator())
    logits = model(tokens, stream)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss.detach(), *(torch.zeros(1) if g is None else g for g in grads)]


@every_policy
@pytest.mark.parametrize("depth", DEPTHS)
def test_both_streams_and_compiled_models_agree(depth, policy):
    config = replace(CONFIG, depth=depth).bounded(3, policy)
    model = make_model(config)
    stream = model.stream(2, 9)
    assert isinstance(stream, DepthStream)
    expected = loss_and_gradients(model, DepthSlots())
    for a, e in zip(loss_and_gradients(model, stream), expected, strict=True):
        assert (a - e).norm() <= 1e-13 * e.norm() + 1e-16


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_budget_of_all_slots_is_the_unbounded_model(depth):
    config = replace(CONFIG, depth=depth)
    bounded = config.bounded(99, first_and_recent(2))
    assert bounded.depth_reads() == config.depth_reads()
    assert set(bounded.depth_positions()) == {None}
    a, b = (loss_and_gradients(make_model(c), None) for c in (config, bounded))
    assert all(map(torch.equal, a, b))


@every_policy
def test_layers_read_the_kept_slots_and_no_others(policy):
    """By hand: the last block's output from the slots of an unbounded list, chosen by number."""
    config = CONFIG.bounded(3, policy)
    model = make_model(config)
    tokens = torch.randint(61, (1, 5), generator=torch.Generator())
    x, rotary, k, v = model.embedding(tokens), model.rotary(5), [], []
    for block, kept in zip(model.blocks, config.depth_keep, strict=True):
        assert len(kept) <= 3
        stream = DepthSlots(tuple(k[i] for i in kept), tuple(v[i] for i in kept))
        x, after = block(x, rotary, stream)
        k += after.k[len(kept) :]
        v += after.v[len(kept) :]
    expected = model.logits(x)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", DEPTHS)
def test_generation_is_that_of_the_bounded_model(depth):
    config = replace(CONFIG, depth=depth).bounded(2, every(3))
    model = make_model(config)
    (new,) = generate(model, [[1, 2, 3]], 6, prefill_chunk=2)
    text = torch.tensor([1, 2, 3])
    for token in new:
        assert token == model(text[None])[0, -1].argmax()
        text = torch.cat((text, token[None]))
    unbounded = make_model(replace(CONFIG, depth=depth))
    assert not torch.equal(unbounded(text[None]), model(text[None]))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
def test_compiled_per_block():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(replace(CONFIG, layers=8).bounded(4))
    expected = loss_and_gradients(model, DepthSlots())
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    actual = loss_and_gradients(model, None)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-13 * e.norm() + 1e-16
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 7


def test_config_is_plain_data_and_checked():
    config = CONFIG.bounded(3, most_mass([[0.1 * i for i in range(10)]] * 6))
    assert MoDAConfig(**asdict(config)) == config
    assert make_model(config).num_parameters() == make_model(CONFIG).num_parameters()
    reads = [sum(len(kept) for kept in config.depth_keep), sum(CONFIG.depth_reads())]
    flops = [make_model(c).flops(2, 9) for c in (config, CONFIG)]
    assert flops[1] - flops[0] == 4 * 2 * 9 * 24 * (reads[1] - reads[0])
    for keep, message in (
        (((),) * 5, "depth_keep must have an entry for each of the 6 blocks, got 5"),
        (((), (2,), (), (), (), ()), r"depth_keep\[1\]: slot 2 cannot stay: only \[0, 1\] are"),
        (((), (0,), (1,), (), (), ()), r"depth_keep\[2\]: slot 1 cannot stay: only \[0, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, depth_keep=keep)


@pytest.mark.parametrize("depth", DEPTHS)
def test_measured_mass_chooses_slots(depth):
    config = replace(CONFIG, depth=depth)
    model = make_model(config)
    batches = [torch.randint(61, (2, 9), generator=torch.Generator()) for _ in range(2)]
    mass = measure_depth_mass(model, batches)
    reads = config.depth_reads()
    assert [len(row) for row in mass] == (reads[1::2] if depth == "attention" else reads)
    bounded = config.bounded(2, most_mass(mass))
    assert max(map(len, bounded.depth_keep)) == 2
    with pytest.raises(ValueError, match="model must have all its depth slots"):
        measure_depth_mass(make_model(bounded), batches)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        measure_depth_mass(model, [])


# Memory


class Watch(DepthSlots):
    """Counts the slots that are alive whenever one is written."""

    alive = ()
    most = 0

    def write(self, k, v):
        Watch.alive = *(ref for ref in Watch.alive if ref() is not None), weakref.ref(k)
        Watch.most = max(Watch.most, len(Watch.alive))
        return Watch(*super().write(k, v))

    def keep(self, slots):
        return Watch(*super().keep(slots))


@pytest.mark.parametrize("layers", [12, 48])
@pytest.mark.parametrize("depth", DEPTHS)
def test_without_gradients_no_more_slots_live_than_the_budget(depth, layers):
    config = replace(CONFIG, depth=depth, layers=layers).bounded(3, every(5))
    model = make_model(config)
    gc.collect()
    Watch.alive, Watch.most = (), 0
    with torch.no_grad():
        assert isinstance(model.stream(1, 4), DepthSlots)
        model(torch.zeros(1, 4, dtype=torch.long), Watch())
    assert Watch.most <= 3 + 2  # and those of the block at hand


def saved_bytes(kind, layers, keep, width=(1, 16, 2, 8)):
    """Bytes of the distinct storages that autograd holds after a forward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(width, requires_grad=True)
    batch, tokens, heads, dim = width
    stream = (
        DepthStream.allocate(2 * layers, batch, tokens, heads, dim)
        if kind is DepthStream
        else DepthSlots()
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(layers):
            stream = stream.keep(keep(stream.written))
            x, stream = stream.write(torch.sin(x), torch.cos(x)).attend(torch.tanh(x))
            stream = stream.write(x * 2, x * 3)  # multiplication saves nothing
    return sum(storage.nbytes() for storage in storages.values())


def newest(written, budget=4):
    return range(written)[-budget:]


def none_of_the_extra(written):
    return [i for i in range(written) if i != written - 1][-4:]


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_saved_memory_is_linear_at_48_layers(kind):
    small, middle, large = (saved_bytes(kind, n, newest) for n in (16, 32, 48))
    assert large - middle == middle - small
    assert large <= saved_bytes(kind, 48, range)


def test_a_list_saves_only_slots_that_some_layer_read():
    """The second slot of each layer, dropped before anybody reads it: 2 tensors less a layer."""
    tensor = 16 * 2 * 8 * 4
    read, unread = (saved_bytes(DepthSlots, 48, keep) for keep in (newest, none_of_the_extra))
    assert read - unread == (48 - 1) * 2 * tensor


class Gradients(torch.utils._python_dispatch.TorchDispatchMode):
    """The most slots in a gradient that a backward operator returns, and what all write."""

    def __init__(self):
        super().__init__()
        self.most = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.moda.stream_attention_backward:
            self.most = max(self.most, len(result[2]))
            self.elements += result[2].numel()
        return result


def test_gradients_that_are_alive_and_written_do_not_grow_with_depth():
    model = make_model(replace(CONFIG, layers=48).bounded(4))
    tokens = torch.zeros(1, 4, dtype=torch.long)
    loss = model(tokens).square().sum()
    with Gradients() as gradients:
        loss.backward()
    assert gradients.most <= 4 + 2 + 1  # kept, dropped by this reader, and its own keys
    slot = 1 * 4 * 2 * 12
    assert gradients.elements <= 48 * 7 * slot
