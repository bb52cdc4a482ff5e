"""An operator as PyTorch sees it: one description, from which every registration follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moda_ops.rules import autocast as autocast_rule
from moda_ops.rules import flops
from moda_ops.rules import vmap as vmap_rule
from moda_ops.rules.autocast import Autocast
from moda_ops.rules.flops import Pairs
from moda_ops.rules.sharding import Sharding
from moda_ops.rules.vmap import Vmap

LIBRARY = torch.library.Library("moda", "DEF")  # the registrations live as long as this object


class Operator(NamedTuple):
    """What ``torch.ops.moda.<name>`` is, for each part of PyTorch that asks.

    Attributes:
        schema: as ``torch.library`` takes it, without the namespace.
        run: computes the results, on CPU and CUDA tensors.
        fake: allocates results of the same shapes, dtypes and strides, and computes nothing.
        gradient: registers what autograd does: a partial of one of the functions in
            ``rules.autograd``, called with the library and the name.
        autocast: which arguments ``torch.autocast`` casts; None casts none.
        vmap: how a mapped dimension becomes part of the batch, or why it cannot.
        pairs: how many pairs of a query and a key one query head has, which gives the FLOPs.
        sharding: the axes over which DTensor may shard it; None is not supported.
    """

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    gradient: Callable[[torch.library.Library, str], None] | None = None
    autocast: Autocast | None = None
    vmap: Vmap | str | None = None
    pairs: Pairs | None = None
    sharding: Sharding | None = None


OPERATORS: dict[str, Operator] = {}
"""All operators that are defined, by name."""


def define(operator: Operator) -> None:
    """Register the operator with everything that its description says."""
    name = operator.schema.partition("(")[0]
    LIBRARY.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, operator.run, device)
    torch.library.register_fake(f"moda::{name}", operator.fake, lib=LIBRARY)
    if operator.gradient is not None:
        operator.gradient(LIBRARY, name)
    if operator.autocast is not None:
        autocast_rule.register(LIBRARY, name, operator.autocast)
    if operator.vmap is not None:
        vmap_rule.register(LIBRARY, name, operator.vmap)
    if operator.pairs is not None:
        flops.register(name, operator.pairs)
    OPERATORS[name] = operator
