"""The operators in plain PyTorch: what CPU tensors get, and the readable form of the kernels.

Memory is O(T * S) for the sequence scores and O(T * L) for the depth scores: no depth slot is ever
copied or stacked. (In chunks of C tokens they are, and the depth scores take O(T * C * L).) float16
and bfloat16 are computed in float32, as the kernels do, and autocast does not reach inside. A query
at key position p sees the keys of the band [p - left, p + right]; None is unbounded, causal is
right = 0. All plans are this one.

What no query sees may hold NaN: `_blocks` splits a call so that no product touches it.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moda_ops.operators.checks import lse_dtype
from moda_ops.operators.slot_tensors import SlotTensors

KeyGradients = tuple[Any, Any, Any, Any]
"""For k, v, k_depth and v_depth, each in its form."""


def depth_slots(depth: list[Tensor]) -> list[Tensor]:
    """A view (B, T, H, D) of every slot."""
    return [*SlotTensors.of(depth).each()]


CuSeqlens = tuple[Tensor, Tensor] | None
"""Where documents packed in one batch entry begin, in queries and in keys, and the last ends."""


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.autocast`` as a decorator keeps one state for all threads; this has one per call."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def bounds(name: str, cu: Tensor, tokens: int) -> list[int]:
    """The values of ``cu_seqlens``; raise ValueError unless they are borders of these tokens."""
    values: list[int] = cu.tolist()
    for i, (before, value) in enumerate(pairwise([0, *values])):
        if not before <= value <= tokens:
            raise ValueError(
                f"{name} must never fall and must stay within 0..{tokens}, got "
                f"{name}[{i}] = {value}" + (f" after {before}" if i else "")
            )
    return values


def _documents(T: int, S: int, cu_seqlens: CuSeqlens) -> list[tuple[range, range]]:
    """Queries and keys of each document; those outside of all documents are without the other."""
    if cu_seqlens is None:
        return [(range(T), range(S))]
    cu_q, cu_k = (
        bounds("cu_seqlens_q", cu_seqlens[0], T),
        bounds("cu_seqlens_k", cu_seqlens[1], S),
    )
    none = range(0)
    outside = [
        *((range(*pair), none) for pair in ((0, cu_q[0]), (cu_q[-1], T))),
        *((none, range(*pair)) for pair in ((0, cu_k[0]), (cu_k[-1], S))),
    ]
    pairs = zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    return outside + [(range(*rows), range(*keys)) for rows, keys in pairs]


def _unseen(T: int, S: int, left: int | None, right: int | None) -> tuple[int, int]:
    """How many first queries see no key, and how many first keys no query sees."""
    blind = 0 if right is None else min(max(T - S - right, 0), T)
    return blind, 0 if left is None else min(max(S - T - left, 0), S)


def _blocks(
    T: int, S: int, left: int | None, right: int | None, cu_seqlens: CuSeqlens = None
) -> Iterator[tuple[slice, slice]]:
    """Queries and keys, each in one block: a block's keys are those that its queries see.

    Every query of a block sees one of its keys, and every key is seen, or the block has none of the
    other. A block's last query sits at its last key.
    """
    for rows, keys in _documents(T, S, cu_seqlens):
        blind, unseen = _unseen(len(rows), len(keys), left, right)
        for a, b in (
            (rows[:blind], keys[:0]),
            (rows[:0], keys[:unseen]),
            (rows[blind:], keys[unseen:]),
        ):
            if a or b:
                yield slice(a.start, a.stop), slice(b.start, b.stop)


def _visible(T: int, S: int, left: int | None, right: int | None, device: torch.device) -> Tensor:
    """[T, S]. The last query sits at the last key."""
    position = torch.arange(S - T, S, device=device)[:, None]
    keys = torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if left is not None:
        seen &= keys >= position - min(left, T + S)  # larger sides could wrap in 64 bits
    if right is not None:
        seen &= keys <= position + min(right, T + S)
    return seen


def _grouped(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """(B, T, HQ, D) -> (B, H, G, T, D), in the compute dtype."""
    B, T, HQ, D = x.shape
    return x.reshape(B, T, H, HQ // H, D).permute(0, 2, 3, 1, 4).to(dtype)


def _ungrouped(x: Tensor) -> Tensor:
    """(B, H, G, T, D) -> (B, T, HQ, D), a view."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S, H, D) -> (B, H, 1, S, D): one key/value head broadcasts over its group."""
    return x.transpose(1, 2).unsqueeze(2).to(dtype)


