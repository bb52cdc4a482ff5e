"""Every refusal names the argument, what was given and what is allowed."""

import inspect

import numpy as np
import pytest
import torch

import moda_ops
from helpers import make_inputs
from moda_ops import DepthSlots, DepthStream, moda_attention, moda_decode
from moda_ops.operators.other_names import INSTEAD, OURS
from operators import BACKWARD, DIFFERENTIABLE, make_call

B, T, S, HQ, H, D, DV, L = 2, 5, 7, 6, 2, 16, 24, 3


def call(**changes):
    arguments = dict(
        q=torch.zeros(B, T, HQ, D),
        k=torch.zeros(B, S, H, D),
        v=torch.zeros(B, S, H, DV),
        k_depth=[torch.zeros(B, T, H, D)] * L,
        v_depth=[torch.zeros(B, T, H, DV)] * L,
    )
    return moda_attention(**(arguments | changes))


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


SLOT, V_SLOT = zeros(B, T, H, D), zeros(B, T, H, DV)
CASES = [
    (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    (dict(q=zeros(T, HQ, D)), ValueError, "q must have shape (B, T, HQ, D), got (5, 6, 16)"),
    (dict(k=zeros(S, H, D)), ValueError, "k must have shape (B, S, H, D), got (7, 2, 16)"),
    (dict(k=zeros(1, S, H, D)), ValueError, "k must have shape (B, S, H, D) = (2, 7, 2, 16), got (1, 7, 2, 16)"),
    (dict(k=zeros(B, S, H, 8)), ValueError, "k must have shape (B, S, H, D) = (2, 7, 2, 16), got (2, 7, 2, 8)"),
    (dict(v=zeros(B, 3, H, DV)), ValueError, "v must have shape (B, S, H, DV) = (2, 7, 2, 24), got (2, 3, 2, 24)"),
    (dict(q=zeros(B, T, 5, D)), ValueError, "q's heads must be a positive multiple of k's, got HQ = 5 and H = 2; heads are the second to last dimension"),
    (dict(q=zeros(B, T, HQ, D, dtype=torch.int32)), TypeError, "q must have one of the dtypes float16, bfloat16, float32, float64 on cpu, got torch.int32"),
    (dict(k=zeros(B, S, H, D).half()), TypeError, "k must have dtype torch.float32 to fit q, got torch.float16"),
    (dict(v_depth=[V_SLOT, V_SLOT.bfloat16(), V_SLOT]), TypeError, "v_depth[1] must have dtype torch.float32 to fit q, got torch.bfloat16"),
    (dict(k=zeros(B, S, H, D, device="meta")), ValueError, "k must be on q's device cpu, got meta"),
    (dict(k=zeros(B, S, D, H).mT), ValueError, "k must be contiguous in its last dimension (stride 1), got strides (224, 32, 1, 2); call .contiguous() if a copy is acceptable"),
    (dict(q=zeros(B, T, HQ, 257), k=zeros(B, S, H, 257), k_depth=None, v_depth=None), ValueError, "q's head dim must be within 1..256, got 257"),
    (dict(v=zeros(B, S, H, 300), k_depth=None, v_depth=None), ValueError, "v's head dim must be within 1..256, got 300"),
    (dict(v_depth=None), ValueError, "k_depth is given but v_depth is None; give both or neither"),
    (dict(k_depth=None), ValueError, "v_depth is given but k_depth is None; give both or neither"),
    (dict(v_depth=[V_SLOT]), ValueError, "k_depth and v_depth must have the same number of slots, got 3 and 1"),
    (dict(k_depth="slots"), TypeError, "k_depth must be a list of tensors (B, T, H, D) or one packed tensor (B, T, L, H, D), got str"),
    (dict(k_depth=SLOT), ValueError, "k_depth given as one tensor must be packed, (B, T, L, H, D), got 4 dimensions (2, 5, 2, 16); a single slot goes in a list"),
    (dict(k_depth=[zeros(B, T, L, H, D)]), ValueError, "k_depth[0] must be (B, T, H, D), got 5 dimensions (2, 5, 3, 2, 16); a packed tensor is given by itself, not in a list"),
    (dict(k_depth=[SLOT, None, SLOT]), TypeError, "k_depth[1] must be a torch.Tensor, got NoneType"),
    (dict(k_depth=[SLOT, SLOT, zeros(B, S, H, D)]), ValueError, "k_depth[2] must have shape (B, T, H, D) = (2, 5, 2, 16), got (2, 7, 2, 16)"),
    (dict(k_depth=zeros(B, T, 2, H, D), v_depth=zeros(B, T, L, H, DV)), ValueError, "v_depth must have shape (B, T, L, H, DV) = (2, 5, 2, 2, 24), got (2, 5, 3, 2, 24)"),
    (dict(k_depth=zeros(B, T, 1, H, D), v_depth=[V_SLOT]), ValueError, "k_depth and v_depth must both be lists of slots or both packed tensors, got one packed tensor of shape (2, 5, 1, 2, 16) and a list of length 1"),
    (dict(k_depth=[SLOT, SLOT], v_depth=zeros(B, T, 2, H, DV)), ValueError, "k_depth and v_depth must both be lists of slots or both packed tensors, got a list of length 2 and one packed tensor of shape (2, 5, 2, 2, 24)"),
    (dict(scale=torch.tensor(0.5)), TypeError, "scale must be a number or None, got tensor(0.5000); call .item()"),
    (dict(scale=1e39), ValueError, "scale must be within -1e+30..1e+30, got 1e+39"),
    (dict(scale=2**63), ValueError, "scale must fit in 64 bits if it is an int, got 9223372036854775808"),
    (dict(window=(2**63, 0)), ValueError, "a window side must fit in 64 bits if it is an int, got 9223372036854775808"),
    (dict(softcap=2.4e38), ValueError, "softcap must be within 1e-07..1e+30, got 2.4e+38"),
    (dict(softcap=1e-8), ValueError, "softcap must be within 1e-07..1e+30, got 1e-08"),
    (dict(window=np.int64(3)), TypeError, "window must be None, an int or a tuple (left, right), got np.int64(3); call .item()"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    (dict(scale=float("nan")), ValueError, "scale must be within -1e+30..1e+30, got nan"),
    (dict(softcap=0.0), ValueError, "softcap must be within 1e-07..1e+30, got 0.0"),
    (dict(softcap=True), TypeError, "softcap must be a number or None, got True"),
    (dict(causal=1), TypeError, "causal must be a bool, got 1"),
    (dict(return_lse="yes"), TypeError, "return_lse must be a bool, got 'yes'"),
    (dict(window=-1), ValueError, "window sides must be >= 0 (None is unbounded), got -1"),
    (dict(window=(1, 2, 3)), TypeError, "window must be None, an int or a tuple (left, right), got (1, 2, 3)"),
    (dict(window=(1.5, 0)), TypeError, "window sides must be ints or None, got 1.5"),
    (dict(plan=3), TypeError, "plan must be a string, got 3"),
    (dict(plan="fast"), ValueError, "plan must be one of 'auto', 'fused', 'split', got 'fast'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    assert str(caught.value) == message


def test_the_unchanged_call_is_accepted():
    assert call().shape == (B, T, HQ, DV)


@pytest.mark.parametrize("L", [0, 1, 3])
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *BACKWARD, "decode"])
def test_depth_in_two_forms_is_refused(name, L):
    """A slot in a list beside a packed tensor, or the other way round."""
    lists, packed = (make_call(name, form=form, L=n) for form, n in (("list", 1), ("packed", L)))
    places = [i for i, x in enumerate(lists.arguments) if isinstance(x, list)]
    for place in places:
        arguments = list(lists.arguments)
        arguments[place] = packed.arguments[place]
        with pytest.raises(ValueError, match="must both be lists of slots or both packed tensors"):
            getattr(torch.ops.moda, name)(*arguments, **lists.options)


@pytest.mark.parametrize("option", [dict(scale=1e30), dict(softcap=1e30), dict(softcap=1e-7)])
def test_the_largest_options_compute(option):
    inputs = make_inputs(1, 5, 2, 1, 16, 2)
    inputs = inputs.map(lambda x: (x if "softcap" in option else x * 1e-30).requires_grad_())
    out = moda_attention(*inputs, **option)
    expected = moda_attention(*inputs.map(torch.Tensor.double), **option)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs.leaves()))


