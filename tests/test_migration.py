"""The authors' layouts and units: what their functions compute, and ours between the adapters."""

import math

import numpy as np
import pytest
import torch

import moda_reference
from moda_ops import from_authors, moda_attention, moda_depth_attention, to_authors


def parallel_moda(q, k, v, cached_k=None, cached_v=None, moda_group_num=1, is_causal=True):
    """What the authors' package computes, as its layouts say it (arXiv 2603.15619, algorithm 1):
    row i_q sees sequence key i_k if i_q // G >= i_k, and depth column j_d if i_q // G == j_d // L.
    k and v are None for their ``parallel_fda``.
    """
    B, rows, H, D = q.shape
    T = rows // moda_group_num
    L = 0 if cached_k is None else cached_k.shape[1] // T
    out, lse = np.zeros((B, rows, H, D)), np.full((B, rows, H), -np.inf)
    for b, i_q, j in np.ndindex(B, rows, H):
        keys = [] if k is None else [
            (k[b, i_k, j], v[b, i_k, j])
            for i_k in range(T)
            if not is_causal or i_q // moda_group_num >= i_k
        ]  # fmt: skip
        keys += [
            (cached_k[b, j_d, j], cached_v[b, j_d, j])
            for j_d in range(T * L)
            if i_q // moda_group_num == j_d // L
        ]
        if keys:
            bits = np.array([q[b, i_q, j] @ key for key, _ in keys]) * D**-0.5 * math.log2(math.e)
            lse[b, i_q, j] = np.log2(np.exp2(bits).sum())
            weights = np.exp2(bits - lse[b, i_q, j])
            out[b, i_q, j] = weights @ np.array([value for _, value in keys])
    return out, lse


def authors_inputs(B, T, G, H, D, L):
    rng = np.random.default_rng([B, T, G, H, D, L])
    rows = T * G, T, T, T * L, T * L
    return [rng.normal(size=(B, n, H, D)) for n in rows]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "G", "H", "D", "L"),
    [(2, 5, 3, 2, 4, 3), (1, 4, 1, 2, 3, 2), (1, 4, 4, 1, 3, 1), (1, 3, 2, 2, 4, 0)],
)
def test_their_call_between_the_adapters(B, T, G, H, D, L, is_causal):
    arrays = authors_inputs(B, T, G, H, D, L)
    expected = parallel_moda(*arrays, moda_group_num=G, is_causal=is_causal)

    q, k, v, cached_k, cached_v = map(torch.from_numpy, arrays)
    q, k_depth, v_depth = from_authors(q, cached_k, cached_v, moda_group_num=G)
    assert (q.shape, k_depth.shape) == ((B, T, H * G, D), (B, T, L, H, D))
    ours = moda_attention(q, k, v, k_depth, v_depth, causal=is_causal, return_lse=True)
    arrays = [x.numpy() for x in (q, k, v, k_depth, v_depth)]
    reference = moda_reference.attention(*arrays, causal=is_causal)
    for results in (ours, map(torch.from_numpy, reference)):
        for a, b in zip(to_authors(*results, moda_group_num=G), expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-12, atol=1e-12)


def test_their_depth_only_call_and_no_cache():
    arrays = authors_inputs(2, 5, 3, 2, 4, 3)
    q, k, v, cached_k, cached_v = map(torch.from_numpy, arrays)
    ours = from_authors(q, cached_k, cached_v, moda_group_num=3)
    out, lse = to_authors(*moda_depth_attention(*ours, return_lse=True), moda_group_num=3)
    expected = parallel_moda(arrays[0], None, None, *arrays[3:], moda_group_num=3)
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12, atol=1e-12)

    ours, k_depth, v_depth = from_authors(q, moda_group_num=3)
    assert k_depth is None and v_depth is None
    out, lse = moda_attention(ours, k, v, k_depth, v_depth, return_lse=True)
    out, lse = to_authors(out, lse, moda_group_num=3)
    expected = parallel_moda(*arrays[:3], moda_group_num=3)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12, atol=1e-12)


def test_current_depth_is_a_slice():
    """Their cache may be longer than what is written; the rest must not be read."""
    T, G, H, D, L, current_depth = 4, 2, 2, 3, 5, 2
    q, k, v, cached_k, cached_v = map(torch.from_numpy, authors_inputs(1, T, G, H, D, L))
    q, k_depth, v_depth = from_authors(q, cached_k, cached_v, moda_group_num=G)
    written = [x[:, :, :current_depth] for x in (k_depth, v_depth)]
    expected = moda_attention(q, k, v, *(x.clone() for x in written))
    for x in (k_depth, v_depth):
        x[:, :, current_depth:] = float("nan")
    assert torch.equal(moda_attention(q, k, v, *written), expected)


