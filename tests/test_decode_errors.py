"""Every refusal of moda_decode names the argument, what was given and what is allowed."""

import pytest
import torch

from moda_ops import moda_decode

B, N, S, HQ, H, D, DV, L = 2, 3, 9, 6, 2, 16, 24, 2
PAGES, PAGE_SIZE, COLUMNS = 7, 4, 3


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def call(**changes):
    arguments = dict(
        q=zeros(B, N, HQ, D),
        k_cache=zeros(B, S, H, D),
        v_cache=zeros(B, S, H, DV),
        k_depth=[zeros(B, N, H, D)] * L,
        v_depth=[zeros(B, N, H, DV)] * L,
        cache_seqlens=zeros(B, dtype=torch.int32),
    )
    return moda_decode(**(arguments | changes))


NEW = dict(k_new=zeros(B, N, H, D), v_new=zeros(B, N, H, DV))
PAGED = dict(
    k_cache=zeros(PAGES, PAGE_SIZE, H, D),
    v_cache=zeros(PAGES, PAGE_SIZE, H, DV),
    block_table=zeros(B, COLUMNS, dtype=torch.int32),
)
CASES = [
    (dict(q=1), TypeError, "q must be a torch.Tensor, got int"),
    (dict(q=zeros(N, HQ, D)), ValueError, "q must have shape (B, N, HQ, D), got (3, 6, 16)"),
    (dict(k_cache=zeros(S, H, D)), ValueError, "k_cache must have shape (B, S_max, H, D), got (9, 2, 16)"),
    (dict(k_cache=zeros(1, S, H, D)), ValueError, "k_cache must have shape (B, S_max, H, D) = (2, 9, 2, 16), got (1, 9, 2, 16)"),
    (dict(v_cache=zeros(B, 8, H, DV)), ValueError, "v_cache must have shape (B, S_max, H, DV) = (2, 9, 2, 24), got (2, 8, 2, 24)"),
    (PAGED | dict(v_cache=zeros(PAGES, 5, H, DV)), ValueError, "v_cache must have shape (pages, page_size, H, DV) = (7, 4, 2, 24), got (7, 5, 2, 24)"),
    (dict(k_cache=zeros(B, S, H, D).half()), TypeError, "k_cache must have dtype torch.float32 to fit q, got torch.float16"),
    (dict(k_cache=zeros(B, S, D, H).mT), ValueError, "k_cache must be contiguous in its last dimension (stride 1), got strides (288, 32, 1, 2); call .contiguous() if a copy is acceptable"),
    (dict(q=zeros(B, N, 5, D)), ValueError, "q's heads must be a positive multiple of k_cache's, got HQ = 5 and H = 2; heads are the second to last dimension"),
    (dict(v_cache=zeros(B, S, H, 300), k_depth=None, v_depth=None), ValueError, "v_cache's head dim must be within 1..256, got 300"),
    (dict(k_depth=None), ValueError, "v_depth is given but k_depth is None; give both or neither"),
    (dict(v_depth=[]), ValueError, "k_depth and v_depth must have the same number of slots, got 2 and 0"),
    *((dict(k_depth=[zeros(B, N, H, D)], v_depth=zeros(B, N, n, H, DV)), ValueError, f"k_depth and v_depth must both be lists of slots or both packed tensors, got a list of length 1 and one packed tensor of shape (2, 3, {n}, 2, 24)") for n in (0, 1, 3)),
    (dict(k_depth=[zeros(B, S, H, D)] * L), ValueError, "k_depth[0] must have shape (B, N, H, D) = (2, 3, 2, 16), got (2, 9, 2, 16)"),
    (dict(cache_seqlens=3), TypeError, "cache_seqlens must be a torch.Tensor, got int"),
    (dict(cache_seqlens=zeros(B).long()), TypeError, "cache_seqlens must have dtype torch.int32, got torch.int64; call .int()"),
    (dict(cache_seqlens=zeros(3, dtype=torch.int32)), ValueError, "cache_seqlens must have shape (B,) = (2), got (3)"),
    (dict(cache_seqlens=zeros(1, dtype=torch.int32).expand(B)), ValueError, "cache_seqlens must be contiguous in its last dimension (stride 1), got strides (0,); call .contiguous() if a copy is acceptable"),
    (dict(cache_seqlens=zeros(B, dtype=torch.int32, device="meta")), ValueError, "cache_seqlens must be on q's device cpu, got meta"),
    (dict(k_new=NEW["k_new"]), ValueError, "k_new is given but v_new is None; give both or neither"),
    (NEW | dict(v_new=zeros(B, 2, H, DV)), ValueError, "v_new must have shape (B, N, H, DV) = (2, 3, 2, 24), got (2, 2, 2, 24)"),
    (NEW | dict(k_new=[1]), TypeError, "k_new must be a torch.Tensor, got list"),
    (NEW | dict(k_cache=zeros(1, S, H, D).expand(B, S, H, D)), ValueError, "k_cache is written to and must not repeat its memory, got strides (0, 32, 16, 1) for shape (2, 9, 2, 16)"),
    (PAGED | dict(block_table=[[0]]), TypeError, "block_table must be a torch.Tensor, got list"),
    (PAGED | dict(block_table=zeros(B, dtype=torch.int32)), ValueError, "block_table must have shape (B, max_pages), got (2)"),
    (PAGED | dict(block_table=zeros(3, COLUMNS, dtype=torch.int32)), ValueError, "block_table must have shape (B, max_pages) = (2, 3), got (3, 3)"),
    (PAGED | dict(block_table=zeros(B, COLUMNS)), TypeError, "block_table must have dtype torch.int32, got torch.float32; call .int()"),
    (PAGED | dict(block_table=zeros(COLUMNS, B, dtype=torch.int32).T), ValueError, "block_table must be contiguous in its last dimension (stride 1), got strides (1, 2); call .contiguous() if a copy is acceptable"),
    (PAGED | dict(k_cache=zeros(PAGES, 0, H, D), v_cache=zeros(PAGES, 0, H, DV)), ValueError, "k_cache must have a page_size of at least 1, got 0"),
    (dict(k_cache=zeros(1, 1, H, D).expand(B, 2**31, H, D), v_cache=zeros(1, 1, H, DV).expand(B, 2**31, H, DV)), ValueError, "S_max must be at most 1072693248: positions are int32, got 2147483648"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    (dict(softcap=-1.0), ValueError, "softcap must be within 1e-07..1e+30, got -1.0"),
    (dict(window=-1), ValueError, "window sides must be >= 0 (None is unbounded), got -1"),
    (dict(return_lse=1), TypeError, "return_lse must be a bool, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message(changes, error, message):
    k_cache, v_cache = (torch.full((B, S, H, n), float("nan")) for n in (D, DV))
    new = {} if "k_new" in changes else NEW
    with pytest.raises(error) as caught:
        call(**(dict(k_cache=k_cache, v_cache=v_cache) | new | changes))
    assert str(caught.value) == message
    assert k_cache.isnan().all() and v_cache.isnan().all()  # nothing is written


def test_one_tensor_cannot_be_both_caches():
    cache, x = torch.full((B, S, H, D), float("nan")), zeros(B, N, H, D)
    lengths = zeros(B, dtype=torch.int32)
    with pytest.raises(ValueError, match="k_cache and v_cache are both written to and must not sh"):
        moda_decode(x, cache, cache, None, None, lengths, k_new=x, v_new=x)
    assert cache.isnan().all()
    together = zeros(B, S, H, 2 * D)  # side by side they are two
    moda_decode(x, *together.split(D, -1), None, None, lengths, k_new=x, v_new=x + 1)
    assert torch.equal(together[:, :N], torch.cat((x, x + 1), -1))


def test_the_unchanged_calls_are_accepted():
    for changes in ({}, NEW, PAGED, PAGED | NEW):
        assert call(**changes).shape == (B, N, HQ, DV)


@pytest.mark.parametrize(
    ("memory", "caches", "shared"),
    [
        ((2, 3, 9, 2, 8), lambda x: x.unbind(0), False),
        ((3, 2, 9, 2, 8), lambda x: x.unbind(1), False),
        ((3, 9, 2, 2, 8), lambda x: x.unbind(2), False),
        ((3, 9, 2, 14), lambda x: x.split((8, 6), -1), False),
        (
            (3, 9, 28),
            lambda x: (x[..., :16].unflatten(2, (2, 8)), x[..., 16:].unflatten(2, (2, 6))),
            False,
        ),
        (
            (3, 9, 28),
            lambda x: (x[..., :16].unflatten(2, (2, 8)), x[..., 15:27].unflatten(2, (2, 6))),
            True,
        ),
        ((3, 9, 2, 14), lambda x: (x[..., :8], x[..., 7:13]), True),
        ((3, 9, 2, 8), lambda x: (x, x), True),
        ((4, 9, 2, 8), lambda x: (x[:3], x[1:]), True),
        ((3, 10, 2, 8), lambda x: (x[:, :9], x[:, 1:]), True),
    ],
)
def test_caches_that_share_memory(memory, caches, shared):
    """Both are written to. Interleaved caches are fine."""
    k_cache, v_cache = caches(torch.zeros(memory))
    numbers = torch.arange(k_cache.untyped_storage().size() // 4).view(memory)
    k_places, v_places = (set(x.flatten().tolist()) for x in caches(numbers))
    assert bool(k_places & v_places) is shared
    q, new = torch.randn(3, 1, 2, 8), torch.randn(3, 1, 2, 8)
    lengths = torch.zeros(3, dtype=torch.int32)

    def call():
        moda_decode(
            q, k_cache, v_cache, None, None, lengths, k_new=new, v_new=new[..., : v_cache.shape[-1]]
        )

    if shared:
        with pytest.raises(ValueError, match="must not share memory"):
            call()
        assert not k_cache.any() and not v_cache.any()
    else:
        call()
        assert torch.equal(k_cache[:, :1], new) and torch.equal(
            v_cache[:, :1], new[..., : v_cache.shape[-1]]
        )
