"""torch.ops.moda.* as PyTorch sees them: schemas, fakes, autograd, compile, export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import FORMS, Inputs, assert_matches_reference, make_inputs
from moda_ops import (
    DepthSlots,
    DepthStream,
    moda_attention,
    moda_attention_varlen,
    moda_chunk_attention,
    moda_decode,
    moda_depth_attention,
    moda_depth_mass,
    moda_sink_mass,
)


def as_arguments(inputs: Inputs):
    """For ``moda_attention``: a packed tensor by itself."""
    q, k, v, k_depth, v_depth = inputs
    packed = len(k_depth) == 1 and k_depth[0].dim() == 5
    return (q, k, v, k_depth[0], v_depth[0]) if packed else inputs


def run_public(attention=moda_attention, **options):
    def run(inputs, dout, dlse):
        leaves = inputs.map(lambda x: x.detach().requires_grad_())
        out, lse = attention(*as_arguments(leaves), return_lse=True, **options)
        grads = torch.autograd.grad(
            [out, lse], leaves.leaves(), [dout, dlse], materialize_grads=True
        )
        n = len(inputs.k_depth)
        return (
            out.detach(),
            lse.detach(),
            Inputs(*grads[:3], list(grads[3 : 3 + n]), list(grads[3 + n :])),
        )

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "softcap": 2.0},
        {"window": (5, 2), "causal": False},
        {"window": 4, "scale": 0.2},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, options, form, device):
    inputs = make_inputs(2, 13, 6, 2, 20, 4, S=17, DV=12, dtype=dtype, device=device, form=form)
    assert_matches_reference(inputs, run_public(**options), **options)


def test_strides_of_what_is_empty_do_not_matter(device):
    """``contiguous`` would not change them either."""
    q, k, v = torch.randn(3, 1, 5, 2, 8, device=device)
    nothing = torch.randn(1, 5, 0, 2, 8, 3, device=device)[..., 0]
    assert nothing.contiguous().stride(-1) == 3
    assert torch.equal(moda_attention(q, k, v, nothing, nothing), moda_attention(q, k, v))
    no_keys = q.new_empty(1, 0, 2, 8, 3)[..., 0]
    assert not moda_attention(q, no_keys, no_keys).any()


def test_gradient_through_one_output_only(device):
    q, k, v, k_depth, v_depth = make_inputs(1, 6, 2, 1, 16, 2, device=device)
    q.requires_grad_()
    out, lse = moda_attention(q, k, v, k_depth, v_depth, return_lse=True)
    both = torch.autograd.grad(out.sum() + lse.sum(), q)[0]
    out_only = torch.autograd.grad(moda_attention(q, k, v, k_depth, v_depth).sum(), q)[0]
    lse_only = torch.autograd.grad(
        moda_attention(q, k, v, k_depth, v_depth, return_lse=True)[1].sum(), q
    )[0]
    assert lse_only.abs().max() > 1e-3 and out_only.abs().max() > 1e-3
    torch.testing.assert_close(out_only + lse_only, both)


def test_tensor_in_both_key_sets_gets_both_gradients(device):
    """k as sequence key and as depth slot, as models use it, eager and compiled."""
    q, k, v, _, _ = make_inputs(1, 6, 2, 1, 16, 0, device=device)
    v2 = torch.randn_like(v)

    def loss(k, slot):
        return moda_attention(q, k, v, [slot], [v2]).square().sum()

    a, b = k.clone().requires_grad_(), k.clone().requires_grad_()
    expected = sum(torch.autograd.grad(loss(a, b), (a, b)))
    compiled = torch.compile(lambda k: loss(k, k), backend="aot_eager", fullgraph=True)
    for f in (lambda k: loss(k, k), compiled):
        shared = k.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(f(shared), shared)[0], expected)


def test_autocast_does_not_reach_inside(device):
    inputs = make_inputs(1, 9, 4, 2, 16, 2, dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_matches_reference(inputs, run_public())


def test_export_round_trip(tmp_path, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, k_depth, v_depth):
            return moda_attention(q, k, v, k_depth, v_depth, return_lse=True)

    inputs = make_inputs(2, 9, 4, 2, 16, 3, device=device)
    T = torch.export.Dim("T", min=2, max=64)
    shapes = ({1: T}, {1: T}, {1: T}, [{1: T}] * 3, [{1: T}] * 3)
    torch.export.save(
        torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes), tmp_path / "moda.pt2"
    )
    loaded = torch.export.load(tmp_path / "moda.pt2").module()
    for t in (9, 21):
        inputs = make_inputs(2, t, 4, 2, 16, 3, device=device, seed=t)
        for a, b in zip(loaded(*inputs), Module()(*inputs), strict=True):
            assert torch.equal(a, b)


class EveryOption(torch.nn.Module):
    """Every public function, with every number that it takes computed from a length."""

    def forward(self, q, k, v, k_slot, v_slot, cu_seqlens, lengths):
        T = q.shape[1]
        scores = dict(scale=T / 100, softcap=T / 3)
        options: dict = dict(window=T // 2, **scores)
        depth = [k_slot], [v_slot]
        out, lse = moda_attention(q, k, v, *depth, causal=T > 1, **options, return_lse=True)
        packed = [x[0] for x in (q, k, v)]
        slots = [k_slot[0]], [v_slot[0]]
        stream = DepthStream.allocate(1, *k.shape, dtype=q.dtype, device=q.device)
        return (
            out,
            moda_attention(q, k, v, *depth, causal=False, window=(None, T // 3), scale=T),
            moda_attention_varlen(
                *packed, *slots, cu_seqlens, cu_seqlens, T, T, **options | {"causal": False}
            ),
            moda_chunk_attention(q, k, v, *depth, T // 2, **options),
            moda_depth_attention(q, *depth, **scores),
            moda_decode(q, k, v, *depth, lengths, **options),
            moda_depth_mass(q, depth[0], lse, **scores),
            moda_sink_mass(q, k, lse, causal=False, **options),
            stream.write(k_slot, v_slot).attend(q, k, v, **options)[0],
            DepthSlots().write(k_slot, v_slot).attend(q, k, v, **options)[0],
        )


def every_option_inputs(T, device):
    q, k, v, k_depth, v_depth = make_inputs(1, T, 4, 2, 8, 1, device=device, seed=T)
    lengths = torch.tensor([0, T // 2, T], dtype=torch.int32, device=device)
    return q, k, v, *k_depth, *v_depth, lengths, lengths[-1:]


@pytest.mark.parametrize("how", ["export", "strict export", "compile"])
def test_options_may_be_symbols(how, device):
    """One graph for all lengths; an option that became a constant would show, or recompile."""
    module, example = EveryOption(), every_option_inputs(9, device)
    counter = CompileCounterWithBackend("aot_eager")
    if how == "compile":
        torch._dynamo.reset()
        run = torch.compile(module, dynamic=True, fullgraph=True, backend=counter)
    else:
        shapes = ({1: torch.export.Dim.DYNAMIC},) * 5 + ({}, {})
        strict = how == "strict export"
        with torch.no_grad():
            run = torch.export.export(
                module, example, dynamic_shapes=shapes, strict=strict
            ).module()
    with torch.no_grad():
        for T in (9, 6):
            inputs = every_option_inputs(T, device)
            for a, b in zip(run(*inputs), module(*inputs), strict=True):
                torch.testing.assert_close(a, b)
    assert how != "compile" or counter.frame_count == 1


def test_inductor(device):
    """And gradients with options that are symbols; README's example has constants."""

    def f(q, k, v, k_slot, v_slot):
        options = dict(scale=q.shape[1] / 100, softcap=q.shape[1] / 3)
        return moda_attention(q, k, v, [k_slot], [v_slot], window=q.shape[1] // 2, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(f, dynamic=True, fullgraph=True, backend=counter)
    for T in (9, 6):
        leaves = [x.requires_grad_() for x in every_option_inputs(T, device)[:5]]
        actual, expected = (torch.autograd.grad(g(*leaves).sum(), leaves) for g in (compiled, f))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_public_functions_of_meta_tensors():
    q, k, v, k_depth, v_depth = make_inputs(1, 5, 4, 2, 8, 2, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    q.requires_grad_()
    stream = DepthStream.allocate(2, *k.shape, dtype=q.dtype, device="meta")
    for slots in (stream, DepthSlots()):
        out, _ = slots.write(*k_depth).write(k, v).attend(q)
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    q = q.detach()
    out, lse = moda_attention(q, k, v, k_depth, v_depth, return_lse=True)
    assert moda_depth_mass(q, k_depth, lse).shape == (1, 4, 2)
    assert moda_sink_mass(q, k, lse, cu_seqlens=(cu_seqlens, cu_seqlens)).shape == (1, 4)
    cache, lengths = torch.empty(2, 1, 9, 2, 8, device="meta"), cu_seqlens[:1]
    out = moda_decode(q, *cache, k_depth, v_depth, lengths, k_new=k, v_new=v)
    assert out.is_meta and out.shape == q.shape


def test_inputs_survive_an_error(device):
    inputs = make_inputs(1, 5, 2, 1, 16, 2, device=device)
    copies = inputs.map(torch.clone)
    with pytest.raises(ValueError, match="v_depth"):
        moda_attention(*inputs._replace(v_depth=inputs.v_depth[:1]))
    for a, b in zip(inputs.leaves(), copies.leaves(), strict=True):
        assert torch.equal(a, b)