def test_query_heads_that_share_a_head_unfolded():
    """Their q may have more heads than k besides its folded rows."""
    T, G, H, D, L = 3, 2, 2, 4, 2
    _, k, v, cached_k, cached_v = map(torch.from_numpy, authors_inputs(1, T, G, H, D, L))
    q = torch.randn(1, T * G, 3 * H, D, dtype=torch.float64)
    ours, k_depth, v_depth = from_authors(q, cached_k, cached_v, moda_group_num=G)
    out, lse = moda_attention(ours, k, v, k_depth, v_depth, return_lse=True)
    out, lse = to_authors(out, lse, moda_group_num=G)
    repeated = [x.repeat_interleave(3, 2).numpy() for x in (k, v, cached_k, cached_v)]
    expected = parallel_moda(q.numpy(), *repeated, moda_group_num=G)
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("G", "H"), [(1, 3), (3, 1), (2, 3)])
def test_views_where_possible(G, H):
    q, cached = torch.randn(2, 4 * G, H, 8), torch.randn(2, 4 * 5, H, 8)
    ours, k_depth, v_depth = from_authors(q, cached, cached, moda_group_num=G)
    assert k_depth.data_ptr() == v_depth.data_ptr() == cached.data_ptr()
    out, _ = to_authors(ours, torch.zeros(2, H * G, 4), moda_group_num=G)
    assert torch.equal(out, q)  # the two adapters are each other's inverse
    same_memory = G == 1 or H == 1
    assert (ours.data_ptr() == q.data_ptr()) is same_memory
    assert (out.data_ptr() == ours.data_ptr()) is same_memory


def test_gradients_come_back_in_their_layout():
    arrays = [torch.from_numpy(x).requires_grad_() for x in authors_inputs(1, 3, 2, 2, 2, 2)]

    def theirs(q, k, v, cached_k, cached_v):
        q, k_depth, v_depth = from_authors(q, cached_k, cached_v, moda_group_num=2)
        out, lse = moda_attention(q, k, v, k_depth, v_depth, return_lse=True)
        return to_authors(out, lse, moda_group_num=2)

    assert torch.autograd.gradcheck(theirs, arrays)
    torch._dynamo.reset()
    compiled = torch.compile(theirs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arrays), theirs(*arrays))


Q, CACHED = torch.zeros(2, 12, 2, 8), torch.zeros(2, 20, 2, 8)  # T = 4, G = 3, L = 5
WITH = "with B = 2, T = 4, D = 8 and the same L and H for both, got "
FROM = [
    (dict(q=[0.0]), TypeError, "q must be a torch.Tensor, got list"),
    (dict(cached_v=3), TypeError, "cached_v must be a torch.Tensor, got int"),
    (dict(moda_group_num=1.5), TypeError, "moda_group_num must be an int, got 1.5"),
    (dict(moda_group_num=0), ValueError, "moda_group_num must be at least 1, got 0"),
    (
        dict(moda_group_num=5),
        ValueError,
        "q must have shape (B, T * G, H, D) with G = moda_group_num = 5, got (2, 12, 2, 8)",
    ),
    (
        dict(q=Q[0]),
        ValueError,
        "q must have shape (B, T * G, H, D) with G = moda_group_num = 3, got (12, 2, 8)",
    ),
    (
        dict(cached_v=None),
        ValueError,
        "cached_k is given but cached_v is None; give both or neither",
    ),
    (
        dict(cached_k=CACHED[:, :18]),
        ValueError,
        f"cached_k must have shape (B, T * L, H, D) {WITH}(2, 18, 2, 8)",
    ),
    (
        dict(cached_k=CACHED[..., :4]),
        ValueError,
        f"cached_k must have shape (B, T * L, H, D) {WITH}(2, 20, 2, 4)",
    ),
    (
        dict(cached_v=CACHED[:, :16]),
        ValueError,
        f"cached_v must have shape (B, T * L, H, DV) {WITH}(2, 16, 2, 8)",
    ),
    (
        dict(cached_v=CACHED[0]),
        ValueError,
        f"cached_v must have shape (B, T * L, H, DV) {WITH}(20, 2, 8)",
    ),
    (
        dict(q=Q[:, :, :1].expand(-1, -1, 3, -1)),
        ValueError,
        "q must have a multiple of cached_k's H = 2 heads, got 3",
    ),
    (
        dict(cached_k=CACHED[:, :, :0], cached_v=CACHED[:, :, :0]),
        ValueError,
        "q must have a multiple of cached_k's H = 0 heads, got 2",
    ),
    (
        dict(cached_v=CACHED.sum()),
        ValueError,
        f"cached_v must have shape (B, T * L, H, DV) {WITH}()",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), FROM)
def test_errors_from(changes, error, message):
    right = dict(q=Q, cached_k=CACHED, cached_v=CACHED[..., :6], moda_group_num=3)
    assert from_authors(**right)[2].shape == (2, 4, 5, 2, 6)
    with pytest.raises(error) as caught:
        from_authors(**(right | changes))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(lse=None), TypeError, "lse must be a torch.Tensor, got NoneType"),
        (dict(moda_group_num=True), TypeError, "moda_group_num must be an int, got True"),
        (
            dict(moda_group_num=4),
            ValueError,
            "out must have shape (B, T, H * G, DV) with G = moda_group_num = 4, got (2, 5, 6, 8)",
        ),
        (
            dict(lse=torch.zeros(2, 5, 6)),
            ValueError,
            "lse must have shape (B, HQ, T) = (2, 6, 5), got (2, 5, 6)",
        ),
    ],
)
def test_errors_to(changes, error, message):
    right = dict(out=torch.zeros(2, 5, 6, 8), lse=torch.zeros(2, 6, 5), moda_group_num=3)
    with pytest.raises(error) as caught:
        to_authors(**(right | changes))
    assert str(caught.value) == message
