"""What no query sees may hold NaN or Inf: the kernels never multiply it, not even by 0."""

import itertools

import numpy as np
import pytest
import torch

import moda_kernels
import moda_reference
from helpers import Inputs, make_cotangents, make_inputs
from moda_kernels import tuning

# The interpreter computes in NumPy, which warns of NaN and Inf also where they are thrown away.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DOCUMENTS = {  # lengths of queries and of keys, and the padding before the first document
    "keys without a query": ([20, 0, 23], [70, 9, 40], 0),
    "queries without a key": ([9, 30, 8], [9, 0, 20], 0),
    "several tiles": ([20, 45, 3], None, 2),
    "padding": ([7, 8], None, 3),
}
WINDOWS = [(None, 0), (None, None), (2, 0), (1, 1)]


def documents_seen(queries, keys, before, left, right, after=4):
    """cu_seqlens of q and k, and who sees whom [T, S]."""
    keys = keys or queries
    cu = [[before, *(before + n for n in itertools.accumulate(x))] for x in (queries, keys)]
    seen = np.zeros([x[-1] + after for x in cu], dtype=bool)
    for (t, m), (s, n) in zip(
        zip(cu[0], queries, strict=False), zip(cu[1], keys, strict=False), strict=True
    ):
        window = left, 0 if right == 0 else right
        seen[t : t + m, s : s + n] = moda_reference.visible(m, n, right == 0, window)
    return cu, torch.from_numpy(seen)


def poison(x, rows, value):
    """A copy of x (B, N, ..) in which these of the N rows hold ``value``."""
    x = x.clone()
    x[:, rows.to(x.device)] = value
    return x


def assert_unseen_does_not_matter(inputs, seen, value, **options):
    """Bitwise equal results of what is seen, whatever the rest of q, k, v and dout holds.

    A row with depth slots sees those. Where it sees no key, its own values still matter to itself.
    """
    keys, rows = ~seen.any(0), ~seen.any(1)
    left, right = options.pop("left"), options.pop("right")
    arguments = inputs.q.shape[-1] ** -0.5, left, right, None
    dout, dlse = make_cotangents(inputs)
    results = []
    for fill in (0.0, value):
        q, k, v = (
            poison(x, unseen, fill)
            for x, unseen in zip(inputs[:3], (rows, keys, keys), strict=True)
        )
        case, grad = Inputs(q, k, v, *inputs[3:]), poison(dout, rows, fill)
        out, lse = moda_kernels.attention(*case, *arguments, **options)
        grads = moda_kernels.attention_backward(grad, dlse, *case, out, lse, *arguments, **options)
        results.append((out, lse, Inputs(*grads)))
    (out, lse, grads), (poisoned_out, poisoned_lse, poisoned) = results
    own = rows if grads.k_depth else torch.zeros_like(rows)  # rows of which something is seen
    assert torch.equal(poisoned_out[:, ~own], out[:, ~own])
    assert torch.equal(poisoned_lse[:, :, ~own], lse[:, :, ~own])
    assert torch.equal(poisoned.q[:, ~own], grads.q[:, ~own])
    for name in ("k", "v"):
        actual, expected = getattr(poisoned, name), getattr(grads, name)
        assert torch.equal(actual, expected), name
        assert not expected[:, keys].any(), name
    for actual, expected in zip(poisoned.leaves()[3:], grads.leaves()[3:], strict=True):
        assert torch.equal(actual[:, ~own], expected[:, ~own])


@pytest.mark.parametrize(
    ("documents", "left", "right", "L", "value"),
    [
        *((name, *window, 0, float("nan")) for name in DOCUMENTS for window in WINDOWS),
        ("padding", 2, 0, 3, float("nan")),
        ("padding", 2, 0, 3, float("inf")),
        ("padding", None, None, 0, float("inf")),
    ],
)
def test_packed_documents(documents, left, right, L, value, device):
    queries, keys, before = DOCUMENTS[documents]
    cu, seen = documents_seen(queries, keys, before, left, right)
    T, S = seen.shape
    inputs = make_inputs(1, T, 2, 1, 16, L, S=S, dtype=torch.float16, device=device)
    cu = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in cu)
    assert_unseen_does_not_matter(inputs, seen, value, left=left, right=right, cu_seqlens=cu)


