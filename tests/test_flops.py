"""FlopCounterMode on every operator, against closed forms and against the pairs themselves."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import moda_reference
from moda_ops import DepthStream, moda_attention
from moda_ops.rules.flops import visible_pairs
from operators import DIFFERENTIABLE, DOCUMENTS, KEY_DOCUMENTS, make_call

B, T, S, HQ, H, D, DV, L = 2, 5, 7, 4, 2, 8, 4, 3  # as operators.make_call has them


def count(f, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        f(*arguments, **options)
    return counter.get_total_flops()


def pairs(causal=True, window=None, T=T, S=S) -> int:
    """Of one head: counted in the mask of the reference."""
    return int(moda_reference.visible(T, S, causal, window).sum())


def packed_pairs(causal, window) -> int:
    lengths = (np.diff(starts[0]).tolist() for starts in (DOCUMENTS, KEY_DOCUMENTS))
    return sum(pairs(causal, window, t, s) for t, s in zip(*lengths, strict=True))


HAND_COUNTED = {  # the pairs that one head of each call in operators.make_call sees
    # causal, S - T = 2, left 3: 3, 4, 4, 4, 4
    "attention": B * (3 + 4 + 4 + 4 + 4) + B * T * L,
    # 2 and 2 queries over 3 and 2 keys, none causal, left 3; the fifth query sees depth alone
    "attention_varlen": (3 + 3 + 2 + 2) + T * L,
    # causal, left 4: 3, 4, 5, 5, 5; chunks of 2: each token sees 1, 2, 1, 2, 1 tokens' slots
    "chunk_attention": B * (3 + 4 + 5 + 5 + 5) + B * (1 + 2 + 1 + 2 + 1) * L,
    "depth_attention": B * T * L,
}


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_closed_form(name, form):
    n = HAND_COUNTED[name]
    assert count(make_call(name, form=form).run) == 2 * HQ * n * (D + DV)
    backward = make_call(f"{name}_backward", form=form)
    assert count(backward.run) == 2 * HQ * n * (3 * D + 2 * DV)
    backward.arguments[1] = None  # without dlse
    assert count(backward.run) == 2 * HQ * n * (3 * D + 2 * DV)


@pytest.mark.parametrize("window", [None, (2, 1), (0, 0), (None, 2), (9, None)])
@pytest.mark.parametrize("causal", [True, False])
def test_masks(causal, window):
    """Every mask in which a sequence can be read, autograd's call of the backward included."""
    for t in range(4):
        for s in range(6):
            left, right = window or (None, None)
            counted = visible_pairs(t, s, left, 0 if causal else right)
            assert counted == pairs(causal, window, t, s)
    q, k = torch.randn(B, T, HQ, D, requires_grad=True), torch.randn(B, S, H, D)
    slots = [torch.randn(B, T, H, D)] * L
    n = B * HQ * (pairs(causal, window) + T * L)

    def forward_backward():
        moda_attention(q, k, k, slots, slots, causal=causal, window=window).sum().backward()

    assert count(forward_backward) == 2 * n * 2 * D + 2 * n * 5 * D

    left, right = window or (None, None)
    call = make_call("attention_varlen")
    options = dict(causal=causal, window_left=left, window_right=right)
    n = HQ * (packed_pairs(causal, window) + T * L)
    assert count(call._replace(options=options).run) == 2 * n * (D + DV)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_chunks(chunk_size):
    call = make_call("chunk_attention")._replace(options=dict(chunk_size=chunk_size))
    tokens = int(moda_reference.chunk_visible(T, chunk_size).sum())
    assert count(call.run) == 2 * B * HQ * (pairs() + tokens * L) * (D + DV)


@pytest.mark.parametrize("page_size", [None, 2])
@pytest.mark.parametrize("append", [False, True])
def test_decoding(append, page_size):
    call = make_call("decode", page_size=page_size)  # 2 tokens; 4 and 2 in the caches, left 2
    n = (3 + 3) + (1 + 2) + B * 2 * L
    if append:  # at 4 and 5, and at 2 and 3
        call.arguments[6:6] = [torch.randn(B, 2, H, d) for d in (D, DV)]
        call, n = call._replace(name="decode_"), (3 + 3) + (3 + 3) + B * 2 * L
    assert count(call.run) == 2 * HQ * n * (D + DV)
    call.arguments[5][0] = 10**6  # longer than the cache, of 7 or 8: nothing of the end is there
    n -= 3 + 3
    assert count(call.run) == 2 * HQ * n * (D + DV)


def test_a_stream():
    q, k, v = torch.randn(B, T, HQ, D), torch.randn(B, T, H, D), torch.randn(B, T, H, DV)
    k.requires_grad_()

    def run():
        stream = DepthStream.allocate(3, B, T, H, D, DV)
        first, stream = stream.write(k, v).write(k, v).attend(q)  # 1 slot
        second, stream = stream.attend(q, k[:, :3], v[:, :3])  # 2 slots
        third, stream = stream.attend_depth(q)  # 2 slots
        (first + second + third).sum().backward()

    n = B * (pairs(S=T) + pairs(S=3) + T * (1 + 2 + 2))
    assert count(run) == 2 * HQ * n * (D + DV) + 2 * HQ * n * (3 * D + 2 * DV)
    x = [torch.randn(1, T, heads, dim) for heads, dim in ((HQ, D), (H, D), (H, DV))]
    starts = torch.tensor(DOCUMENTS[0], dtype=torch.int32)
    stream = DepthStream.allocate(2, 1, T, H, D, DV).write(*x[1:]).write(*x[1:])
    counted = count(stream.attend, x[0], cu_seqlens=(starts, starts))
    assert counted == 2 * HQ * (3 + 3 + T) * (D + DV)  # two documents of two tokens


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "decode"])
def test_lengths_that_are_not_known(name):
    """Of fake tensors: the most that there can be, one document or full caches."""
    call = make_call(name)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in call.leaves()]
        counted = count(call.run, *fake)
    n = {
        "attention": HAND_COUNTED["attention"],
        "attention_varlen": pairs(False, (3, None)) + T * L,
        "decode": B * 2 * (3 + L),
    }[name]
    assert counted == 2 * HQ * n * (D + DV)


AFTER = "import torch.utils.flop_counter, moda_ops"
BEFORE = "import importlib.util, moda_ops; importlib.util.find_spec('torch.utils.flop_counter')"
SCRIPT = """
import importlib, torch, torch.utils.flop_counter
for again in range(2):
    x = torch.zeros(1, 3, 1, 4)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        moda_ops.moda_attention(x, x, x)
    print(counter.get_total_flops())
    importlib.reload(torch.utils.flop_counter)
"""


@pytest.mark.parametrize("imports", [BEFORE, AFTER])
def test_any_order_of_imports(imports):
    path = f"import sys; sys.path[:0] = {sys.path}\n"
    result = subprocess.run(
        [sys.executable, "-c", path + imports + SCRIPT], capture_output=True, text=True
    )
    assert result.stdout.split() == [str(2 * 6 * 8)] * 2, result.stderr


def test_import_caches_may_be_invalidated():
    importlib.invalidate_caches()
