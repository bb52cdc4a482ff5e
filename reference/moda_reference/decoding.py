"""Attention of new tokens to a cache, which is attention to the keys that the cache holds."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth, Window, bind, read_depth
from moda_reference.vectorised import attention

Places = npt.NDArray[np.int64]


class Decoded(NamedTuple):
    """What `decode` returns; the caches with the new tokens in them."""

    out: Array  # (B, T, HQ, DV)
    lse: Array  # (B, HQ, T)
    k_cache: Array
    v_cache: Array


def decode(
    q: npt.ArrayLike,
    k_cache: npt.ArrayLike,
    v_cache: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    cache_seqlens: npt.ArrayLike,
    *,
    k_new: npt.ArrayLike | None = None,
    v_new: npt.ArrayLike | None = None,
    block_table: npt.ArrayLike | None = None,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> Decoded:
    """Attend from T new tokens per sequence to a cache and to the tokens' own depth keys.

    Sequence b has len_b keys in the cache: cache_seqlens[b] + T with `k_new`, which goes to their
    end first, and cache_seqlens[b] without it, when the cache holds the new tokens already. Token t
    sits at position len_b - T + t and sees the keys up to there: `attention` with S = len_b.
    Key n lies at [b, n] of a cache, or with pages at [block_table[b, n // page_size],
    n % page_size].

    Args:
        q: (B, T, HQ, D), real numbers of any dtype.
        k_cache: (B, S, H, D), or pages (pages, page_size, H, D). Unused places may hold NaN.
        v_cache: (B, S, H, DV), or pages (pages, page_size, H, DV).
        k_depth: L slots (B, T, H, D) in a list, or packed (B, T, L, H, D), or None.
        v_depth: L slots (B, T, H, DV) in a list, or packed (B, T, L, H, DV), or None.
        cache_seqlens: (B,), integers.
        k_new: (B, T, H, D), or None.
        v_new: (B, T, H, DV), or None.
        block_table: (B, max_pages), integers; entries of unused pages may be anything.
        scale, window, softcap: as in `attention`.

    Returns:
        `Decoded`: out (B, T, HQ, DV), lse (B, HQ, T), natural logarithm, and new caches, float64.
        The arguments are left as they are.

    Raises:
        TypeError, ValueError: an argument is not what is said above, a sequence does not fit into
            its part of the cache, or one of its pages does not exist; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 4, 2, 8))
    >>> cache = np.full((1, 6, 2, 8), np.nan)
    >>> first = decode(q[:, :3], cache, cache, None, None, [0], k_new=k[:, :3], v_new=v[:, :3])
    >>> then = decode(q[:, 3:], *first[2:], None, None, [3], k_new=k[:, 3:], v_new=v[:, 3:])
    >>> bool(np.allclose(np.concatenate([first.out, then.out], 1), attention(q, k, v)[0]))
    True
    """
    sizes: dict[str, int] = {}
    queries = bind("q", q, "B T HQ D", sizes)
    axes = "B S" if block_table is None else "pages page_size"
    keys = bind("k_cache", k_cache, f"{axes} H D", sizes)
    values = bind("v_cache", v_cache, f"{axes} H DV", sizes)
    k_slots, v_slots = read_depth(k_depth, v_depth, sizes)
    lengths = _integers("cache_seqlens", cache_seqlens, "B", sizes)
    table, page_size = np.arange(sizes["B"])[:, None], keys.shape[1]
    if block_table is not None:
        table = _integers("block_table", block_table, "B max_pages", sizes)
    if (k_new is None) != (v_new is None):
        missing, other = ("k_new", "v_new") if k_new is None else ("v_new", "k_new")
        raise ValueError(f"{missing} is None, but {other} is given; give both or neither")

    new = None
    if k_new is not None and v_new is not None:
        new = bind("k_new", k_new, "B T H D", sizes), bind("v_new", v_new, "B T H DV", sizes)
        lengths = lengths + sizes["T"]

    places = [
        _places(b, length, table[b], page_size, len(keys)) for b, length in enumerate(lengths)
    ]
    out = np.zeros((*queries.shape[:3], sizes["DV"]))
    lse = np.zeros((sizes["B"], sizes["HQ"], sizes["T"]))
    for b, (page, place) in enumerate(places):
        if new is not None:
            at = page[len(page) - sizes["T"] :], place[len(page) - sizes["T"] :]
            keys[at], values[at] = new[0][b], new[1][b]
    for b, at in enumerate(places):
        one = slice(b, b + 1)
        depth = k_slots[one], v_slots[one]
        result = attention(
            queries[one], keys[at][None], values[at][None], *depth,
            scale=scale, window=window, softcap=softcap,
        )  # fmt: skip
        out[one], lse[one] = result
    return Decoded(out, lse, keys, values)


def _integers(name: str, given: npt.ArrayLike, layout: str, sizes: dict[str, int]) -> Places:
    array = np.asarray(given)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be an array of integers, got dtype {array.dtype}")
    bind(name, array, layout, sizes)
    return array.astype(np.int64)


def _places(
    b: int, length: int, pages: Places, page_size: int, n_pages: int
) -> tuple[Places, Places]:
    """Where positions 0..length - 1 of sequence b lie on the first two axes of a cache."""
    if not 0 <= length <= len(pages) * page_size:
        raise ValueError(
            f"sequence {b} has {length} keys, its part of the cache holds {len(pages) * page_size}"
        )
    n = np.arange(length)
    page, place = pages[n // page_size], n % page_size
    if any(page < 0) or any(page >= n_pages):
        raise ValueError(
            f"block_table[{b}] names pages {np.unique(page)}, there are 0 to {n_pages - 1}"
        )
    return page, place
