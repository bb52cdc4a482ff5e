"""Packed documents: the kernels against a loop of the NumPy reference over documents."""

import itertools

import numpy as np
import pytest
import torch
from test_attention_kernels import DTYPES, run_kernels

from helpers import Inputs, assert_matches_reference, make_inputs
from moda_kernels import tuning
from moda_kernels.bands import launch_bands

LENGTHS = [  # of queries and keys of each document
    ([5, 0, 1, 9], None),
    ([7], None),
    ([0, 0, 3, 0], None),
    ([4, 6, 2], [4, 0, 9]),
    ([3, 0, 5, 1], [8, 2, 3, 1]),
    ([40, 1, 33], None),
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(window=(3, 1), softcap=2.0)])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize(
    ("G", "D", "L", "form", "parts"),
    [(2, 16, 3, "list", 1), (3, 24, 0, "list", 3), (8, 64, 5, "packed", 2)],
)
def test_each_document_matches_the_reference(
    G, D, L, form, queries, keys, options, parts, dtype, device, monkeypatch
):
    monkeypatch.setattr(tuning, "backward_dkv_parts", lambda *sizes: parts)
    keys = keys or queries
    inputs = make_inputs(
        1, sum(queries), G, 1, D, L, S=sum(keys), dtype=dtype, device=device, form=form
    )
    cu = starts(queries, device), starts(keys, device)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(inputs.q.shape, generator=generator).to(inputs.q)
    dlse = torch.randn(1, G, sum(queries), generator=generator).to(device)
    out, lse, grads = run_kernels(cu_seqlens=cu, **options)(inputs, dout, dlse)
    for i in range(len(queries)):
        t, s = (slice(sum(x[:i]), sum(x[: i + 1])) for x in (queries, keys))
        assert_matches_reference(
            document(inputs, t, s),
            lambda *_, t=t, s=s: (out[:, t], lse[:, :, t], document(grads, t, s)),
            (dout[:, t].contiguous(), dlse[:, :, t].contiguous()),
            **options,
        )
