"""The configuration that transformers reads and writes: what ``config.json`` holds."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from moda_ops import nn
from moda_ops.hf.release import CACHE


class MoDAConfig(PretrainedConfig):
    """What ``config.json`` holds: :class:`moda_ops.nn.MoDAConfig` and what transformers adds.

    Files and ``to_dict`` have transformers' names for the sizes, and either name reads and sets
    them: ``hidden_size`` is ``width``, ``num_hidden_layers`` ``layers``, ``num_attention_heads``
    ``heads``, ``num_key_value_heads`` ``kv_heads`` and ``intermediate_size`` ``hidden``. Defaults
    are the 700 M model of arXiv 2603.15619, Table 3, row 4.

    Args:
        vocab_size: number of tokens. It and all up to ``rope_base`` are those of
            :class:`moda_ops.nn.MoDAConfig`.
        use_cache: whether a forward pass without gradients makes a cache, unless told.
        pad_token_id, bos_token_id, eos_token_id: for ``generate``; None for none.
        tie_word_embeddings: True: the output layer is the transposed embedding.
        kwargs: of ``PretrainedConfig``.

    Raises:
        ValueError: see :class:`moda_ops.nn.MoDAConfig`; also ``tie_word_embeddings=False``.

    Example:
        >>> from moda_ops.hf import MoDAConfig
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> config.num_hidden_layers, config.to_nn().layers
        (2, 2)
        >>> MoDAConfig.from_nn(config.to_nn(), eos_token_id=0).hidden_size
        32
    """

    model_type = "moda"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "hidden": "intermediate_size",
    }

    def __init__(
        self,
        vocab_size: int = 100_278,
        layers: int = 36,
        width: int = 1024,
        heads: int = 16,
        kv_heads: int = 8,
        head_dim: int = 64,
        hidden: int = 4096,
        depth: nn.Depth = "kv+ffn",
        norm: nn.Norm = "post",
        qk_norm: bool = False,
        bias: bool = False,
        write_last: bool = False,
        rope_base: float = 10_000.0,
        depth_keep: Sequence[Sequence[int]] | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if not tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be True: the output layer is the transposed embedding"
            )
        self.vocab_size = vocab_size
        self.layers = layers
        self.width = width
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.hidden = hidden
        self.depth = depth
        self.norm = norm
        self.qk_norm = qk_norm
        self.bias = bias
        self.write_last = write_last
        self.rope_base = rope_base
        self.depth_keep = None if depth_keep is None else [list(kept) for kept in depth_keep]
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.to_nn()

    def to_nn(self) -> nn.MoDAConfig:
        """The dataclass that the modules of :mod:`moda_ops.nn` take."""
        values = {name: getattr(self, name) for name in _NN_FIELDS}
        if self.depth_keep is not None:
            values["depth_keep"] = tuple(map(tuple, self.depth_keep))
        return nn.MoDAConfig(**values)

    @classmethod
    def from_nn(cls, config: nn.MoDAConfig, **options: Any) -> "MoDAConfig":
        """The configuration with these sizes; ``options`` are this class's other arguments.

        Raises:
            ValueError: ``config.causal`` is off.
        """
        if not config.causal:
            raise ValueError("config must be causal, got one with causal = False")
        return cls(**{name: getattr(config, name) for name in _NN_FIELDS}, **options)


_NN_FIELDS = [field.name for field in fields(nn.MoDAConfig) if field.name != "causal"]
