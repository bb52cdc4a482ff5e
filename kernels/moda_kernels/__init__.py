"""Triton kernels for Mixture-of-Depths Attention and their launchers; private to ``moda_ops``.

The functions have the signatures of their plain PyTorch twins in ``moda_ops.operators.eager`` and trust their
arguments: ``moda_ops`` has checked them.
"""

from moda_kernels.operators import (
    attention,
    attention_backward,
    chunk_attention,
    chunk_attention_backward,
    decode,
    depth_mass,
)

__all__ = [
    "attention",
    "attention_backward",
    "chunk_attention",
    "chunk_attention_backward",
    "decode",
    "depth_mass",
]
