"""Depth mass and sink mass: values, torch.ops.moda.depth_mass to PyTorch, errors."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import moda_reference
from helpers import COMPILED, FORMS, Inputs, assert_accurate, by_turns, make_inputs
from moda_ops import moda_attention, moda_attention_varlen, moda_depth_mass, moda_sink_mass
from moda_ops.operators import definition as ops
from moda_ops.operators import eager

EPS = torch.finfo(torch.float32).eps


def plain_mass(scores, lse):
    """The mean over tokens of exp(scores [B, HQ, T, n] - lse [B, HQ, T])."""
    return torch.exp(scores - lse[..., None]).mean(2)


def scores_of(q, keys, scale=None, softcap=None):
    """[B, HQ, T, n] of q (B, T, HQ, D) and n keys (B, T, H, D) of each token."""
    G, scale = q.shape[2] // keys[0].shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.stack([(q * k.repeat_interleave(G, 2)).sum(-1) for k in keys], -1) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.transpose(1, 2)


def assert_mass(name, actual, exact, q, keys, lse, **options):
    """Twice a plain evaluation's error, plus one float32 rounding of each score, sum and lse."""
    exact_q, sizes = q.double(), [q.abs().double(), [k.abs().double() for k in keys]]
    p = torch.exp(
        scores_of(exact_q, [k.double() for k in keys], **options) - lse.double()[..., None]
    )
    scale = options.get("scale")
    scale = None if scale is None else abs(scale)
    size = scores_of(*sizes, **options | {"softcap": None, "scale": scale})
    floor = EPS * (p * (1 + size + lse.abs()[..., None])).mean(2).max().item()
    plain = plain_mass(scores_of(q, keys, **options), lse.to(q.dtype)).float()
    assert_accurate(name, actual, exact, plain, floor)


def slots_of(inputs):
    packed = len(inputs.k_depth) == 1 and inputs.k_depth[0].dim() == 5
    return list(inputs.k_depth[0].unbind(2)) if packed else inputs.k_depth


def check(inputs, run, **options):
    q, k, v, k_depth, v_depth = inputs
    scale = options.get("scale") or q.shape[-1] ** -0.5
    _, lse = eager.attention(q, k, v, k_depth, v_depth, scale, None, 0, options.get("softcap"))
    depth = inputs.numpy()[3]
    exact = moda_reference.depth_mass(
        inputs.numpy()[0], depth, lse.double().cpu().numpy(), **options
    )
    mass = run(q, k_depth, lse, scale, options.get("softcap"))
    assert mass.dtype is torch.float32 and mass.is_contiguous()
    assert_mass("mass", mass, exact, q, slots_of(inputs), lse, **options)


def run_kernels(*arguments):
    import moda_kernels

    return moda_kernels.depth_mass(*arguments)


def run_operator(q, k_depth, lse, scale, softcap):
    return torch.ops.moda.depth_mass(q, k_depth, lse, scale=scale, softcap=softcap)


RUNS = [run_operator, run_kernels]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("B", "T", "HQ", "H", "D", "L", "form", "dtype"),
    by_turns(
        [
            (2, 1, 1, 1, 16, 1, "list"),
            (1, 45, 6, 2, 24, 7, "embedded"),
            (1, 33, 2, 2, 64, 18, "packed"),
            (1, 9, 5, 1, 70, 33, "packed"),
            (1, 34, 16, 2, 32, 5, "list"),
            (1, 3, 80, 1, 64, 17, "embedded"),
            (1, 7, 8, 1, 256, 3, "packed"),
        ]
    ),
)
def test_matches_reference(B, T, HQ, H, D, L, form, dtype, run, device):
    check(make_inputs(B, T, HQ, H, D, L, dtype=dtype, device=device, form=form), run)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("options", "dtype"), by_turns([{"softcap": 1.5}, {"scale": 0.3}, {"scale": 2.0}])
)
def test_options(options, dtype, run, device):
    check(make_inputs(2, 37, 4, 2, 16, 5, dtype=dtype, device=device), run, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "G", "H", "L", "D"), [(4096, 8, 8, 64, 64), (4096, 2, 8, 72, 64)])
def test_sizes_of_models(T, G, H, L, D):
    options = dict(dtype=torch.bfloat16, device="cuda", form="packed")
    inputs = make_inputs(1, T, G * H, H, D, L, S=0, **options)
    check(inputs, run_operator)


def test_several_runs_of_tokens_are_summed_in_a_fixed_order(device):
    inputs = make_inputs(
        1, 200 if COMPILED else 65, 4, 1, 16, 3, dtype=torch.float16, device=device
    )
    _, lse = moda_attention(*inputs, return_lse=True)
    first, second = (run_kernels(inputs.q, inputs.k_depth, lse, 0.25, None) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("run", RUNS)
def test_tokens_that_saw_nothing_add_nothing(run, device):
    inputs = make_inputs(1, 40, 4, 2, 16, 3, device=device)
    _, lse = moda_attention(*inputs, return_lse=True)
    mass = run(inputs.q, inputs.k_depth, lse, 0.25, None)
    hidden = lse.clone()
    hidden[..., 5:] = float("-inf")
    first = make_first(inputs, 5)
    expected = run(first.q, first.k_depth, lse[..., :5], 0.25, None) * (5 / 40)
    actual = run(inputs.q, inputs.k_depth, hidden, 0.25, None)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert (actual < mass).all()


def make_first(inputs: Inputs, n: int) -> Inputs:
    return inputs.map(lambda x: x[:, :n])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("B", "T", "L"), [(2, 5, 0), (2, 0, 3), (0, 5, 3)])
