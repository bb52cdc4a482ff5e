"""Decoding against a cache: ``moda_decode``, ``torch.ops.moda.decode`` and ``decode_``.

``decode_`` also writes new keys and values into the caches, which its schema declares. Neither has
a gradient: an input that requires one is an error unless gradients are off.
"""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators import definition
from moda_ops.operators.arguments import (
    DepthArgument,
    Window,
    check_bool,
    check_tensors,
    score_options,
    slot_lists,
    window_sides,
)
from moda_ops.operators.checks import check_both, check_decode, overlap, sum_dtype
from moda_ops.operators.definition import DEPTH
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.operators.slot_tensors import SlotTensors
from moda_ops.rules.autocast import Autocast
from moda_ops.rules.autograd import refuse_gradients
from moda_ops.rules.flops import known_values, visible_pairs
from moda_ops.rules.operator import Operator, define
from moda_ops.rules.vmap import Arguments, Mapped, Vmap, fold, mapped_rows


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    cache_seqlens: Tensor, block_table: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new = None, None
    return _run(q, k_cache, v_cache, k_depth, v_depth, cache_seqlens, block_table, *new, **options)


def _append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    cache_seqlens: Tensor, k_new: Tensor, v_new: Tensor, block_table: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if overlap(k_cache, v_cache):
        raise ValueError("k_cache and v_cache are both written to and must not share memory")
    new = k_new, v_new
    results = _run(
        q, k_cache, v_cache, k_depth, v_depth, cache_seqlens, block_table, *new, **options
    )
    for cache in (k_cache, v_cache):
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)
    return results


def _run(q: Tensor, *arguments: Any, **given: Any) -> tuple[Tensor, Tensor]:
    """``arguments`` with block_table, k_new and v_new at the end, each of which may be None."""
    options = Options(**given)
    check_decode(*(q, *arguments, options))
    scale, left, _, softcap, _ = options.resolved(q.shape[-1])
    out, lse = definition.implementation(q).decode(q, *arguments, scale, left, softcap)
    return out, lse


def _decode_fake(q: Tensor, *arguments: Any, **given: Any) -> tuple[Tensor, Tensor]:
    *required, block_table = [*arguments, None][:6]
    return _results(q, *required, block_table, None, None, given=given)


def _append_fake(q: Tensor, *arguments: Any, **given: Any) -> tuple[Tensor, Tensor]:
    *required, k_new, v_new, block_table = [*arguments, None][:8]
    return _results(q, *required, block_table, k_new, v_new, given=given)


