"""A decoder language model over the depth stream, and the models that it is compared with.

Every attention layer reads, beside its sequence, the keys and values that earlier layers wrote at
the same token (arXiv 2603.15619, section 2, mechanism (d)). A key is written after rotation at its
own token: query and depth key share a position, the rotations cancel, and the sequence key is the
depth key.

:class:`MoDAConfig` chooses who writes the stream, ``depth``, and where the norms stand, ``norm``;
:class:`MoDALanguageModel` is the model. :class:`MoDAClassifier` takes images: the same blocks,
without a causal mask and without rotation. The stream is a value that the blocks pass on, any
:class:`Stream`: a :class:`moda_ops.DepthStream`, or, for the functional path,
:class:`moda_ops.DepthSlots`, or, in :func:`generate`, a :class:`CachedStream` over a
:class:`KVCache`, which keeps no depth. A :class:`WatchedStream` shows what layers read: see
:func:`depth_use`. Shapes: B batch, T tokens, C width, HQ query heads, H key/value heads, D head
dimension.
"""

from moda_ops.nn.cache import CachedStream, KVCache
from moda_ops.nn.compilation import compile_blocks
from moda_ops.nn.config import BlockConfig, Depth, MoDAConfig, Norm
from moda_ops.nn.generation import decode_step, generate, prefill, token_probabilities
from moda_ops.nn.inspection import (
    AttentionMap,
    DepthUse,
    attention_map,
    depth_use,
    measure_depth_mass,
    plot_attention,
)
from moda_ops.nn.layers import (
    DepthAttention,
    DepthProjection,
    FeedForward,
    MoDAAttention,
    RMSNorm,
    Rotary,
    TokenEmbedding,
    rotary_angles,
    rotate,
)
from moda_ops.nn.model import DepthAttentionBlock, MoDABlock, MoDALanguageModel, MoDATransformer
from moda_ops.nn.vision import MoDAClassifier, PatchEmbedding, VisionConfig
from moda_ops.nn.watch import Reading, WatchedStream
from moda_ops.stream.protocol import Stream

__all__ = [
    "AttentionMap",
    "BlockConfig",
    "CachedStream",
    "Depth",
    "DepthAttention",
    "DepthAttentionBlock",
    "DepthProjection",
    "DepthUse",
    "FeedForward",
    "KVCache",
    "MoDAAttention",
    "MoDABlock",
    "MoDAClassifier",
    "MoDAConfig",
    "MoDALanguageModel",
    "MoDATransformer",
    "Norm",
    "PatchEmbedding",
    "RMSNorm",
    "Reading",
    "Rotary",
    "Stream",
    "TokenEmbedding",
    "VisionConfig",
    "WatchedStream",
    "attention_map",
    "compile_blocks",
    "decode_step",
    "depth_use",
    "generate",
    "measure_depth_mass",
    "plot_attention",
    "prefill",
    "rotary_angles",
    "rotate",
    "token_probabilities",
]
