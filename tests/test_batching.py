"""torch.vmap of every operator against a loop over the mapped dimension."""

import pytest
import torch
from torch import Tensor

from moda_ops import DepthSlots, DepthStream, moda_attention, moda_decode
from operators import BACKWARD, DIFFERENTIABLE, Call, make_call

SIZE = 3
ALL = (*DIFFERENTIABLE, *BACKWARD, "decode")
FLOAT64 = dict(dtype=torch.float64)
IN_DIMS = {"first": (0,), "last": (-1,), "mixed": (None, 0, 1, -1), "others": (0, None, None)}


def mapped_arguments(calls, pattern):
    """Each argument's mapped dimension, by turns from the pattern, and its values in one tensor."""
    dims, stacked = [], []
    for i, values in enumerate(zip(*(call.leaves() for call in calls), strict=True)):
        dim = pattern[i % len(pattern)] if isinstance(values[0], Tensor) else None
        dims.append(dim)
        stacked.append(values[0] if dim is None else torch.stack(values, dim))
    return tuple(dims), stacked


def loop(f, dims, stacked):
    rows = [
        f(*(x if d is None else x.select(d, i).contiguous() for x, d in zip(stacked, dims)))  # noqa: B905
        for i in range(SIZE)
    ]
    return [torch.stack(results) for results in zip(*rows, strict=True)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", IN_DIMS.values(), ids=IN_DIMS)
@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("name", ALL)
def test_is_a_loop(name, form, pattern):
    calls = [make_call(name, seed, form=form, **FLOAT64) for seed in range(SIZE)]
    dims, stacked = mapped_arguments(calls, pattern)
    f = calls[0].run
    assert_same(torch.vmap(f, dims)(*stacked), loop(f, dims, stacked))


@pytest.mark.parametrize("name", ["attention_varlen", "attention_varlen_backward"])
def test_tokens_before_the_first_document_are_nobody_s(name):
    calls = [make_call(name, seed, **FLOAT64) for seed in range(SIZE)]
    for i, call in enumerate(calls):
        for cu in call.arguments[-2:] if name == "attention_varlen" else call.arguments[7:9]:
            cu.clamp_(min=i)
        if name != "attention_varlen":
            forward = make_call("attention_varlen", i, **FLOAT64)
            forward.arguments[5:] = call.arguments[7:9]
            call.arguments[9:] = forward.run()
    dims, stacked = mapped_arguments(calls, (0,))
    assert_same(torch.vmap(calls[0].run, dims)(*stacked), loop(calls[0].run, dims, stacked))


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("name", [*ALL, "depth_mass"])
def test_a_dimension_of_size_0(name, form):
    """Empty results and gradients of the right shapes and dtypes."""
    if name == "depth_mass":
        one = make_call("depth_attention", form=form)
        q, k_depth, _ = one.arguments
        call = Call(name, [q, k_depth, one.run()[1]], {})
    else:
        call = make_call(name, form=form)
    leaves = call.leaves()
    dims = tuple((0, -1, None)[i % 3] for i in range(len(leaves)))
    stacked = [
        (x if d is None else torch.stack([x], d).narrow(d, 0, 0)).requires_grad_(
            name in DIFFERENTIABLE and x.is_floating_point()
        )
        for x, d in zip(leaves, dims, strict=True)
    ]
    results, expected = torch.vmap(call.run, dims)(*stacked), call.run(*leaves)
    for result, one in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == ((0, *one.shape), one.dtype)
    if name in DIFFERENTIABLE:
        needed = [x for x in stacked if x.requires_grad]
        grads = torch.autograd.grad([x.sum() for x in results], needed)
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, needed, strict=True))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_gradients(name, form, size):
    """is_grads_batched, of both results and of each alone, is a loop over the gradients."""
    call = make_call(name, form=form, **FLOAT64)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in call.leaves()]
    needed = [x for x in leaves if x.requires_grad]
    results = call.run(*leaves)
    grads = [torch.randn(size, *x.shape, **FLOAT64) for x in results]
    for which in (slice(0, 2), slice(0, 1), slice(1, 2)):

        def pull(rows, which=which, batched=False):
            return torch.autograd.grad(
                results[which],
                needed,
                rows,
                is_grads_batched=batched,
                retain_graph=True,
                materialize_grads=True,
            )

        rows = [pull([g[i] for g in grads[which]]) for i in range(size)]
        assert_same(pull(grads[which], batched=True), map(torch.stack, zip(*rows, strict=True)))


def test_vectorized_jacobian():
    def f(x):
        return moda_attention(x, x, x, [x.sin()], [x])

    x = torch.randn(1, 3, 1, 4, **FLOAT64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(f, x, vectorize=True), jacobian(f, x))


