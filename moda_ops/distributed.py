"""``torch.ops.moda.*`` on DTensors; importing this module registers how.

One rule serves every operator over a sequence or over depth, forward and backward. The placement of
q decides, for each dimension of the mesh by itself, and the other arguments are redistributed to
fit:

=============== ====================== ======================================= ===================
q is sharded by others                 communication                           operators
=============== ====================== ======================================= ===================
batch           like q                 none                                    all but varlen
heads           like q; size divides H none                                    all
tokens          slots like q; k and v  all-gather of k and v; in backward once attention,
                on every rank          more, and a reduce-scatter of dk and dv depth_attention
not at all      on every rank          none
=============== ====================== ======================================= ===================

A gradient comes back as its argument was placed, and replicated where that was a pending sum. Only
shards are saved for backward, never the gathered k and v. Every rank has as many tokens as
``torch.chunk`` gives it, so that under a causal mask the last rank has most to do:
:class:`moda_ops.nn.context_parallel.ContextParallel` balances that.

This is a rule for ``torch_dispatch`` and not a sharding strategy, because a strategy
(:func:`torch.distributed.tensor.experimental.register_sharding`) may take lists of tensors but not
return a list beside other tensors, as the backward operators do (torch 2.11 and 2.13).

Example:
    >>> import torch.distributed as dist
    >>> from torch.distributed.tensor import distribute_tensor, init_device_mesh
    >>> import moda_ops.distributed
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> mesh = init_device_mesh("cpu", (1,))
    >>> x = distribute_tensor(torch.randn(2, 5, 4, 8), mesh, [Shard(2)])
    >>> moda_ops.moda_attention(x, x, x, [x, x], [x, x]).placements
    (Shard(dim=2),)
    >>> dist.destroy_process_group()
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from moda_ops.rules.operator import LIBRARY, OPERATORS
from moda_ops.rules.sharding import Sharding


def _dispatch(
    sharding: Sharding,
    cls: type,
    op: Any,
    types: Sequence[type],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Redistribute the arguments, run ``op`` on their local tensors, and wrap what it returns."""
    given = dict(zip([x.name for x in op._schema.arguments], args, strict=False))
    _check_distributed(given)
    q, mesh = given["q"], given["q"].device_mesh
    split_over = _split_over(sharding, given)

    def placements(name: str, x: Tensor) -> list[Placement]:
        axes = sharding.axes(name, x, q)
        return [Shard(axes[axis]) if axis in axes else Replicate() for axis in split_over]

    def localize(name: str, x: Any) -> Any:
        if isinstance(x, list):
            return [localize(name, slot) for slot in x]
        if not _is_dtensor(x):
            return x
        return x.detach().redistribute(mesh, placements(name, x)).to_local()

    def distribute(x: Tensor, shape: Sequence[int], where: Sequence[Placement]) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, mesh, where, shape=torch.Size(shape), stride=stride)

    def gradient(name: str, x: Any, like: Any) -> Any:
        if isinstance(x, list):
            return [gradient(name, *pair) for pair in zip(x, like, strict=True)]
        axes = sharding.axes(name, x, q)
        summed: list[Placement] = [
            Partial() if axis == "tokens" and axis not in axes else placement
            for axis, placement in zip(split_over, placements(name, x), strict=True)
        ]
        back = [Replicate() if p.is_partial() else p for p in like.placements]
        return distribute(x, like.shape, summed).redistribute(mesh, back)

    with torch.no_grad():
        local = {name: localize(name, x) for name, x in given.items()}
        keys = _visible_keys(split_over, given, local, kwargs or {})
        if keys is not None:
            local |= {name: local[name][:, keys] for name in ("k", "v")}
        results = op(*local.values(), **(kwargs or {}))
        names = [x.name for x in op._schema.returns]
        if names == ["out", "lse"]:
            out, lse = results
            v = given["v"] if "v" in given else (given["v_depth"] or [q])[0]
            shape = (*q.shape[:-1], v.shape[-1])
            lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
            return (
                distribute(out, shape, placements("out", out)),
                distribute(lse, lse_shape, placements("lse", lse)),
            )
        grads = dict(zip(names, results, strict=True))
        if keys is not None:
            hidden = keys.start, given["k"].shape[1] - keys.stop
            for name in ("dk", "dv"):
                grads[name] = F.pad(grads[name], (0, 0, 0, 0, *hidden))
        return tuple(gradient(name, x, given[name[1:]]) for name, x in grads.items())


def _is_dtensor(x: object) -> bool:
    return isinstance(x, DTensor)


def _check_distributed(given: dict[str, Any]) -> None:
    """Raise TypeError for a plain tensor, but for document lengths, which are the same anyway."""
    for name, value in given.items():
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, Tensor) and not _is_dtensor(x) and "cu_seqlens" not in name:
                raise TypeError(
                    f"{name} must be a DTensor as other arguments are, got a plain tensor"
                )


def _split_over(sharding: Sharding, given: dict[str, Any]) -> list[str | None]:
    """What each dimension of the mesh shards: batch, tokens, heads or nothing."""
    q, mesh = given["q"], given["q"].device_mesh
    axes = {n: axis for axis, n in sharding.q.items()}
    split = [axes.get(p.dim) if type(p) is Shard else None for p in q.placements]
    if split.count("tokens") > 1:
        raise ValueError(f"q may be sharded over tokens by one mesh dimension, got {q.placements}")
    holder = given["k"] if "k" in given else (given["k_depth"] or [q])[0]
    ranks = math.prod(mesh.size(i) for i, axis in enumerate(split) if axis == "heads")
    if holder.shape[-2] % ranks:
        raise ValueError(
            f"q is sharded over heads on {ranks} ranks, which must divide the key/value heads "
            f"H = {holder.shape[-2]}"
        )
    return split


def _visible_keys(
    split_over: Sequence[str | None],
    given: dict[str, Any],
    local: dict[str, Any],
    options: dict[str, Any],
) -> slice | None:
    """The sequence keys that this rank's queries see, if these are a part of all."""
    if "tokens" not in split_over or "k" not in given:
        return None
    left, T, S = options.get("window_left"), given["q"].shape[1], given["k"].shape[1]
    if not options.get("causal", True):
        if left is not None or options.get("window_right") is not None:
            raise ValueError("a window without causal=True cannot be sharded over tokens")
        return slice(0, S)
    dim = split_over.index("tokens")
    mesh = given["q"].device_mesh
    first = min(mesh.get_local_rank(dim) * -(-T // mesh.size(dim)), T) + S - T  # query's position
    stop = max(first + local["q"].shape[1], 0)
    return slice(0 if left is None else min(max(first - left, 0), stop), stop)


for _name, _operator in OPERATORS.items():
    if _operator.sharding is not None:
        torch.library.register_torch_dispatch(
            f"moda::{_name}", DTensor, partial(_dispatch, _operator.sharding), lib=LIBRARY
        )
