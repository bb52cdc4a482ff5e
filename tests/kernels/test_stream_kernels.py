"""Attention over a depth stream: kernels against the NumPy reference, and the running gradient."""

import pytest
import torch
from test_varlen_kernels import assert_documents_match_reference, document, documents, starts

import moda_kernels
from helpers import (
    COMPILED,
    Inputs,
    assert_matches_reference,
    by_turns,
    in_dtypes,
    make_cotangents,
    make_inputs,
    rounding,
)
from moda_kernels import tuning
from moda_ops import DepthStream
from moda_ops.operators import definition as ops


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch):
    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)


def as_stream(inputs, newest, grad_dtype, places=None):
    """Buffer and token whose slots are depth and, if ``newest``, the sequence last; the rest of the
    buffer is NaN."""
    q, k, v, k_depth, v_depth = inputs
    slots = list(zip(k_depth, v_depth, strict=True)) + ([(k, v)] if newest else [])
    shape = (q.shape[0], q.shape[1], k.shape[2], k.shape[3] + v.shape[3])
    places = range(len(slots)) if places is None else places
    buffer = torch.ops.moda.stream_buffer(q.new_empty(0), (max(places, default=0) + 2, *shape))
    buffer.fill_(float("nan"))
    empty = q.new_empty(0, *shape, dtype=grad_dtype)
    for place, pair in zip([n for n in places if n >= 0], slots, strict=True):
        torch.ops.moda.stream_write(*pair, buffer, empty, place)
    token = torch.empty_strided((len(places), *shape), (0,) * 5, dtype=grad_dtype, device=q.device)
    return buffer, token


def run_stream(newest, grad_dtype, dtoken=None, places=None, **options):
    """``assert_matches_reference``'s run, through the stream operators and ``dtoken``."""
    window = options.pop("window", None)
    left, right = window if isinstance(window, tuple) else (window, window)
    options |= dict(window_left=left, window_right=right)

    def run(inputs, dout, dlse):
        q, D = inputs.q, inputs.q.shape[-1]
        buffer, token = as_stream(inputs, newest, grad_dtype, places)
        k, v = (None, None) if newest else inputs[1:3]
        options["places"] = places
        out, lse, _ = torch.ops.moda.stream_attention(q, k, v, buffer, token, **options)
        dq, dk_dv, grads = torch.ops.moda.stream_attention_backward(
            dout, dlse.to(lse), dtoken, q, k, v, buffer, out, lse, len(token), grad_dtype, **options
        )
        dropped = [n < 0 for n in places or [0] * len(token)]
        assert not grads[dropped].any()
        grads = grads[[not gone for gone in dropped]].unbind()
        slots = [[g[..., :D] for g in grads], [g[..., D:] for g in grads]]
        dk, dv = [x.pop() for x in slots] if newest else dk_dv
        return out, lse, Inputs(dq, dk, dv, *slots)

    return run


SHAPES = [  # B, T, S, HQ, H, D, DV, L
    (2, 9, None, 2, 2, 16, 16, 3),
    (1, 23, None, 6, 2, 24, 40, 0),
    (2, 23 if COMPILED else 9, None, 16, 2, 64, 64, 17),
    (1, 13, None, 3, 1, 70, 20, 5),
    (1, 9, 46, 4, 2, 32, 16, 4),
    (1, 9, 0, 4, 2, 16, 24, 2),
]


@pytest.mark.parametrize(("B", "T", "S", "HQ", "H", "D", "DV", "L", "dtype"), by_turns(SHAPES))
def test_matches_reference(B, T, S, HQ, H, D, DV, L, dtype, device):
    inputs = make_inputs(B, T, HQ, H, D, L, S=S, DV=DV, dtype=dtype, device=device)
    assert_matches_reference(inputs, run_stream(S is None, dtype))


