"""Depth shared within chunks: its kernels against the NumPy reference."""

import itertools

import pytest
import torch
from test_attention_kernels import heads

import moda_kernels
from helpers import (
    COMPILED,
    FORMS,
    Inputs,
    assert_matches_reference,
    in_dtypes,
    make_cotangents,
    make_inputs,
)
from moda_kernels import backward_chunk_dkv, backward_chunk_dq, forward


def run_kernels(chunk_size, scale=None, window=None, softcap=None):
    """``assert_matches_reference``'s run: options in the form that the launchers take."""

    def run(inputs, dout, dlse):
        options = (chunk_size, scale or inputs.q.shape[-1] ** -0.5, window, softcap)
        out, lse = moda_kernels.chunk_attention(*inputs, *options)
        grads = moda_kernels.chunk_attention_backward(dout, dlse, *inputs, out, lse, *options)
        return out, lse, Inputs(*grads)

    return run


def check(inputs, **options):
    assert_matches_reference(inputs, run_kernels(**options), **options)


def shapes():
    """Head dims x groups, each pair with one of the chunk sizes, L, T, S - T, DV and depth forms in
    turn."""
    tokens = (23, 64, 111, 300) if COMPILED else (3, 7, 17)
    slots = (1, 4, 9, 2, 72) if COMPILED else (1, 4, 7, 2, 5)
    turns = [(2, 7, 5, 40, 3), slots, tokens, (0, 5), (None, None, None, 40), FORMS]
    turn = zip(*map(itertools.cycle, turns), strict=False)
    for dtype, D, G in heads():
        C, L, T, extra, DV, form = next(turn)
        name = f"D{D}-G{G}-C{C}-L{L}-T{T}-S{T + extra}-DV{DV}-{form}"
        yield from in_dtypes(dtype, D, G, C, L, T, T + extra, DV, form, id=name)


@pytest.mark.parametrize(("D", "G", "C", "L", "T", "S", "DV", "form", "dtype"), list(shapes()))
def test_shapes(D, G, C, L, T, S, DV, form, dtype, device):
    B, H = (1, 1) if G == 64 else (2, 2)
    inputs = make_inputs(B, T, G * H, H, D, L, S=S, DV=DV, dtype=dtype, device=device, form=form)
    check(inputs, chunk_size=C)


@pytest.mark.parametrize(
    ("C", "dtype"),
    [case for i, C in enumerate([2, 16, 33, 64, 1000]) for case in in_dtypes(i, C, id=str(C))],
)
def test_chunks_and_tiles_of_any_size(C, dtype, device):
    """Tiles begin and end within chunks; a chunk has several blocks of rows, of depth and of q."""
    inputs = make_inputs(1, 70, 3, 1, 16, 3, dtype=dtype, device=device, form="embedded")
    check(inputs, chunk_size=C)


OPTIONS = [
    {"softcap": 1.5},
    {"scale": 0.3},
    {"window": 4},
    {"window": 0},
    {"window": 4, "softcap": 1.5, "scale": 0.3},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [case for i, x in enumerate(OPTIONS) for case in in_dtypes(i // 2, x, id=str(x))],
)
def test_options(options, dtype, device):
    inputs = make_inputs(2, 19, 4, 2, 16, 5, S=25, dtype=dtype, device=device, form="embedded")
    check(inputs, chunk_size=6, **options)


@pytest.mark.parametrize("S", [0, 4])
def test_rows_without_keys(S, device):
    """S < T hides all keys of the sequence from the first rows, which have depth alone."""
    check(make_inputs(2, 9, 3, 1, 16, 3, S=S, device=device), chunk_size=4)


def test_large_scores_stay_finite(device):
    inputs = make_inputs(1, 40, 2, 1, 16, 5, device=device)
    check(inputs._replace(q=inputs.q * 60), chunk_size=16)


@pytest.mark.parametrize("chunk_size", [1, 2**40])
def test_one_token_or_one_chunk(chunk_size, device, monkeypatch):
    """A chunk of one token is plain MoDA, which has better kernels."""
    if chunk_size == 1:
        for module in (backward_chunk_dkv, backward_chunk_dq):
            monkeypatch.setattr(module, "_prepare", None)
    inputs = make_inputs(2, 13, 4, 2, 16, 3, dtype=torch.float16, device=device)
    check(inputs, chunk_size=chunk_size)


def test_results_do_not_depend_on_the_form_of_depth(device):
    packed = make_inputs(2, 23, 4, 2, 64, 6, dtype=torch.float16, device=device, form="packed")
    slots = packed._replace(
        k_depth=list(packed.k_depth[0].unbind(2)), v_depth=list(packed.v_depth[0].unbind(2))
    )
    cotangents = make_cotangents(packed)
    out, lse, grads = run_kernels(5)(packed, *cotangents)
    slot_out, slot_lse, slot_grads = run_kernels(5)(slots, *cotangents)
    assert torch.equal(out, slot_out) and torch.equal(lse, slot_lse)
    for a, b in zip(grads[:3], slot_grads[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads[3:], slot_grads[3:], strict=True):
        assert torch.equal(a[0], torch.stack(b, 2))


def test_runs_are_bitwise_equal(device):
    T, runs = (40, 20) if COMPILED else (9, 2)
    inputs = make_inputs(1, T, 4, 2, 64, 3, dtype=torch.float16, device=device)
    cotangents = make_cotangents(inputs)
    runs = [run_kernels(16)(inputs, *cotangents) for _ in range(runs)]
    for out, lse, grads in runs[1:]:
        for a, b in zip(grads.leaves(), runs[0][2].leaves(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1])


@pytest.mark.gpu
def test_one_compilation_serves_all_chunks_lengths_and_depths():
    kernels = [
        forward._moda_forward_kernel,
        backward_chunk_dkv._moda_backward_chunk_dkv_kernel,
        backward_chunk_dq._moda_backward_chunk_dq_kernel,
    ]
    counts = []
    for C, T, L in [(2, 48, 3), (16, 17, 16), (3, 64, 1), (1000, 300, 33)]:
        inputs = make_inputs(2, T, 6, 3, 48, L, dtype=torch.bfloat16, device="cuda")
        check(inputs, chunk_size=C)
        counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    assert counts == counts[:1] * 4


def test_more_pairs_of_token_and_slot_than_32_bits_count():
    T, L = 2**20, 2**11
    q, depth = torch.zeros(16).expand(1, T, 1, 16), torch.zeros(16).expand(1, T, L, 1, 16)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pairs .* T = 1048576 and L = 2048"):
        moda_kernels.chunk_attention(q, q, q, [depth], [depth], 64, 0.25, None, None)
