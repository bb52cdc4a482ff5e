"""moda_decode and its operators as PyTorch sees them, and against moda_attention."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import FORMS, assert_decodes, make_decoding
from moda_ops import moda_attention, moda_decode


def run_public(decode=moda_decode, **options):
    def run(case):
        q, _, _, k_depth, v_depth = case.inputs
        packed = len(k_depth) == 1 and k_depth[0].dim() == 5
        depth = (k_depth[0], v_depth[0]) if packed else (k_depth, v_depth)
        return decode(
            q, case.k_cache, case.v_cache, *depth, case.cache_seqlens, k_new=case.k_new,
            v_new=case.v_new, block_table=case.block_table, return_lse=True, **options,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("page_size", [None, 16, 3])
@pytest.mark.parametrize("options", [{}, {"window": (9, 1), "softcap": 2.0}, {"scale": 0.2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, options, page_size, append, device):
    left = options.get("window", (None,))[0]
    case = make_decoding(
        [0, 41, 16], 3, 6, 2, 20, 4, DV=12, page_size=page_size, append=append, left=left,
        dtype=dtype, device=device, form=FORMS[append],
    )  # fmt: skip
    assert_decodes(case, run_public(**options), **options)


def tolerance(dtype):
    """Two evaluations in one dtype differ by roundings of results of about 1, and of sums."""
    return dict(rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_add_up_to_the_whole_sequence(dtype, window, page_size, device):
    """A prompt of its own length for each sequence, then steps of 1 and of 3 tokens."""
    T, starts = 14, [5, 0, 2]
    case = make_decoding([T] * 3, T, 4, 2, 16, 3, dtype=dtype, device=device, page_size=page_size)
    inputs, seqlens = case.inputs, torch.tensor(starts, dtype=torch.int32, device=device)
    whole, whole_lse = moda_attention(*inputs, window=window, return_lse=True)
    for cache in (case.k_cache, case.v_cache):
        for b, start in enumerate(starts):  # what comes after the prompts is not there yet
            if page_size is None:
                cache[b, start:] = float("nan")
            else:
                for n in range(start, T):
                    cache[case.block_table[b, n // page_size], n % page_size] = float("nan")
    for step in (1, 3, 1, 3):
        at = [slice(n, n + step) for n in seqlens.tolist()]

        def now(x, dim=1, at=at):
            rows = [x[b].narrow(dim - 1, s.start, s.stop - s.start) for b, s in enumerate(at)]
            return torch.stack(rows)

        out, lse = moda_decode(
            now(inputs.q), case.k_cache, case.v_cache, [now(x) for x in inputs.k_depth],
            [now(x) for x in inputs.v_depth], seqlens, k_new=now(inputs.k), v_new=now(inputs.v),
            block_table=case.block_table, window=window, return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(out, now(whole), **tolerance(dtype))
        torch.testing.assert_close(lse, now(whole_lse, 2), **tolerance(torch.float32))
        seqlens += step


def test_pages_and_plain_caches_give_the_same(device):
    cases = [
        make_decoding([9, 50], 2, 4, 2, 16, 3, append=True, page_size=p, device=device)
        for p in (None, 16, 5, 1)
    ]
    results = [run_public()(case) for case in cases]
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], **tolerance(out.dtype))
        torch.testing.assert_close(lse, results[0][1], **tolerance(out.dtype))


def test_writes_in_place_and_nothing_else(device):
    case = make_decoding([0, 7], 2, 2, 1, 16, 1, append=True, device=device)
    k_whole, v_whole = case.k_cache._base.clone(), case.v_cache._base.clone()
    k_whole[0, 1:3], k_whole[1, 8:10] = case.k_new[0], case.k_new[1]
    v_whole[0, 1:3], v_whole[1, 8:10] = case.v_new[0], case.v_new[1]
    version, seqlens = case.k_cache._version, case.cache_seqlens.clone()
    run_public()(case)
    assert case.k_cache._version > version  # autograd knows of the write
    assert torch.equal(case.cache_seqlens, seqlens)
    torch.testing.assert_close(case.k_cache._base, k_whole, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(case.v_cache._base, v_whole, rtol=0, atol=0, equal_nan=True)
    with torch.inference_mode():
        out, _ = run_public()(case._replace(k_cache=case.k_cache.clone()))
    assert not out.isnan().any()


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_cache_without_room_leaves_depth(page_size, device):
    q, _, _, k_depth, v_depth = make_decoding([0], 1, 4, 2, 16, 3, device=device).inputs
    rows, size, table = 1, 0, None
    if page_size is not None:
        rows, size, table = 2, page_size, torch.empty(1, 0, dtype=torch.int32, device=device)
    cache = torch.full((2, rows, size, 2, 16), float("nan"), device=device)
    lengths, new = torch.zeros(1, dtype=torch.int32, device=device), k_depth[0]
    out = moda_decode(
        q, *cache, k_depth, v_depth, lengths, k_new=new, v_new=new, block_table=table
    )  # fmt: skip
    expected = moda_attention(q, new[:, :0], new[:, :0], k_depth, v_depth)
    torch.testing.assert_close(out, expected, **tolerance(out.dtype))
    assert cache.isnan().all()


@pytest.mark.parametrize("page_size", [None, 4])
def test_positions_that_a_cache_does_not_have(page_size, device):
    """Past its end, below 0 and in pages that do not exist nothing is written or read."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    k, v, q, k_new, v_new = (randn(5, n, 1, 16) for n in (8, 8, 3, 3, 3))
    lengths = torch.tensor([6, 8, 2**31 - 1, -2, -(2**31)], dtype=torch.int32, device=device)
    kept = [8, 8, 8, 1, 0]  # tokens that are there after the step
    expected = [x.clone() for x in (k, v)]
    for cache, new in zip(expected, (k_new, v_new), strict=True):
        cache[0, 6:], cache[3, :1] = new[0, :2], new[3, 2:]
    caches, table = [k, v], None
    if page_size is not None:
        caches = [x.reshape(-1, page_size, *x.shape[2:]) for x in caches]
        table = torch.arange(10, dtype=torch.int32, device=device).view(5, 2)
    out, lse = moda_decode(
        q,
        *caches,
        None,
        None,
        lengths,
        k_new=k_new,
        v_new=v_new,
        block_table=table,
        return_lse=True,
    )
    for cache, whole in zip(caches, expected, strict=True):
        assert torch.equal(cache.reshape(whole.shape), whole)
    for b, n in enumerate(kept):  # the last query of each
        one = slice(b, b + 1)
        keys = [x[one, :n] for x in expected]
        alone = moda_attention(q[one, 2:], *keys, causal=False, return_lse=True)
        for a, c in zip((out[one, 2:], lse[one, :, 2:]), alone, strict=True):
            torch.testing.assert_close(a, c, **tolerance(out.dtype))


