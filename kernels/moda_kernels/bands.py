"""Who sees whom in packed documents: each token's first and last key, each key's first and last token.

Document d has the queries cu_q[d]..cu_q[d + 1] and the keys cu_k[d]..cu_k[d + 1], aligned bottom-right: its
last query sits at its last key. All four columns never fall from one row to the next, whatever the lengths,
because an empty band of document d is put at the document's own place.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, cached_launch, layout

Bands = tuple[Tensor, Tensor, Tensor, Tensor] | None


@triton.jit
def _start(cu_ptr, document, tokens):
    """Where a document starts; within the tensors, whatever the table says."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + document), 0), tokens)


@triton.jit
def _document(cu_ptr, documents, index, tokens):
    """The last document that starts at or before ``index``; an empty one only if nothing else is there."""
    low = tl.zeros_like(index)
    high = low + documents  # cu[low] <= index < cu[high], but past the end
    for _ in range(0, 32):
        middle = (low + high) // 2
        starts = _start(cu_ptr, middle, tokens) <= index
        low = tl.where(starts & (middle > low), middle, low)
        high = tl.where(starts, high, middle)
    return low


@triton.jit(do_not_specialize=["documents", "T", "S", "left", "right"])
def _moda_bands_kernel(
    cu_q_ptr, cu_k_ptr, first_key_ptr, last_key_ptr, first_token_ptr, last_token_ptr, documents, T, S, left, right,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    d = _document(cu_q_ptr, documents, index, T)
    following = tl.minimum(d + 1, documents)  # d + 1, unless there is no document at all
    begin = _start(cu_k_ptr, d, S)
    end = _start(cu_k_ptr, following, S)
    position = index + end - _start(cu_q_ptr, following, T)
    first = begin
    last = end - 1
    if left is not None:
        first = tl.minimum(tl.maximum(begin, position - left), end)
    if right is not None:
        last = tl.maximum(tl.minimum(last, position + right), begin - 1)
    after = index >= _start(cu_q_ptr, documents, T)  # sees nothing
    first = tl.where(after, end, first)
    last = tl.where(after, end - 1, tl.where(index < _start(cu_q_ptr, 0, T), begin - 1, last))
    tl.store(first_key_ptr + index, first, mask=index < T)
    tl.store(last_key_ptr + index, last, mask=index < T)

    d = _document(cu_k_ptr, documents, index, S)
    following = tl.minimum(d + 1, documents)
    begin = _start(cu_q_ptr, d, T)
    end = _start(cu_q_ptr, following, T)
    token = index + end - _start(cu_k_ptr, following, S)
    first = begin
    last = end - 1
    if right is not None:
        first = tl.minimum(tl.maximum(begin, token - right), end)
    if left is not None:
        last = tl.maximum(tl.minimum(last, token + left), begin - 1)
    after = index >= _start(cu_k_ptr, documents, S)  # sees nothing
    first = tl.where(after, end, first)
    last = tl.where(after, end - 1, tl.where(index < _start(cu_k_ptr, 0, S), begin - 1, last))
    tl.store(first_token_ptr + index, first, mask=index < S)
    tl.store(last_token_ptr + index, last, mask=index < S)


@cached_launch
def _prepare(cu_q: Layout, cu_k: Layout, T: int, S: int, left: int | None, right: int | None) -> Launch:
    return Launch(
        _moda_bands_kernel, triton.cdiv(max(T, S), tuning.BANDS.BLOCK), cu_q.shape[0] - 1, T, S, left, right,
        **tuning.BANDS._asdict(),
    )  # fmt: skip


def launch_bands(cu_q: Tensor, cu_k: Tensor, T: int, S: int, left: int | None, right: int | None) -> Bands:
    """Four int32 columns: two of T tokens, two of S keys."""
    empty = cu_q.new_empty
    bands = empty(T), empty(T), empty(S), empty(S)
    _prepare(layout(cu_q), layout(cu_k), T, S, left, right)(cu_q, cu_k, *bands)
    return bands