@pytest.mark.parametrize(
    ("T", "S", "left", "right", "L", "value"),
    [
        (5, 40, 3, 0, 2, float("nan")),
        (5, 40, 3, 0, 0, float("inf")),
        (40, 120, 9, 9, 0, float("nan")),
        (70, 3, 0, 0, 0, float("nan")),
    ],
)
def test_keys_left_of_every_window(T, S, left, right, L, value, device):
    """And queries before the first key."""
    seen = torch.from_numpy(moda_reference.visible(T, S, right == 0, (left, right)))
    assert not seen.any(0).all() or not seen.any(1).all()
    inputs = make_inputs(1, T, 2, 1, 16, L, S=S, dtype=torch.float16, device=device)
    assert_unseen_does_not_matter(inputs, seen, value, left=left, right=right)


def test_rows_shared_by_several_programs(device, monkeypatch):
    monkeypatch.setattr(tuning, "backward_dkv_parts", lambda *_: 4)
    cu, seen = documents_seen([40, 7, 21], [30, 0, 50], 3, 5, 0)
    inputs = make_inputs(1, *seen.shape[:1], 3, 1, 16, 0, S=seen.shape[1], device=device)
    cu = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in cu)
    assert_unseen_does_not_matter(inputs, seen, float("nan"), left=5, right=0, cu_seqlens=cu)


def test_a_document_does_not_reach_another_tile_or_row_before_it(device):
    """A NaN in a document's key stays among the documents that share a tile with its readers."""
    cu, _ = documents_seen([70, 70], None, 0, None, 0, after=0)
    inputs = make_inputs(1, 140, 1, 1, 16, 0, device=device)
    cu = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in cu)
    arguments = 0.25, None, 0, None, "fused", cu
    out, _ = moda_kernels.attention(*inputs, *arguments)
    nan = inputs._replace(v=poison(inputs.v, torch.arange(140) == 139, float("nan")))
    tile = tuning.forward_tile(device, inputs.q.dtype, 1, 16, 16, True).BLOCK_M
    rows = 139 // tile * tile
    assert torch.equal(moda_kernels.attention(*nan, *arguments)[0][:, :rows], out[:, :rows])


@pytest.mark.parametrize("beyond", [1, 2**31 - 9])
def test_lengths_beyond_the_tensors_end_with_them(beyond, device):
    """Documents that end past q and k end there: no memory after them is read or written."""
    inputs = make_inputs(1, 9, 2, 1, 16, 1, device=device, form="embedded")
    dout, dlse = make_cotangents(inputs)
    results = []
    for end in (9, min(9 + beyond, 2**31 - 1)):
        cu = torch.tensor([0, 4, end, end], dtype=torch.int32, device=device)
        arguments = 0.25, 3, 0, None, "fused", (cu, cu)
        out, lse = moda_kernels.attention(*inputs, *arguments)
        grads = moda_kernels.attention_backward(dout, dlse, *inputs, out, lse, *arguments)
        results.append([out, lse, *Inputs(*grads).leaves()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cu", [[0, -5, 9], [-(2**31), 3, 9], [0, 7, 2, 9], [2**31 - 1, 0, 9]])
def test_meaningless_lengths_stay_within_the_tensors(cu, device):
    """Their results mean nothing, but bands, which lead all loads, stay inside."""
    cu = torch.tensor(cu, dtype=torch.int32, device=device)
    for left, right in WINDOWS:
        for band in moda_kernels.bands.launch_bands(cu, cu, 9, 9, left, right):
            assert band.min() >= -1 and band.max() <= 9


@pytest.mark.parametrize("length", [2**31 - 1, -(2**31), -3, 50])
@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("left", [None, 4, 2**40])
def test_cache_lengths_beyond_the_cache(length, append, left, device):
    """A length past the cache: new tokens are dropped. One below 0: no key is seen."""
    N, S = 2, 20
    inputs = make_inputs(1, N, 2, 1, 16, 1, S=S, device=device)
    q, k, v, *depth = inputs
    new = (k[:, :N] + 1, v[:, :N] + 1) if append else (None, None)
    caches = k.clone(), v.clone()
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    out, lse = moda_kernels.decode(q, *caches, *depth, lengths, None, *new, 0.25, left, None)
    hidden = length < 0 or left == 4
    keys = [x[:, :0] if hidden else x for x in (k, v)]
    expected = moda_kernels.attention(q, *keys, *depth, 0.25, None, None, None, "fused")
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)
    torch.testing.assert_close(lse, expected[1].float())
    torch.testing.assert_close(out, expected[0])
