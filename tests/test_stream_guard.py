"""Who may read and write a stream's memory: copies, hooks, checkpoints, threads."""

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moda_ops import DepthSlots, DepthStream
from moda_ops.stream import guard

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own

B, T, H, D = 1, 4, 2, 8
LAYERS = 3
COPY = "this is a copy of a depth stream"
REENTRANT = "use_reentrant=False"


def allocate(slots=LAYERS):
    return DepthStream.allocate(slots, B, T, H, D, dtype=torch.float64)


def randn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, H, D, dtype=torch.float64, generator=generator)


def block(w, x, stream):
    k = (x * w).sin()
    y, stream = stream.write(k, k.cos()).attend(k)
    return x + y, stream


def loop(x, stream, weights, block=block):
    for w in weights:
        x, stream = block(w, x, stream)
    return x


def gradients(model, stream):
    """Of each layer's weights, and of the input."""
    leaves = [torch.linspace(-1, i, D, dtype=torch.float64) for i in range(LAYERS)]
    *weights, x = (leaf.requires_grad_() for leaf in (*leaves, randn()))
    model(x, stream, weights).square().sum().backward()
    return [leaf.grad for leaf in (*weights, x)]


def assert_same(actual, expected):
    """Equal up to the order of a few additions in float64."""
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-14 * e.norm()


# Reentrant checkpoints


def in_a_tuple(x, stream, weights):
    return loop(x, stream, weights, partial(checkpoint, block, use_reentrant=True))


def in_a_dict(x, stream, weights):
    def run(w, x, state):
        x, stream = block(w, x, state["stream"])
        return x, {"stream": stream}

    state = {"stream": stream}
    for w in weights:
        x, state = checkpoint(run, w, x, state, use_reentrant=True)
    return x


def closed_over(x, stream, weights):
    """Each recomputation finds the stream as the last block has left it."""
    left = [stream]

    def run(w, x):
        x, left[0] = block(w, x, left[0])
        return x

    for w in weights:
        x = checkpoint(run, w, x, use_reentrant=True)
    return x


def first_block_alone(x, stream, weights):
    x, stream = checkpoint(block, weights[0], x, stream, use_reentrant=True)
    return loop(x, stream, weights[1:])


def begun_inside(x, stream, weights):
    begin = DepthSlots if isinstance(stream, DepthSlots) else allocate

    def run(w, x):
        return block(w, x, begin())

    x, stream = checkpoint(run, weights[0], x, use_reentrant=True)
    return loop(x, stream, weights[1:])


def two_parts(x, stream, weights):
    """Writes that no recomputation reaches: only the stream takes what they return."""
    for w in weights:
        _, stream = checkpoint(lambda w, x, s: (None, s.write(x * w, x)), w, x, stream,
                               use_reentrant=True)  # fmt: skip
        y, stream = stream.attend(x)
        x = x + y
    return x


def writes_alone(x, stream, weights):
    """No reader is between the writes, so no token with a gradient reaches a checkpoint."""
    for w in weights:
        (stream,) = checkpoint(lambda w, x, s: [s.write(x * w, x)], w, x, stream,
                               use_reentrant=True)  # fmt: skip
    return stream.attend(x)[0]


class OfAnotherLibrary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, w, x, box):
        ctx.run, ctx.box = run, box
        ctx.save_for_backward(w, x)
        y, ctx.after = run(w, x, box[0])
        box[0] = ctx.after
        return y

    @staticmethod
    def backward(ctx, dy):
        w, x = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            y, _ = ctx.run(w, x, ctx.box[1])
        return None, *torch.autograd.grad(y, (w, x), dy), None


def of_another_library(x, stream, weights):
    for w in weights:
        box = [stream, stream]
        x, stream = OfAnotherLibrary.apply(block, w, x, box), box[0]
    return x


@pytest.mark.parametrize("begin", [lambda: allocate(2 * LAYERS), DepthSlots])
@pytest.mark.parametrize(
    "model",
    [
        of_another_library,
        in_a_tuple,
        in_a_dict,
        closed_over,
        first_block_alone,
        begun_inside,
        two_parts,
        writes_alone,
    ],
)
def test_a_reentrant_checkpoint_is_an_error(model, begin):
    with pytest.raises(RuntimeError, match=REENTRANT):
        gradients(model, begin())


def test_a_reentrant_checkpoint_of_tensors_is_an_error():
    def run(w, x, buffer, token):
        x, stream = block(w, x, DepthStream(buffer, token, D))
        return x, stream.buffer, stream.token

    def model(x, stream, weights):
        buffer, token = stream.buffer, stream.token
        for w in weights:
            x, buffer, token = checkpoint(run, w, x, buffer, token, use_reentrant=True)
        return x

    with pytest.raises(RuntimeError, match=REENTRANT):
        gradients(model, allocate())


