"""Context parallelism: the tokens of a sequence shared out among the ranks of a group.

Depth needs no communication, for a token's slots are where the token is. The sequence does: each
layer gathers the keys and values of all ranks, in backward once more, and scatters their gradients'
sums. What is gathered lives for one layer; saved are a rank's own.

Of W ranks, rank r has chunks r and 2 W - 1 - r of 2 W equal ones. Under a causal mask two such
chunks see as many keys on every rank. It is the order of PyTorch's
:func:`torch.distributed.tensor.experimental.context_parallel`, which may shard the buffers instead
of :meth:`ContextParallel.shard`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moda_ops.operators.arguments import (
    Window,
    check_bool,
    check_option,
    check_tensors,
    window_sides,
)
from moda_ops.stream.depth_stream import DepthStream

CHUNKS = 2  # of every rank
# torch 2.13 renames both
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ContextParallel:
    """Which tokens each rank of a group has, and how their keys and values meet.

    Args:
        group: of the ranks that share sequences; default: all ranks.

    Raises:
        ValueError: this process is not a member of the group.

    Example:
        >>> from moda_ops.nn import MoDAConfig, MoDALanguageModel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, tokens = MoDALanguageModel(config), torch.randint(256, (1, 8))
        >>> context = ContextParallel()
        >>> model(context.shard(tokens, 1), context=context).shape
        torch.Size([1, 8, 256])
        >>> dist.destroy_process_group()
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must be one that this process is a member of")

    @property
    def chunks(self) -> tuple[int, int]:
        """The chunks of this rank, of ``2 * size``, in its tokens' order."""
        return self.rank, 2 * self.size - 1 - self.rank

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of x, whose axis ``dim`` is all tokens.

        Raises:
            ValueError: ``2 * size`` does not divide the number of tokens.
        """
        if x.shape[dim] % (CHUNKS * self.size):
            raise ValueError(
                f"x has {x.shape[dim]} tokens, which must be a multiple of twice the {self.size} "
                "ranks; pad the sequences"
            )
        parts = x.chunk(CHUNKS * self.size, dim)
        return torch.cat([parts[i] for i in self.chunks], dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All tokens, in order, of every rank's x: the inverse of :meth:`shard`. No gradient."""
        x = x.detach().movedim(dim, 0).contiguous()
        every = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(every, x, group=self.group)
        parts = every.chunk(CHUNKS * self.size)
        order = [*parts[::2], *parts[:0:-2]]
        return torch.cat([part.movedim(0, dim) for part in order], dim)

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of the sum of every rank's x, whose axis ``dim`` is all tokens."""
        parts = x.movedim(dim, 0).chunk(CHUNKS * self.size)
        every = torch.cat([parts[i] for r in range(self.size) for i in (r, -1 - r)])
        own = every.new_empty(every.shape[0] // self.size, *every.shape[1:])
        _reduce_scatter(own, every, group=self.group)
        return own.movedim(0, dim)

    def positions(self, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """Positions (tokens,) of this rank's tokens, which are so many."""
        return self.shard(torch.arange(self.size * tokens, device=device), 0)

    def stream(self, first: DepthStream, second: DepthStream) -> "ContextParallelStream":
        """The stream of this rank's tokens, of one empty stream for either chunk."""
        return ContextParallelStream((first, second), self)


class ContextParallelStream(NamedTuple):
    """A depth stream of a part of the tokens, to layers what :class:`moda_ops.DepthStream` is.

    Attributes:
        halves: the slots of this rank's first and second chunk.
        context: which tokens these are.
        newest: k and v of the last write, if that is not in the halves yet.
    """

    halves: tuple[DepthStream, DepthStream]
    context: ContextParallel
    newest: tuple[Tensor, Tensor] | None = None

    @property
    def written(self) -> int:
        """How many slots are written."""
        return self.halves[0].written + (self.newest is not None)

    def write(self, k: Tensor, v: Tensor) -> "ContextParallelStream":
        """The stream with one more slot: k (B, T / W, H, D) and v (B, T / W, H, DV)."""
        check_tensors(k=k, v=v)
        return self._flushed()._replace(newest=(k, v))

    def keep(self, slots: Sequence[int]) -> NoReturn:
        """Not supported: a model with bounded slots cannot be context parallel."""
        raise ValueError("slots cannot be dropped under context parallelism (depth_keep)")

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: Window | None = None,
        softcap: float | None = None,
    ) -> "tuple[Tensor, ContextParallelStream]":
        """``out`` (B, T / W, HQ, DV) and the stream: see :meth:`moda_ops.DepthStream.attend`.

        k and v are of this rank's tokens.

        Raises:
            TypeError, ValueError: as :meth:`moda_ops.DepthStream.attend`; also unless ``causal``.
        """
        _check_causal(causal)
        check_option("scale", scale)
        check_option("softcap", softcap)
        options = dict(scale=scale, window_left=window_sides(window)[0], softcap=softcap)
        if k is not None and v is not None:
            return self._flushed()._attend(q, k, v, options)
        if self.newest is None:
            raise ValueError("nothing is written since the last read: write first, or give k and v")
        out, stream = self._replace(newest=None)._attend(q, *self.newest, options)
        return out, stream._replace(newest=self.newest)

    def attend_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
    ) -> "tuple[Tensor, ContextParallelStream]":
        """The same without depth: see :meth:`moda_ops.DepthStream.attend_sequence`."""
        _check_causal(causal)
        first, second = (x._replace(token=x.token[:0].detach()) for x in self.halves)
        out, _ = self._replace(halves=(first, second), newest=None)._attend(q, k, v, {})
        return out, self

    def attend_depth(self, q: Tensor) -> "tuple[Tensor, ContextParallelStream]":
        """Over the slots alone: see :meth:`moda_ops.DepthStream.attend_depth`."""
        stream = self._flushed()
        parts = [h.attend_depth(x) for h, x in zip(stream.halves, q.chunk(CHUNKS, 1), strict=True)]
        (a, first), (b, second) = parts
        return torch.cat((a, b), 1), stream._replace(halves=(first, second))

    def _flushed(self) -> "ContextParallelStream":
        if self.newest is None:
            return self
        pairs = zip(*(x.chunk(CHUNKS, 1) for x in self.newest), strict=True)
        first, second = (h.write(*kv) for h, kv in zip(self.halves, pairs, strict=True))
        return self._replace(halves=(first, second), newest=None)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> "tuple[Tensor, ContextParallelStream]":
        check_tensors(q=q, k=k, v=v)
        if q.shape[1] % CHUNKS or q.shape[1] != k.shape[1]:
            raise ValueError(
                f"q and k must have this rank's two chunks of tokens, got {q.shape[1]} and "
                f"{k.shape[1]}"
            )
        state = [x for half in self.halves for x in (half.buffer, half.token)]
        out, *stream_tokens = _Attend.apply(self.context, options, q, torch.cat((k, v), -1), *state)
        first, second = (
            half._replace(token=token)
            for half, token in zip(self.halves, stream_tokens, strict=True)
        )
        return out, self._replace(halves=(first, second))


