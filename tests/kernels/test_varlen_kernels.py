"""Packed documents: the kernels against a loop of the NumPy reference over documents."""

import itertools

import numpy as np
import pytest
import torch
from test_attention_kernels import run_kernels

import moda_kernels
from helpers import (
    COMPILED,
    Inputs,
    assert_matches_reference,
    in_dtypes,
    make_cotangents,
    make_inputs,
)
from moda_kernels import tuning
from moda_kernels.bands import launch_bands
from moda_ops import DepthStream, moda_attention_varlen
from moda_ops.operators import definition as ops

LENGTHS = [  # of queries and keys of each document
    ([5, 0, 1, 9], None),
    ([7], None),
    ([0, 0, 3, 0], None),
    ([4, 6, 2], [4, 0, 9]),
    ([3, 0, 5, 1], [8, 2, 3, 1]),
    ([40, 1, 33], None) if COMPILED else ([17, 1], [38, 3]),  # some blocks need no mask
]
WINDOWS = [(None, 0), (None, None), (3, 0), (2, 1), (0, 0), (None, 2)]


def starts(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@pytest.mark.parametrize(("left", "right"), WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("padding", [0, 3])
def test_bands(queries, keys, left, right, padding, device):
    """Each token's and each key's band is the mask's, in columns that never fall."""
    keys = keys or queries
    T, S = sum(queries) + padding, sum(keys) + padding
    seen = np.zeros((T, S), dtype=bool)
    for i, (m, n) in enumerate(zip(queries, keys, strict=True)):
        t, s = sum(queries[:i]), sum(keys[:i])
        position, key = np.arange(n - m, n)[:, None], np.arange(n)[None, :]
        band = np.ones((m, n), dtype=bool)
        band &= key >= position - left if left is not None else True
        band &= key <= position + right if right is not None else True
        seen[t : t + m, s : s + n] = band
    cu = starts(queries, device), starts(keys, device)
    first_key, last_key, first_token, last_token = (
        x.cpu().numpy() for x in launch_bands(*cu, T, S, left, right)
    )
    key, token = np.arange(S)[None, :], np.arange(T)[:, None]
    assert ((key >= first_key[:, None]) & (key <= last_key[:, None]) == seen).all()
    assert ((token >= first_token[None, :]) & (token <= last_token[None, :]) == seen).all()
    for column in (first_key, last_key, first_token, last_token):
        assert (np.diff(column) >= 0).all()


def test_no_document_at_all(device):
    """A table of one entry: what lies after it in memory is not read."""
    cu = torch.tensor([0, 100], dtype=torch.int32, device=device)[:1]
    assert [x.tolist() for x in launch_bands(cu, cu, 3, 2, None, 0)] == [
        [0, 0, 0], [-1, -1, -1], [0, 0], [-1, -1],
    ]  # fmt: skip


def document(inputs, t, s):
    """One document of packed inputs, as a batch of one."""
    q, k, v, k_depth, v_depth = inputs
    k_depth, v_depth = ([x[:, t] for x in depth] for depth in (k_depth, v_depth))
    return Inputs(q[:, t], k[:, s], v[:, s], k_depth, v_depth)


def documents(queries, keys):
    """Where each document is in the packed queries and keys."""
    for i in range(len(queries)):
        yield [slice(sum(x[:i]), sum(x[: i + 1])) for x in (queries, keys)]


def assert_documents_match_reference(inputs, run, queries, keys, **options):
    """``assert_matches_reference`` for each document of one call of ``run``."""
    dout, dlse = make_cotangents(inputs)
    out, lse, grads = run(inputs, dout, dlse)
    for t, s in documents(queries, keys):
        assert_matches_reference(
            document(inputs, t, s),
            lambda *_, t=t, s=s: (out[:, t], lse[:, :, t], document(grads, t, s)),
            (dout[:, t].contiguous(), dlse[:, :, t].contiguous()),
            **options,
        )


def cases():
    """Shapes x lengths x options x dtypes; for the interpreter one shape and dtype to each pair of
    lengths and options, such that all shapes, options and dtypes meet."""
    shapes = [(2, 16, 3, "list", 1), (3, 24, 0, "list", 3), (8, 64, 5, "packed", 2)]
    options = [{}, dict(causal=False), dict(window=(3, 1), softcap=2.0)]
    for s, n, o in itertools.product(*map(range, (len(shapes), len(LENGTHS), len(options)))):
        if COMPILED or s == (n + o) % len(shapes):
            case = *shapes[s], *LENGTHS[n], options[o]
            yield from in_dtypes(n + 1, *case, id=f"{shapes[s]}-{LENGTHS[n]}-{options[o]}")


@pytest.mark.parametrize(
    ("G", "D", "L", "form", "parts", "queries", "keys", "options", "dtype"), list(cases())
)
def test_each_document_matches_the_reference(
    G, D, L, form, parts, queries, keys, options, dtype, device, monkeypatch
):
    monkeypatch.setattr(tuning, "backward_dkv_parts", lambda *sizes: parts)
    keys = keys or queries
    inputs = make_inputs(
        1, sum(queries), G, 1, D, L, S=sum(keys), dtype=dtype, device=device, form=form
    )
    cu = starts(queries, device), starts(keys, device)
    run = run_kernels(cu_seqlens=cu, **options)
    assert_documents_match_reference(inputs, run, queries, keys, **options)


@pytest.mark.parametrize(
    ("newest", "dtype"),
    [case for newest in (True, False) for case in in_dtypes(newest, newest, id=str(newest))],
)
def test_readers_of_a_stream_are_calls_with_its_slots(newest, dtype, device, monkeypatch):
    """But for six readers' gradients of k and of v, which are added up in another order."""
    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    lengths = [5, 0, 1, 3] if COMPILED else [3, 0, 1]
    cu = starts(lengths, device), starts(lengths, device)
    leaves = make_inputs(1, sum(lengths), 3, 1, 16, 0, dtype=dtype, device=device)[:3]
    q, *k_v = (x.requires_grad_() for x in leaves)
    results = []
    for stream in (DepthStream.allocate(3, *leaves[1].shape, dtype=dtype, device=device), None):
        outs, slots = [], []
        for reader in (1, 2, 3):
            k, v = (reader * x for x in k_v)
            if stream is None:
                depth = [torch.stack(x, 2)[0] for x in zip(*slots, strict=True)] or [None, None]
                outs.append(moda_attention_varlen(q[0], k[0], v[0], *depth, *cu)[None])
                slots.append((k, v))
            elif newest:
                out, stream = stream.write(k, v).attend(q, cu_seqlens=cu)
                outs.append(out)
            else:
                out, stream = stream.attend(q, k, v, cu_seqlens=cu)
                outs.append(out)
                stream = stream.write(k, v)
        out = torch.cat(outs, 2)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).norm() <= 6 * torch.finfo(dtype).eps * b.double().norm()
