"""What a stack of layers keeps and does for backward: linear in layers for both streams."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.stacked import StackedSlots
from moda_ops import DepthSlots, DepthStream

SHAPE = (1, 16, 2, 8)


def begin(kind, layers: int):
    B, T, H, D = SHAPE
    return DepthStream.allocate(layers, B, T, H, D) if kind is DepthStream else kind()


def model(x, kind, layers: int):
    """Attention layers that each read every earlier layer's keys and values."""
    stream = begin(kind, layers)
    for _ in range(layers):
        x, stream = stream.write(torch.sin(x), torch.cos(x)).attend(torch.tanh(x))
    return x


def saved_bytes(kind, layers: int, compiler) -> int:
    """Bytes of the distinct storages that autograd holds after a forward pass."""
    torch._dynamo.reset()
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(SHAPE, requires_grad=True)
    run = compiler(lambda x: model(x, kind, layers))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(storage.nbytes() for storage in storages.values())


def compile_aot(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("compiler", [lambda f: f, compile_aot], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("kind", "linear"), [(DepthStream, True), (DepthSlots, True), (StackedSlots, False)]
)
def test_saved_memory_is_linear_in_layers(kind, linear, compiler):
    four, eight, twelve = (saved_bytes(kind, n, compiler) for n in (4, 8, 12))
    growth = (twelve - eight) / (eight - four)
    assert (growth < 1.05) == linear, f"{four}, {eight}, {twelve} bytes for 4, 8, 12 layers"


class Calls(TorchDispatchMode):
    """Counts operator calls, and the elements that additions write."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.added = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count[func.overloadpacket] += 1
        if func.overloadpacket is torch.ops.aten.add:
            self.added += result.numel()
        return result


def backward_calls(kind, layers: int) -> Calls:
    x = torch.randn(SHAPE, requires_grad=True)
    y = model(x, kind, layers).sum()
    with Calls() as calls:
        y.backward()
    return calls


@pytest.mark.parametrize(("kind", "linear"), [(DepthStream, True), (DepthSlots, False)])
def test_gradients_are_added_inside_the_operators(kind, linear):
    """Of DepthStream: per layer the same operators, and no addition but of the layer's input."""
    four, eight, twelve = (backward_calls(kind, n) for n in (4, 8, 12))
    per_layer = {op: n - four.count[op] for op, n in eight.count.items()}
    assert (per_layer == {op: n - eight.count[op] for op, n in twelve.count.items()}) == linear
    assert (twelve.added - eight.added == eight.added - four.added) == linear
