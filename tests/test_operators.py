"""What every operator does under PyTorch: one table, ``operators.make_call``, for all of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moda_ops.rules.autograd import lengths, unflatten
from operators import BACKWARD, DIFFERENTIABLE, EVERY, make_call

every_operator = pytest.mark.parametrize("name", EVERY)
every_differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)
both_forms = pytest.mark.parametrize("form", ["list", "packed"])


def assert_equal(actual, expected):
    """Bit by bit, and in dtype."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def needing_gradients(call):
    return [x.requires_grad_(x.is_floating_point()) for x in call.leaves()]


def loss_of(results):
    """Of every result; lse may be -inf."""
    return sum(x.square().clamp(max=81).sum() for x in results)


def test_no_operator_is_forgotten():
    registered = torch._C._dispatch_get_all_op_names()
    names = {op.removeprefix("moda::") for op in registered if op.startswith("moda::")}
    assert {name for name in names if not name.startswith("stream_")} == set(EVERY)


# Schema, fake and gradient

CASES = {
    "list": dict(form="list"),
    "packed": dict(form="packed"),
    "embedded": dict(form="embedded"),
    "no slots": dict(L=0),
    "pages": dict(page_size=4),
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(n, c) for n in EVERY for c in CASES if c != "pages" or n.startswith("decode")],
)
def test_opcheck(name, case, device):
    """With gradients and options; in the packed form without them, and without dlse."""
    call = make_call(name, device=device, **CASES[case])
    leaves, options = call.leaves(), call.options
    if name.startswith("decode"):
        leaves[1:3] = [x.nan_to_num() for x in leaves[1:3]]  # opcheck compares all of a cache
    if case == "packed":
        options = {x: n for x, n in options.items() if x == "chunk_size"}
        leaves[1] = None if name in BACKWARD else leaves[1]
    elif name in (*DIFFERENTIABLE, "depth_mass"):
        leaves = [x.requires_grad_(x.is_floating_point()) for x in leaves]
    arguments = unflatten(leaves, lengths(call.arguments))
    op = getattr(torch.ops.moda, name).default
    torch.library.opcheck(op, tuple(arguments), options)


@pytest.mark.parametrize(
    ("name", "form", "L"),
    [
        (name, form, L)
        for name in DIFFERENTIABLE
        for form, L in (("list", 0), ("list", 1), ("list", 3), ("packed", 2))
        if L or name != "depth_attention"
    ],
)
def test_gradcheck(name, form, L):
    shape = dict(B=1, T=4, S=5, D=3, DV=2, L=L)
    call = make_call(name, form=form, dtype=torch.float64, **shape)

    def f(*leaves):
        out, lse = call.run(*leaves)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(f, needing_gradients(call))


@both_forms
@every_operator
def test_meta_tensors(name, form):
    """What the operator returns, on meta: nothing computed, all checks made."""
    call = make_call(name, form=form)
    leaves = [x.to("meta") for x in call.leaves()]
    for x in leaves:
        x.requires_grad_(name in DIFFERENTIABLE and x.is_floating_point())
    results = call.run(*leaves)
    for x, y in zip(results, call.run(), strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    needed = [x for x in leaves if x.requires_grad]
    if needed:
        grads = torch.autograd.grad([x.sum() for x in results], needed)
        assert all(g.is_meta and g.shape == x.shape for g, x in zip(grads, needed, strict=True))
    with pytest.raises(ValueError, match="must be on q's device"):
        call.run(*leaves[:-1], call.leaves()[-1])


@both_forms
@every_operator
def test_a_call_gives_the_same_bits_again(name, form, device):
    calls = [make_call(name, form=form, device=device) for _ in range(2)]
    assert_equal(*(call.run() for call in calls))
    for a, b in zip(*(call.leaves() for call in calls), strict=True):  # what decode_ writes, too
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# Compilers

FIRST_CALLS = """
import os, sys
import torch
import torch._dynamo
import moda_ops as m

def f_attention(q, d): return m.moda_attention(q, *d, d, d)
def f_varlen(q, d):
    d = [x[0] for x in d]
    return m.moda_attention_varlen(q[0], *d, d, d, cu, cu)
def f_chunk(q, d): return m.moda_chunk_attention(q, *d, d, d, 2)
def f_depth(q, d): return m.moda_depth_attention(q, d, d)
def f_decode(q, d):
    d = [x.detach() for x in d]
    return m.moda_decode(q.detach(), *d, d, d, n)
def f_append(q, d):
    q, *d = (x.detach() for x in (q, *d))
    out = m.moda_decode(q, *caches, [d[0]], [d[1]], 0 * n, k_new=d[0], v_new=d[1])
    return out, caches.clone()
def f_mass(q, d): return m.moda_depth_mass(q, d, q[..., 0].mT.contiguous())
def f_stream(q, d):
    stream = m.DepthStream.allocate(2, *q.shape)
    return stream.write(*d).write(*d).attend(q)[0]

device = torch.device(sys.argv[1])
for name, f in [(name, f) for name, f in vars().items() if name.startswith("f_")]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    torch.set_default_device(device)
    n = torch.tensor([5], dtype=torch.int32)
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    caches = torch.zeros(2, 1, 8, 2, 16)
    q, *d = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(q, d)
    torch.testing.assert_close(out, f(q, d))
    if name in ("f_attention", "f_varlen", "f_chunk", "f_depth", "f_stream"):
        out.sum().backward()
        assert q.grad.isfinite().all() and d[1].grad.isfinite().all() and d[1].grad.any()
    print(name, flush=True)
    os._exit(0)
"""


def test_first_call_may_be_compiled(device):
    """In a process that has called no operator: one that has imported all is forked for each."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS, device.type],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0 and len(result.stdout.split()) == 8, result.stderr


@both_forms
@every_differentiable
def test_one_graph_serves_all_lengths(name, form, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(dynamic=True, fullgraph=True, backend=counter)
    def compiled(call, *leaves):
        return call.run(*leaves)

    for T, S in ((19, 22), (23, 29), (64, 70)):  # sizes that are equal at first stay equal
        call = make_call(name, T, B=3, T=T, S=S, L=5, form=form, device=device)
        chunk_size = dict(chunk_size=T // 4) if name == "chunk_attention" else {}
        call = call._replace(options=chunk_size)  # floats are traced twice
        leaves = needing_gradients(call)
        results = [f(*leaves) for f in (lambda *x, call=call: compiled(call, *x), call.run)]
        assert_equal(*results)
        needed = [x for x in leaves if x.requires_grad]
        grads = [torch.autograd.grad(loss_of(x), needed) for x in results]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
