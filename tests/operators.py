"""One call of every operator, for tests of what they all do."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers import make_decoding, make_inputs
from moda_ops.rules.autograd import flatten, lengths, unflatten

DIFFERENTIABLE = ("attention", "attention_varlen", "chunk_attention", "depth_attention")
BACKWARD = tuple(f"{name}_backward" for name in DIFFERENTIABLE)
EVERY = (*DIFFERENTIABLE, *BACKWARD, "decode", "decode_", "depth_mass")
T, S = 5, 7
DOCUMENTS = [[0, 2, 2, 4], [0, 3, 3, 4], [0, 0, 1, 5]]  # of T queries; rows may follow the last
KEY_DOCUMENTS = [[0, 3, 4, 6], [0, 3, 3, 7], [0, 1, 1, 7]]  # of S keys


class Call(NamedTuple):
    """``moda::name(*arguments, **options)``."""

    name: str
    arguments: list[Any]
    options: dict[str, Any]

    def leaves(self) -> list[Any]:
        """The arguments with their lists opened."""
        return flatten(self.arguments)

    def run(self, *leaves: Any) -> tuple[Tensor, ...]:
        """The results, lists opened, with these in place of its own leaves."""
        arguments = unflatten(leaves or self.leaves(), lengths(self.arguments))
        return tuple(flatten(getattr(torch.ops.moda, self.name)(*arguments, **self.options)))


def make_call(name: str, seed: int = 0, **inputs: Any) -> Call:
    """Inputs of the same shapes for every seed; ``inputs`` are further arguments of their maker."""
    if name.endswith("_backward"):
        return backward_of(make_call(name.removesuffix("_backward"), seed, **inputs))
    shape = dict(B=2, T=T, HQ=4, H=2, D=8, L=3, S=S, DV=4) | inputs
    device = shape.get("device", "cpu")
    if name == "depth_mass":
        depth_attention = make_call("depth_attention", seed, **inputs)
        q, k_depth, _ = depth_attention.arguments
        lse = depth_attention.run()[1]
        return Call(name, [q, k_depth, lse], depth_attention.options)
    if name in ("decode", "decode_"):
        del shape["B"], shape["T"], shape["S"]
        paged, append = shape.pop("page_size", None), name == "decode_"
        before = [2 + seed, 0] if append else [4 + seed, 2]
        case = make_decoding(
            before, 2, append=append, seed=seed, page_size=paged, spare=3 - seed, **shape
        )
        q, _, _, *depth = case.inputs
        caches, table = [case.k_cache, case.v_cache], [case.block_table]
        if paged is None:  # there is no junk to stay away from
            caches, table = [x.nan_to_num(0.5) for x in caches], []
        new = [case.k_new, case.v_new] if append else []
        arguments = [q, *caches, *depth, case.cache_seqlens, *new, *table]
        return Call(name, arguments, dict(window_left=2))
    x = make_inputs(**shape, seed=seed)
    if name == "attention":
        return Call(name, list(x), dict(window_left=3, softcap=2.0))
    if name == "chunk_attention":
        return Call(name, list(x), dict(chunk_size=2, window_left=4))
    if name == "depth_attention":
        return Call(name, [x.q, *x[3:]], dict(scale=0.4))
    x = x.map(lambda tensor: tensor[0])
    starts = [
        torch.tensor([n * tokens // unit for n in cu[seed % 3]], dtype=torch.int32, device=device)
        for cu, tokens, unit in ((DOCUMENTS, shape["T"], T), (KEY_DOCUMENTS, shape["S"], S))
    ]
    return Call(name, [*x, *starts], dict(causal=False, window_left=3))


def backward_of(forward: Call) -> Call:
    """The call of its backward operator that autograd makes, for random gradients."""
    out, lse = forward.run()
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)
    )
    arguments = [dout, dlse, *forward.arguments, out, lse]
    return Call(f"{forward.name}_backward", arguments, forward.options)
