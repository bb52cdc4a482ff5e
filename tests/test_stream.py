"""DepthStream: the values and gradients of a list of slots, however layers use it."""

import io

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from moda_ops import DepthSlots, DepthStream
from moda_ops.stream import guard
from moda_ops.stream import operators as stream_ops

B, T, HQ, H, D, DV = 2, 6, 4, 2, 8, 4
WEIGHTS = torch.randn(16, 3, 1, 1, 1, D, generator=torch.Generator().manual_seed(0))


def allocate(slots, **options):
    options = dict(dtype=torch.float64) | options
    return DepthStream.allocate(slots, B, T, H, D, DV, **options)


def parts(x, i):
    """Some q, k and v of x (B, T, HQ, D), different for every i."""
    q, k, v = (x * WEIGHTS[i].to(x)).sin()
    return q, k[:, :, :H], v[:, :, :H, :DV]


def widen(out):
    """(B, T, HQ, DV) -> (B, T, HQ, D)."""
    return torch.cat([out, -out], -1)


def layer(x, stream, i=0):
    q, k, v = parts(x, i)
    out, stream = stream.write(k, v).attend(q)
    return x + widen(out), stream


def model(x, stream, layers=4, block=layer):
    for i in range(layers):
        x, stream = block(x, stream, i)
    return x


def extra_writes(x, stream):
    """Two slots between two readers, as a feed-forward projection writes them."""
    for i in range(3):
        x, stream = layer(x, stream, i)
        stream = stream.write(*parts(x, 10 + i)[1:])
    return x


def keys_outside(x, stream):
    """A sequence that is no slot, and slots that were never a sequence."""
    for i in range(3):
        q, k, v = parts(x, i)
        out, stream = stream.attend(q, torch.cat([k, k], 1), torch.cat([v, v], 1), causal=i > 0)
        x = x + widen(out)
        stream = stream.write(*parts(x, 10 + i)[1:])
    return x


def depth_alone(x, stream):
    for i in range(3):
        q, k, v = parts(x, i)
        out, stream = stream.write(k, v).attend(q, k[:, :0], v[:, :0])
        x = widen(out)
    return x


def apart(x, stream):
    """Sequence and depth each under its own softmax."""
    for i in range(3):
        q, k, v = parts(x, i)
        near, stream = stream.attend_sequence(q, k, v, window=3)
        deep, stream = stream.write(k, v).attend_depth(q, scale=0.7, softcap=2.0)
        x = widen(near) + widen(deep)
    return x


def two_readers(x, stream):
    """Readers that do not pass the stream on to each other."""
    x, stream = layer(x, stream)
    left, _ = stream.attend(parts(x, 1)[0])
    right, other = stream.attend(parts(x, 2)[0], softcap=2.0)
    third, _ = stream.attend(parts(x, 3)[0])
    last, _ = other.write(*parts(x, 4)[1:]).attend(parts(x, 5)[0])
    return left * right + third * last


def unread_layers(x, stream):
    """Losses from layers in the middle, a dropped output, and slots after the last reader."""
    middle, stream = layer(x, stream, 0)
    _, stream = layer(middle, stream, 1)
    x, stream = layer(middle, stream, 2)
    stream.write(*parts(x, 3)[1:])
    return torch.cat([x, middle])


def options(x, stream):
    x, stream = layer(x, stream)
    q, k, v = parts(x, 1)
    stream = stream.write(k, v)
    return stream.attend(q, causal=False, scale=0.3, window=(2, 1), softcap=1.5)[0]


PATTERNS = [
    model,
    extra_writes,
    keys_outside,
    depth_alone,
    apart,
    two_readers,
    unread_layers,
    options,
]


def results(pattern, stream, x):
    out = pattern(x, stream)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, x, cotangent)]


def random_input(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, HQ, D, dtype=dtype, generator=generator).requires_grad_()