STREAM = DepthStream.allocate(1, B, T, HQ, D).write(*zeros(2, B, T, HQ, D))
CALLERS = [
    *(getattr(moda_ops, name) for name in moda_ops.__all__ if name.startswith("moda_")),
    STREAM.attend,
    STREAM.attend_with_lse,
    STREAM.attend_sequence,
    STREAM.attend_depth,
    DepthSlots().attend,
    DepthSlots().attend_with_lse,
    DepthSlots().attend_sequence,
    DepthSlots().attend_depth,
]


@pytest.mark.parametrize("function", CALLERS, ids=lambda f: f.__qualname__)
def test_names_of_other_attention_functions(function):
    """A name that a function knows is ours; of all others the message says what to do."""
    known = inspect.signature(function).parameters
    for name in {*OURS, *INSTEAD}.difference(known):
        with pytest.raises(TypeError) as caught:
            function(**{name: None})
        message = str(caught.value)
        begin = f"{function.__qualname__}() got an unexpected keyword argument {name!r}; "
        assert message.startswith(begin)
        advice = message.removeprefix(begin)
        ours = [argument for argument in OURS.get(name, ()) if argument in known]
        if ours:
            assert advice == f"it is called {ours[0]} here"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("is_causal", "it is called causal here"),
        ("softmax_scale", "it is called scale here"),
        ("window_size", "it is called window here"),
        ("enable_gqa", "leave it out: heads are grouped by shape, HQ = G * H"),
        ("dropout_p", "not supported: apply dropout to the result"),
        ("mask", "the arguments are q, k, v, k_depth, v_depth, causal, scale, window, softcap, plan, return_lse"),
    ],
)  # fmt: skip
def test_advice(name, advice):
    expected = f"moda_attention() got an unexpected keyword argument {name!r}; {advice}"
    with pytest.raises(TypeError) as caught:
        call(**{name: None})
    assert str(caught.value) == expected and caught.value.__cause__ is None


