"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619) for torch.compile.

A query attends, under one softmax, to the keys of its sequence and to the depth keys that earlier
layers wrote at the query's own token. ``moda_attention`` is the public function, ``DepthStream``
its form for whole models (``DepthSlots`` the same over a list of slots), ``moda_decode`` its
decoding step; ``moda_attention_varlen`` takes packed documents, ``moda_depth_attention`` attends to
depth alone, ``moda_chunk_attention`` to that of a chunk of tokens; ``moda_depth_mass`` and
``moda_sink_mass`` say where attention went; ``from_authors`` and ``to_authors`` translate from and
to the paper authors' package.

``moda_ops.nn`` has a language model and an image classifier, ``moda_ops.hf`` the language model for
Hugging Face transformers, ``moda_ops.policies`` bounds the slots that a layer reads, and
``moda_ops.distributed`` teaches DTensor the operators. ``python -m moda_ops --help`` lists what the
command line does.

Importing this package also registers the operators ``torch.ops.moda.*``. Triton is loaded by the
first call on a CUDA tensor, never by the import.
"""

from moda_ops.operators.attention import moda_attention
from moda_ops.operators.attention_varlen import moda_attention_varlen
from moda_ops.operators.chunk_attention import moda_chunk_attention
from moda_ops.operators.decode import moda_decode
from moda_ops.operators.depth_attention import moda_depth_attention
from moda_ops.operators.depth_mass import moda_depth_mass, moda_sink_mass
from moda_ops.operators.migration import from_authors, to_authors
from moda_ops.stream.depth_slots import DepthSlots
from moda_ops.stream.depth_stream import DepthStream

__version__ = "0.1.0"
__all__ = [
    "DepthSlots",
    "DepthStream",
    "from_authors",
    "moda_attention",
    "moda_attention_varlen",
    "moda_chunk_attention",
    "moda_decode",
    "moda_depth_attention",
    "moda_depth_mass",
    "moda_sink_mass",
    "to_authors",
]