def test_empty(B, T, L, run, device):
    inputs = make_inputs(B, T, 4, 2, 16, L, device=device)
    mass = run(inputs.q, inputs.k_depth, inputs.q.new_zeros(B, 4, T), 0.25, None)
    assert mass.shape == (B, 4, L) and not mass.any()


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False, "softcap": 2.0}], ids=str)
def test_depth_and_all_keys_together_have_all(options, device):
    inputs = make_inputs(2, 21, 6, 2, 16, 3, device=device)
    q, k, _, k_depth, _ = inputs
    _, lse = moda_attention(*inputs, **options, return_lse=True)
    mass = moda_depth_mass(q, k_depth, lse, softcap=options.get("softcap")).sum(-1)
    total = mass + moda_sink_mass(q, k, lse, keys=21, **options)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("keys", [1, 3, 50])
@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (13, 13, {}),
        (5, 13, {"softcap": 1.5}),
        (13, 5, {}),
        (13, 13, {"window": 4, "scale": 0.4}),
        (13, 17, {"causal": False, "window": (20, 3)}),
        (5, 0, {}),
    ],
)
def test_sink_matches_reference(T, S, options, keys, device):
    inputs = make_inputs(2, T, 6, 2, 16, 2, S=S, device=device, form="embedded")
    _, lse = moda_attention(*inputs, **options, return_lse=True)
    q, k, *_ = inputs.numpy()
    exact = moda_reference.sink_mass(q, k, lse.double().cpu().numpy(), keys=keys, **options)
    mass = moda_sink_mass(inputs.q, inputs.k, lse, keys=keys, **options)
    assert mass.shape == exact.shape and mass.dtype is torch.float32
    # Roundings of scores, lse and at most 13 * 13 probabilities of at most 1 each.
    np.testing.assert_allclose(mass.cpu().numpy(), exact, rtol=200 * EPS, atol=EPS)


@pytest.mark.parametrize("cached", [0, 2], ids=["", "more keys than queries"])
@pytest.mark.parametrize("keys", [1, 3])
def test_sinks_of_packed_documents(keys, cached, device):
    lengths, more = [3, 0, 7, 1], 2  # and rows after the last document
    documents = len(lengths)
    inputs = make_inputs(
        1, sum(lengths) + more, 4, 2, 16, 2, S=sum(lengths) + more + cached * documents,
        device=device,
    )  # fmt: skip
    q, k, v, *depth = inputs
    ends = np.cumsum([0, *lengths])
    key_ends = ends + cached * np.arange(documents + 1)
    cu = [torch.tensor(x, dtype=torch.int32, device=device) for x in (ends, key_ends)]
    slots = [[x[0] for x in slots] for slots in depth]
    _, lse = moda_attention_varlen(q[0], k[0], v[0], *slots, *cu, return_lse=True)
    mass = moda_sink_mass(q, k, lse[None], keys=keys, window=4, cu_seqlens=tuple(cu))
    expected = torch.zeros_like(mass)
    for rows, columns in zip(pairwise(ends), pairwise(key_ends), strict=True):
        part, there = slice(*rows), slice(*columns)
        one = moda_sink_mass(q[:, part], k[:, there], lse[None, :, part], keys=keys, window=4)
        expected += one * (rows[1] - rows[0]) / q.shape[1]
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-7)


def test_sinks_keep_to_the_keys_that_there_are(device):
    """Borders past k count no key twice on a GPU, where nobody reads them; on a CPU they raise."""
    q, k = (torch.randn(1, 6, 2, 16, device=device) for _ in range(2))
    lse = torch.full((1, 2, 6), 3.0, device=device)
    cu, past = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 6], [0, 4, 9]))
    options = dict(keys=5, causal=False)
    expected = moda_sink_mass(q, k, lse, **options, cu_seqlens=(cu, cu))
    if COMPILED:
        assert torch.equal(moda_sink_mass(q, k, lse, **options, cu_seqlens=(cu, past)), expected)
        return
    for bad in (past, torch.tensor([0, 4, 3], dtype=torch.int32)):
        for name, pair in (("cu_seqlens_q", (bad, cu)), ("cu_seqlens_k", (cu, bad))):
            with pytest.raises(ValueError, match=f"{name} must never fall and must stay"):
                moda_sink_mass(q, k, lse, **options, cu_seqlens=pair)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_gradient_passes_and_none_is_disturbed(backend, device):
    """Logged beside the loss, compiled as one graph, it changes no gradient."""
    torch._dynamo.reset()

    def attend(q, k, depth, log):
        out, lse = moda_attention(q, k, k, depth, depth, return_lse=True)
        if not log:
            return out, lse, lse
        return out, moda_depth_mass(q, depth, lse), moda_sink_mass(q, k, lse)

    grads = []
    for log in (True, False):
        inputs = make_inputs(1, 9, 4, 2, 16, 3, device=device)
        leaves = inputs.map(lambda x: x.requires_grad_())
        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        out, mass, sink = compiled(leaves.q, leaves.k, leaves.k_depth, log)
        assert log != mass.requires_grad and log != sink.requires_grad
        grads.append(torch.autograd.grad(out.sum(), [leaves.q, leaves.k, *leaves.k_depth]))
    assert all(map(torch.equal, *grads))


def test_strides_of_lse(device):
    inputs = make_inputs(2, 40, 4, 2, 16, 3, device=device)
    _, lse = moda_attention(*inputs, return_lse=True)
    for run in RUNS:
        arguments = inputs.q, inputs.k_depth
        mass = run(*arguments, lse.mT.contiguous().mT, 0.25, None)
        assert torch.equal(mass, run(*arguments, lse, 0.25, None))


def test_kernels_behind_the_operator(device, monkeypatch):
    import moda_kernels

    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    check(make_inputs(2, 5, 6, 2, 20, 4, device=device), run_operator)


Q, SLOT, LSE = torch.zeros(2, 5, 6, 16), torch.zeros(2, 5, 2, 16), torch.zeros(2, 6, 5)
CASES = [
    (dict(q=None), TypeError, "q must be a torch.Tensor, got NoneType"),
    (dict(q=Q[0]), ValueError, "q must have shape (B, T, HQ, D), got (5, 6, 16)"),
    (dict(lse=LSE.mT), ValueError, "lse must have shape (B, HQ, T) = (2, 6, 5), got (2, 5, 6)"),
    (
        dict(lse=LSE.half()),
        TypeError,
        "lse must have dtype torch.float32 to fit q, got torch.float16",
    ),
    (
        dict(k_depth=[SLOT, SLOT.double()]),
        TypeError,
        "k_depth[1] must have dtype torch.float32 to fit q, got torch.float64",
    ),
    (
        dict(k_depth=[torch.zeros(2, 5, 4, 16)]),
        ValueError,
        "q's heads must be a positive multiple of k_depth's, got HQ = 6 and H = 4; "
        "heads are the second to last dimension",
    ),
    (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    (dict(softcap=0.0), ValueError, "softcap must be within 1e-07..1e+30, got 0.0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_errors(changes, error, message):
    right = dict(q=Q, k_depth=[SLOT], lse=LSE)
    assert moda_depth_mass(**right).shape == (2, 6, 1)
    with pytest.raises(error) as caught:
        moda_depth_mass(**(right | changes))
    assert str(caught.value) == message


CU = torch.tensor([0, 5], dtype=torch.int32)
SINK_CASES = [
    (dict(keys=0), ValueError, "keys must be at least 1, got 0"),
    (dict(keys=1.0), TypeError, "keys must be an int, got 1.0"),
    (dict(k=SLOT[0]), ValueError, "k must have shape (B, S, H, D), got (5, 2, 16)"),
    (
        dict(k=SLOT[:1]),
        ValueError,
        "k must have shape (B, S, H, D) = (2, 5, 2, 16), got (1, 5, 2, 16)",
    ),
    (dict(lse=LSE[:1]), ValueError, "lse must have shape (B, HQ, T) = (2, 6, 5), got (1, 6, 5)"),
    (dict(causal=1), TypeError, "causal must be a bool, got 1"),
    (dict(window=-1), ValueError, "window sides must be >= 0 (None is unbounded), got -1"),
    (
        dict(cu_seqlens=CU),
        TypeError,
        "cu_seqlens must be None or a pair (cu_seqlens_q, cu_seqlens_k), got Tensor",
    ),
    (
        dict(cu_seqlens=(CU, CU)),
        ValueError,
        "packed documents need a batch of B = 1, got B = 2",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), SINK_CASES)
def test_sink_errors(changes, error, message):
    right = dict(q=Q, k=SLOT, lse=LSE)
    assert moda_sink_mass(**right).shape == (2, 6)
    with pytest.raises(error) as caught:
        moda_sink_mass(**(right | changes))
    assert str(caught.value) == message


@pytest.mark.parametrize("form", FORMS)
def test_lse_of_the_operator_or_of_the_function(form, device):
    """Float64 beside float32 queries, and float32; the mass is float32."""
    q, k, v, k_depth, v_depth = make_inputs(1, 9, 4, 2, 16, 2, device=device, form=form)
    _, wide = torch.ops.moda.attention(q, k, v, k_depth, v_depth)
    assert wide.dtype is torch.float64
    for mass in (
        lambda lse: moda_depth_mass(q, k_depth[0] if form == "packed" else k_depth, lse),
        lambda lse: moda_sink_mass(q, k, lse),
    ):
        ours, theirs = mass(wide), mass(wide.float())
        assert ours.dtype is theirs.dtype is torch.float32
        torch.testing.assert_close(ours, theirs)