def assert_same(actual, expected):
    """Equal up to a few roundings of float64: sums over readers come in another order."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-14 * e.norm()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_list_of_slots_gives_the_same(pattern):
    x = random_input()
    assert_same(results(pattern, allocate(8), x), results(pattern, DepthSlots(), x))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern):
    """Of a stream; a list of slots has the same gradients, by the test above."""
    x = random_input()[:1, :3].detach().requires_grad_()

    def f(x):
        return pattern(x, DepthStream.allocate(8, 1, 3, H, D, DV, dtype=x.dtype))

    assert torch.autograd.gradcheck(f, x)


def test_opcheck(device, monkeypatch):
    """With slots written beforehand, so that the hidden write changes nothing, and with zeros for
    tokens, whose values mean nothing: opcheck compares them."""

    def zeros(token, slots):
        return token.new_empty_strided((slots, *token.shape[1:]), (0,) * 5).fill_(0)

    monkeypatch.setattr(stream_ops, "_new_token", zeros)
    for check in ("claim", "check_written"):  # opcheck copies what it gets
        monkeypatch.setattr(stream_ops, check, lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    buffer = randn(4, B, T, H, D + DV)
    q, k, v = randn(B, T, HQ, D), *buffer[2].split([D, DV], -1)
    moda = torch.ops.moda
    torch.library.opcheck(moda.stream_buffer.default, (torch.empty(0, device=device), (0, 3)))
    for grad in (False, True):
        leaves = [x.clone().requires_grad_(grad) for x in (q, k, v)]
        token = zeros(buffer, 2).requires_grad_(grad)
        torch.library.opcheck(moda.stream_write.default, (*leaves[1:], buffer, token))
        for places in (None, (3, -1)):
            torch.library.opcheck(moda.stream_read.default, (buffer, token, places))
        for keys in (leaves[1:], (None, None)):
            args = (leaves[0], *keys, buffer, token)
            torch.library.opcheck(moda.stream_attention.default, args, dict(softcap=2.0))
    out, lse, _ = moda.stream_attention(q, None, None, buffer, token.detach())
    dtoken = randn(2, *buffer.shape[1:])
    for optional in ((None, None, q, k, v), (torch.randn_like(lse), dtoken, q, None, None)):
        args = (torch.randn_like(out), *optional, buffer, out, lse, 2, torch.float32)
        torch.library.opcheck(moda.stream_attention_backward.default, args)


def test_read_goes_on_in_another_stream():
    """A copy, whose gradient is that of the slots."""
    q = random_input(torch.float64).detach()
    results = []
    for split in (False, True):
        q, k, v = (x.detach().requires_grad_() for x in (q, q[:, :, :H], q[:, :, :H, :DV]))
        stream = allocate(3, dtype=torch.float64).write(k, v).write(k.sin(), v.cos())
        if split:
            slots = stream.read()
            assert slots.data_ptr() != stream.buffer.data_ptr()
            stream = allocate(2, dtype=torch.float64)
            for slot in slots:
                stream = stream.write(*slot.split([D, DV], -1))
        out, _ = stream.attend(q)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_first_call_may_be_compiled(backend):
    torch._dynamo.reset()
    x = random_input(torch.float32)

    @torch.compile(fullgraph=True, backend=backend)
    def run(x):
        return model(x, allocate(2, dtype=x.dtype), layers=2)

    actual = torch.autograd.grad(run(x).square().sum(), x)[0]
    x64 = x.detach().double().requires_grad_()
    exact, plain = (
        torch.autograd.grad(model(y, DepthSlots(), layers=2).square().sum(), y)[0] for y in (x64, x)
    )
    floor = torch.finfo(x.dtype).eps * exact.norm()
    assert (actual - exact).norm() <= 2 * (plain - exact).norm() + floor


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
def test_compiled_blocks_share_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = 9
    x = random_input()
    block = torch.compile(layer_of_step, fullgraph=True, backend="aot_eager")

    def run(x, stream):
        for i in range(layers):
            x, stream = block(x, stream, torch.tensor(0.1 * i))
        return x

    def eagerly(x, stream):
        for i in range(layers):
            x, stream = layer_of_step(x, stream, torch.tensor(0.1 * i))
        return x

    assert_same(results(run, allocate(layers), x), results(eagerly, DepthSlots(), x))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3  # for no slot and one slot, sizes that PyTorch specializes on, and for more


def layer_of_step(x, stream, step):
    return layer(x + step, stream)


def test_two_streams_in_one_graph_stay_two():
    """The same first slot twice, then different ones: equal calls must not be merged."""
    torch._dynamo.reset()
    x = random_input()

    def twice(x, stream):
        first, stream = layer(x, stream)
        other, others = layer(x, allocate(4))
        left, _ = layer(first, stream, 1)
        right, last = layer(2 * other, others, 1)
        return torch.cat([left, right]) + last.keys()[1].sum()

    @torch.compile(fullgraph=True, backend="inductor")
    def compiled(x):
        return twice(x, allocate(4))

    actual = results(lambda x, _: compiled(x), None, x)
    for a, e in zip(actual, results(twice, allocate(4), x), strict=True):
        assert (a - e).norm() <= 1e-12 * e.norm()


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_checkpointed_blocks_give_the_same_and_save_less(compiler):
    torch._dynamo.reset()
    x = random_input()

    def block(x, stream, i):
        return checkpoint(layer, x, stream, i, use_reentrant=False)

    def run(x, stream):
        return model(x, stream, block=block)

    def plain(x, stream):
        return model(x, stream)

    if compiler:
        run, plain = (torch.compile(f, fullgraph=True, backend=compiler) for f in (run, plain))
    assert_same(results(run, allocate(4), x), results(plain, allocate(4), x))
    assert saved_bytes(lambda: run(x, allocate(4))) < 0.7 * saved_bytes(
        lambda: plain(x, allocate(4))
    )


def saved_bytes(f):
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        f()
    return sum(storage.nbytes() for storage in storages.values())


def test_backward_may_run_again():
    x = random_input()
    out = model(x, allocate(4)).square().sum()
    once = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x)[0], once)


def test_micro_batches_and_models_interleave():
    x, y = random_input(), random_input().detach().neg().requires_grad_()
    expected = results(model, allocate(4), x), results(model, allocate(4), y)
    outs = [x + 0, y + 0]
    streams = [allocate(4), allocate(4)]
    for i in range(4):
        for j in range(2):
            outs[j], streams[j] = layer(outs[j], streams[j], i)
    for j, leaf in enumerate((x, y)):
        cotangent = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf)
        actual = [outs[j].detach(), *torch.autograd.grad(outs[j], leaf, cotangent)]
        assert all(map(torch.equal, actual, expected[j]))


def test_a_failed_step_leaves_nothing_behind():
    x = random_input()
    expected = results(model, allocate(4), x)

    def fails(x, stream, i):
        if i == 2:
            raise ArithmeticError
        return layer(x, stream, i)

    with pytest.raises(ArithmeticError):
        model(x, allocate(4), block=fails)
    out = model(x, allocate(4))
    out.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    assert all(map(torch.equal, results(model, allocate(4), x), expected))


def test_streams_without_tokens():
    """Empty buffers have no address of their own."""
    x = random_input()[:, :0].detach().requires_grad_()
    for _ in range(2):
        stream = DepthStream.allocate(4, B, 0, H, D, DV, dtype=x.dtype)
        out, grad = results(model, stream, x)
        assert out.shape == grad.shape == x.shape


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode):
    x = random_input()
    expected = model(x, allocate(4)).detach()
    with mode():
        out = model(x, allocate(4))
    assert torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_decides_the_dtype(inside):
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        stream = DepthStream.allocate(2, B, T, H, D)
    expected = torch.bfloat16 if inside else torch.float32
    assert stream.buffer.dtype is stream.token.dtype is expected


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_allocated_like_a_tensor(dtype, inside):
    """As the pages advise: what a layer's keys are, under autocast and without."""
    x, layer = torch.zeros(B, T, H * D, dtype=dtype), torch.nn.Linear(H * D, H * D, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        stream = DepthStream.allocate(2, B, T, H, D, like=x)
        k = layer(x).view(B, T, H, D)
        stream.write(k, k).attend(k)
    assert stream.buffer.dtype is k.dtype
    other = DepthStream.allocate(2, B, T, H, D, like=x, dtype=torch.float32, device="meta")
    assert other.buffer.dtype is torch.float32 and other.buffer.is_meta


# A part of the model without gradients


def mixed(x, stream, without, mode=torch.no_grad, block=layer):
    """Blocks of which one runs without gradients; its output is an input like others."""
    for i in range(4):
        if i == without:
            with mode():
                y, stream = block(x, stream, i)
            x = x + y.clone()
        else:
            x, stream = block(x, stream, i)
    return x


def bounded_layer(x, stream, i):
    return layer(x, stream.keep(range(stream.written)[-2:]), i)


def depth_alone_layer(x, stream, i):
    q, k, v = parts(x, i)
    near, stream = stream.attend_sequence(q, k, v)
    deep, stream = stream.write(k, v).attend_depth(q)
    return x + widen(near) + widen(deep), stream


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("block", [layer, bounded_layer, depth_alone_layer])
@pytest.mark.parametrize("without", range(4))
def test_a_block_without_gradients_leaves_those_of_others(without, block, mode):
    x = random_input()
    expected = results(lambda x, stream: mixed(x, stream, without, block=block), DepthSlots(), x)
    actual = results(lambda x, stream: mixed(x, stream, without, mode, block), allocate(4), x)
    assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_block_without_gradients_leaves_those_of_others(whole):
    torch._dynamo.reset()
    x = random_input()
    block = layer if whole else torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(x, stream):
        return mixed(x, stream, 2, block=block)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager") if whole else run
    expected = results(lambda x, stream: mixed(x, stream, 2), DepthSlots(), x)
    assert_same(results(compiled, allocate(4), x), expected)


def test_frozen_layers_leave_the_gradients_of_others():
    """Keys that need none, between slots that do."""
    x = random_input()

    def run(x, stream):
        for i in range(4):
            q, k, v = parts(x, i)
            k, v = (k.detach(), v.detach()) if i == 2 else (k, v)
            out, stream = stream.write(k, v).attend(q)
            x = x + widen(out)
        return x

    assert_same(results(run, allocate(4), x), results(run, DepthSlots(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_gradients_of_16_bit_slots(dtype):
    """One rounding at a slot's end, not one per reader."""
    errors = {}
    for grad_dtype in (dtype, torch.float32):
        x = random_input().detach().to(dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        actual, expected = (
            torch.autograd.grad(many_readers(y, stream), y)[0]
            for y, stream in (
                (x, allocate(1, dtype=dtype, grad_dtype=grad_dtype)),
                (exact, allocate(1)),
            )
        )
        errors[grad_dtype] = ((actual - expected).norm() / expected.norm()).item()
    assert errors[torch.float32] < 0.5 * errors[dtype]


def many_readers(x, stream):
    """64 readers of one slot, all with the same query."""
    stream = stream.write(x[:, :, :H], x[:, :, :H, :DV])
    loss = 0
    q = x.detach()
    for _ in range(64):
        out, stream = stream.attend(q)
        loss = loss + out.double().square().sum()
    return loss


def test_nothing_is_kept_for_a_stream_that_is_gone():
    allocate(1)  # forgets the ones that are gone
    before = len(guard._records)
    for _ in range(3):
        model(random_input(), allocate(4))
    allocate(1)
    assert len(guard._records) <= before


def test_no_version_of_the_buffer_is_spent():
    stream = allocate(2)
    version = stream.buffer._version
    layer(random_input(), stream)
    assert stream.buffer._version == version


def test_compiled_reads_wait_for_writes():
    """A compiler sees neither the writes nor, without an operator, that a read comes after them."""
    torch._dynamo.reset()
    x = random_input()

    def run(x, stream):
        for i in range(3):
            _, k, v = parts(x, i)
            stream = stream.write(k, v)
        whole = stream.read() + 0
        q, k, v = parts(x, 3)
        _, stream = stream.keep((0, 2)).attend(q, k, v)
        kept = stream.write(k, v)
        return [whole, *(kept.keys()[i] + 0 for i in range(3)), kept.read()]

    stream = allocate(4)
    stream.buffer.fill_(7.0)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(x, stream)
    expected = run(x, allocate(4))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-14, atol=0)


def test_keys_copy_nothing_in_eager_mode():
    stream = model_of(2)
    first, second = (key.untyped_storage().data_ptr() for key in stream.keys())  # noqa: SIM118
    assert first == second == stream.buffer.untyped_storage().data_ptr()
    assert all(map(torch.equal, stream.keys(), [slot[..., :D] for slot in stream.read()]))


def model_of(slots):
    stream = allocate(slots)
    for i in range(slots):
        stream = stream.write(*parts(random_input().detach(), i)[1:])
    return stream


def test_keys_under_a_transform():
    def loss(x):
        stream = allocate(1).write(x[:, :, :H], x[:, :, :H, :DV])
        return (stream.keys()[0] * x[:, :, :H]).sum()  # the keys have no gradient

    x = random_input().detach()
    expected = torch.cat([x[:, :, :H], torch.zeros_like(x[:, :, :H])], 2)
    assert torch.equal(torch.func.grad(loss)(x), expected)


def test_read_of_kept_slots_has_gradients():
    x = random_input()

    def run(x, stream):
        x, stream = layer(x, stream)
        x, stream = layer(x, stream, 1)
        return stream.write(*parts(x, 2)[1:]).keep((0, 2)).read()

    def by_hand(x, stream):
        x, stream = layer(x, stream)
        x, stream = layer(x, stream, 1)
        k, v = stream.write(*parts(x, 2)[1:]).keep((0, 2))
        return torch.stack([torch.cat(pair, -1) for pair in zip(k, v, strict=True)])

    assert_same(results(run, allocate(3), x), results(by_hand, DepthSlots(), x))


def test_repr_shows_no_memory():
    assert repr(model_of(1)) == (
        "DepthStream(written=1, slots=1, batch=2, tokens=6, kv_heads=2, head_dim=8, value_dim=4, "
        "dtype=torch.float64, device='cpu')"
    )
    shapes = tree_map(lambda x: "x", model_of(1)), tree_map(lambda x: "x", DepthSlots().write(K, V))
    assert repr(shapes) == "(DepthStream('x', 'x', 'x', 'x'), DepthSlots(('x',), ('x',)))"
    assert repr(DepthSlots()) == "DepthSlots(written=0)"
    assert repr(DepthSlots().write(K, V)) == (
        "DepthSlots(written=1, k=(2, 6, 2, 8), v=(2, 6, 2, 4), dtype=torch.float64, device='cpu')"
    )


class Block(torch.nn.Module):
    def forward(self, x, stream):
        return layer(x, stream, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begin", [lambda: allocate(2), DepthSlots])
def test_an_exported_block_is_saved_and_loaded(begin):
    x, file = random_input().detach(), io.BytesIO()
    _, stream = layer(x, begin())
    with torch.no_grad():
        torch.export.save(torch.export.export(Block(), (x, stream)), file)
    file.seek(0)
    out, after = torch.export.load(file).module()(x, stream)
    _, stream = layer(x, begin())
    assert type(after) is type(stream) and after.written == 2
    assert torch.equal(out, layer(x, stream, 1)[0])


@pytest.mark.filterwarnings("ignore")
def test_a_nested_compile_region_returns_the_token():
    """It may not return its input, the buffer."""
    torch._dynamo.reset()
    x = random_input()

    @torch.compiler.nested_compile_region
    def region(x, stream, i):
        x, stream = layer(x, stream, i)
        return x, stream.token

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, stream):
        for i in range(3):
            x, token = region(x, stream, i)
            stream = stream._replace(token=token)
        return x

    expected = results(lambda x, stream: model(x, stream, 3), DepthSlots(), x)
    assert_same(results(run, allocate(3), x), expected)


def k_like(*shape, **kwargs):
    return torch.zeros(*shape, **(dict(dtype=torch.float64) | kwargs))


K, V, Q = k_like(B, T, H, D), k_like(B, T, H, DV), k_like(B, T, HQ, D)
EMPTY = (
    "the depth stream is empty: write this layer's keys and values first (write returns the stream "
    "to go on with: stream = stream.write(k, v)), or give k and v"
)


def forgets_what_write_returns(stream):
    stream.write(K, V)
    stream.attend(Q)


ALLOWED = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
MISUSES = [
    (lambda: allocate(-1), ValueError, "slots must be at least 0, got -1"),
    (lambda: allocate(2.0), TypeError, "slots must be an int, got 2.0"),
    (lambda: DepthStream.allocate(1, B, T, 0, D), ValueError, "kv_heads must be at least 1, got 0"),
    (
        lambda: allocate(1, dtype=torch.int32),
        TypeError,
        f"dtype must be one of {ALLOWED}, got torch.int32",
    ),
    (
        lambda: allocate(1, grad_dtype="float32"),
        TypeError,
        f"grad_dtype must be one of {ALLOWED}, got 'float32'",
    ),
    (
        lambda: allocate(1).write(K, V).write(K, V),
        ValueError,
        "the depth stream is too short: all of its 1 slots are written; allocate it with as many "
        "slots= as the forward pass writes",
    ),
    (lambda: allocate(1).write(None, V), TypeError, "k must be a torch.Tensor, got NoneType"),
    (
        lambda: allocate(1).write(K[0], V),
        ValueError,
        "k must have shape (B, T, H, D), got (6, 2, 8)",
    ),
    (
        lambda: allocate(1).write(K[:, :3], V[:, :3]),
        ValueError,
        "k must have shape (B, T, H, D) with B = 2, T = 6 and H = 2, as the depth stream was "
        "allocated (batch, tokens, kv_heads), got (2, 3, 2, 8)",
    ),
    (
        lambda: allocate(1).write(Q, V),
        ValueError,
        "k must have shape (B, T, H, D) with B = 2, T = 6 and H = 2, as the depth stream was "
        "allocated (batch, tokens, kv_heads), got (2, 6, 4, 8)",
    ),
    (
        lambda: allocate(1).write(K, K),
        ValueError,
        "k and v must have D + DV = 12 in all to fit the depth stream, got D = 8 and DV = 8",
    ),
    (
        lambda: allocate(1).write(V, K),
        ValueError,
        "k must have the depth stream's head dim 8, got 4",
    ),
    (
        lambda: allocate(1).write(K.float(), V),
        TypeError,
        "k must have dtype torch.float64 to fit the depth stream, got torch.float32",
    ),
    (
        lambda: allocate(1).write(K, V.to("meta")),
        ValueError,
        "v must be on the depth stream's device cpu, got meta",
    ),
    (
        lambda: allocate(1).attend(Q),
        ValueError,
        EMPTY,
    ),
    (
        lambda: DepthSlots().attend(Q),
        ValueError,
        EMPTY,
    ),
    (lambda: forgets_what_write_returns(allocate(1)), ValueError, EMPTY),
    (lambda: forgets_what_write_returns(DepthSlots()), ValueError, EMPTY),
    (lambda: allocate(1, like=3), TypeError, "like must be a torch.Tensor, got int"),
    (lambda: allocate(1).attend("q"), TypeError, "q must be a torch.Tensor, got str"),
    (
        lambda: allocate(1).attend(Q, K),
        ValueError,
        "k is given but v is None; give both or neither",
    ),
    (
        lambda: DepthSlots().write(K, V).attend(Q, K),
        ValueError,
        "k is given but v is None; give both or neither",
    ),
    (
        lambda: allocate(1).write(K, V).attend(Q[:, :3]),
        ValueError,
        "q must have shape (B, T, HQ, D) with B = 2 and T = 6, as the depth stream was allocated "
        "(batch, tokens), got (2, 3, 4, 8)",
    ),
    (
        lambda: allocate(1).write(K, V).attend(k_like(B, T, HQ, D + DV)),
        ValueError,
        "q must have the depth stream's head dim 8, got 12",
    ),
    (
        lambda: allocate(1).attend(Q, K[:, :, :1], V[:, :, :1]),
        ValueError,
        "k and v must have the depth stream's H = 2 heads and D + DV = 12, got 1 heads, "
        "D = 8 and DV = 4",
    ),
    (
        lambda: allocate(1).write(K, V).attend(Q[:, :, :3]),
        ValueError,
        "q's heads must be a positive multiple of k's, got HQ = 3 and H = 2; "
        "heads are the second to last dimension",
    ),
    (
        lambda: allocate(1).write(K, V).attend(Q, softcap=-1.0),
        ValueError,
        "softcap must be within 1e-07..1e+30, got -1.0",
    ),
    (
        lambda: allocate(1).write(K, V).attend(Q, causal=None),
        TypeError,
        "causal must be a bool, got None",
    ),
]


@pytest.mark.parametrize(("misuse", "error", "message"), MISUSES)
def test_misuse(misuse, error, message):
    with pytest.raises(error) as caught:
        misuse()
    assert str(caught.value) == message


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_slot_is_written_once(compiler):
    torch._dynamo.reset()
    block = torch.compile(layer, backend=compiler) if compiler else layer
    x, stream = random_input(), allocate(4)
    _, following = block(x, stream)
    block(x, following)
    message = "slot 0 of the depth stream is written twice: a stream value can be continued once"
    with pytest.raises(RuntimeError) as caught:
        block(x, stream)
    assert message in str(caught.value)


@pytest.mark.parametrize("inside", [True, False])
@functorch_config.patch(activation_memory_budget=0.1)
def test_a_recomputed_allocation_is_an_error(inside):
    """A memory budget lets the partitioner recompute what it likes, also the buffer."""
    torch._dynamo.reset()
    x = random_input()

    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def run(x, stream=None):
        return model(x, allocate(6) if stream is None else stream, layers=6)

    if inside:
        with pytest.raises(RuntimeError, match="allocate the DepthStream outside of the compiled"):
            run(x).square().sum().backward()
    else:
        assert_same(results(run, allocate(6), x), results(model_of_six, DepthSlots(), x))


def model_of_six(x, stream):
    return model(x, stream, layers=6)


def test_a_stream_after_backward_has_no_graph():
    x = random_input()
    y, stream = layer(x, allocate(4))
    y.sum().backward()
    z, _ = layer(x.detach(), stream, 1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        z.sum().backward()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_attend_casts_no_lse():
    """The operator's own is float64; only attend_with_lse returns one."""
    q = torch.randn(B, T, HQ, D)
    stream = DepthStream.allocate(1, B, T, H, D, DV, like=q).write(q[:, :, :H], q[:, :, :H, :DV])
    with Recorder() as recorder:
        stream.attend(q)
    assert recorder.calls == ["moda.stream_attention.default"]
    assert stream.attend_with_lse(q)[1].dtype is torch.float32


@pytest.mark.parametrize("kind", [DepthSlots, DepthStream])
def test_a_slot_written_without_gradients_has_none(kind):
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    stream = kind() if kind is DepthSlots else DepthStream.allocate(1, 1, 4, 2, 8)
    with torch.no_grad():
        stream = stream.write(x, x)
    assert not stream.attend(x.detach())[0].requires_grad


def test_an_empty_list_has_no_value_dim():
    with pytest.raises(ValueError, match="value_dim is not known before the first slot is written"):
        DepthSlots().value_dim  # noqa: B018
