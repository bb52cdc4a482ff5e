"""Logits at which float32 has few bits left, and windows as large as integers can be."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import moda_reference
from helpers import Inputs, make_cotangents, make_inputs, plain_attention, rounding
from moda_ops import (
    DepthSlots,
    DepthStream,
    moda_attention,
    moda_attention_varlen,
    moda_chunk_attention,
    moda_decode,
    moda_depth_attention,
    moda_sink_mass,
)
from moda_ops.nn.inspection import _map_of
from moda_ops.nn.watch import WatchedStream
from moda_ops.rules.flops import visible_pairs


def starts(*borders, device="cpu"):
    return torch.tensor(borders, dtype=torch.int32, device=device)


def varlen(x, borders, **options):
    """One batch entry as packed documents, with a batch axis."""
    one = x.map(lambda y: y[0])
    cu = (starts(*borders, device=x.q.device),) * 2
    out, lse = moda_attention_varlen(*one, *cu, return_lse=True, **options)
    return out[None], lse[None]


def stream(kind, x, **options):
    """The same through a depth stream."""
    (B, T, H, D), DV = x.k.shape, x.v.shape[-1]
    slots = DepthSlots()
    if kind is DepthStream:
        slots = DepthStream.allocate(
            len(x.k_depth), B, T, H, D, DV, dtype=x.q.dtype, device=x.q.device
        )
    for k, v in zip(x.k_depth, x.v_depth, strict=True):
        slots = slots.write(k, v)
    return slots.attend_with_lse(x.q, x.k, x.v, **options)[:2]


def decode(x, **options):
    lengths = starts(*[x.k.shape[1]] * len(x.q), device=x.q.device)
    return moda_decode(x.q, *x[1:], lengths, return_lse=True, **options)


RUNS = {
    "attention": lambda x, **o: moda_attention(*x, return_lse=True, **o),
    "documents": lambda x, **o: varlen(x, (0, 5, 9), **o),
    "chunks": lambda x, **o: moda_chunk_attention(*x, chunk_size=4, return_lse=True, **o),
    "depth": lambda x, **o: moda_depth_attention(x.q, *x[3:], return_lse=True, **o),
    "stream": lambda x, **o: stream(DepthStream, x, **o),
    "slots": lambda x, **o: stream(DepthSlots, x, **o),
    "decode": decode,
}


def large(x, logit):
    """The same inputs with about this much added to every score."""
    x, scale = x.map(torch.clone), x.q.shape[-1] ** -0.5
    side = abs(logit / scale) ** 0.5
    x.q[..., 0] = side
    for key in (x.k, *x.k_depth):
        key[..., 0] = side if logit > 0 else -side
    return x


@pytest.mark.parametrize("logit", [1e6, -1e6])
@pytest.mark.parametrize("run", RUNS)
def test_probabilities_sum_to_one(run, logit, device):
    x = large(make_inputs(1, 9, 4, 2, 16, 3, device=device), logit)
    ones = [torch.ones_like(v) for v in x.v_depth]
    out, lse = RUNS[run](x._replace(v=torch.ones_like(x.v), v_depth=ones))
    assert (lse - logit).abs().max() < 20
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_a_map_of_attention_sums_to_one():
    x, readings = large(make_inputs(1, 9, 4, 2, 16, 1), 1e6), []
    WatchedStream(DepthSlots(), readings.append).write(x.k, x.v).attend(x.q)
    p = _map_of(readings[0])
    total = torch.cat([p.sequence, p.depth], -1).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_map_of_attention_at_a_scale_of_zero():
    x, readings = make_inputs(1, 4, 2, 1, 8, 0), []
    WatchedStream(DepthSlots(), readings.append).attend_sequence(x.q, x.k, x.v, scale=0.0)
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(_map_of(readings[0]).sequence, expected.expand(1, 2, 4, 4))


@pytest.mark.parametrize("logit", [1000, -1000])
@pytest.mark.parametrize("run", ["attention", "chunks", "depth", "documents", "stream"])
def test_gradients_are_as_precise_as_those_of_plain_pytorch(run, logit, device):
    """Twice plain PyTorch's error, and what rounding does to them at small logits.

    All inputs are eighths, and so every q . k is exact whatever the order of its sum: what is left
    is what a pass does to scores, probabilities and lse.
    """
    x = make_inputs(1, 64, 4, 2, 16, 3, device=device)
    x = x.map(lambda y: (y * 8).round() / 8)
    if run == "depth":
        x = x._replace(k=x.k[:, :0], v=x.v[:, :0])
    dout, dlse = make_cotangents(x)
    options = dict(chunk_size=4) if run == "chunks" else {}
    floor, side = rounding(x, dout, dlse, **options), 64
    x.q[..., 0] = side
    for key in (x.k, *x.k_depth):
        key[..., 0] = logit / (0.25 * side)

    def plain(x):
        parts = [x] if run != "documents" else [cut(x, *ends) for ends in ((0, 5), (5, 64))]
        outs, lses = zip(*(plain_attention(part, **options) for part in parts), strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def gradients(f, dtype):
        leaves = x.map(lambda y: y.to(dtype).requires_grad_())
        out, lse = f(leaves)
        upstream = [dout.to(dtype), dlse.to(dtype)]
        return torch.autograd.grad([out, lse], leaves.leaves(), upstream, materialize_grads=True)

    def ours(x):
        return varlen(x, (0, 5, 64)) if run == "documents" else RUNS[run](x)

    exact = gradients(plain, torch.float64)
    errors = [
        [
            (a - b).abs().max().item() if a.numel() else 0.0
            for a, b in zip(gradients(f, torch.float32), exact, strict=True)
        ]
        for f in (ours, plain)
    ]
    names = ["dq", "dk", "dv", *["dk_depth"] * 3, *["dv_depth"] * 3]
    for name, mine, theirs in zip(names, *errors, strict=True):
        assert mine <= 2 * theirs + floor[name] * (1 if "dv" in name else side), name


def cut(x, start, end):
    return x.map(lambda y: y[:, start:end])


def test_backward_with_the_lse_of_a_larger_softmax():
    """As ring attention calls it: every part of the keys with the out and lse of all."""
    x = make_inputs(2, 6, 4, 2, 8, 2, S=9, dtype=torch.float64)
    x = large(x, 30)
    out, lse = torch.ops.moda.attention(*x, causal=False)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    backward = torch.ops.moda.attention_backward
    dq, dk, dv, *depth = backward(dout, dlse, *x, out, lse, causal=False)
    parts = [x._replace(k=x.k[:, a:b], v=x.v[:, a:b]) for a, b in pairwise((0, 4, 9))]
    parts[1] = parts[1]._replace(k_depth=[], v_depth=[])
    grads = [backward(dout, dlse, *part, out, lse, causal=False) for part in parts]
    torch.testing.assert_close(grads[0][0] + grads[1][0], dq)
    torch.testing.assert_close(torch.cat([g[1] for g in grads], 1), dk)
    torch.testing.assert_close(torch.cat([g[2] for g in grads], 1), dv)
    torch.testing.assert_close([*grads[0][3:]], depth)


SIDES = [2**31 - 1, 2**32, sys.maxsize]


EQUAL = "stream", "slots", "documents"  # these runs have as many keys as queries


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("run", "S"),
    [(run, S) for run in RUNS if run != "depth" for S in ((9,) if run in EQUAL else (4, 9, 14))],
)
def test_a_window_of_any_size_is_a_window(run, S, side, device):
    x = make_inputs(1, 9, 4, 2, 16, 1, S=S, device=device)
    cases = [({}, dict(window=(side, 0)), dict(window=(None, 0)))]
    if run in ("attention", "documents", "stream", "slots"):
        pairs = [((side, side), None), ((side, 1), (None, 1)), ((1, side), (1, None))]
        cases = [(dict(causal=False), dict(window=a), dict(window=b)) for a, b in pairs]
    for options, given, same in cases:
        results = [flat(RUNS[run], x, **options, **window) for window in (given, same)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def flat(run, x, **options):
    """Results and gradients, if there are any."""
    if run is decode:
        return run(x, **options)
    leaves = x.map(lambda y: y.detach().requires_grad_())
    out, lse = run(leaves, **options)
    total = out.square().sum() + lse.clamp(min=-99).sum()
    return [out, lse, *torch.autograd.grad(total, leaves.leaves())]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("T", "S"), [(9, 4), (4, 9)])
def test_a_window_of_any_size_beside_the_operators(T, S, side):
    q, k, v, _, _ = make_inputs(1, T, 4, 2, 16, 0, S=S)
    out, lse = moda_attention(q, k, v, causal=False, return_lse=True)
    cu = starts(0, T), starts(0, S)
    for options in ({}, dict(cu_seqlens=cu)):
        whole = moda_sink_mass(q, k, lse, keys=2, causal=False, **options)
        mass = moda_sink_mass(q, k, lse, keys=2, causal=False, window=side, **options)
        assert torch.equal(mass, whole)
    arrays = [x.numpy() for x in (q, k, v)]
    exact, _ = moda_reference.attention(*arrays, causal=False, window=side)
    tiled, _ = moda_reference.attention_tiled(*arrays, causal=False, window=side)
    for x in (exact, tiled):
        np.testing.assert_allclose(x, out, atol=1e-5)
    assert visible_pairs(T, S, side, side) == T * S


@pytest.mark.parametrize("side", [*SIDES, None])
def test_a_window_of_any_size_past_a_cache(side):
    """A length that the cache does not have, or below 0, changes nothing about its window."""
    q, cache = torch.randn(3, 1, 2, 8), torch.randn(3, 5, 1, 8)
    lengths = starts(2**31 - 1, 5, -(2**31))
    window = None if side is None else (side, 0)
    out, lse = moda_decode(q, cache, cache, None, None, lengths, window=window, return_lse=True)
    expected = moda_decode(q, cache, cache, None, None, starts(5, 5, 5))
    torch.testing.assert_close(out[:2], expected[:2])
    assert not out[2].any() and (lse[2] == float("-inf")).all()


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (run, sizes)
        for run in RUNS
        if run not in ("documents", "decode")
        for sizes in (dict(B=0), dict(T=0), dict(T=0, S=5), dict(S=0), dict(L=0), dict(S=0, L=0))
        if "S" not in sizes or run not in EQUAL
    ],
)
def test_sizes_of_zero(run, sizes, device):
    sizes = dict(B=2, T=9, HQ=4, H=2, D=8, L=2, DV=12) | sizes
    x = make_inputs(**sizes, device=device)
    leaves = x.map(lambda y: y.requires_grad_())
    out, lse = RUNS[run](leaves)
    total = out.sum() + lse.clamp(min=-99).sum()
    for grad in torch.autograd.grad(total, leaves.leaves(), materialize_grads=True):
        assert grad.isfinite().all()
    if run != "depth":
        arrays = Inputs(*x).numpy()
        options = dict(chunk_size=4) if run == "chunks" else {}
        name = "chunk_attention" if run == "chunks" else "attention"
        exact, exact_lse = getattr(moda_reference, name)(*arrays, **options)
        np.testing.assert_allclose(out.detach().cpu(), exact, atol=1e-5)
        np.testing.assert_allclose(lse.detach().cpu(), exact_lse, atol=1e-5)
