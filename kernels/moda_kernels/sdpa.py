"""The sequence part by the kernels behind torch's ``scaled_dot_product_attention``, with lse.

cuDNN's where it takes the tensors and the GPU has compute capability 9.0 or more, else FlashAttention's; on a
CPU, where our kernels run interpreted, PyTorch's own. Tensors are (B, T, H, D) with their own number of
key/value heads. ``out`` and ``lse`` of the backward may be those of a softmax over more keys than these: the
gradients are then these keys' share.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

aten = torch.ops.aten


def select(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str | None:
    """"cudnn", "flash", "cpu", or None if none of them takes these tensors."""
    D, DV = q.shape[-1], v.shape[-1]
    if k.shape[1] == 0:
        return None
    if q.device.type == "cpu":
        return "cpu" if D == DV else None
    if any((x.data_ptr() | n * x.element_size()) % 16 for x in (q, k, v) for n in x.stride()[:3]):
        return None
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    new_parameters: Any = SDPAParams  # its stub says that it takes nothing
    parameters = new_parameters(q, k, v, None, 0.0, causal, grouped)
    recent = torch.cuda.get_device_capability(q.device) >= (9, 0)
    if recent and max(D, DV) <= 128 and can_use_cudnn_attention(parameters):
        return "cudnn"
    return "flash" if D == DV and can_use_flash_attention(parameters) else None


def attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) and natural-log lse (B, HQ, T) in float32, each with any strides."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if name == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
    elif name == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse.view(lse.shape[:3])


@lru_cache
def _cudnn_lse_dims() -> int:
    """(B, HQ, T), or (B, HQ, T, 1): that depends on PyTorch's version."""
    x = torch.empty(1, 1, 16, 16, dtype=torch.float16, device="meta")
    lse: Tensor = aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return lse.dim()


def attention_backward(
    name: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v, with any strides."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    lse = lse.float()
    lengths = None, None, q.shape[2], k.shape[2]
    if name == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    else:
        no_dropout = torch.empty((), dtype=torch.int64, device=q.device)  # its seed and offset
        if name == "cudnn":
            lse = lse.view(*lse.shape, *(1,) * (_cudnn_lse_dims() - 3))
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse, no_dropout, no_dropout, None, *lengths, 0.0, causal, scale=scale
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, *lengths, 0.0, causal, no_dropout, no_dropout, scale=scale
            )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv
