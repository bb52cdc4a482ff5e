"""torch.ops.moda.attention_varlen and moda_attention_varlen on a CPU: a loop over documents."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moda_reference
from moda_ops import DepthSlots, DepthStream, moda_attention_varlen, moda_depth_attention

HQ, H, D, DV, L = 6, 2, 16, 24, 3
LENGTHS, KEY_LENGTHS = [5, 0, 1, 9], [7, 2, 1, 4]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def inputs(
    form: str = "list", dtype: torch.dtype = torch.float64, **changes: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    T, S = sum(LENGTHS), sum(KEY_LENGTHS)
    depth = [randn(T, L, H, n) for n in (D, DV)]
    k_depth, v_depth = depth if form == "packed" else ([*x.unbind(1)] for x in depth)
    return (
        dict(
            q=randn(T, HQ, D),
            k=randn(S, H, D),
            v=randn(S, H, DV),
            k_depth=k_depth,
            v_depth=v_depth,
            cu_seqlens_q=starts(LENGTHS),
            cu_seqlens_k=starts(KEY_LENGTHS),
        )
        | changes
    )


def leaves(x: dict[str, Any]) -> list[Tensor]:
    depth = [x["k_depth"], x["v_depth"]]
    slots = depth if isinstance(depth[0], Tensor) else [*depth[0], *depth[1]]
    return [x["q"], x["k"], x["v"], *slots]


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("options", [{}, dict(causal=False, window=(3, 1), softcap=2.0, scale=0.3)])
def test_matches_the_reference(options: dict[str, Any], form: str) -> None:
    x = inputs(form)
    for leaf in leaves(x):
        leaf.requires_grad_()
    out, lse = moda_attention_varlen(**x, **options, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad([out, lse], leaves(x), [dout, dlse])

    def array(y: Any) -> Any:
        return [array(z) for z in y] if isinstance(y, list) else y.detach().numpy()

    arrays = [array(y) for y in x.values()]
    exact_out, exact_lse = moda_reference.attention_varlen(*arrays, **options)
    exact = moda_reference.attention_varlen_backward(
        dout.numpy(), *arrays, dlse=dlse.numpy(), **options
    )
    depth = (
        [exact.dk_depth, exact.dv_depth] if form == "packed" else [*exact.dk_depth, *exact.dv_depth]
    )
    for actual, expected in zip(
        (out, lse, *grads), (exact_out, exact_lse, *exact[:3], *depth), strict=True
    ):
        np.testing.assert_allclose(actual.detach(), expected, rtol=0, atol=1e-12)


def test_rows_after_the_last_document_see_depth_alone() -> None:
    x = inputs()
    cu, cu_k = starts([5, 3]), starts([7, 1])
    out = moda_attention_varlen(**(x | dict(cu_seqlens_q=cu, cu_seqlens_k=cu_k)))
    q, depth = x["q"][8:], [[y[8:] for y in x[name]] for name in ("k_depth", "v_depth")]
    nothing = torch.zeros_like(starts([0]))
    alone = moda_attention_varlen(q, x["k"][:0], x["v"][:0], *depth, starts([len(q)]), nothing)
    torch.testing.assert_close(out[8:], alone)


@pytest.mark.parametrize("newest", [False, True])
def test_a_depth_stream_of_packed_documents(newest: bool) -> None:
    """Three layers over a stream, and over a list, are three calls with the slots so far."""
    cu = starts(LENGTHS), starts(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    shape = 1, sum(LENGTHS)
    draws = [torch.randn(*shape, h, D, generator=generator) for h in (HQ, H, H)]
    results = []
    for stream in (DepthStream.allocate(3, *shape, H, D), DepthSlots(), None):
        x, *kv = (y.clone().requires_grad_() for y in draws)
        leaves, slots, y = [x, *kv], [], x
        for layer in range(3):
            k, v = (z * (layer + 1) for z in kv)
            if stream is None:
                flat = [z[0] for z in (y, k, v)]
                depth = [list(z) for z in zip(*slots, strict=True)] or [[], []]
                y = moda_attention_varlen(*flat, *depth, *cu)[None]
                slots.append((k[0], v[0]))
            elif newest:
                stream = stream.write(k, v)
                y, stream = stream.attend(y, cu_seqlens=cu)
            else:
                y, stream = stream.attend(y, k, v, cu_seqlens=cu)
                stream = stream.write(k, v)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual in results[:2]:
        torch.testing.assert_close(actual, results[2])


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_packed_documents_are_one_batch_entry(kind: Any) -> None:
    x, cu = torch.zeros(2, 4, 1, 8), starts([4])
    stream = DepthSlots() if kind is DepthSlots else DepthStream.allocate(1, 2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"packed documents need a .*B = 1, got B = 2"):
        stream.attend(x, x, x, cu_seqlens=(cu, cu))


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_a_stream_takes_starts_in_pairs(kind: Any) -> None:
    x, cu = torch.zeros(1, 4, 1, 8), starts([4])
    stream = DepthSlots() if kind is DepthSlots else DepthStream.allocate(1, 1, 4, 1, 8)
    pair = r"cu_seqlens must be None or a pair \(cu_seqlens_q, cu_seqlens_k\), got "
    with pytest.raises(TypeError, match=pair + "Tensor"):
        stream.attend(x, x, x, cu_seqlens=cu)
    with pytest.raises(TypeError, match=pair + "tuple"):
        stream.attend(x, x, x, cu_seqlens=(cu,))
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be a torch.Tensor, got list"):
        stream.attend(x, x, x, cu_seqlens=(cu, [0, 4]))


CU = starts(LENGTHS)
ERRORS = [
    (dict(q=torch.zeros(1, 15, HQ, D)), ValueError, "q must have shape (total_q, HQ, D), got (1, 15, 6, 16)"),
    (dict(k=torch.zeros(14, H, 8)), ValueError, "k must have shape (total_k, H, D) = (14, 2, 16), got (14, 2, 8)"),
    (dict(v=torch.zeros(13, H, DV)), ValueError, "v must have shape (total_k, H, DV) = (14, 2, 24), got (13, 2, 24)"),
    (dict(k_depth=[torch.zeros(14, H, D)] * L), ValueError, "k_depth[0] must have shape (total_q, H, D) = (15, 2, 16), got (14, 2, 16)"),
    (dict(k_depth=torch.zeros(15, H, D)), ValueError, "k_depth given as one tensor must be packed, (total_q, L, H, D), got 3 dimensions (15, 2, 16); a single slot goes in a list"),
    (dict(v_depth=None), ValueError, "k_depth is given but v_depth is None; give both or neither"),
    (dict(cu_seqlens_q=[0, 15]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    (dict(cu_seqlens_q=CU.long()), TypeError, "cu_seqlens_q must have dtype torch.int32, got torch.int64; call .int()"),
    (dict(cu_seqlens_k=CU[:, None]), ValueError, "cu_seqlens_k must have shape (documents + 1,), got (5, 1)"),
    (dict(cu_seqlens_k=CU[:0]), ValueError, "cu_seqlens_k must have shape (documents + 1,), got (0)"),
    (dict(cu_seqlens_k=CU[:-1]), ValueError, "cu_seqlens_q and cu_seqlens_k must have the same length, documents + 1, got 5 and 4"),
    (dict(cu_seqlens_k=CU.to("meta")), ValueError, "cu_seqlens_k must be on q's device cpu, got meta"),
    (dict(cu_seqlens_q=torch.zeros(10, dtype=torch.int32)[::2]), ValueError, "cu_seqlens_q must be contiguous in its last dimension (stride 1), got strides (2,); call .contiguous() if a copy is acceptable"),
    (dict(cu_seqlens_q=CU + 1), ValueError, "cu_seqlens_q must never fall and must stay within 0..15, got cu_seqlens_q[4] = 16 after 7"),
    (dict(cu_seqlens_k=starts(KEY_LENGTHS) + 1), ValueError, "cu_seqlens_k must never fall and must stay within 0..14, got cu_seqlens_k[4] = 15 after 11"),
    (dict(cu_seqlens_q=CU - 1), ValueError, "cu_seqlens_q must never fall and must stay within 0..15, got cu_seqlens_q[0] = -1"),
    (dict(cu_seqlens_k=CU.flip(0) - 2), ValueError, "cu_seqlens_k must never fall and must stay within 0..14, got cu_seqlens_k[1] = 4 after 13"),
    (dict(plan="fast"), ValueError, "plan must be one of 'auto', 'fused', 'split', got 'fast'"),
    (dict(max_seqlen_q=9.0), TypeError, "max_seqlen_q must be an int, got 9.0"),
    (dict(max_seqlen_k=-1), ValueError, "max_seqlen_k must be at least 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_message(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        moda_attention_varlen(**inputs(dtype=torch.float32, **changes))
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_borders_past_a_stream(kind: Any) -> None:
    x, cu = torch.zeros(1, 4, 1, 8), starts([3, 2])
    stream = DepthSlots() if kind is DepthSlots else DepthStream.allocate(1, 1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must .* got cu_seqlens_q\[2\] = 5 after 3"):
        stream.attend(x, x, x, cu_seqlens=(cu, cu))


def test_borders_in_a_compiled_function() -> None:
    """Fake tensors have no values: the operator looks when it runs."""
    x, cu = torch.zeros(5, 1, 8), starts([3, 2])
    f = torch.compile(moda_attention_varlen, backend="aot_eager", fullgraph=True)
    f(x, x, x, None, None, cu, cu)
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[2\] = 6 after 3"):
        f(x, x, x, None, None, cu, starts([3, 3]))


def test_rows_before_the_first_document_see_depth_alone() -> None:
    x = inputs()
    whole = leaves(x)
    for leaf in whole:
        leaf.requires_grad_()
    out = moda_attention_varlen(
        **(x | dict(cu_seqlens_q=CU[1:], cu_seqlens_k=starts(KEY_LENGTHS)[1:]))
    )
    depth = [[y[:5] for y in x[name]] for name in ("k_depth", "v_depth")]
    alone = moda_depth_attention(x["q"][None, :5], *([y[None] for y in z] for z in depth))
    torch.testing.assert_close(out[None, :5], alone)
    rest = {name: x[name][5:] for name in ("q",)} | {name: x[name][7:] for name in "kv"}
    rest |= {name: [y[5:] for y in x[name]] for name in ("k_depth", "v_depth")}
    cu = CU[1:] - 5, starts(KEY_LENGTHS)[1:] - 7
    torch.testing.assert_close(out[5:], moda_attention_varlen(*rest.values(), *cu))
    dk, dv = torch.autograd.grad(out.sum(), [x["k"], x["v"]])
    assert not dk[:7].any() and not dv[:7].any() and dk[7:].any()


def test_backward_checks_what_it_is_given() -> None:
    x = inputs(dtype=torch.float32)
    out, lse = torch.ops.moda.attention_varlen(*x.values())
    with pytest.raises(ValueError, match=r"lse must have shape \(HQ, total_q\) = \(6, 15\), got"):
        torch.ops.moda.attention_varlen_backward(out, None, *x.values(), out, lse.mT)
