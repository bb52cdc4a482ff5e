"""Mixture-of-depths attention, specified in NumPy.

One softmax runs over the keys of a query's sequence and over the depth keys that earlier layers
wrote at the query's own token (arXiv 2603.15619, section 2 d). Three forms of the same function,
all in float64 whatever comes in:

* `attention_loops` reads like the equations,
* `attention` is vectorised, and fast enough to check other implementations against,
* `attention_tiled` is the online-softmax form that a GPU kernel mirrors,

and two forms of its closed-form gradient, `attention_backward_loops` and `attention_backward`.
`attention_varlen` and `attention_varlen_backward` take packed documents, each of which is attention
of its own, and `decode` is `attention` of new tokens to a cache. `depth_attention` and its backward
have depth keys alone; in `chunk_attention` and its backward a query sees those of earlier tokens in
its chunk as well. `depth_mass` and `sink_mass` say where the probability went. `visible` and
`chunk_visible` are the masks; `moda_reference.glossary` explains every symbol.

The package imports NumPy and nothing else.

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> q = rng.normal(size=(1, 5, 4, 8))                           # (B, T, HQ, D)
>>> k, v = rng.normal(size=(2, 1, 5, 2, 8))                     # (B, S, H, D) each
>>> k_depth, v_depth = rng.normal(size=(2, 3, 1, 5, 2, 8))      # L = 3 slots (B, T, H, D) each
>>> out, lse = attention(q, k, v, list(k_depth), list(v_depth))
>>> out.shape, lse.shape
((1, 5, 4, 8), (1, 4, 5))
"""

from moda_reference.chunked import chunk_attention, chunk_attention_backward
from moda_reference.decoding import Decoded, decode
from moda_reference.depth import depth_attention, depth_attention_backward
from moda_reference.gradients import Gradients
from moda_reference.loops import attention_backward_loops, attention_loops
from moda_reference.masks import chunk_visible, visible
from moda_reference.mass import depth_mass, sink_mass
from moda_reference.tiled import attention_tiled
from moda_reference.varlen import attention_varlen, attention_varlen_backward
from moda_reference.vectorised import attention, attention_backward

__all__ = [
    "Decoded",
    "Gradients",
    "attention",
    "attention_backward",
    "attention_backward_loops",
    "attention_loops",
    "attention_tiled",
    "attention_varlen",
    "attention_varlen_backward",
    "chunk_attention",
    "chunk_attention_backward",
    "chunk_visible",
    "decode",
    "depth_attention",
    "depth_attention_backward",
    "depth_mass",
    "sink_mass",
    "visible",
]