def test_a_stream_refuses_batched_gradients():
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    out, _ = DepthStream.allocate(1, 1, 4, 2, 8).write(x, x).attend(x)
    message = r"moda::stream_attention_backward cannot be mapped by is_grads_batched: .*DepthSlots"
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("mapped", ["q", "q block_table", "k_cache", "q k_cache v_cache", "all"])
def test_pages(mapped):
    """Pages that all read, and pages of each; a NaN would show that a wrong one is read."""
    calls = [make_call("decode", seed, page_size=2, **FLOAT64) for seed in range(SIZE)]
    if mapped == "all":
        dims, stacked = mapped_arguments(calls, (0,))
    else:
        names = ["q", "k_cache", "v_cache", *["depth"] * 6, "cache_seqlens", "block_table"]
        dims = tuple(0 if name in mapped.split() else None for name in names)
        leaves = zip(calls[0].leaves(), dims, strict=True)
        stacked = [x if d is None else torch.stack([x] * SIZE) for x, d in leaves]
        stacked[0 if dims[0] == 0 else 1][1:] *= 2
    f = calls[0].run
    assert_same(torch.vmap(f, dims)(*stacked), loop(f, dims, stacked))


def test_a_page_that_does_not_exist_is_not_another_mapping_s():
    calls = [make_call("decode", seed, page_size=2, **FLOAT64) for seed in range(SIZE)]
    for call in calls:
        call.arguments[-1][0, 1] = len(call.arguments[1])  # would be the next one's first page
    dims, stacked = mapped_arguments(calls, (0,))
    assert_same(torch.vmap(calls[0].run, dims)(*stacked), loop(calls[0].run, dims, stacked))


@pytest.mark.parametrize("dim", [-1, 2])
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_a_view_of_other_strides(name, dim):
    """Folding a batch of 1 copies nothing, so that the strides are those of the mapped tensor."""
    calls = [make_call(name, seed, B=1, **FLOAT64) for seed in range(SIZE)]
    dims, stacked = mapped_arguments(calls, (dim,))
    assert_same(torch.vmap(calls[0].run, dims)(*stacked), loop(calls[0].run, dims, stacked))


@pytest.mark.parametrize("missing", ["dout", "dlse"])
def test_a_gradient_that_is_not_there(missing):
    call = make_call("attention_backward", **FLOAT64)
    leaves = call.leaves()
    leaves[("dout", "dlse").index(missing)] = None
    dims = (None, None, 0, *[None] * (len(leaves) - 3))
    stacked = [x if d is None else torch.stack([x, 2 * x, -x]) for x, d in zip(leaves, dims)]  # noqa: B905
    assert_same(torch.vmap(call.run, dims)(*stacked), loop(call.run, dims, stacked))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_per_sample(name):
    """vmap(grad) and grad(vmap)."""
    calls = [make_call(name, seed, **FLOAT64) for seed in range(SIZE)]
    dims, stacked = mapped_arguments(calls, (0,))
    floating = tuple(i for i, x in enumerate(stacked) if x.is_floating_point())

    def loss(*leaves):
        out, lse = calls[0].run(*leaves)
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()

    gradient = torch.func.grad(loss, floating)
    expected = loop(gradient, dims, stacked)
    assert any(x.abs().max() > 1e-3 for x in expected)
    assert_same(torch.vmap(gradient)(*stacked), expected)

    def total(*leaves):
        return torch.vmap(loss)(*leaves).sum()

    assert_same(torch.func.grad(total, floating)(*stacked), expected)


def test_nested():
    x = torch.randn(2, 3, 1, 4, 2, 8, dtype=torch.float64)

    def f(x, slot):
        return moda_attention(x, x, x, [slot], [x])

    nested = torch.vmap(torch.vmap(f, (0, None)), (0, None))(x, x[0, 0])
    expected = torch.stack([f(one, x[0, 0]) for one in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(nested, expected)


def test_one_call_serves_all_and_a_batch_of_one_is_not_copied(monkeypatch):
    from moda_ops.operators import eager

    seen = []
    monkeypatch.setattr(
        eager, "attention", lambda *args: seen.append(args) or (args[0], args[0][..., 0].mT)
    )
    q, k = torch.randn(5, 1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    torch.vmap(lambda q: moda_attention(q, k, k, [k], [k]))(q)
    ((q_folded, k_folded, *_),) = seen
    assert q_folded.shape == k_folded.shape == (5, 4, 2, 8)
    assert q_folded.data_ptr() == q.data_ptr() and k_folded.data_ptr() == k.data_ptr()


@pytest.mark.filterwarnings("ignore")
def test_compiles():
    x = torch.randn(3, 1, 4, 2, 8)

    def f(x):
        return torch.vmap(lambda x: moda_attention(x, x, x, [x], [x]))(x)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), f(x))


def test_what_writes_in_place_is_refused():
    x = torch.randn(3, 1, 4, 2, 8)

    def through_a_stream(x):
        stream = DepthStream.allocate(1, 1, 4, 2, 8)
        return stream.write(x, x).attend(x)[0]

    def append(x):
        cache, lengths = torch.zeros(1, 9, 2, 8), torch.zeros(1, dtype=torch.int32)
        return moda_decode(x, cache, cache.clone(), None, None, lengths, k_new=x, v_new=x)

    with pytest.raises(NotImplementedError, match=r"moda::stream_write cannot.*DepthSlots"):
        torch.vmap(through_a_stream)(x)
    with pytest.raises(NotImplementedError, match=r"moda::decode_ cannot.*writes to its caches"):
        torch.vmap(append)(x)
    slots = torch.vmap(lambda x: DepthSlots().write(x, x).attend(x)[0])(x)
    torch.testing.assert_close(slots[1], moda_attention(x[1], x[1], x[1]))