def test_a_reentrant_checkpoint_of_compiled_blocks_is_an_error():
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def model(x, stream, weights):
        return loop(x, stream, weights, partial(checkpoint, compiled, use_reentrant=True))

    with pytest.raises(RuntimeError, match=REENTRANT):
        gradients(model, allocate())


@pytest.mark.parametrize("begin", [allocate, DepthSlots])
def test_a_reentrant_checkpoint_may_hold_a_whole_stream(begin):
    def model(x, stream, weights):
        return checkpoint(lambda x: loop(x, begin(), weights), x, use_reentrant=True)

    assert_same(gradients(model, None), gradients(loop, DepthSlots()))


@pytest.mark.parametrize("begin", [allocate, DepthSlots])
@torch.no_grad()
def test_a_reentrant_checkpoint_is_harmless_without_gradients(begin):
    x, weights = randn(), [randn(i).requires_grad_() for i in range(LAYERS)]
    stream = begin()
    for w in weights:
        (stream,) = checkpoint(lambda w, s: [s.write(x * w, x)], w, stream, use_reentrant=True)
    out, _ = stream.attend(x)
    stream = begin()
    for w in weights:
        stream = stream.write(x * w, x)
    assert torch.equal(out, stream.attend(x)[0])


# Recomputation by other means, and offloading


def flat(w, x, stream):
    """A checkpoint that takes and returns the stream's tensors, which hooks then see."""

    def run(w, x, buffer, token):
        x, stream = block(w, x, DepthStream(buffer, token, D))
        return x, stream.buffer, stream.token

    x, buffer, token = checkpoint(run, w, x, stream.buffer, stream.token, use_reentrant=False)
    return x, DepthStream(buffer, token, D)


def offloads(w, x, stream):
    with save_on_cpu():
        return block(w, x, stream)


recompute = partial(checkpoint, use_reentrant=False)
WAYS = {
    "checkpoint": partial(recompute, block),
    "flat": flat,
    "nested": partial(recompute, partial(recompute, block)),
    "offload": offloads,
    "offload in a checkpoint": partial(recompute, offloads),
    **{
        f"selective {op}": partial(
            recompute, block, context_fn=partial(create_selective_checkpoint_contexts, [op])
        )
        for op in (
            torch.ops.moda.stream_attention.default,
            torch.ops.moda.stream_write.default,
            torch.ops.aten.mul.Tensor,
        )
    },
}


@pytest.mark.parametrize("outside", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_recomputation_and_offloading(way, outside):
    def model(x, stream, weights):
        if not outside:
            return loop(x, stream, weights, way)
        with save_on_cpu():
            return loop(x, stream, weights, way)

    assert_same(gradients(model, allocate()), gradients(loop, DepthSlots()))


def test_compiled_autograd_recomputes():
    torch._dynamo.reset()

    def model(x, stream, weights):
        return loop(x, stream, weights[:1], WAYS["checkpoint"])

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        w, *_, x = gradients(model, allocate())
    expected, *_, other = gradients(lambda x, stream, w: loop(x, stream, w[:1]), DepthSlots())
    assert_same((w, x), (expected, other))


# Other writes within backward


def in_backward(run):
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: run() and None)
    y.sum().backward()


def test_a_hook_may_not_write_a_slot_again():
    k, stream = randn(), allocate()
    written = stream.write(k, k)
    with pytest.raises(RuntimeError, match="slot 0 of the depth stream is written twice"):
        in_backward(lambda: stream.write(2 * k, k))
    with pytest.raises(RuntimeError, match=COPY):
        in_backward(lambda: written._replace(buffer=written.buffer.clone()).write(k, k))


def test_a_hook_of_a_compiled_block_may_not_either():
    torch._dynamo.reset()
    compiled = torch.compile(torch.sin, backend="aot_eager")
    k, stream = randn(), allocate()
    stream.write(k, k)
    y = compiled(torch.ones(1, requires_grad=True))
    y.register_hook(lambda grad: stream.write(2 * k, k) and None)
    with pytest.raises(RuntimeError, match="written twice"):
        y.sum().backward()


def test_a_hook_may_run_a_model():
    k, outs = randn(), []
    in_backward(lambda: outs.append(loop(k, allocate(), [k, k])))
    assert torch.equal(outs[0], loop(k, allocate(), [k, k]))


# Copies


