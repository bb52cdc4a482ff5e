"""What is timed, on which shapes: the operator, its parts and its peers, from the same inputs."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moda_ops import private
from moda_ops.operators.checks import Plan

Call = Callable[[], Any]


class Case(NamedTuple):
    """Sizes of one measurement: q (B, T, G H, D), k and v (B, T, H, D), L slots."""

    B: int
    T: int
    G: int
    H: int
    L: int
    D: int
    causal: bool = True

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in zip("BTGHLD", self, strict=False))
        return sizes + (", causal" if self.causal else ", full")

    def depth_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of all slots."""
        return 2 * dtype.itemsize * self.B * self.T * self.H * self.L * self.D


SWEEPS: dict[str, list[Case]] = {
    "main": [
        Case(1, 1024, 8, 8, 64, 64),
        Case(1, 4096, 8, 8, 64, 64),
        Case(1, 4096, 2, 8, 72, 64),
        Case(1, 4096, 1, 16, 24, 64),
        Case(1, 16384, 2, 8, 64, 64),
        Case(1, 16384, 8, 8, 64, 64),
        Case(1, 16384, 32, 8, 64, 64),
        Case(1, 16384, 8, 8, 256, 64),
        Case(1, 65536, 8, 8, 64, 64),
        Case(1, 4096, 8, 8, 64, 128),
    ],
    "tokens": [Case(1, T, 8, 8, 64, 64) for T in (4096, 8192, 16384, 32768, 65536)],
    "groups": [Case(1, 16384, G, 8, 64, 64) for G in (2, 4, 8, 16, 32)],
    "slots": [Case(1, 16384, 8, 8, L, 64) for L in (64, 128, 256)],
    "training": [
        Case(B, T, G, 16 // G, L, D)
        for D in (64, 128)
        for B in (1, 8)
        for T in (2048, 4096)
        for G in (1, 2, 4)
        for L in (8, 24, 48, 96)
    ],
    "depth": [Case(1, 4096, G, 8, 64, D) for D in (64, 128) for G in (1, 2, 8, 32)],
    "full": [Case(1, 4096, G, 8, 64, D, causal=False) for G in (1, 2, 8) for D in (64, 128)],
    "tiny": [Case(2, 64, 2, 2, L, 16) for L in (4, 16)],
}
"""tokens, groups and slots are those of arXiv 2603.15619, Table 2; tiny is for a CPU."""


class Inputs(NamedTuple):
    """Depth is packed, (B, T, L, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_depth: Tensor
    v_depth: Tensor
    dout: Tensor

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> "Inputs":
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        B, T, G, H, L, D, _ = case
        rows, keys, slots = (B, T, G * H, D), (B, T, H, D), (B, T, L, H, D)
        return cls(*(randn(*shape) for shape in (rows, keys, keys, slots, slots, rows)))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)


class Passes(NamedTuple):
    """Forward returns out, its heads perhaps as (H, G), which need not lie side by side; backward
    the gradients of the inputs that take part, in their order."""

    forward: Call
    backward: Call | None  # None: there is none


class Contender(NamedTuple):
    """``sequence`` and ``depth`` say over which keys it attends. A ``peer`` may fail to run."""

    name: str
    sequence: bool
    depth: bool
    prepare: Callable[[Inputs, Case], Passes]
    peer: bool = False


def moda(plan: Plan = "auto", *, as_list: bool = False, sequence: bool = True) -> Any:
    """The operator; with ``sequence`` False over depth alone."""

    def prepare(x: Inputs, case: Case) -> Passes:
        k, v = (x.k, x.v) if sequence else (x.k[:, :0], x.v[:, :0])
        depth = [[x.k_depth], [x.v_depth]]
        if as_list:
            depth = [[slot.clone() for slot in packed.unbind(2)] for (packed,) in depth]
        options = dict(causal=case.causal, plan=plan)
        out, lse = torch.ops.moda.attention(x.q, k, v, *depth, **options)

        def backward() -> list[Tensor]:
            dq, dk, dv, *depth_grads = torch.ops.moda.attention_backward(
                x.dout, None, x.q, k, v, *depth, out, lse, **options
            )
            if as_list:
                return [dq, dk, dv, *depth_grads[0], *depth_grads[1]]
            return [dq, *([dk, dv] if sequence else []), *(grad for (grad,) in depth_grads)]

        return Passes(lambda: torch.ops.moda.attention(x.q, k, v, *depth, **options)[0], backward)

    return prepare


def sdpa(x: Inputs, case: Case) -> Passes:
    """The sequence alone by ``scaled_dot_product_attention``."""
    leaves = [y.detach().requires_grad_() for y in x[:3]]

    def forward() -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in leaves)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.G > 1)
        return out.transpose(1, 2)

    out = forward()
    return Passes(forward, lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True))


def library(name: str) -> Any:
    """The sequence alone by one of the GPU kernels behind ``scaled_dot_product_attention``."""

    def prepare(x: Inputs, case: Case) -> Passes:
        from moda_kernels import sdpa

        arguments = case.causal, case.D**-0.5
        out, lse = sdpa.attention(name, x.q, x.k, x.v, *arguments)
        return Passes(
            lambda: sdpa.attention(name, x.q, x.k, x.v, *arguments)[0],
            lambda: sdpa.attention_backward(name, x.dout, *x[:3], out, lse, *arguments),
        )

    return prepare


def flex(x: Inputs, case: Case) -> Passes:
    """FlexAttention over the concatenated keys [sequence | depth]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, L = case.T, case.L

    def mask(b: Tensor, h: Tensor, token: Tensor, key: Tensor) -> Tensor:
        visible = key <= token if case.causal else key >= 0
        return torch.where(key < T, visible, (key - T) // L == token)

    leaves = [y.detach().requires_grad_() for y in x[:5]]
    q, k, v, k_depth, v_depth = leaves
    keys, values = (
        torch.cat([y, depth.flatten(1, 2)], 1).transpose(1, 2).contiguous()
        for y, depth in ((k, k_depth), (v, v_depth))
    )
    blocks = torch.compile(create_block_mask)(mask, None, None, T, T + T * L, device=q.device)
    attention = torch.compile(flex_attention)

    def forward() -> Tensor:
        out = attention(q.transpose(1, 2), keys, values, block_mask=blocks, enable_gqa=case.G > 1)
        return out.transpose(1, 2)

    def backward() -> tuple[Tensor, ...]:
        # Donated buffers would serve one backward. A patch holds in its own thread, so stay in it.
        one_thread = torch.autograd.set_multithreading_enabled(False)
        with one_thread, private.buffers_not_donated():
            return torch.autograd.grad(out, leaves, x.dout, retain_graph=True)

    with private.buffers_not_donated():
        out = forward()
    return Passes(forward, backward)


def authors(x: Inputs, case: Case) -> Passes:
    """The authors' kernel (hustvl/MoDA) in its folded layout: rows (t, g), depth rows (t, l).

    Forward alone: its backward does not compile with Triton 3.6.
    """
    from fla.ops.moda import parallel_moda

    B, T, G, H, _, D, causal = case
    q = x.q.view(B, T, H, G, D).transpose(2, 3).reshape(B, T * G, H, D)
    k_depth, v_depth = x.k_depth.flatten(1, 2), x.v_depth.flatten(1, 2)
    options = dict(scale=D**-0.5, moda_group_num=G, is_causal=causal)

    def forward() -> Tensor:
        out: Any = parallel_moda(q, x.k, x.v, cached_k=k_depth, cached_v=v_depth, **options)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(B, T, G, H, D).transpose(2, 3)  # from_authors would copy, and be timed

    return Passes(forward, None)


def has_authors() -> bool:
    """Whether the authors' package is installed."""
    return find_spec("fla") is not None and find_spec("fla.ops.moda") is not None


def contenders(device: torch.device) -> list[Contender]:
    """Those that this machine can run. On a CPU the operator is plain PyTorch."""
    ours = [
        Contender("moda", True, True, moda()),
        Contender("moda, list", True, True, moda(as_list=True)),
    ]
    alone = Contender("moda, depth alone", False, True, moda(sequence=False))
    if device.type == "cpu":
        return [*ours, alone, Contender("SDPA", True, False, sdpa, peer=True)]
    peers = [Contender("FlexAttention", True, True, flex, peer=True)]
    if has_authors():
        peers.append(Contender("authors", True, True, authors, peer=True))
    return [
        *ours,
        Contender("moda, fused", True, True, moda("fused")),
        Contender("moda, split", True, True, moda("split")),
        alone,
        Contender("cuDNN", True, False, library("cudnn"), peer=True),
        Contender("FlashAttention", True, False, library("flash"), peer=True),
        *peers,
    ]