def _results(q: Tensor, *arguments: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sizes = check_decode(*(q, *arguments, Options(**given)))
    out, lse = sizes.shape("B N HQ DV"), sizes.shape("B HQ N")
    return q.new_empty(out), q.new_empty(lse, dtype=sum_dtype(q))


def _pairs(
    q: Tensor,
    k_cache: Tensor,
    k_depth: list[Tensor],
    cache_seqlens: Tensor,
    k_new: Tensor | None = None,
    block_table: Tensor | None = None,
    window_left: int | None = None,
    **_: Any,
) -> int:
    B, N = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    new = 0 if k_new is None else N
    known = known_values(cache_seqlens)
    lengths = [capacity] * B if known is None else [n + new for n in known]
    sequence = sum(visible_pairs(N, min(n, capacity), window_left, 0, n - N) for n in lengths)
    return sequence + B * N * SlotTensors.of(k_depth).number


def _fold_pages(arguments: Arguments, size: int) -> dict[str, Any]:
    """Pages that are not mapped serve all; of mapped ones, the tables count through all."""
    caches = {name: arguments[name] for name in ("k_cache", "v_cache")}
    table = arguments.get("block_table", Mapped(None, None))
    if table.value is None:
        return {}
    if all(cache.dim is None for cache in caches.values()):
        return {name: cache.value for name, cache in caches.items()}
    folded = {name: fold(cache, size, 0) for name, cache in caches.items()}
    pages = folded["k_cache"].shape[0] // size
    first = torch.arange(size, device=table.value.device, dtype=torch.int32) * pages
    ids = mapped_rows(table, size)
    ids = (ids + first[:, None, None]).where((ids >= 0) & (ids < pages), -1)
    return folded | {"block_table": ids.flatten(0, 1)}


_CACHES = "Tensor q, Tensor{} k_cache, Tensor{} v_cache"
_OPTIONS = (
    "Tensor? block_table=None, *, Scalar? scale=None, SymInt? window_left=None, "
    "Scalar? softcap=None) -> (Tensor out, Tensor lse)"
)
_NO_GRADIENT = partial(
    refuse_gradients,
    message="moda_decode has no gradient, but {} requires one; call it under torch.no_grad() or "
    "torch.inference_mode(), or train with moda_attention",
)
define(
    Operator(
        f"decode({_CACHES.format('', '')}, {DEPTH}, Tensor cache_seqlens, {_OPTIONS}",
        _decode,
        _decode_fake,
        _NO_GRADIENT,
        Autocast(memory=("k_cache", "v_cache")),
        Vmap(special=_fold_pages),
        _pairs,
    )
)
define(
    Operator(
        f"decode_({_CACHES.format('(a!)', '(b!)')}, {DEPTH}, Tensor cache_seqlens, "
        f"Tensor k_new, Tensor v_new, {_OPTIONS}",
        _append,
        _append_fake,
        _NO_GRADIENT,
        Autocast(memory=("k_cache", "v_cache")),
        "it writes to its caches; append to them first and map moda_decode without k_new",
        _pairs,
    )
)


@overload
def moda_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    cache_seqlens: Tensor,
    *,
    k_new: Tensor | None = ...,
    v_new: Tensor | None = ...,
    block_table: Tensor | None = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    cache_seqlens: Tensor,
    *,
    k_new: Tensor | None = ...,
    v_new: Tensor | None = ...,
    block_table: Tensor | None = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    cache_seqlens: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend from a few new tokens to a cache of keys and to the tokens' own depth keys.

    The decoding step of ``moda_attention``: for sequence b, new token i, query head h and its
    key/value head j = h // G, with len_b keys of the sequence in the cache (all of one b)::

        pos = len_b - N + i                         the token's position
        a_n = scale * q[i,h] . k_cache[n,j]         for 0 <= n <= pos
        d_l = scale * q[i,h] . k_depth[l][i,j]      for every depth slot l
        lse = log( sum_n exp a_n + sum_l exp d_l )
        out = sum_n exp(a_n - lse) v_cache[n,j] + sum_l exp(d_l - lse) v_depth[l][i,j]

    (arXiv 2603.15619, section 2, mechanism (d); lengths, pages and appending follow
    ``flash_attn_with_kvcache``.) Lengths and page ids stay on the device: nothing is synchronized,
    and one captured CUDA graph serves all lengths. There is no gradient.

    Args:
        q: queries of the new tokens, (B, N, HQ, D); float16, bfloat16 or float32, on a CPU also
            float64. Meant for small N; any is right.
        k_cache: keys, q's dtype: (B, S_max, H, D), or with ``block_table`` pages (pages, page_size,
            H, D). HQ = G * H for an integer G >= 1. Memory that no query sees may hold anything.
        v_cache: values likewise, (B, S_max, H, DV) or (pages, page_size, H, DV).
            1 <= D, DV <= 256.
        k_depth: depth keys of the new tokens, q's dtype: a list of L slots (B, N, H, D), or one
            packed tensor (B, N, L, H, D). ``None`` and the empty list mean L = 0.
        v_depth: depth values in the same form: slots (B, N, H, DV) or packed (B, N, L, H, DV).
        cache_seqlens: (B,) int32 of stride 1, tokens of each sequence in the cache before the
            call: len_b is cache_seqlens[b] + N with ``k_new``, and cache_seqlens[b] without it,
            when the cache holds the new tokens already. Not changed by the call. Any length may be
            0; a token with pos < 0 sees no key of the cache.
        k_new: keys of the new tokens, (B, N, H, D), q's dtype. They are written **in place** to
            positions cache_seqlens[b] .. cache_seqlens[b] + N - 1 before anything is read. The two
            caches may be views of one tensor but must not overlap.
        v_new: values likewise, (B, N, H, DV).
        block_table: (B, max_pages) int32: position n of sequence b lies in page
            block_table[b, n // page_size], at n % page_size. Any page_size >= 1; 16, 32 and
            multiples of 64 are fast. Entries of pages that no query sees, and no new token goes to,
            are not read.
        scale: factor on every score, within -1e30..1e30; default 1 / sqrt(D).
        window: ``(left, right)`` or an int, as in ``moda_attention``: also hides n < pos - left.
            ``right`` hides nothing more.
        softcap: c within 1e-7..1e30 replaces each score x, of both kinds, by c * tanh(x / c).
        return_lse: also return ``lse``.

    A sequence that is longer than its part of the cache, S_max or max_pages * page_size, cannot be
    found out without a synchronization and raises no error: what does not fit is neither written
    nor seen. The same is true of a page id outside 0 .. pages - 1.

    Returns:
        ``out`` (B, N, HQ, DV) in q's dtype, contiguous; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is (B, HQ, N) in float32 (float64 for float64 inputs), natural
        logarithm. A row that sees nothing has out = 0 and lse = -inf.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, or an option outside its range.
        RuntimeError: an argument requires a gradient and gradients are on. Nothing is written when
            an error is raised.

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention, moda_decode
        >>> B, S_max, HQ, H, D = 2, 16, 4, 2, 32
        >>> k_cache, v_cache = torch.zeros(2, B, S_max, H, D)
        >>> lengths = torch.zeros(B, dtype=torch.int32)
        >>> q, k, v, slot = (torch.randn(B, 3, heads, D) for heads in (HQ, H, H, H))
        >>> for i in range(3):
        ...     new = slice(i, i + 1)
        ...     out = moda_decode(
        ...         q[:, new], k_cache, v_cache, [slot[:, new]], [slot[:, new]], lengths,
        ...         k_new=k[:, new], v_new=v[:, new],
        ...     )
        ...     lengths += 1
        >>> out.shape
        torch.Size([2, 1, 4, 32])
        >>> whole = moda_attention(q, k, v, [slot], [slot])
        >>> torch.allclose(out, whole[:, 2:], atol=1e-5)
        True
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens)
    check_both("k_new", k_new, "v_new", v_new)
    if block_table is not None:
        check_tensors(block_table=block_table)
    check_bool("return_lse", return_lse)
    options = score_options(scale, softcap) | dict(window_left=window_sides(window)[0])
    arguments = q, k_cache, v_cache, *slot_lists(k_depth, v_depth, "B, N"), cache_seqlens
    if k_new is None or v_new is None:
        out, lse = torch.ops.moda.decode(*arguments, block_table, **options)
    else:
        check_tensors(k_new=k_new, v_new=v_new)
        out, lse = torch.ops.moda.decode_(*arguments, k_new, v_new, block_table, **options)
    return (out, lse) if return_lse else out
