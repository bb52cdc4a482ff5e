"""One helper makes inputs, one asserts; plus attention as anybody would write it in PyTorch."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import moda_reference

FORMS = ("list", "packed", "embedded")
COMPILED = torch.cuda.is_available()  # else Triton's interpreter runs kernels, without bfloat16
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
if COMPILED:
    DTYPES.append(pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.gpu))


def in_dtypes(turn: int, *values: Any, id: str) -> list[Any]:
    """A test's case in every dtype; for the interpreter in one of its two, by ``turn``."""
    dtypes = DTYPES if COMPILED else [DTYPES[turn % 2]]
    return [
        pytest.param(*values, *dtype.values, id=f"{id}-{dtype.id}", marks=dtype.marks)
        for dtype in dtypes
    ]


def by_turns(*axes: Any) -> list[Any]:
    """Every combination of the axes' values, with a dtype, as ``in_dtypes`` gives it."""
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
        name = "-".join(str(value).replace("torch.", "") for value in values)
        cases += in_dtypes(sum(places), *flat, id=name)
    return cases


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


def _scale(inputs: Inputs, options: dict[str, Any]) -> float:
    scale = options.get("scale")
    return inputs.q.shape[-1] ** -0.5 if scale is None else scale


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
    cap, scale = options.get("softcap"), _scale(inputs, options)

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


def rounding(
    inputs: Inputs, dout: Tensor, dlse: Tensor, *, stored: bool = False, **options: Any
) -> dict[str, float]:
    """What one float32 rounding of every score, sum and product amounts to in each result.

    To first order: p carries the roundings of its score (a sum of products) and of lse, ds those of
    the two sums that cancel in dp - delta, and the final sums add magnitudes. With ``stored`` also
    what one rounding of p, out and ds to the inputs' dtype amounts to, and four roundings in place
    of one, in sums over tokens at least a 32nd of their number: thousands of random cases need it,
    among them results of few elements, where a plain evaluation may be exact by accident, and sums
    of equal numbers, whose roundings have one direction.
    """
    exact, size = inputs.map(lambda x: x.double()), inputs.map(lambda x: x.abs().double())
    scale = abs(_scale(inputs, options))
    scores = _scores(exact, options)
    sizes = _scores(size, options | {"softcap": None, "scale": scale})
    out, lse = plain_attention(exact, **options)
    lse = lse.masked_fill(lse.isinf(), 0.0)[..., None]
    p = torch.exp(scores.values - lse)
    steps = torch.finfo(inputs.q.dtype).eps / torch.finfo(torch.float32).eps if stored else 0.0
    p = p * (1 + steps + sizes.values.masked_fill(scores.hidden, 0.0) + lse.abs())
    do = dout.abs().double().transpose(1, 2)
    dp = torch.cat([do @ sizes.v[0].mT, *((do * x).sum(-1, keepdim=True) for x in sizes.v[1:])], -1)
    delta = (do * out.abs().transpose(1, 2)).sum(-1) + dlse.abs()
    ds = p * (dp + delta[..., None]) * scale
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
    rows = inputs.q.shape[1] * G / 32
    roundings = dict.fromkeys(magnitudes, 4.0) | dict(dk=max(rows, 4.0), dv=max(rows, 4.0))
    eps = torch.finfo(torch.float32).eps
    return {
        name: eps * (roundings[name] if stored else 1.0) * x.max().item() if x.numel() else 0.0
        for name, x in magnitudes.items()
    }


def assert_accurate(name: str, actual: Tensor, exact: Any, plain: Tensor, floor: float) -> None:
    """Largest |actual - exact| <= 2 |plain - exact| + floor + one rounding to actual's dtype.

    ``exact`` is float64; ``plain`` is the plain evaluation in ``actual``'s dtype. Float32
    probabilities below 2**-126 underflow, and a product may make that larger: 2**-100 is allowed.
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

    rounded = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    bound = 2 * error(plain) + floor + rounded + 2.0**-100
    assert error(actual) <= bound, f"{name}: error {error(actual):.2e}, allowed {bound:.2e}"


def make_cotangents(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Random dout (B, T, HQ, DV) and dlse (B, HQ, T)."""
    B, T, HQ, _ = inputs.q.shape
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(B, T, HQ, inputs.v.shape[-1], generator=generator).to(inputs.q)
    return dout, torch.randn(B, HQ, T, generator=generator).to(inputs.q.device)


