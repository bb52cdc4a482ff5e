"""What the host does for a call, kernels and device left out: they are stand-ins that do nothing.

"launcher" is moda_kernels called directly, which allocates results, finds the prepared launches and
writes the table of a list of slots; "inference" adds argument checks and the dispatcher, "training"
autograd. Shapes have one element per head, tensors are on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moda_kernels
from moda_kernels import (
    backward_delta,
    backward_depth,
    backward_dkv,
    backward_dq,
    decode_merge,
    decode_split,
    forward,
    slots,
)
from moda_ops import DepthStream, moda_attention, moda_decode
from moda_ops.operators import definition as ops
from moda_ops.stream import guard

BACKWARD = backward_delta, backward_depth, backward_dq, backward_dkv
PASSES = forward, *BACKWARD, decode_split, decode_merge, slots
OPTIONS: Any = (1.0, None, 0, None, "fused")


class Nothing:
    """Stands for a Triton kernel and for its compiled code."""

    arg_names = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forget() -> None:
        for module in PASSES:
            prepare = vars(module).get("_prepare", slots._write_words)
            prepare.cache_clear()

    for module in PASSES:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    forget()
    yield
    forget()


def inputs(L: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(1, 1, 1, 1)
    return x, *([torch.randn(1, 1, 1, 1) for _ in range(L)] for _ in range(2))


@pytest.mark.parametrize("L", [0, 8, 72])
@pytest.mark.parametrize("call", ["launcher", "inference", "training"])
def test_forward(benchmark: Any, L: int, call: str) -> None:
    x, k_depth, v_depth = inputs(L)
    benchmark.group = f"forward, {L} slots"
    if call == "launcher":
        out, _ = benchmark(moda_kernels.attention, x, x, x, k_depth, v_depth, *OPTIONS)
    else:
        x.requires_grad_(call == "training")
        out = benchmark(moda_attention, x, x, x, k_depth, v_depth)
        assert out.requires_grad == (call == "training")
    assert out.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("L", [0, 8, 72])
@pytest.mark.parametrize("call", ["launcher", "operator", "autograd"])
def test_backward(benchmark: Any, L: int, call: str) -> None:
    x, k_depth, v_depth = inputs(L)
    benchmark.group = f"backward, {L} slots"
    saved = x, x, x, k_depth, v_depth, x, x[..., 0].double()  # out and lse
    if call == "launcher":
        grads = benchmark(moda_kernels.attention_backward, x, None, *saved, *OPTIONS)
    elif call == "operator":
        grads = benchmark(torch.ops.moda.attention_backward, x, None, *saved)
    else:
        leaves = [y.requires_grad_() for y in (x, *k_depth, *v_depth)]
        out = moda_attention(x, x, x, k_depth, v_depth)
        grads = benchmark(torch.autograd.grad, out, leaves, x.detach(), retain_graph=True)
        assert len(grads) == 1 + 2 * L
    assert grads[0].shape == x.shape


@pytest.mark.parametrize("L", [0, 8, 72])
@pytest.mark.parametrize("call", ["launcher", "inference"])
@pytest.mark.parametrize("paged", [False, True])
def test_decode(benchmark: Any, L: int, call: str, paged: bool) -> None:
    """One new token, written and attended to; its keys are split over programs, and merged."""
    x, k_depth, v_depth = inputs(L)
    benchmark.group = f"decoding, {L} slots" + ", paged" * paged
    cache, seqlens = torch.randn(64, 64, 1, 1), torch.ones(1, dtype=torch.int32)
    table = torch.arange(64, dtype=torch.int32)[None] if paged else None
    cache = cache if paged else cache.view(1, -1, 1, 1)
    if call == "launcher":
        arguments = x, cache, cache, k_depth, v_depth, seqlens, table, x, x, 1.0, None, None
        out, _ = benchmark(moda_kernels.decode, *arguments)
    else:
        new = dict(k_new=x, v_new=x, block_table=table)
        out = benchmark(moda_decode, x, cache, cache.clone(), k_depth, v_depth, seqlens, **new)
    assert out.shape == (1, 1, 1, 1)


@pytest.mark.parametrize("call", ["write", "forward", "backward"])
def test_stream(benchmark: Any, call: str) -> None:
    """One layer's calls on a stream of 48 slots: their number makes no difference."""
    x = torch.randn(1, 1, 1, 1)
    benchmark.group = "stream of 48 slots"
    with torch.no_grad():
        stream = DepthStream.allocate(48, 1, 1, 1, 1)
        for _ in range(47):
            stream = stream.write(x, x)
        buffer, token = stream.buffer, stream.token
        if call == "write":
            record = guard.record_of(buffer)
            assert record is not None

            def write() -> None:
                record.written = 0  # the same slot again and again, each time as if it were new
                torch.ops.moda.stream_write(x, x, buffer, token)

            benchmark(write)
            return
        out, lse, _ = torch.ops.moda.stream_attention(x, None, None, buffer, token)
        if call == "forward":
            benchmark(torch.ops.moda.stream_attention, x, None, None, buffer, token)
        else:
            arguments = x, None, torch.zeros(47, 1, 1, 1, 2), x, None, None, buffer, out, lse, 47
            backward = torch.ops.moda.stream_attention_backward
            benchmark(backward, *arguments, torch.float32)
