"""Sizes and options of the models."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from moda_ops.operators.checks import MAX_HEAD_DIM
from moda_ops.policies import SlotPolicy, kept_slots, positions, recent

Depth = Literal["residual", "attention", "kv", "kv+ffn", "kv+ffn+attn"]
"""How layers read earlier layers; :class:`BlockConfig` explains each."""

Norm = Literal["pre", "post"]
"""Where the norms stand; :class:`BlockConfig` explains both."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes and options of the blocks of a model.

    ``depth`` is one of (sections and tables of arXiv 2603.15619):

    ================= ============================================================================
    ``"residual"``    the residual stream alone: section 2 (a), the baseline, Table 3, rows 1 and 2
    ``"attention"``   a layer's input is attention over the slots of all layers before it, at its
                      own token, in place of the residual stream: section 2 (c)
    ``"kv"``          MoDA over the attention layers' own keys and values: row 3
    ``"kv+ffn"``      and a projection of each feed-forward layer's input: row 4, the default
    ``"kv+ffn+attn"`` the attention layers too write a projection of their input, not their own
                      keys and values: row 5
    ================= ============================================================================

    ``norm`` is ``"post"``, x = norm(x + f(x)), the better one for MoDA in Table 6, or ``"pre"``,
    x = x + f(norm(x)) and a norm before the output layer, the better one there for the baseline.
    Under ``depth="attention"`` there is no sum, and these are norm(f(x)) and f(norm(x)).

    Args:
        layers: number of blocks, each an attention and a feed-forward layer.
        width: C, size of the residual stream.
        heads: HQ, query heads.
        kv_heads: H, key/value heads; divides ``heads``.
        head_dim: D, even, at most 256.
        hidden: inner size of the feed-forward layers.
        depth: how layers read earlier layers, see above.
        norm: ``"post"`` or ``"pre"``, see above.
        qk_norm: RMSNorm of every query and key over its head dimension, before rotation.
        bias: add a bias to every projection.
        write_last: let the last block write to the depth stream too, although no layer reads it
            there (the counts in Table 6 have it). Its projections then get no gradient.
        causal: whether a token sees the tokens up to itself, or all of its sequence.
        depth_keep: for each block the depth slots that it may read, by their numbers in the order
            they are written; None is all. :meth:`bounded` fills it in. No parameter depends on it.

    Raises:
        ValueError: sizes that do not fit together, or an option that does not exist.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    depth: Depth = "kv+ffn"
    norm: Norm = "post"
    qk_norm: bool = False
    bias: bool = False
    write_last: bool = False
    causal: bool = True
    depth_keep: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._check_sizes("layers", "width", "heads", "kv_heads", "head_dim", "hidden")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim = {self.head_dim} must be at most {MAX_HEAD_DIM}")
        for name, kinds in (("depth", Depth), ("norm", Norm)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {known}")
        if self.depth == "attention" and self.q_width != self.width:
            raise ValueError(
                f"heads * head_dim = {self.heads} * {self.head_dim} = {self.q_width} must equal "
                f"width = {self.width} for depth = 'attention': a layer's input is a row of heads"
            )
        self.depth_positions()

    def _check_sizes(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")

    @property
    def q_width(self) -> int:
        """HQ * D, size of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """H * D, size of all keys of a token, and of all values."""
        return self.kv_heads * self.head_dim

    def depth_reads(self) -> list[int]:
        """Slots that each read of the depth stream meets, from the first read to the last.

        Example:
            >>> from dataclasses import replace
            >>> config = BlockConfig(
            ...     layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... )
            >>> config.depth_reads()  # one read per block; a block writes two slots
            [0, 2, 4]
            >>> replace(config, depth="kv").depth_reads()
            [0, 1, 2]
            >>> replace(config, depth="attention").depth_reads()  # after every layer, embedding too
            [2, 3, 4, 5, 6, 7]
            >>> config.bounded(3).depth_reads()
            [0, 2, 3]
        """
        writes = self.depth_writes()
        there = [sum(writes[: layer + 1]) for layer in range(self.layers)]
        if self.depth_keep is not None:
            there = [len(kept) for kept in self.depth_keep]
        if self.depth == "attention":
            return [slots + own for slots in there for own in (1, 2)]
        return there

    def depth_writes(self) -> list[int]:
        """Slots that are written before each block, and after the one before it.

        Example:
            >>> BlockConfig(
            ...     layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... ).depth_writes()
            [0, 2, 2]
        """
        slots = {"residual": 0, "kv": 1}.get(self.depth, 2)
        return [1 if self.depth == "attention" else 0, *[slots] * (self.layers - 1)]

    def bounded(self, budget: int, policy: SlotPolicy = recent) -> Self:
        """The same model with at most ``budget`` slots for a block to read.

        Slots are dropped between blocks. Under ``depth="attention"`` a block's two layers read, on
        top of these, what the block itself has written.

        Args:
            budget: at least 1.
            policy: which slots stay: one of :mod:`moda_ops.policies`, or your own function.

        Raises:
            TypeError, ValueError: as :func:`moda_ops.policies.kept_slots`.

        Example:
            >>> from moda_ops.policies import first_and_recent
            >>> config = BlockConfig(
            ...     layers=4, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... )
            >>> config.bounded(3, first_and_recent(1)).depth_keep
            ((), (0, 1), (0, 2, 3), (0, 4, 5))
        """
        return replace(self, depth_keep=kept_slots(self.depth_writes(), budget, policy))

    def depth_positions(self) -> list[tuple[int, ...] | None]:
        """For each block what ``keep`` of the stream takes before it; None where all slots stay.

        Raises:
            ValueError: ``depth_keep`` has not one entry for each block, or has a slot that is not
                there.

        Example:
            >>> BlockConfig(
            ...     layers=4, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... ).bounded(3).depth_positions()
            [None, None, (1, 2, 3), (2, 3, 4)]
        """
        if self.depth_keep is None:
            return [None] * self.layers
        if len(self.depth_keep) != self.layers:
            raise ValueError(
                f"depth_keep must have an entry for each of the {self.layers} blocks, got "
                f"{len(self.depth_keep)}"
            )
        there: tuple[int, ...] = ()
        result: list[tuple[int, ...] | None] = []
        end = 0
        for layer, (more, kept) in enumerate(
            zip(self.depth_writes(), self.depth_keep, strict=True)
        ):
            there = (*there, *range(end, end + more))
            end += more
            try:
                stay = positions(there, kept)
            except ValueError as error:
                raise ValueError(f"depth_keep[{layer}]: {error}") from None
            result.append(None if len(stay) == len(there) else stay)
            there = kept
        return result

    def depth_slots(self) -> int:
        """Slots that the layers write in all.

        Example:
            >>> BlockConfig(
            ...     layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... ).depth_slots()  # two per block, but none in the last
            4
        """
        if self.depth == "attention":
            return 2 * self.layers + 1
        slots = {"residual": 0, "kv": 1}.get(self.depth, 2)
        return slots * (self.layers if self.write_last else self.layers - 1)


@dataclass(frozen=True, kw_only=True)
class MoDAConfig(BlockConfig):
    """Sizes and options of a :class:`MoDALanguageModel`: those of its blocks, and its own.

    Args:
        vocab_size: number of tokens.
        rope_base: base of the rotary wavelengths; ``head_dim`` is even.

    Raises:
        ValueError: see :class:`BlockConfig`.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> config.depth, config.norm, config.causal
        ('kv+ffn', 'post', True)
    """

    vocab_size: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("vocab_size")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for the rotary embedding")
