"""One helper makes inputs, one asserts; plus attention as anybody would write it in PyTorch."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import moda_reference

FORMS = ("list", "packed", "embedded")


class Inputs(NamedTuple):
    """Arguments of the operators; depth is L slots, or a list of one packed tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_depth: list[Tensor]
    v_depth: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.k_depth, *self.v_depth]

    def map(self, f: Any) -> "Inputs":
        q, k, v = map(f, self[:3])
        return Inputs(q, k, v, [f(x) for x in self.k_depth], [f(x) for x in self.v_depth])

    def numpy(self) -> tuple[Any, ...]:
        """The same numbers for moda_reference."""
        q, k, v, k_depth, v_depth = self.map(lambda x: x.detach().double().cpu().numpy())
        packed = len(k_depth) == 1 and k_depth[0].ndim == 5
        return (q, k, v, k_depth[0], v_depth[0]) if packed else (q, k, v, k_depth, v_depth)


def make_inputs(
    B: int,
    T: int,
    HQ: int,
    H: int,
    D: int,
    L: int,
    *,
    S: int | None = None,
    DV: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    form: str = "list",
    seed: int = 0,
) -> Inputs:
    """Normal random inputs. "embedded": a list of views into larger tensors that are NaN elsewhere,
    with (B, H, T, D) memory order for k and different strides from slot to slot."""
    generator = torch.Generator().manual_seed(seed)
    S, DV = T if S is None else S, D if DV is None else DV

    def dense(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def embedded(*shape: int) -> Tensor:
        values = dense(*shape)
        before, after = (int(n) for n in torch.randint(0, 4, (2,), generator=generator))
        larger = values.new_full([before + n + after for n in shape], float("nan"))
        view = larger[tuple(slice(before, before + n) for n in shape)]
        return view.copy_(values)

    make = embedded if form == "embedded" else dense
    q, k, v = make(B, T, HQ, D), make(B, S, H, D), make(B, S, H, DV)
    if form == "embedded":
        k = make(B, H, S, D).transpose(1, 2)
    if form == "packed":
        return Inputs(q, k, v, [make(B, T, L, H, D)], [make(B, T, L, H, DV)])
    k_depth, v_depth = [[make(B, T, H, n) for _ in range(L)] for n in (D, DV)]
    return Inputs(q, k, v, k_depth, v_depth)


class Scores(NamedTuple):
    """All scores of sequence and depth side by side, [B, HQ, T, S + L], -inf where hidden.

    With a ``chunk_size``, depth keys have several readers and stand among the sequence's.
    """

    values: Tensor
    hidden: Tensor
    v: list[Tensor]  # the sequence's [B, HQ, S, DV], then each slot's [B, HQ, T, DV]
    k: list[Tensor]  # likewise


def _scores(inputs: Inputs, options: dict[str, Any]) -> Scores:
    q, k, v, k_depth, v_depth = inputs
    if len(k_depth) == 1 and k_depth[0].dim() == 5:
        k_depth, v_depth = list(k_depth[0].unbind(2)), list(v_depth[0].unbind(2))
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = moda_reference.visible(T, S, options.get("causal", True), options.get("window"))
    if "chunk_size" in options:
        chunk = moda_reference.chunk_visible(T, options["chunk_size"])
        seen = np.concatenate([seen, *[chunk] * len(k_depth)], 1)
        k, v, k_depth, v_depth = torch.cat([k, *k_depth], 1), torch.cat([v, *v_depth], 1), [], []
    cap, scale = options.get("softcap"), options.get("scale") or q.shape[-1] ** -0.5

    def heads(x: Tensor) -> Tensor:  # (B, S, H, D) -> (B, HQ, S, D)
        return x.repeat_interleave(G, 2).transpose(1, 2)

    q, keys = q.transpose(1, 2), [heads(x) for x in (k, *k_depth)]
    dots = [q @ keys[0].mT, *((q * x).sum(-1, keepdim=True) for x in keys[1:])]
    x = torch.cat(dots, -1) * scale
    if cap is not None:
        x = cap * torch.tanh(x / cap)
    hidden = torch.nn.functional.pad(~torch.from_numpy(seen), (0, len(k_depth))).to(q.device)
    return Scores(
        x.masked_fill(hidden, float("-inf")), hidden, [heads(x) for x in (v, *v_depth)], keys
    )


def _mix(p: Tensor, values: list[Tensor]) -> Tensor:
    """sum_n p_n v_n over the sequence and the slots."""
    S = values[0].shape[2]
    out = p[..., :S] @ values[0]
    for i, slot in enumerate(values[1:], S):
        out = out + p[..., i, None] * slot
    return out


def plain_attention(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """MoDA by concatenating the scores of sequence and depth, every step in the inputs' dtype."""
    scores = _scores(inputs, options)
    p = scores.values.softmax(-1).masked_fill(scores.hidden, 0.0)  # a row of -inf alone gives NaN
    return _mix(p, scores.v).transpose(1, 2), scores.values.logsumexp(-1)


def rounding(inputs: Inputs, dout: Tensor, dlse: Tensor, **options: Any) -> dict[str, float]:
    """What one float32 rounding of every score, sum and product amounts to in each result.

    To first order: p carries the roundings of its score (a sum of products) and of lse, ds those of
    the two sums that cancel in dp - delta, and the final sums add magnitudes.
    """
    exact, size = inputs.map(lambda x: x.double()), inputs.map(lambda x: x.abs().double())
    scores, sizes = _scores(exact, options), _scores(size, options | {"softcap": None})
    out, lse = plain_attention(exact, **options)
    lse = lse.masked_fill(lse.isinf(), 0.0)[..., None]
    p = torch.exp(scores.values - lse)
    p = p * (1 + sizes.values.masked_fill(scores.hidden, 0.0) + lse.abs())
    do = dout.abs().double().transpose(1, 2)
    dp = torch.cat([do @ sizes.v[0].mT, *((do * x).sum(-1, keepdim=True) for x in sizes.v[1:])], -1)
    delta = (do * out.abs().transpose(1, 2)).sum(-1) + dlse.abs()
    ds = p * (dp + delta[..., None]) * (options.get("scale") or inputs.q.shape[-1] ** -0.5)
    G, S = inputs.q.shape[2] // inputs.k.shape[2], inputs.k.shape[1]

    def over_rows(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sums for sequence keys and for slots, both over the group."""
        if "chunk_size" in options:
            keys = (weights.mT @ rows).unflatten(1, (-1, G)).sum(2)
            return keys[:, :, :S], keys[:, :, S:]
        sequence = (weights[..., :S].mT @ rows).unflatten(1, (-1, G)).sum(2)
        depth = (weights[..., S:, None] * rows[..., None, :]).unflatten(1, (-1, G)).sum(2)
        return sequence, depth

    (dk, dk_depth), (dv, dv_depth) = over_rows(ds, size.q.transpose(1, 2)), over_rows(p, do)
    magnitudes = dict(
        out=_mix(p, sizes.v), lse=p.sum(-1), dq=_mix(ds, sizes.k), dk=dk, dv=dv,
        dk_depth=dk_depth, dv_depth=dv_depth,
    )  # fmt: skip
    eps = torch.finfo(torch.float32).eps
    return {name: eps * x.max().item() if x.numel() else 0.0 for name, x in magnitudes.items()}


def assert_accurate(name: str, actual: Tensor, exact: Any, plain: Tensor, floor: float) -> None:
    """Largest |actual - exact| <= 2 |plain - exact| + floor + one rounding to actual's dtype.

    ``exact`` is float64; ``plain`` is the plain evaluation in ``actual``'s dtype.
    """
    exact = torch.as_tensor(np.asarray(exact), device=actual.device)
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    infinite = exact.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{name}: infinities differ"
    exact = exact.masked_fill(infinite, 0.0)

    def error(x: Tensor) -> float:
        return (x.double().masked_fill(infinite, 0.0) - exact).abs().max().item()

    bound = 2 * error(plain) + floor + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error(actual) <= bound, f"{name}: error {error(actual):.2e}, allowed {bound:.2e}"


def make_cotangents(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Random dout (B, T, HQ, DV) and dlse (B, HQ, T)."""
    B, T, HQ, _ = inputs.q.shape
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(B, T, HQ, inputs.v.shape[-1], generator=generator).to(inputs.q)
    return dout, torch.randn(B, HQ, T, generator=generator).to(inputs.q.device)


def assert_matches_reference(
    inputs: Inputs, run: Any, cotangents: tuple[Tensor, Tensor] | None = None, **options: Any
) -> None:
    """``run(inputs, dout, dlse) -> (out, lse, gradients as Inputs)`` against moda_reference."""
    dout, dlse = cotangents or make_cotangents(inputs)
    out, lse, grads = run(inputs, dout, dlse)

    arrays = inputs.numpy()
    name = "chunk_attention" if "chunk_size" in options else "attention"
    exact_out, exact_lse = getattr(moda_reference, name)(*arrays, **options)
    exact = getattr(moda_reference, f"{name}_backward")(
        dout.double().cpu().numpy(), *arrays, dlse=dlse.double().cpu().numpy(), **options
    )
    leaves = inputs.map(lambda x: x.detach().requires_grad_())
    plain_out, plain_lse = plain_attention(leaves, **options)
    blind = plain_lse.isinf()  # these rows have no gradient; autograd would say NaN
    loss = [plain_out, plain_lse.masked_fill(blind, 0.0)]
    plain = torch.autograd.grad(
        loss, leaves.leaves(), [dout, dlse.to(plain_lse)], allow_unused=True
    )

    floor = rounding(inputs, dout, dlse, **options)
    assert_accurate("out", out, exact_out, plain_out, floor["out"])
    assert_accurate("lse", lse, exact_lse, plain_lse, floor["lse"])
    packed = isinstance(exact.dk_depth, np.ndarray)
    depth = [exact.dk_depth, exact.dv_depth] if packed else [*exact.dk_depth, *exact.dv_depth]
    slots = len(depth) // 2
    names = ["dq", "dk", "dv", *["dk_depth"] * slots, *["dv_depth"] * slots]
    for name, g, e, p in zip(names, grads.leaves(), [*exact[:3], *depth], plain, strict=True):
        p = torch.zeros_like(g) if p is None else p.nan_to_num(0.0)
        assert_accurate(name, g, e, p, floor[name])