def test_caches_may_share_one_buffer(device):
    """Keys and values side by side in one row of memory, as many servers keep them."""
    case = make_decoding([3, 7], 2, 4, 2, 16, 1, DV=8, append=True, device=device)
    both = torch.cat([case.k_cache, case.v_cache], -1)
    k_cache, v_cache = both.split([16, 8], -1)
    assert_decodes(case._replace(k_cache=k_cache, v_cache=v_cache), run_public())

    def step(both, case):
        k_cache, v_cache = both.split([16, 8], -1)
        return run_public()(case._replace(k_cache=k_cache, v_cache=v_cache)), both * 1

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        both = torch.cat([case.k_cache, case.v_cache], -1)
        results.append((f(both, case), both))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
def test_compiled(page_size, append, backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(moda_decode, fullgraph=True, backend=backend)
    for seed in range(2):
        case = make_decoding(
            [5, 2 + seed], 2, 4, 2, 16, 3, page_size=page_size, append=append, seed=seed,
            spare=4, device=device,
        )  # fmt: skip
        assert_decodes(case, run_public(compiled))


def test_one_graph_serves_several_sizes(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moda_decode, dynamic=True, fullgraph=True, backend=counter)
    for n in (19, 23, 64):  # dynamic shapes take sizes that start out equal for equal forever
        case = make_decoding(
            [n, n + 3, 5], 2, 12, 2, 16, 5, append=True, page_size=8, device=device, seed=n
        )
        assert_decodes(case, run_public(compiled))
    assert counter.frame_count == 1


def test_a_compiled_step_writes_before_what_follows_it_reads(device):
    """Functionalization must neither drop the mutation nor move it."""
    torch._dynamo.reset()

    def step(q, cache, k, v, n):
        before = cache.sum((1, 2, 3, 4))
        out = moda_decode(q, cache[0], cache[1], None, None, n, k_new=k, v_new=v)
        return before, out, cache.sum((1, 2, 3, 4))

    q, k, v = (torch.randn(2, 1, heads, 16, device=device) for heads in (4, 2, 2))
    n = torch.tensor([2, 0], dtype=torch.int32, device=device)
    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        cache = torch.ones(2, 2, 5, 2, 16, device=device)
        results.append((*f(q, cache, k, v, n), cache))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(results[0][0], results[0][2])


def test_autocast_does_not_reach_inside(device):
    case = make_decoding([5, 2], 2, 4, 2, 16, 3, append=True, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_decodes(case, run_public())


def test_gradients_are_refused(device):
    case = make_decoding([3], 1, 2, 1, 16, 2, append=True, device=device)
    before = case.k_cache.clone()
    q = case.inputs.q.requires_grad_()
    message = (
        "moda_decode has no gradient, but q requires one; call it under torch.no_grad() or "
        "torch.inference_mode(), or train with moda_attention"
    )
    for f in (moda_decode, torch.compile(moda_decode, fullgraph=True, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=r"moda_decode has no gradient, but q") as caught:
            run_public(f)(case)
        if f is moda_decode:
            assert str(caught.value) == message
        assert torch.equal(case.k_cache.isnan(), before.isnan())
    with torch.no_grad():
        assert_decodes(case, run_public())
        run_public(torch.compile(moda_decode, fullgraph=True, backend="aot_eager"))(case)
    q.requires_grad_(False)
    case.inputs.v_depth[1].requires_grad_()
    with pytest.raises(RuntimeError, match="but v_depth requires one"):
        run_public()(case)


def graphed(case):
    """A captured call, and its results' tensors."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_public()(case)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run_public()(case)
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_captured_graph_serves_all_lengths(dtype, page_size):
    """Lengths, pages and contents change between replays; 3000 keys take several splits."""
    options = dict(append=True, page_size=page_size, dtype=dtype, device="cuda", form="packed")

    def fresh(lengths, seed):
        spare = 3000 - max(lengths)
        return make_decoding(lengths, 2, 8, 2, 64, 5, spare=spare, seed=seed, **options)

    static = fresh([0, 5, 2900], 0)
    graph, results = graphed(static)
    for seed, lengths in enumerate([[2998, 1, 0], [64, 63, 65], [0, 0, 1], [700, 2500, 16]], 1):
        case = fresh(lengths, seed)
        static.k_cache.copy_(case.k_cache)
        static.v_cache.copy_(case.v_cache)
        tensors = [*static.inputs.leaves(), static.cache_seqlens, static.k_new, static.v_new]
        others = [*case.inputs.leaves(), case.cache_seqlens, case.k_new, case.v_new]
        if page_size is not None:
            tensors.append(static.block_table)
            others.append(case.block_table)
        for a, b in zip(tensors, others, strict=True):
            if a.shape == b.shape:  # all but the tokens that the caches were made of
                a.copy_(b)
        caches = static.k_cache, static.v_cache

        def replay(_):
            graph.replay()
            return results

        assert_decodes(case._replace(k_cache=caches[0], v_cache=caches[1]), replay)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_reduce_overhead_replays_with_new_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(moda_decode, mode="reduce-overhead", fullgraph=True)
    options = dict(append=True, page_size=16, dtype=torch.bfloat16, device="cuda")
    for seed, n in enumerate((5, 900, 0, 77)):
        torch.compiler.cudagraph_mark_step_begin()
        case = make_decoding([n, 300], 1, 8, 2, 64, 5, spare=1000 - n, seed=seed, **options)
        assert_decodes(case, run_public(compiled))


@pytest.mark.gpu
def test_nothing_is_synchronized():
    case = make_decoding(
        [5, 900], 1, 8, 2, 64, 5, append=True, page_size=16, dtype=torch.bfloat16, device="cuda"
    )
    run_public()(case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_public()(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_pages_past_2_31_elements():
    """Offsets into a cache are 64-bit."""
    H, D, page_size = 8, 128, 256
    pages = 2**31 // (page_size * H * D) + 8
    case = make_decoding(
        [page_size * 3 + 7], 1, 16, H, D, 2, append=True, page_size=page_size,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    k_cache, v_cache = (
        torch.full((pages, page_size, H, D), float("nan"), device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    used, table = len(case.k_cache), case.block_table
    k_cache[-used:], v_cache[-used:] = case.k_cache, case.v_cache
    far = torch.where((table >= 0) & (table < used), table + pages - used, -1)
    run = run_public()
    out, lse = run(case._replace(k_cache=k_cache, v_cache=v_cache, block_table=far))
    expected, expected_lse = run(case)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
