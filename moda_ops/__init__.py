"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619) for torch.compile.

``moda_attention`` is the public function; importing this package also registers the operators
``torch.ops.moda.*``. Triton is loaded by the first call on a CUDA tensor, never by the import.
"""

from moda_ops import ops as ops  # registers torch.ops.moda.*
from moda_ops.attention import moda_attention

__version__ = "0.1.0"
__all__ = ["moda_attention"]
