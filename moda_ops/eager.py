"""The operators in plain PyTorch: what CPU tensors get, and the readable form of the kernels.

Memory is O(T * S) for the sequence scores and O(T * L) for the depth scores: no depth slot is ever
copied or stacked. (In chunks of C tokens they are, and the depth scores take O(T * C * L).) float16
and bfloat16 are computed in float32, as the kernels do, and autocast reaches in as little as into a
kernel. A query at key position p sees the keys of the band [p - left, p + right]; None is
unbounded, causal is right = 0. All plans are this one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

KeyGradients = tuple[Any, Any, Any, Any]
"""For k, v, k_depth and v_depth, each in its form."""


def depth_slots(depth: list[Tensor]) -> list[Tensor]:
    """Per-slot views (B, T, H, D) of either form: L slots, or a list of one packed tensor."""
    packed = len(depth) == 1 and depth[0].dim() == 5
    return list(depth[0].unbind(2)) if packed else depth


CuSeqlens = tuple[Tensor, Tensor] | None
"""Where documents packed in one batch entry begin, in queries and in keys, and the last ends."""


def _visible(
    T: int,
    S: int,
    left: int | None,
    right: int | None,
    cu_seqlens: CuSeqlens,
    device: torch.device,
) -> Tensor:
    position = torch.arange(S - T, S, device=device)[:, None]
    keys = torch.arange(S, device=device)[None, :]
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        document, key_document = (
            torch.searchsorted(cu, torch.arange(n, device=device, dtype=cu.dtype), right=True) - 1
            for cu, n in zip(cu_seqlens, (T, S), strict=True)
        )
        seen = document[:, None] == key_document[None, :]
        seen &= (document < len(cu_seqlens[0]) - 1)[:, None]  # what follows the last document
        last, last_key = (cu[(document + 1).clamp(max=len(cu) - 1)] for cu in cu_seqlens)
        position = (torch.arange(T, device=device) + last_key - last)[:, None]
    if left is not None:
        seen &= keys >= position - left
    if right is not None:
        seen &= keys <= position + right
    return seen  # [T, S]


def _grouped(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """(B, T, HQ, D) -> (B, H, G, T, D), in the compute dtype."""
    B, T, HQ, D = x.shape
    return x.reshape(B, T, H, HQ // H, D).permute(0, 2, 3, 1, 4).to(dtype)


def _ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, G, T, D) -> (B, T, HQ, D), contiguous."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype).contiguous()


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


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
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
    seen = _visible(q.shape[1], k.shape[1], left, right, cu_seqlens, q.device)
    return _attend(q, k, v, depth_slots(k_depth), depth_slots(v_depth), scale, softcap, seen)


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
    """out and lse under a sequence mask that broadcasts to [B, H, G, T, S]."""
    H, S = k.shape[2], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    scores, _ = _scores(rows, keys, k_slots, scale, softcap, seen)
    lse = torch.logsumexp(scores, -1)  # [B, H, G, T]
    p = _probabilities(scores, lse)
    out = p[..., :S] @ values
    for i, slot in enumerate(v_slots, S):
        out += p[..., i, None] * _heads_first(slot, dtype)
    return _ungrouped(out, q.dtype), lse.flatten(1, 2).contiguous()


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
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
    H, S = k.shape[2], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    drows = _grouped(dout, H, dtype)
    k_slots, v_slots = depth_slots(k_depth), depth_slots(v_depth)

    delta = (drows * _grouped(out, H, dtype)).sum(-1)  # [B, H, G, T]
    if dlse is not None:
        delta = delta - dlse.to(dtype).unflatten(1, delta.shape[1:3])
    seen = _visible(q.shape[1], S, left, right, cu_seqlens, q.device)
    scores, slope = _scores(rows, keys, k_slots, scale, softcap, seen)
    p = _probabilities(scores, lse.to(dtype).unflatten(1, delta.shape[1:3]))
    dp_depth = [(drows * _heads_first(slot, dtype)).sum(-1, keepdim=True) for slot in v_slots]
    dp = torch.cat([drows @ values.mT, *dp_depth], -1)
    ds = p * (dp - delta[..., None]) * slope * scale  # [B, H, G, T, S + L]

    drows_q = ds[..., :S] @ keys
    for i, slot in enumerate(k_slots, S):
        drows_q += ds[..., i, None] * _heads_first(slot, dtype)
    dk = (ds[..., :S].mT @ rows).sum(2).transpose(1, 2)
    dv = (p[..., :S].mT @ drows).sum(2).transpose(1, 2)
    L = len(k_slots)
    dk_slots = [(ds[..., S + i, None] * rows).sum(2).transpose(1, 2) for i in range(L)]
    dv_slots = [(p[..., S + i, None] * drows).sum(2).transpose(1, 2) for i in range(L)]
    into_k, into_v, into_k_depth, into_v_depth = grads or (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        [x.new_empty(x.shape) for x in k_depth],
        [x.new_empty(x.shape) for x in v_depth],
    )
    k_running, v_running, k_depth_running, v_depth_running = running or (None, None, None, None)
    _store([into_k], [dk], None if k_running is None else [k_running])
    _store([into_v], [dv], None if v_running is None else [v_running])
    _store(into_k_depth, dk_slots, k_depth_running)
    _store(into_v_depth, dv_slots, v_depth_running)
    return _ungrouped(drows_q, q.dtype), into_k, into_v, into_k_depth, into_v_depth


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
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
    T, S, H = q.shape[1], k.shape[1], k.shape[2]
    C = min(chunk_size, T)
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = _grouped(q, H, dtype), _heads_first(k, dtype), _heads_first(v, dtype)
    chunk_keys, chunk_values = _chunk_rows(k_depth, C, dtype), _chunk_rows(v_depth, C, dtype)
    scores, _ = _chunk_scores(rows, keys, chunk_keys, C, scale, left, softcap)
    lse = torch.logsumexp(scores, -1)  # [B, H, G, T]
    p = _probabilities(scores, lse)
    out = p[..., :S] @ values + _joined(_chunks(p[..., S:], C) @ chunk_values, T)
    return _ungrouped(out, q.dtype), lse.flatten(1, 2).contiguous()


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
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
    T, S, H = q.shape[1], k.shape[1], k.shape[2]
    C = min(chunk_size, T)
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
    dk = (ds[..., :S].mT @ rows).sum(2).transpose(1, 2)
    dv = (p[..., :S].mT @ drows).sum(2).transpose(1, 2)
    dk_depth, dv_depth = ([x.new_empty(x.shape) for x in depth] for depth in (k_depth, v_depth))
    _store(dk_depth, _slots_of((chunk_ds.mT @ _chunks(rows, C)).sum(2), C, T), None)
    _store(dv_depth, _slots_of((chunk_p.mT @ _chunks(drows, C)).sum(2), C, T), None)
    return (
        _ungrouped(dq, q.dtype),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        dk_depth,
        dv_depth,
    )


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def depth_mass(
    q: Tensor, k_depth: list[Tensor], lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """``moda::depth_mass``: (B, HQ, L); rows of lse = -inf have nothing to give."""
    (B, T, HQ, _), slots = q.shape, depth_slots(k_depth)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not slots:
        return q.new_empty(B, HQ, 0, dtype=dtype)
    rows = _grouped(q, slots[0].shape[2], dtype)
    lse = lse.masked_fill(lse == float("-inf"), float("inf")).unflatten(1, rows.shape[1:3])
    mass = []
    for slot in slots:
        scores = (rows * _heads_first(slot, dtype)).sum(-1) * scale  # [B, H, G, T]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mass.append(torch.exp(scores - lse).sum(-1) / max(T, 1))
    return torch.stack(mass, -1).flatten(1, 2)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def probabilities(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> Tensor:
    """Those of the softmax whose lse this is: (B, HQ, T, S + L), sequence, then depth."""
    H, dtype = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    rows, keys = _grouped(q, H, dtype), _heads_first(k, dtype)
    seen = _visible(q.shape[1], k.shape[1], left, right, None, q.device)
    scores, _ = _scores(rows, keys, depth_slots(k_depth), scale, softcap, seen)
    return _probabilities(scores, lse.unflatten(1, rows.shape[1:3])).flatten(1, 2)


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
    seen = torch.cat([_visible(T, S, left, 0, None, q.device), earlier], -1)
    return _finished_scores(products, seen, scale, softcap)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); zeros in a row that sees nothing, where all of these are -inf."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


def _store(into: list[Tensor], grads: list[Tensor], running: list[Tensor] | None) -> None:
    """Write gradients, plus what is running; each list is in one of the two forms of depth."""
    slots = depth_slots(into)
    for i, grad in enumerate(grads):
        slots[i].copy_(grad if running is None else grad + depth_slots(running)[i])


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
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
    longest = int(positions.max()) + 1 if positions.numel() else 0
    keys = torch.arange(min(max(longest, 0), capacity))  # [S]
    page, place, there = _cache_places(k_cache, block_table, keys.expand(B, -1))
    seen = (keys <= positions[..., None]) & there[:, None]  # [B, N, S]
    if left is not None:
        seen &= keys >= positions[..., None] - left
    read = seen.any(1)  # the rest of a cache may hold NaN
    k, v = (x.new_zeros(*read.shape, *x.shape[2:]) for x in (k_cache, v_cache))
    k[read], v[read] = k_cache[page[read], place[read]], v_cache[page[read], place[read]]
    seen = seen[:, None, None]
    return _attend(q, k, v, depth_slots(k_depth), depth_slots(v_depth), scale, softcap, seen)


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