def test_advice_for_a_function_that_does_not_have_it():
    causal = r"leave it out: it is causal in the sequence, and depth is never masked"
    with pytest.raises(TypeError, match=rf"moda_decode\(\) got .*'is_causal'; {causal}"):
        moda_decode(is_causal=True)
    with pytest.raises(TypeError, match="'k'; it is called k_new here"):
        moda_decode(k=SLOT)


def test_operator_checks_its_own_arguments():
    q, k, v = zeros(B, T, HQ, D), zeros(B, S, H, D), zeros(B, S, H, DV)
    with pytest.raises(ValueError, match=r"window_left must be >= 0 \(None is unbounded\), got -1"):
        torch.ops.moda.attention(q, k, v, [], [], window_left=-1)
    out, lse = torch.ops.moda.attention(q, k, v, [], [])
    with pytest.raises(
        ValueError, match=r"lse must have shape \(B, HQ, T\) = \(2, 6, 5\), got \(2, 5, 6\)"
    ):
        torch.ops.moda.attention_backward(out, None, q, k, v, [], [], out, lse.mT)
    with pytest.raises(ValueError, match="lse must be contiguous, as the forward returned it"):
        torch.ops.moda.attention_backward(out, None, q, k, v, [], [], out, lse.mT.contiguous().mT)
    with pytest.raises(
        TypeError, match=r"dout must have dtype torch\.float32 to fit q, got torch\.float16"
    ):
        torch.ops.moda.attention_backward(out.half(), None, q, k, v, [], [], out, lse)


@pytest.mark.gpu
def test_float64_is_for_cpus():
    x = zeros(1, 2, 1, 16, dtype=torch.float64, device="cuda")
    with pytest.raises(
        TypeError, match="q must have one of the dtypes float16, bfloat16, float32 on cuda"
    ):
        moda_attention(x, x, x)


def test_shape_errors_show_while_compiling():
    q, k = zeros(B, T, HQ, D), zeros(B, S, H, D)
    torch._dynamo.reset()  # an earlier compilation would make the sizes symbols
    compiled = torch.compile(moda_attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"v must have shape \(B, S, H, DV\) = \(2, 7, 2, 24\)"):
        compiled(q, k, zeros(B, 3, H, DV))
