"""The axes over which DTensor may shard an operator. ``moda_ops.distributed`` does it."""

from typing import Any, NamedTuple

MeshAxes = dict[str, int]
"""``"batch"``, ``"tokens"`` and ``"heads"``, each with its axis in a tensor."""


class Sharding(NamedTuple):
    """Where an operator's batch, tokens and heads are, as far as it can be sharded over them."""

    q: MeshAxes  # and of every other tensor
    lse: MeshAxes
    packed: MeshAxes  # depth in one tensor

    def axes(self, name: str, x: Any, q: Any) -> MeshAxes:
        """Of an argument or a result; those that are not named lie on every rank."""
        if name.startswith("cu_seqlens"):
            return {}
        if name.endswith("lse"):
            return self.lse
        if name.endswith("_depth") and x.dim() > q.dim():
            return self.packed
        keys = name in ("k", "v", "dk", "dv")
        return {axis: n for axis, n in self.q.items() if not (keys and axis == "tokens")}


BY_BATCH_AND_HEAD = Sharding(
    {"batch": 0, "heads": 2}, {"batch": 0, "heads": 1}, {"batch": 0, "heads": 3}
)
BY_TOKEN_TOO = Sharding(
    BY_BATCH_AND_HEAD.q | {"tokens": 1},
    BY_BATCH_AND_HEAD.lse | {"tokens": 2},
    BY_BATCH_AND_HEAD.packed | {"tokens": 1},
)
PACKED_BY_HEAD = Sharding({"heads": 1}, {"heads": 0}, {"heads": 2})