@pytest.mark.parametrize(
    ("S", "options", "dtype"),
    by_turns(
        [
            (None, dict(causal=False)),
            (None, dict(window=3, softcap=1.5, scale=0.4)),
            (15, dict(window=3, softcap=1.5, scale=0.4)),
            (15, dict(causal=False, window=(6, 2), softcap=2.0)),
            (0, dict(causal=False, softcap=2.0, scale=0.7)),
        ]
    ),
)
def test_options(S, options, dtype, device):
    """Alone, and on top of a running gradient."""
    T = 11 if COMPILED else 7
    inputs = make_inputs(1, T, 3, 1, 16, 3, S=S, DV=24, dtype=dtype, device=device)
    run = run_stream(S is None, dtype, **options)
    assert_matches_reference(inputs, run, **options)
    assert_running_is_added(inputs, S is None, **options)


def test_depth_alone_is_a_sequence_of_no_keys(device):
    inputs = make_inputs(1, 9, 4, 2, 16, 5, S=0, device=device)
    stream = DepthStream(*as_stream(inputs, False, torch.float32), head_dim=16)
    options = dict(softcap=1.5, scale=0.4)
    run = run_stream(False, torch.float32, causal=False, **options)
    expected, *_ = run(inputs, *make_cotangents(inputs))
    assert torch.equal(stream.attend_depth(inputs.q, **options)[0], expected)


@pytest.mark.parametrize(
    ("queries", "keys", "parts", "options", "dtype"),
    by_turns(
        [
            ([13, 0, 1, 7], None, 1, {}),
            ([9, 0, 1, 4], None, 2, dict(window=(3, 1), softcap=2.0, scale=0.3)),
            ([4, 6, 2], [4, 0, 9], 1, dict(causal=False)),
            ([3, 0, 5, 1], [8, 2, 3, 1], 1, dict(window=3, softcap=2.0)),
        ]
    ),
)
def test_packed_documents(queries, keys, parts, options, dtype, device, monkeypatch):
    """Alone, and on top of a running gradient; without keys of their own the newest slot's."""
    monkeypatch.setattr(tuning, "backward_dkv_parts", lambda *sizes: parts)
    newest, keys = keys is None, keys or queries
    inputs = make_inputs(
        1, sum(queries), 3, 1, 16, 3, S=sum(keys), DV=24, dtype=dtype, device=device
    )
    cu = dict(cu_seqlens_q=starts(queries, device), cu_seqlens_k=starts(keys, device))
    run = run_stream(newest, dtype, **cu, **options)
    assert_documents_match_reference(inputs, run, queries, keys, **options)
    dout, dlse = make_cotangents(inputs)
    floors = [
        rounding(document(inputs, t, s), dout[:, t], dlse[..., t], **options)
        for t, s in documents(queries, keys)
    ]
    floor = {name: max(each[name] for each in floors) for name in floors[0]}
    assert_running_is_added(inputs, newest, floor, **cu, **options)


PLACES = dict(
    recent=[-1, -1, 4, 5, 6, 7],
    spaced=[0, -1, 2, -1, 4, -1, 6],
    uneven=[0, -1, 4, 5, 7],
    spaced_in_the_buffer_alone=[1, 2, -1, 3, 4],
)
every_place = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)


@pytest.mark.parametrize(("places", "dtype"), by_turns([*PLACES.values()]))
def test_dropped_slots(places, dtype, device):
    """Of the four slots that are there the last is the sequence; then five, and keys outside."""
    T = 9 if COMPILED else 3
    inputs = make_inputs(2, T, 4, 2, 16, 3, DV=24, dtype=dtype, device=device)
    assert_matches_reference(inputs, run_stream(True, dtype, places=places))
    inputs = make_inputs(1, T, 4, 2, 16, 5, S=T + 2, dtype=dtype, device=device)
    places = [*places, max(places) + 1, -1]
    assert_matches_reference(inputs, run_stream(False, torch.float32, places=places))


