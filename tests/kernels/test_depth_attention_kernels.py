"""Attention over depth alone, S = 0: its kernels against the NumPy reference."""

import itertools

import pytest
import torch
from test_attention_kernels import TOKENS, check, heads

import moda_kernels
from helpers import COMPILED, FORMS, in_dtypes, make_inputs
from moda_kernels import backward_dkv, backward_dq, forward


@pytest.fixture(autouse=True)
def no_sequence_kernels(monkeypatch):
    """Nothing is left to do for the passes over the sequence."""

    def never(*args):
        raise AssertionError("a pass over the sequence ran")

    for module in (forward, backward_dq, backward_dkv):
        monkeypatch.setattr(module, "_prepare", never)


def shapes():
    """Head dims x groups, each pair with one of the L, T, DV and depth forms in turn."""
    turns = [
        (1, 7, 18, 72 if COMPILED else 33),
        TOKENS if COMPILED else (1, 5, 9),
        (None, None, None, 40),
        FORMS,
    ]
    turn = zip(*map(itertools.cycle, turns), strict=False)
    for dtype, D, G in heads():
        L, T, DV, form = next(turn)
        name = f"D{D}-G{G}-L{L}-T{T}-DV{DV}-{form}"
        yield from in_dtypes(dtype, D, G, L, T, DV, form, id=name)


@pytest.mark.parametrize(("D", "G", "L", "T", "DV", "form", "dtype"), list(shapes()))
def test_shapes(D, G, L, T, DV, form, dtype, device):
    B, H = (1, 1) if G == 64 else (2, 2) if COMPILED or T < 9 else (1, 2)
    check(make_inputs(B, T, G * H, H, D, L, S=0, DV=DV, dtype=dtype, device=device, form=form))


OPTIONS = [{"softcap": 1.5}, {"scale": 0.3}, {"scale": 2.0}]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [case for i, x in enumerate(OPTIONS) for case in in_dtypes(i, x, id=str(x))],
)
def test_options(options, dtype, device):
    inputs = make_inputs(
        2, 9 if COMPILED else 5, 4, 2, 16, 5, S=0, dtype=dtype, device=device, form="embedded"
    )
    check(inputs, **options)


@pytest.mark.parametrize(("G", "dtype"), [*in_dtypes(0, 80, id="80"), *in_dtypes(1, 130, id="130")])
def test_group_wider_than_a_block(G, dtype, device):
    """dq is then summed in float32 from one block of slots to the next, and finished at the end."""
    check(make_inputs(1, 3, G, 1, 64, 40, S=0, dtype=dtype, device=device), scale=0.3)


def test_large_scores_stay_finite(device):
    inputs = make_inputs(1, 9, 2, 1, 16, 20, S=0, device=device)
    check(inputs._replace(q=inputs.q * 60))


def test_results_are_those_of_a_split_plan_without_a_sequence(device):
    """From nothing, or from a sequence's out = 0 and lse = -inf: the same bits."""
    from moda_kernels.forward_depth import launch_forward_depth
    from moda_kernels.operators import problem

    inputs = make_inputs(2, 13, 4, 2, 16, 5, S=0, dtype=torch.float16, device=device)
    q, k, v, k_depth, v_depth = inputs
    p = problem(q, k, v, k_depth, 0.25, None, None, None)
    nothing = torch.zeros_like(q), q.new_full((2, 4, 13), float("-inf"), dtype=torch.float32)
    merged = launch_forward_depth(p, q, k_depth, v_depth, *nothing)
    for a, b in zip(merged, moda_kernels.attention(*inputs, 0.25, None, None, None), strict=True):
        assert torch.equal(a, b)