def _check_causal(causal: bool) -> None:
    if not check_bool("causal", causal):
        raise ValueError("causal must be True under context parallelism, got False")


class _Attend(torch.autograd.Function):
    """Two chunks of queries over the keys up to their last, gathered, and their own depth slots."""

    @staticmethod
    def forward(
        ctx: Any,
        context: ContextParallel,
        options: dict[str, Any],
        q: Tensor,
        kv: Tensor,  # (B, T / W, H, D + DV)
        *state: Tensor,  # buffer and token of either half
    ) -> tuple[Tensor, ...]:
        buffers, stream_tokens = state[::2], state[1::2]
        outs, lses, after = [], [], []
        for part, keys, buffer, token in zip(
            q.chunk(CHUNKS, 1),
            _visible(context, kv, q.shape[-1]),
            buffers,
            stream_tokens,
            strict=True,
        ):
            out, lse, token = torch.ops.moda.stream_attention(part, *keys, buffer, token, **options)
            outs.append(out)
            lses.append(lse)
            after.append(token)
        whole = torch.cat(outs, 1)  # what the output projection saves, too
        ctx.save_for_backward(q, kv, whole, *buffers, *lses)
        ctx.context, ctx.options = context, options
        ctx.slots, ctx.grad_dtype = [x.shape[0] for x in stream_tokens], stream_tokens[0].dtype
        ctx.set_materialize_grads(False)
        return whole, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dtokens: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return None, None, None, None, None, dtokens[0], None, dtokens[1]
        q, kv, out, *saved = ctx.saved_tensors
        buffers, lses = saved[:CHUNKS], saved[CHUNKS:]
        outs = [x.contiguous() for x in out.chunk(CHUNKS, 1)]
        D, (B, n, H, E) = q.shape[-1], kv.shape
        dkeys = kv.new_zeros(B, n * ctx.context.size, H, E)
        dqs, before = [], []
        for i, (part, keys, dpart) in enumerate(
            zip(
                q.chunk(CHUNKS, 1),
                _visible(ctx.context, kv, D),
                dout.chunk(CHUNKS, 1),
                strict=True,
            )
        ):
            dq, (dk, dv), dtoken = torch.ops.moda.stream_attention_backward(
                dpart, None, dtokens[i], part, *keys, buffers[i], outs[i], lses[i],
                ctx.slots[i], ctx.grad_dtype, **ctx.options,
            )  # fmt: skip
            dkeys[:, : dk.shape[1], :, :D] += dk
            dkeys[:, : dv.shape[1], :, D:] += dv
            dqs.append(dq)
            before.append(dtoken)
        dkv = ctx.context.scatter_sum(dkeys, 1)
        return None, None, torch.cat(dqs, 1), dkv, None, before[0], None, before[1]


def _visible(context: ContextParallel, kv: Tensor, D: int) -> list[tuple[Tensor, Tensor]]:
    """For each of this rank's chunks, the keys and values up to its end."""
    every, chunk = context.gather(kv, 1), kv.shape[1] // CHUNKS
    parts = [every[:, : (i + 1) * chunk] for i in context.chunks]
    return [(part[..., :D], part[..., D:]) for part in parts]