def by_torch_save(stream):
    file = io.BytesIO()
    torch.save(stream, file)
    file.seek(0)
    return torch.load(file)


COPIES = {
    "clone": lambda stream: stream._replace(buffer=stream.buffer.clone()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda stream: pickle.loads(pickle.dumps(stream)),
    "torch.save": by_torch_save,
    "part": lambda stream: stream._replace(buffer=stream.buffer[1:]),
}
USES = {
    "write": lambda stream: stream.write(randn(), randn()),
    "attend": lambda stream: stream.attend(randn()),
    "attend_depth": lambda stream: stream.attend_depth(randn()),
    "read": DepthStream.read,
    "keys": DepthStream.keys,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_refused(how, use):
    with pytest.raises(RuntimeError, match=COPY):
        use(how(allocate().write(randn(), randn())))


def test_a_tuple_of_the_same_tensors_is_no_copy():
    stream = copy.copy(allocate().write(randn(), randn()))
    for use in USES.values():
        use(stream)


def test_a_slot_that_is_not_written_is_not_read():
    stream = allocate()
    token = allocate().write(randn(), randn()).token
    for use in ("attend", "attend_depth", "read", "keys"):
        with pytest.raises(RuntimeError, match="only 0 of the 1 slots"):
            USES[use](stream._replace(token=token))


def test_to_another_device():
    """The copy is a stream of its own, and gradients come back; its device here is the same."""
    results = []
    for move in (lambda stream: stream, lambda stream: stream._copied("cpu")):
        k, stream = randn().requires_grad_(), allocate(4)
        assert stream.to("cpu") is stream
        for i in range(1, 4):
            stream = stream.write(i * k, k.sin())
        stream = move(stream.keep((0, 2)))
        assert stream.written == 2 and stream.slots == 4
        out = loop(randn(1), stream, [k])
        results.append([*stream.keys(), out, *torch.autograd.grad(out.square().sum(), k)])
        with pytest.raises(RuntimeError, match="written twice"):
            stream.write(k, k)
    assert_same(*results)
    moved = stream.to("meta")
    assert moved.buffer.is_meta and moved.token.is_meta and moved.written == 2
    keys, moved_keys = stream.keys(), moved.keys()
    assert [key.shape for key in moved_keys] == [key.shape for key in keys]


# Threads


def test_threads_do_not_lose_a_guard():
    """Streams come and go at the same addresses in all of them."""
    k, failures = randn(), []

    def work():
        for _ in range(100):
            stream = allocate()
            try:
                stream.write(k, k).attend(k)
            except RuntimeError as error:
                failures.append(error)
            try:
                stream.write(k, k)
            except RuntimeError:
                continue
            failures.append("a slot is written twice")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_forgetting_a_stream_spares_one_that_comes_meanwhile(monkeypatch):
    """In the old stream's place: what a thread has found to be gone, another one allocates."""
    expired, come, k = StorageWeakRef.expired, [], torch.zeros(1, 1, 1, 2**20)

    def large():  # enough for the system to give the same memory again
        return DepthStream.allocate(8, *k.shape)

    def meanwhile(reference):
        gone = expired(reference)
        if gone and monkeypatch.undo() is None:
            come.append(large())
            come[-1].write(k, k)
            monkeypatch.setattr(StorageWeakRef, "expired", meanwhile)
        return gone

    [large() for _ in range(4)]  # gone at once
    monkeypatch.setattr(StorageWeakRef, "expired", meanwhile)
    large()
    assert come
    for stream in come:
        with pytest.raises(RuntimeError, match="written twice"):
            stream.write(k, k)


# Debug mode


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_debug_compares_what_a_checkpoint_recomputes(monkeypatch, compiler):
    monkeypatch.setattr(guard, "DEBUG", True)
    torch._dynamo.reset()
    run = torch.compile(block, backend=compiler, fullgraph=True) if compiler else block

    def model(x, stream, weights, add):
        keys = []

        def changed(w, x, stream):
            w = w + next(add)
            keys.append((x * w).detach().sin())
            return run(w, x, stream)

        try:
            return loop(x, stream, weights, partial(recompute, changed))
        finally:
            model.keys = keys

    gradients(partial(model, add=iter([0.0] * 6)), allocate())
    with pytest.raises(RuntimeError, match="slot 2 of the depth stream is recomputed") as caught:
        gradients(partial(model, add=iter([0.0] * 3 + [0.5] * 3)), allocate())
    first, again = model.keys[2:4]
    greatest = max((f(first) - f(again)).abs().max().item() for f in (torch.cos, lambda k: k))
    assert f"the greatest difference is {greatest:.3g}" in str(caught.value)
