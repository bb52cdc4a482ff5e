"""What a stack of layers keeps for backward: each slot once, however many layers read it."""

import pytest
import torch

from moda_ops import moda_attention


def layers(x, depth: int, attend):
    """``depth`` attention layers that each read every earlier layer's keys and values."""
    k_slots, v_slots = [], []
    for _ in range(depth):
        q, k, v = torch.tanh(x), torch.sin(x), torch.cos(x)
        x = attend(q, k, v, k_slots, v_slots)
        k_slots, v_slots = [*k_slots, k], [*v_slots, v]
    return x


def packed_per_layer(q, k, v, k_slots, v_slots):
    """What must not happen: every layer stacks the stream anew."""
    if not k_slots:
        return moda_attention(q, k, v)
    return moda_attention(q, k, v, torch.stack(k_slots, 2), torch.stack(v_slots, 2))


def saved_bytes(depth: int, attend, compiler) -> int:
    """Bytes of the distinct storages that autograd holds after a forward pass."""
    torch._dynamo.reset()
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(1, 16, 2, 8, requires_grad=True)
    run = compiler(lambda x: layers(x, depth, attend))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(storage.nbytes() for storage in storages.values())


def compile_aot(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("compiler", [lambda f: f, compile_aot], ids=["eager", "compiled"])
@pytest.mark.parametrize(("attend", "linear"), [(moda_attention, True), (packed_per_layer, False)])
def test_saved_memory_is_linear_in_layers(attend, linear, compiler):
    four, eight, twelve = (saved_bytes(n, attend, compiler) for n in (4, 8, 12))
    growth = (twelve - eight) / (eight - four)
    assert (growth < 1.05) == linear, f"{four}, {eight}, {twelve} bytes for 4, 8, 12 layers"
