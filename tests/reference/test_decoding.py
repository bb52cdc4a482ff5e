"""Decoding is attention to what a cache holds, wherever it lies."""

import re

import numpy as np
import pytest

from moda_reference import attention, attention_loops, decode

OPTIONS = [{}, {"window": 2}, {"softcap": 0.7, "scale": 0.3}]


def contiguous(k, lengths, S, fill=np.nan):
    cache = np.full((len(lengths), S, *k.shape[2:]), fill)
    for b, length in enumerate(lengths):
        cache[b, :length] = k[b, :length]
    return cache


def paged(k, lengths, page_size, fill=np.nan):
    """A cache in shuffled pages, its table with impossible ids where no page is used."""
    rng = np.random.default_rng(0)
    columns = -(-k.shape[1] // page_size) + 1
    table = rng.permutation(len(lengths) * columns + 3)[: len(lengths) * columns]
    table = table.reshape(len(lengths), columns)
    cache = np.full((len(lengths) * columns + 3, page_size, *k.shape[2:]), fill)
    for b, length in enumerate(lengths):
        for n in range(length):
            cache[table[b, n // page_size], n % page_size] = k[b, n]
        table[b, -(-length // page_size) :] = (-1, 10**6)[b % 2]
    return cache, table


@pytest.mark.parametrize("options", OPTIONS)
def test_each_sequence_is_attention_to_its_own_keys(options, make_inputs, assert_same):
    """In loops, key by key: nothing is shared with how `decode` goes about it."""
    x, lengths = make_inputs(B=3, T=3, S=9), [0, 2, 9]
    k_cache, v_cache = (contiguous(x[name], lengths, 11) for name in "kv")
    out, lse, *caches = decode(
        x["q"], k_cache, v_cache, x["k_depth"], x["v_depth"], lengths, **options
    )
    for b, length in enumerate(lengths):
        one = {name: array[b : b + 1] for name, array in x.items()}
        one["k"], one["v"] = one["k"][:, :length], one["v"][:, :length]
        expected = attention_loops(**one, **options)
        assert_same((out[b : b + 1], lse[b : b + 1]), expected)
    assert_same(caches, [k_cache, v_cache])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
def test_pages_change_nothing(page_size, options, make_inputs, assert_same):
    x, lengths = make_inputs(B=3, T=2, S=9), [2, 0, 9]
    depth = x["k_depth"], x["v_depth"], lengths
    k_cache, v_cache = (contiguous(x[name], lengths, 9) for name in "kv")
    expected = decode(x["q"], k_cache, v_cache, *depth, **options)
    (k_cache, table), (v_cache, _) = (paged(x[name], lengths, page_size) for name in "kv")
    out, lse, *_ = decode(x["q"], k_cache, v_cache, *depth, block_table=table, **options)
    assert_same((out, lse), expected[:2])


@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_add_up_to_the_whole_sequence(options, page_size, make_inputs, assert_same):
    x = make_inputs(B=2, T=9)
    whole, whole_lse = attention(**x, **options)
    k_cache, v_cache, table = *np.full((2, 2, 9, 2, 4), np.nan), None
    v_cache = v_cache[..., :3]
    if page_size is not None:
        table = np.array([[5, 1, 0], [2, 4, 3]])
        k_cache, v_cache = (c.reshape(6, page_size, *c.shape[2:]) for c in (k_cache, v_cache))
    n = 0
    for step in (2, 1, 1, 5):
        now = {name: array[:, n : n + step] for name, array in x.items()}
        before = k_cache.copy()
        y = decode(
            now["q"], k_cache, v_cache, now["k_depth"], now["v_depth"], [n, n], k_new=now["k"],
            v_new=now["v"], block_table=table, **options,
        )  # fmt: skip
        assert_same(y[:2], (whole[:, n : n + step], whole_lse[..., n : n + step]))
        assert_same(k_cache, before)  # arguments are left as they are
        assert np.isnan(y.k_cache).sum() == np.isnan(k_cache).sum() - now["k"].size
        k_cache, v_cache, n = y.k_cache, y.v_cache, n + step
    if page_size is None:
        assert_same((k_cache, v_cache), (x["k"], x["v"]))


q, k, v = np.zeros((2, 3, 4, 5)), np.zeros((2, 8, 2, 5)), np.zeros((2, 8, 2, 6))
PAGES = np.array([[0, 1], [1, 9]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_cache": k[:1]}, ValueError, "k_cache has shape (1, 8, 2, 5), it must be (B=2, S, H,"),
        ({"cache_seqlens": [1]}, ValueError, "cache_seqlens has shape (1,), it must be (B=2)"),
        ({"cache_seqlens": [0.5, 1]}, TypeError, "cache_seqlens must be an array of integers, got"),
        ({"cache_seqlens": [8, 9]}, ValueError, "sequence 1 has 9 keys, its part of the cache"),
        ({"cache_seqlens": [-1, 9]}, ValueError, "sequence 0 has -1 keys, its part of the cache"),
        ({"k_new": q[:, :, :2]}, ValueError, "v_new is None, but k_new is given; give both or"),
        ({"v_new": v[:, :3]}, ValueError, "k_new is None, but v_new is given; give both or"),
        (
            {"k_new": k[:, :3], "v_new": v[:, :2]},
            ValueError,
            "v_new has shape (2, 2, 2, 6), it must be (B=2, T=3, H=2, DV=6)",
        ),
        (
            {"k_new": k[:, :3], "v_new": v[:, :3], "cache_seqlens": [5, 6]},
            ValueError,
            "sequence 1 has 9 keys, its part of the cache holds 8",
        ),
        ({"block_table": PAGES[:1]}, ValueError, "block_table has shape (1, 2), it must be (B=2,"),
        ({"block_table": PAGES}, ValueError, "block_table[1] names pages [1 9], there are 0 to 1"),
        ({"k_depth": [q[:, :, :2]]}, ValueError, "v_depth is None, but k_depth is given"),
    ],
)
def test_message(changes, error, message):
    right = dict(
        q=q,
        k_cache=k,
        v_cache=v,
        k_depth=None,
        v_depth=None,
        cache_seqlens=[0, 8],
        block_table=None,
    )
    if "block_table" in changes:
        changes["cache_seqlens"] = [0, 9]
    with pytest.raises(error, match=re.escape(message)):
        decode(**(right | changes))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="HQ must be a multiple of H"):
        decode(q[:, :, :3], k, v, None, None, [0, 8])
