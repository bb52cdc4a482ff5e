"""Forward over depth: the online softmax goes on over the depth slots of each row's token.

    lse = log( e^lse_sequence + sum_l exp d_l )
    out = e^(lse_sequence - lse) out_sequence + sum_l e^(d_l - lse) v_l

``attend_depth`` is the loop over slots, which the fused forward has in it as well, for a tile of BLOCK_M
(token, group) rows of one key/value head. A program of the kernel here owns one token and BLOCK_G heads of a
group, padded to a power of two, and starts from what another kernel left for the sequence or, where there
is no sequence, from nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout, lse_dtype
from moda_kernels.rows import load_rows
from moda_kernels.slots import DepthLayout, depth_pointers, slot_rows
from moda_kernels.softmax import base2_lse, base2_scores, natural_lse, online_softmax


@triton.jit
def _attend_depth_by_dot(
    q, m_i, l_i, acc, k_depth, v_depth, b, j, first_token, T, L, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The online softmax over depth, [G, D] x [D, BLOCK_L] products batched over the tile's tokens."""
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    BLOCK_T: tl.constexpr = BLOCK_M // G
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_t = first_token + tl.arange(0, BLOCK_T)
    q = tl.reshape(q, [BLOCK_T, G, BLOCK_D])
    acc = tl.reshape(acc, [BLOCK_T, G, BLOCK_DV])
    m_i = tl.reshape(m_i, [BLOCK_T, G])
    l_i = tl.reshape(l_i, [BLOCK_T, G])
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        offs_l = start + tl.arange(0, BLOCK_L)
        ok = (offs_t < T)[:, None] & (offs_l < L)[None, :]
        k_rows = slot_rows(k_depth, b, j, offs_t[:, None], offs_l, offs_l < L, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, offs_t[:, None], offs_l, offs_l < L, ALIGNED)
        k = load_rows(k_rows[:, :, None] + offs_d[None, None, :], ok, offs_d, D)
        v = load_rows(v_rows[:, :, None] + offs_dv[None, None, :], ok, offs_dv, DV)
        qk = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee")  # [BLOCK_T, G, BLOCK_L]
        scores, excess = base2_scores(qk, scale, softcap, q.dtype)
        scores = tl.where((offs_l < L)[None, None, :], scores, float("-inf"))
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, excess)
        acc = acc * alpha[:, :, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return tl.reshape(m_i, [BLOCK_M]), tl.reshape(l_i, [BLOCK_M]), tl.reshape(acc, [BLOCK_M, BLOCK_DV])


@triton.jit
def _attend_depth_by_sum(
    q, m_i, l_i, acc, k_depth, v_depth, b, j, offs_t, T, L, scale, softcap, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The online softmax over depth in plain multiply-adds; GROUP adjacent rows share a token."""
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    BLOCK_DV: tl.constexpr = acc.shape[1]
    BLOCK_T: tl.constexpr = BLOCK_M // GROUP
    dtype: tl.constexpr = q.dtype
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q = tl.reshape(q, [BLOCK_T, GROUP, 1, BLOCK_D]).to(tl.float32)
    acc = tl.reshape(acc, [BLOCK_T, GROUP, BLOCK_DV])
    m_i = tl.reshape(m_i, [BLOCK_T, GROUP])
    l_i = tl.reshape(l_i, [BLOCK_T, GROUP])
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        offs_l = start + tl.arange(0, BLOCK_L)
        ok = (offs_t < T)[:, None] & (offs_l < L)[None, :]
        k_rows = slot_rows(k_depth, b, j, offs_t[:, None], offs_l, offs_l < L, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, offs_t[:, None], offs_l, offs_l < L, ALIGNED)
        k = load_rows(k_rows[:, :, None] + offs_d[None, None, :], ok, offs_d, D).to(tl.float32)
        v = load_rows(v_rows[:, :, None] + offs_dv[None, None, :], ok, offs_dv, DV).to(tl.float32)
        qk = tl.sum(q * k[:, None, :, :], 3)  # [BLOCK_T, GROUP, BLOCK_L]
        scores, excess = base2_scores(qk, scale, softcap, dtype)
        scores = tl.where((offs_l < L)[None, None, :], scores, float("-inf"))
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, excess)
        acc = acc * alpha[:, :, None] + tl.sum(p[:, :, :, None] * v[:, None, :, :], 2)
    return tl.reshape(m_i, [BLOCK_M]), tl.reshape(l_i, [BLOCK_M]), tl.reshape(acc, [BLOCK_M, BLOCK_DV])


@triton.jit
def attend_depth(
    q, m_i, l_i, acc, k_depth, v_depth, b, j, tile, T, L, scale, softcap, G: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The online softmax over depth for the rows of a tile, by dots or by sums."""
    BLOCK_M: tl.constexpr = q.shape[0]
    first_token = tile * BLOCK_M // G
    if DOT:
        m_i, l_i, acc = _attend_depth_by_dot(
            q, m_i, l_i, acc, k_depth, v_depth, b, j, first_token, T, L, scale, softcap,
            G, D, DV, BLOCK_L, STAGES, ALIGNED,
        )  # fmt: skip
    else:
        GROUP: tl.constexpr = G if BLOCK_M % G == 0 else 1
        if GROUP == G:
            token = first_token + tl.arange(0, BLOCK_M // G)
        else:
            token = (tile * BLOCK_M + tl.arange(0, BLOCK_M)) // G
        m_i, l_i, acc = _attend_depth_by_sum(
            q, m_i, l_i, acc, k_depth, v_depth, b, j, token, T, L, scale, softcap,
            GROUP, D, DV, BLOCK_L, STAGES, ALIGNED,
        )  # fmt: skip
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["T", "L", "stride_lb", "stride_lh", "stride_lt"])
def _moda_forward_depth_kernel(
    q_ptr, k_depth, v_depth, sequence_ptr, sequence_lse_ptr, out_ptr, lse_ptr,
    q_strides, sequence_strides, stride_lb, stride_lh, stride_lt, scale, softcap, B, T, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(G, BLOCK_G)
    part = tl.program_id(0) % parts  # side by side: those that read the same slots
    token = tl.program_id(0) // parts // (B * H)
    head = tl.program_id(0) // parts % (B * H)
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    t = token.to(tl.int64)
    offs_g = part * BLOCK_G + tl.arange(0, BLOCK_G)
    row_ok = offs_g < G
    h = j * G + offs_g
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    q_rows = q_ptr + b * q_strides[0] + t * q_strides[1] + h * q_strides[2]
    q = load_rows(q_rows[:, None] + offs_d[None, :], row_ok, offs_d, D)
    if sequence_ptr is None:
        m_i = tl.full([BLOCK_G], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    else:
        acc_rows = sequence_ptr + b * sequence_strides[0] + t * sequence_strides[1] + h * sequence_strides[2]
        acc = load_rows(acc_rows[:, None] + offs_dv[None, :], row_ok, offs_dv, DV).to(tl.float32)
        lse = sequence_lse_ptr + b * stride_lb + h * stride_lh + t * stride_lt
        m_i, low = base2_lse(tl.load(lse, mask=row_ok, other=0.0), q.dtype)
        l_i = tl.exp2(low)
        acc *= l_i[:, None]
    m_i, l_i, acc = _attend_depth_by_dot(
        q, m_i, l_i, acc, k_depth, v_depth, b, j, token, T, L, scale, softcap,
        BLOCK_G, D, DV, BLOCK_L, STAGES, ALIGNED,
    )  # fmt: skip

    out_rows = out_ptr + ((b * T + t) * (H * G) + h) * DV
    tl.store(
        out_rows[:, None] + offs_dv[None, :],
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (offs_dv < DV)[None, :],
    )
    tl.store(lse_ptr + (b * H * G + h) * T + t, natural_lse(m_i, l_i, q.dtype), mask=row_ok)


@cached_launch
def _prepare(
    p: Problem, q: Layout, sequence: Layout | None, sequence_lse: Layout | None, depth: DepthLayout
) -> Launch:
    tile = tuning.forward_depth_tile(q.dtype, p.G, p.D, p.DV)
    return Launch(
        _moda_forward_depth_kernel, p.B * p.T * p.H * triton.cdiv(p.G, tile.BLOCK_G),
        q.strides[:3], sequence and sequence.strides[:3], *(sequence_lse.strides if sequence_lse else (None,) * 3),
        p.scale, p.softcap, p.B, p.T, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, **tile._asdict(),
    )  # fmt: skip


def launch_forward_depth(
    p: Problem, q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    sequence: Tensor | None = None, sequence_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``launch_forward``, from the sequence's out and lse, or from no sequence; L >= 1."""
    out = q.new_empty(p.B, p.T, p.H * p.G, p.DV)
    lse = q.new_empty(p.B, p.H * p.G, p.T, dtype=lse_dtype(q.dtype))
    depth, depth_layout = depth_pointers(k_depth, v_depth)
    launch = _prepare(p, layout(q), layout(sequence), layout(sequence_lse), depth_layout)
    launch(q, *depth, sequence, sequence_lse, out, lse)
    return out, lse