def _scores(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    scale: float,
    softcap: float | None,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores [B, H, G, T, S + L], sequence then depth, -inf where hidden; and softcap's slope."""
    sequence = q @ k.mT  # [B, H, G, T, S]
    depth = [(q * _heads_first(slot, q.dtype)).sum(-1, keepdim=True) for slot in k_depth]
    return _finished_scores(torch.cat([sequence, *depth], -1), seen, scale, softcap)


def _finished_scores(
    products: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Scores of q . k, -inf where not ``seen``, which may lack the last columns; and the slope."""
    scores = products * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    scores[..., : seen.shape[-1]].masked_fill_(~seen, float("-inf"))
    return scores, slope


@_without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    plan: str = "auto",
    cu_seqlens: CuSeqlens = None,
) -> tuple[Tensor, Tensor]:
    """``moda::attention``: out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T)."""
    B, T, HQ, _ = q.shape
    out = q.new_empty(B, T, HQ, v.shape[-1])
    lse = q.new_empty(B, HQ, T, dtype=lse_dtype(q))
    k_slots, v_slots = depth_slots(k_depth), depth_slots(v_depth)
    for rows, keys in _blocks(T, k.shape[1], left, right, cu_seqlens):
        part, some_k, some_v = q[:, rows], k[:, keys], v[:, keys]
        depth = [x[:, rows] for x in k_slots], [x[:, rows] for x in v_slots]
        seen = _visible(part.shape[1], some_k.shape[1], left, right, q.device)
        out[:, rows], lse[..., rows] = _attend(part, some_k, some_v, *depth, scale, softcap, seen)
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slots: list[Tensor],
    v_slots: list[Tensor],
    scale: float,
    softcap: float | None,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """out, in float32 at least, and lse; ``seen`` broadcasts to [B, H, G, T, S]."""
    H, S = k.shape[2], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    scores, _ = _scores(rows, keys, k_slots, scale, softcap, seen)
    p, lse = _softmax(scores)
    out = p[..., :S] @ values
    for i, slot in enumerate(v_slots, S):
        out += p[..., i, None] * _heads_first(slot, dtype)
    return _ungrouped(out), lse.flatten(1, 2)


@_without_autocast
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    plan: str = "auto",
    cu_seqlens: CuSeqlens = None,
    grads: KeyGradients | None = None,
    running: KeyGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``moda::attention_backward``: the gradients, depth in the form it was given.

    Those of keys and values go into ``grads`` where that is given, and else into new contiguous
    tensors. ``running`` is what later readers have left for them and is added; None is nothing.
    """
    dq = q.new_empty(q.shape)
    grads = grads or (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        [x.new_empty(x.shape) for x in k_depth],
        [x.new_empty(x.shape) for x in v_depth],
    )
    k_slots, v_slots = depth_slots(k_depth), depth_slots(v_depth)
    into = _tensors(grads)
    handed = [None] * len(into) if running is None else _tensors(running)
    for rows, keys in _blocks(q.shape[1], k.shape[1], left, right, cu_seqlens):
        dq[:, rows], *found = _attend_backward(
            dout[:, rows],
            None if dlse is None else dlse[..., rows],
            q[:, rows],
            k[:, keys],
            v[:, keys],
            [x[:, rows] for x in k_slots],
            [x[:, rows] for x in v_slots],
            out[:, rows],
            lse[..., rows],
            scale,
            left,
            right,
            softcap,
        )
        places = [keys, keys, *[rows] * (len(into) - 2)]
        for x, more, place, grad in zip(into, handed, places, found, strict=True):
            x[:, place] = grad if more is None else grad + more[:, place]
    return dq, *grads


def _tensors(x: KeyGradients) -> list[Any]:
    k, v, k_depth, v_depth = x
    return [k, v, *depth_slots(k_depth), *depth_slots(v_depth)]


def _attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slots: list[Tensor],
    v_slots: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """The gradients of q, k, v, all key slots and all value slots, in float32 at least."""
    (T, S), H, L = (q.shape[1], k.shape[1]), k.shape[2], len(k_slots)
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    drows = _grouped(dout, H, dtype)

    delta = (drows * _grouped(out, H, dtype)).sum(-1)  # [B, H, G, T]
    if dlse is not None:
        delta = delta - dlse.to(dtype).unflatten(1, delta.shape[1:3])
    seen = _visible(T, S, left, right, q.device)
    scores, slope = _scores(rows, keys, k_slots, scale, softcap, seen)
    p = _probabilities(scores, lse.to(dtype).unflatten(1, delta.shape[1:3]))
    dp_depth = [(drows * _heads_first(slot, dtype)).sum(-1, keepdim=True) for slot in v_slots]
    dp = torch.cat([drows @ values.mT, *dp_depth], -1)
    ds = p * (dp - delta[..., None]) * slope * scale  # [B, H, G, T, S + L]

    dq = ds[..., :S] @ keys
    for i, slot in enumerate(k_slots, S):
        dq += ds[..., i, None] * _heads_first(slot, dtype)
    return [
        _ungrouped(dq),
        (ds[..., :S].mT @ rows).sum(2).transpose(1, 2),
        (p[..., :S].mT @ drows).sum(2).transpose(1, 2),
        *((ds[..., S + i, None] * rows).sum(2).transpose(1, 2) for i in range(L)),
        *((p[..., S + i, None] * drows).sum(2).transpose(1, 2) for i in range(L)),
    ]


@_without_autocast
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    chunk_size: int,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``moda::chunk_attention``: as ``attention``, causal, over the depth of a token's chunk."""
    if not depth_slots(k_depth) or q.numel() == 0:
        return attention(q, k, v, k_depth, v_depth, scale, left, 0, softcap)
    T, H, C = q.shape[1], k.shape[2], min(chunk_size, q.shape[1])
    _, first = _unseen(T, k.shape[1], left, 0)
    k, v = k[:, first:], v[:, first:]
    S = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    chunk_keys, chunk_values = _chunk_rows(k_depth, C, dtype), _chunk_rows(v_depth, C, dtype)
    scores, _ = _chunk_scores(rows, keys, chunk_keys, C, scale, left, softcap)
    p, lse = _softmax(scores)
    out = p[..., :S] @ values + _joined(_chunks(p[..., S:], C) @ chunk_values, T)
    return _ungrouped(out).to(q.dtype).contiguous(), lse.flatten(1, 2).to(lse_dtype(q))


@_without_autocast
def chunk_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    chunk_size: int,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``moda::chunk_attention_backward``: the gradients, depth in the form it was given."""
    if not depth_slots(k_depth) or q.numel() == 0:
        return attention_backward(
            dout, dlse, q, k, v, k_depth, v_depth, out, lse, scale, left, 0, softcap
        )
    T, H, C = q.shape[1], k.shape[2], min(chunk_size, q.shape[1])
    blind, first = _unseen(T, k.shape[1], left, 0)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    k, v = k[:, first:], v[:, first:]
    S = k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    chunk_keys, chunk_values = _chunk_rows(k_depth, C, dtype), _chunk_rows(v_depth, C, dtype)
    drows = _grouped(dout, H, dtype)

    delta = (drows * _grouped(out, H, dtype)).sum(-1)  # [B, H, G, T]
    if dlse is not None:
        delta = delta - dlse.to(dtype).unflatten(1, delta.shape[1:3])
    scores, slope = _chunk_scores(rows, keys, chunk_keys, C, scale, left, softcap)
    p = _probabilities(scores, lse.to(dtype).unflatten(1, delta.shape[1:3]))
    chunk_dp = _joined(_chunks(drows, C) @ chunk_values.mT, T)
    dp = torch.cat([drows @ values.mT, chunk_dp], -1)
    ds = p * (dp - delta[..., None]) * slope * scale  # [B, H, G, T, S + C * L]

    chunk_p, chunk_ds = _chunks(p[..., S:], C), _chunks(ds[..., S:], C)
    dq = ds[..., :S] @ keys + _joined(chunk_ds @ chunk_keys, T)
    for grad, weights, x in ((dk, ds, rows), (dv, p, drows)):
        sums = weights[..., blind:, :S].mT @ x[..., blind:, :]
        grad[:, first:] = sums.sum(2).transpose(1, 2)
    dk_depth, dv_depth = ([x.new_empty(x.shape) for x in depth] for depth in (k_depth, v_depth))
    for grads, weights, x in ((dk_depth, chunk_ds, rows), (dv_depth, chunk_p, drows)):
        sums = (weights.mT @ _chunks(x, C)).sum(2)
        for slot, slot_grad in zip(depth_slots(grads), _slots_of(sums, C, T), strict=True):
            slot.copy_(slot_grad)
    return _ungrouped(dq).to(q.dtype).contiguous(), dk, dv, dk_depth, dv_depth


@_without_autocast
def depth_mass(
    q: Tensor, k_depth: list[Tensor], lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """``moda::depth_mass``: (B, HQ, L); rows of infinite lse add nothing, whatever they hold.

    The slots alone do not give a softmax: these probabilities are as precise as ``lse``.
    """
    (B, T, HQ, _), slots = q.shape, depth_slots(k_depth)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not slots:
        return q.new_empty(B, HQ, 0, dtype=dtype)
    rows = _grouped(q, slots[0].shape[2], dtype)
    lse = lse.unflatten(1, rows.shape[1:3])
    nothing = lse.isinf()
    mass = []
    for slot in slots:
        scores = (rows * _heads_first(slot, dtype)).sum(-1) * scale  # [B, H, G, T]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mass.append(torch.exp(scores - lse).masked_fill(nothing, 0.0).sum(-1) / max(T, 1))
    return torch.stack(mass, -1).flatten(1, 2).to(dtype)


@_without_autocast
def probabilities(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> Tensor:
    """(B, HQ, T, S + L), sequence, then depth."""
    H, dtype = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    rows, keys = _grouped(q, H, dtype), _heads_first(k, dtype)
    seen = _visible(q.shape[1], k.shape[1], left, right, q.device)
    scores, _ = _scores(rows, keys, depth_slots(k_depth), scale, softcap, seen)
    return _softmax(scores)[0].flatten(1, 2)


def _chunks(x: Tensor, C: int) -> Tensor:
    """[.., T, D] -> [.., N, C, D], with zeros past the last token."""
    return pad(x, (0, 0, 0, -x.shape[-2] % C)).unflatten(-2, (-1, C))


def _joined(x: Tensor, T: int) -> Tensor:
    """[.., N, C, D] -> [.., T, D]."""
    return x.flatten(-3, -2)[..., :T, :]


def _chunk_rows(depth: list[Tensor], C: int, dtype: torch.dtype) -> Tensor:
    """Each chunk's depth keys [B, H, 1, N, C * L, D]; slot l of token s is row s * L + l."""
    L = len(depth_slots(depth))
    tokens = torch.stack(depth_slots(depth), 3).permute(0, 2, 1, 3, 4).flatten(3)  # [B, H, T, L D]
    return _chunks(tokens.to(dtype), C).unflatten(-1, (L, -1)).flatten(3, 4).unsqueeze(2)


def _slots_of(rows: Tensor, C: int, T: int) -> list[Tensor]:
    """The inverse of ``_chunk_rows``: [B, H, N, C * L, D] -> L slots (B, T, H, D)."""
    tokens = rows.unflatten(3, (C, -1)).flatten(2, 3)[:, :, :T]  # [B, H, T, L, D]
    return list(tokens.transpose(1, 2).unbind(3))


def _chunk_scores(
    q: Tensor,
    k: Tensor,
    chunk_keys: Tensor,
    C: int,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As ``_scores``, [B, H, G, T, S + C * L]: a token's chunk comes last, row by row."""
    T, S = q.shape[-2], k.shape[-2]
    products = torch.cat([q @ k.mT, _joined(_chunks(q, C) @ chunk_keys.mT, T)], -1)
    place = torch.arange(T, device=q.device) % C  # of a token in its chunk
    earlier = torch.arange(C, device=q.device)[None, :] <= place[:, None]  # [T, C], or itself
    earlier = earlier.repeat_interleave(chunk_keys.shape[-2] // C, 1)
    seen = torch.cat([_visible(T, S, left, 0, q.device), earlier], -1)
    return _finished_scores(products, seen, scale, softcap)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and lse; zeros and -inf in a row that sees nothing, where all are -inf."""
    lse = torch.logsumexp(scores, -1)
    p, blind = torch.softmax(scores, -1), lse == float("-inf")
    return p.masked_fill(blind[..., None], 0.0) if blind.any() else p, lse


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Those of the softmax whose lse this is, which may have further keys.

    exp(scores - lse) would carry the rounding of a large lse. What these scores give by themselves
    is the same lse, bit for bit, unless there are further keys.
    """
    p, own = _softmax(scores)
    return p if torch.equal(own, lse) else p * torch.exp(own - lse)[..., None]


@_without_autocast
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_new: Tensor | None,
    v_new: Tensor | None,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``moda::decode``, or ``moda::decode_``: out (B, N, HQ, DV) in q's dtype, lse (B, HQ, N)."""
    B, N = q.shape[:2]
    first = cache_seqlens.long()[:, None]  # the first new token's position
    if k_new is None or v_new is None:
        first = first - N
    positions = first + torch.arange(N)  # [B, N]
    page, place, there = _cache_places(k_cache, block_table, positions)
    if k_new is not None and v_new is not None:
        k_cache[page[there], place[there]] = k_new[there]
        v_cache[page[there], place[there]] = v_new[there]

    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    longest = max(int(positions.max()) + 1, 0) if positions.numel() else 0
    keys = torch.arange(min(longest, capacity))  # [S]
    page, place, there = _cache_places(k_cache, block_table, keys.expand(B, -1))
    seen = (keys <= positions[..., None]) & there[:, None]  # [B, N, S]
    if left is not None:
        seen &= keys >= positions[..., None] - min(left, longest)  # larger ones could wrap
    read = seen.any(1)  # the rest of a cache may hold NaN
    k, v = (x.new_zeros(*read.shape, *x.shape[2:]) for x in (k_cache, v_cache))
    k[read], v[read] = k_cache[page[read], place[read]], v_cache[page[read], place[read]]
    seen = seen[:, None, None]
    out, lse = _attend(q, k, v, depth_slots(k_depth), depth_slots(v_depth), scale, softcap, seen)
    return out.to(q.dtype).contiguous(), lse


def _cache_places(
    cache: Tensor, block_table: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where positions [B, n] lie on a cache's first two axes, and which of them there are."""
    size = cache.shape[1]
    if block_table is None:
        page = torch.arange(len(positions))[:, None].expand_as(positions)
        return page, positions, (positions >= 0) & (positions < size)
    there = (positions >= 0) & (positions < size * block_table.shape[1])
    column = (positions // size).where(there, 0)
    page = block_table.long().gather(1, column) if block_table.shape[1] else column
    return page, positions % size, there & (page >= 0) & (page < len(cache))