@pytest.mark.parametrize(
    ("newest", "dtype"),
    [case for newest in (True, False) for case in in_dtypes(newest, newest, id=str(newest))],
)
@every_place
def test_running_gradient_of_slots_that_are_left(places, newest, dtype, device):
    T = 9 if COMPILED else 3
    inputs = make_inputs(1, T, 4, 2, 16, 4 - newest, dtype=dtype, device=device)
    assert_running_is_added(inputs, newest, places=places)


@pytest.mark.parametrize(
    ("HQ", "H", "D", "L", "newest", "dtype"),
    by_turns([(4, 2, 16, 3), (16, 2, 64, 17), (64, 1, 64, 5), (3, 1, 70, 2)], [True, False]),
)
def test_running_gradient_is_added_before_the_one_rounding(HQ, H, D, L, dtype, newest, device):
    B, T = (2, 23) if COMPILED else (1, 5)
    inputs = make_inputs(B, T, HQ, H, D, L, dtype=dtype, device=device)
    assert_running_is_added(inputs, newest)


def assert_running_is_added(inputs, newest, floor=None, places=None, **options):
    """Gradients on top of what later readers have left are the sums of both, rounded once."""
    cotangents, generator = make_cotangents(inputs), torch.Generator().manual_seed(2)
    (B, T), H, D, DV = inputs.q.shape[:2], *inputs.k.shape[2:], inputs.v.shape[-1]
    running = torch.randn(len(inputs.k_depth) + newest, B, T, H, D + DV, generator=generator)
    floor = floor or rounding(inputs, *cotangents, **options)
    *_, alone = run_stream(newest, torch.float32, None, places, **options)(inputs, *cotangents)
    for grad_dtype in {torch.float32, inputs.q.dtype}:
        dtoken = running.to(inputs.q.device, grad_dtype)
        run = run_stream(newest, grad_dtype, dtoken, places, **options)
        *_, both = run(inputs, *cotangents)
        assert_running(newest, both, alone, dtoken, floor)


def assert_running(newest, both, alone, dtoken, floor):
    """``both`` are the gradients ``alone`` and what was running, added in one rounding."""
    assert torch.equal(both.q, alone.q)
    dims = both.k.shape[-1], both.v.shape[-1]
    k_before, v_before = (list(x) for x in dtoken.split(dims, -1))
    if newest:
        assert_one_rounding(both.k, alone.k, k_before.pop(), floor["dk"])
        assert_one_rounding(both.v, alone.v, v_before.pop(), floor["dv"])
    else:
        assert torch.equal(both.k, alone.k) and torch.equal(both.v, alone.v)
    for args in zip(both.k_depth, alone.k_depth, k_before, strict=True):
        assert_one_rounding(*args, floor["dk_depth"])
    for args in zip(both.v_depth, alone.v_depth, v_before, strict=True):
        assert_one_rounding(*args, floor["dv_depth"])


def assert_one_rounding(total, own, before, floor):
    """total = own + before, rounded to its dtype once; float32 sums ``own`` up as it pleases."""
    exact = own.double() + before.double()
    final = torch.finfo(total.dtype)
    bound = final.eps / 2 * exact.abs().clamp(min=final.smallest_normal) + floor
    bound += torch.finfo(torch.float32).eps * before.abs().double()
    assert ((total.double() - exact).abs() <= bound).all()


def test_running_gradient_may_have_any_strides(device):
    inputs = make_inputs(1, 9, 2, 1, 16, 3, device=device)
    cotangents = make_cotangents(inputs)
    dtoken = torch.randn(4, 1, 9, 1, 32, device=device)
    expected = run_stream(True, torch.float32, dtoken)(inputs, *cotangents)[2]
    strided = dtoken.permute(4, 2, 0, 1, 3).contiguous().permute(2, 3, 1, 4, 0)
    actual = run_stream(True, torch.float32, strided)(inputs, *cotangents)[2]
    assert all(map(torch.equal, actual.leaves(), expected.leaves()))
