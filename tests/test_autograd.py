"""torch.func on every operator: grad, vjp and jacrev are autograd's; the rest is an error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp

from moda_ops import DepthSlots, DepthStream, moda_attention, moda_decode
from moda_ops.nn import MoDAConfig, MoDALanguageModel
from operators import DIFFERENTIABLE, make_call


def loss_and_leaves(name, device="cpu"):
    call = make_call(name, device=device)
    leaves = call.leaves()
    floating = tuple(i for i, x in enumerate(leaves) if x.is_floating_point())

    def loss(*leaves):
        out, lse = call.run(*leaves)
        return out.square().sum() + lse.clamp(min=-9).sum()

    return loss, leaves, floating


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_autograd(name, device):
    loss, leaves, floating = loss_and_leaves(name, device)
    by_func = grad(loss, floating)(*leaves)

    def of_floating(*values):
        given = iter(values)
        return loss(*(next(given) if i in floating else x for i, x in enumerate(leaves)))

    value, pull = vjp(of_floating, *(leaves[i] for i in floating))
    by_vjp = pull(torch.ones_like(value))
    needed = [leaves[i].requires_grad_() for i in floating]
    expected = torch.autograd.grad(loss(*leaves), needed)
    for a, b, c in zip(by_func, by_vjp, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_gradients_through_a_stream(kind):
    def loss(x):
        stream = DepthStream.allocate(3, *x.shape) if kind is DepthStream else DepthSlots()
        for i in range(3):
            x, stream = stream.write(x.sin(), (x + i).cos()).attend(x)
        return x.square().sum()

    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert torch.equal(grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.filterwarnings("ignore")
def test_compiled_autograd():
    x = torch.randn(1, 4, 2, 8, requires_grad=True)

    def loss(x):
        stream = DepthStream.allocate(1, *x.shape).write(x.sin(), x)
        return moda_attention(stream.attend(x)[0], x, x, [x], [x]).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        loss(x).backward()
    torch.testing.assert_close(x.grad, expected)


def test_jacobian():
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64)

    def f(x):
        return moda_attention(x, x, x, [x.sin()], [x])

    expected = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(jacrev(f)(x), expected)


def test_functional_call_of_the_model():
    config = MoDAConfig(
        vocab_size=20, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16
    )
    model, tokens = MoDALanguageModel(config), torch.randint(20, (2, 5))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return functional_call(model, parameters, (tokens,)).square().mean()

    grads = grad(loss)(parameters)
    loss(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=name)

    def loss_of_one(parameters, tokens):
        logits = functional_call(model, parameters, (tokens[None], DepthSlots()))
        return logits.square().mean()

    per_sample = torch.vmap(grad(loss_of_one), (None, 0))(parameters, tokens)
    for name in grads:
        torch.testing.assert_close(per_sample[name].mean(0), grads[name], msg=name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name):
    loss, leaves, floating = loss_and_leaves(name)
    i, message = floating[-1], rf"moda::{name} has no forward-mode derivative .* use reverse mode"

    def of_one(x):
        return loss(*leaves[:i], x, *leaves[i + 1 :])

    x = leaves[i]
    with pytest.raises(NotImplementedError, match=message):
        jvp(of_one, (x,), (x,))
    with pytest.raises(NotImplementedError, match=message):
        jacfwd(of_one)(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        of_one(forward_ad.make_dual(x, x))
    with torch.no_grad(), forward_ad.dual_level():
        assert of_one(x).isfinite()  # no tangent: no error
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(grad(of_one), (x,), (x,))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused(name):
    """Also where an outer transform, not an inner one, needs them."""
    loss, leaves, floating = loss_and_leaves(name)
    message = f"moda::{name} has no second derivative"
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda *x: grad(loss, floating[0])(*x).sum(), floating[0])(*leaves)
    with pytest.raises(NotImplementedError, match=message):
        jacrev(grad(loss, floating[0]), floating[0])(*leaves)
    q = leaves[0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(*leaves), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        gradient.sum().backward()


def test_a_stream_refuses_forward_mode():
    x = torch.randn(1, 4, 2, 8)
    stream = DepthStream.allocate(1, *x.shape).write(x, x)
    with pytest.raises(NotImplementedError, match="moda::stream_attention has no forward-mode"):
        jvp(lambda q: stream.attend(q)[0], (x,), (x,))
    stream = DepthStream.allocate(1, *x.shape)
    with pytest.raises(NotImplementedError, match="moda::stream_write has no forward-mode"):
        jvp(lambda k: stream.write(k, x).attend(x)[0], (x,), (x,))


def test_decoding_refuses_every_derivative():
    q, cache = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 2, 8)
    lengths = torch.tensor([3], dtype=torch.int32)

    def decode(q, slot, new):
        return moda_decode(
            q, cache, cache.clone(), [slot], [q.detach()], lengths, k_new=new, v_new=q.detach()
        )

    for i, argument in enumerate(("q", "k_depth", "k_new")):
        message = f"moda_decode has no gradient, but {argument} requires one"

        def of_one(x, i=i):
            return decode(*(x if j == i else q for j in range(3))).sum()

        with pytest.raises(RuntimeError, match=message):
            grad(of_one)(q)
        with pytest.raises(RuntimeError, match=message):
            jvp(of_one, (q,), (q,))
    with torch.no_grad(), forward_ad.dual_level():
        assert decode(q, q, q).isfinite().all()