def assert_matches_reference(
    inputs: Inputs,
    run: Any,
    cotangents: tuple[Tensor, Tensor] | None = None,
    *,
    stored: bool = False,
    **options: Any,
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

    floor = rounding(inputs, dout, dlse, stored=stored, **options)
    assert_accurate("out", out, exact_out, plain_out, floor["out"])
    assert_accurate("lse", lse, exact_lse, plain_lse, floor["lse"])
    packed = isinstance(exact.dk_depth, np.ndarray)
    depth = [exact.dk_depth, exact.dv_depth] if packed else [*exact.dk_depth, *exact.dv_depth]
    slots = len(depth) // 2
    names = ["dq", "dk", "dv", *["dk_depth"] * slots, *["dv_depth"] * slots]
    for name, g, e, p in zip(names, grads.leaves(), [*exact[:3], *depth], plain, strict=True):
        p = torch.zeros_like(g) if p is None else p.nan_to_num(0.0)
        assert_accurate(name, g, e, p, floor[name])


class Decoding(NamedTuple):
    """A decoding step: what the operators take, and what its caches stand for.

    In ``inputs`` k and v (B, S, H, ..) are the sequences' tokens one after the other; the caches
    hold those that a step may read, and NaN everywhere else.
    """

    inputs: Inputs
    lengths: list[int]  # tokens of each sequence, the new ones included
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    k_new: Tensor | None
    v_new: Tensor | None

    def one(self, b: int) -> Inputs:
        """Sequence b by itself, for ``moda_attention``."""
        sequence = self.inputs.map(lambda x: x[b : b + 1])
        k, v = (x[:, : self.lengths[b]] for x in (sequence.k, sequence.v))
        return sequence._replace(k=k, v=v)


def make_decoding(
    cache_seqlens: list[int],
    N: int,
    HQ: int,
    H: int,
    D: int,
    L: int,
    *,
    DV: int | None = None,
    page_size: int | None = None,
    append: bool = False,
    left: int | None = None,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    form: str = "list",
    seed: int = 0,
) -> Decoding:
    """Contiguous caches, or shuffled pages with page ids of all sorts where none is used.

    Tokens too far left of all queries for a window are not in the caches, and a page that only
    had such tokens is gone. ``spare`` is how much longer a cache is than the longest sequence.
    """
    B, generator = len(cache_seqlens), torch.Generator().manual_seed(seed)
    lengths = [n + N if append else n for n in cache_seqlens]
    S = max(lengths, default=0)
    inputs = make_inputs(
        B, N, HQ, H, D, L, S=S, DV=DV, dtype=dtype, device=device, form=form, seed=seed
    )
    table, rows, size = torch.arange(B)[:, None], B, S + spare
    if page_size is not None:
        columns, size = -(-(S + spare) // page_size), page_size
        rows = B * columns + 2
        table = torch.randperm(rows, generator=generator)[: B * columns].view(B, columns)
    caches = [x.new_full((rows, size + 2, *x.shape[2:]), float("nan")) for x in inputs[1:3]]
    k_cache, v_cache = (cache[:, 1:-1] for cache in caches)
    used = torch.zeros_like(table, dtype=torch.bool)
    for b, length in enumerate(lengths):
        n = torch.arange(0 if left is None else max(0, length - N - left), length)
        used[b, n // size] = True
        n = n[: len(n) - (N if append else 0)]
        at = table[b, n // size].to(device), (n % size).to(device)
        k_cache[at], v_cache[at] = inputs.k[b, n], inputs.v[b, n]
    junk = torch.tensor([-1, 2**31 - 1, -(2**31), rows])
    junk = junk[torch.randint(0, 4, table.shape, generator=generator)]
    new = [x.new_empty(B, N, *x.shape[2:]) if append else None for x in inputs[1:3]]
    if append:
        for b, n in enumerate(lengths):
            new[0][b], new[1][b] = inputs.k[b, n - N : n], inputs.v[b, n - N : n]
    return Decoding(
        inputs,
        lengths,
        k_cache,
        v_cache,
        torch.tensor(cache_seqlens, dtype=torch.int32, device=device),
        None if page_size is None else table.where(used, junk).to(device, torch.int32),
        *new,
    )


def assert_decodes(case: Decoding, run: Any, *, stored: bool = False, **options: Any) -> None:
    """``run(case) -> (out, lse)``, which may write to its caches, against moda_reference.decode."""
    q, _, _, k_depth, v_depth = case.inputs.numpy()
    tensors = [None if x is None else x.double().cpu().numpy() for x in case[2:]]
    k_cache, v_cache, _, _, k_new, v_new = tensors
    lengths = case.cache_seqlens.cpu().numpy()
    table = None if case.block_table is None else case.block_table.cpu().numpy()
    left = options.get("window")
    if table is not None and left is not None:  # the reference reads keys that no query sees
        table = np.where((table < 0) | (table >= len(k_cache)), 0, table)
    exact = moda_reference.decode(
        q, np.nan_to_num(k_cache), np.nan_to_num(v_cache), k_depth, v_depth, lengths,
        k_new=k_new, v_new=v_new, block_table=table, **options,
    )  # fmt: skip
    out, lse = run(case)
    plain_out, plain_lse, floor = torch.empty_like(out), torch.empty_like(lse), [0.0, 0.0]
    for b in range(len(case.lengths)):
        one = case.one(b)
        plain_out[b : b + 1], plain_lse[b : b + 1] = plain_attention(one, **options)
        zeros = torch.zeros_like(out[:1]), torch.zeros_like(lse[:1])
        errors = rounding(one, *zeros, stored=stored, **options)
        floor = [max(floor[0], errors["out"]), max(floor[1], errors["lse"])]
    assert_accurate("out", out, exact.out, plain_out, floor[0])
    assert_accurate("lse", lse, exact.lse, plain_lse, floor[1])
    for name, cache, expected in (
        ("k_cache", case.k_cache, exact.k_cache),
        ("v_cache", case.v_cache, exact.v_cache),
    ):
        assert np.array_equal(np.nan_to_num(cache.double().cpu().numpy()), expected), name
