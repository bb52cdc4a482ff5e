"""The operators under PyTorch's tools: checkpointing, export, profiler, determinism."""

import ast
import pathlib
from collections import Counter
from functools import partial

import pytest
import torch
from torch.export import Dim, export
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from helpers import make_inputs
from moda_ops import DepthSlots, DepthStream, moda_attention
from moda_ops.nn import MoDAConfig, MoDALanguageModel
from moda_ops.operators import definition as ops
from operators import BACKWARD, DIFFERENTIABLE, backward_of, make_call

CONFIG = MoDAConfig(
    vocab_size=50, layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, qk_norm=True
)
ATTENTION = [torch.ops.moda.attention.default, torch.ops.moda.stream_attention.default]


class Calls(TorchDispatchMode):
    """Counts the calls of torch.ops.moda.*."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moda":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def selective(operators):
    return partial(create_selective_checkpoint_contexts, operators)


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_selective_checkpointing_of_blocks(kind, device):
    """Attention is not run again in backward, and everything else is: bit for bit the same."""
    model = MoDALanguageModel(CONFIG).to(device)
    tokens = torch.randint(50, (2, 7), device=device)

    def gradients(context_fn):
        x, rotary = model.embedding(tokens), model.rotary(7)
        stream = model.stream(2, 7) if kind is DepthStream else DepthSlots()
        for block in model.blocks:
            x, stream = (
                block(x, rotary, stream)
                if context_fn is None
                else checkpoint(
                    block, x, rotary, stream, use_reentrant=False, context_fn=context_fn
                )
            )
        model.zero_grad()
        loss = model.logits(model.norm(x)).square().mean()
        with Calls() as calls:
            loss.backward()
        return [p.grad for p in model.parameters()], calls.count

    prefix = "stream_" if kind is DepthStream else ""
    expected, calls = gradients(None)
    assert calls == {f"{prefix}attention_backward": 3}
    writes = {"stream_write": 4} if kind is DepthStream else {}
    for context_fn, again in ((noop_context_fn, 3), (selective(ATTENTION), 0)):
        grads, calls = gradients(context_fn)
        assert calls[f"{prefix}attention"] == again
        assert Counter(calls) - Counter({f"{prefix}attention": again}) == {
            f"{prefix}attention_backward": 3,
            **writes,
        }
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_selective_checkpointing_of_a_compiled_model():
    torch._dynamo.reset()
    model, tokens = MoDALanguageModel(CONFIG), torch.randint(50, (2, 7))

    def loss(tokens, rotary, stream):
        x = model.embedding(tokens)
        for block in model.blocks:
            x, stream = checkpoint(
                block, x, rotary, stream, use_reentrant=False, context_fn=selective(ATTENTION)
            )
        return model.logits(model.norm(x)).square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = compiled(tokens, model.rotary(7), model.stream(2, 7))
    with Calls() as calls:
        value.backward()
    assert not calls.count["stream_attention"] and calls.count["stream_attention_backward"] == 3


def test_export_of_the_language_model():
    model = MoDALanguageModel(CONFIG).eval()
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = export(model, (torch.zeros(2, 7, dtype=torch.long),), dynamic_shapes=shapes)
    exported = program.module()
    for B, T in ((2, 7), (3, 11), (1, 1), (5, 64)):
        tokens = torch.randint(50, (B, T))
        assert torch.equal(exported(tokens), model(tokens))


def profiled(activity) -> set[str]:
    device = "cuda" if activity is ProfilerActivity.CUDA else "cpu"
    inputs = make_inputs(1, 33, 4, 2, 16, 3, device=device).map(lambda x: x.requires_grad_())
    k, v = inputs.k, inputs.v
    with profile(activities=[activity]) as profiler:
        moda_attention(*inputs).sum().backward()
        stream = DepthStream.allocate(2, 1, 33, 2, 16, device=device).write(k, v).write(v, k)
        stream.attend(inputs.q)[0].sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return {event.name for event in profiler.events()}


@pytest.mark.filterwarnings("ignore")
def test_names_in_a_profile():
    assert profiled(ProfilerActivity.CPU) >= {
        "moda::attention",
        "moda::attention_backward",
        "moda_attentionBackward",
        "moda::stream_write",
        "moda::stream_attention",
        "moda::stream_attention_backward",
    }


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_names_of_kernels_in_a_profile():
    names = {name for name in profiled(ProfilerActivity.CUDA) if "moda" in name}
    passes = "forward", "backward_dq", "backward_dkv", "backward_depth", "slot_table"
    for kernel in (f"_moda_{name}_kernel" for name in passes):
        assert any(name.startswith(kernel) for name in names), f"{kernel} is not in {names}"


def test_kernels_have_recognisable_names():
    """Every kernel that a launcher prepares is named _moda_<what>_kernel."""
    directory = pathlib.Path(__file__).parents[1] / "kernels" / "moda_kernels"
    kernels = set()
    for path in directory.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id.endswith("_kernel"):
                kernels.add(node.id)
    assert len(kernels) > 10
    assert [name for name in kernels if not name.startswith("_moda_")] == []


def assert_reproducible(call, runs):
    assert torch.are_deterministic_algorithms_enabled()
    first = call.run()
    for _ in range(runs - 1):
        for a, b in zip(call.run(), first, strict=True):
            assert torch.equal(a, b)


def stream_results(x):
    y, stream = x, DepthStream.allocate(3, *x.shape, dtype=x.dtype, device=x.device)
    for _ in range(3):
        y, stream = stream.write(y.sin(), y.cos()).attend(y)
    return [y, *torch.autograd.grad(y.float().square().sum(), x)]


@pytest.mark.parametrize("name", ["attention", "attention_backward", "decode"])
def test_kernels_are_accepted(name, device, monkeypatch):
    """Through Triton's interpreter where there is no GPU."""
    import moda_kernels

    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    assert_reproducible(make_call(name, device=device), 3)


OPERATORS = [*DIFFERENTIABLE, *BACKWARD, "decode"]


@pytest.mark.parametrize("name", OPERATORS)
def test_twenty_runs_give_the_same_bits(name):
    assert_reproducible(make_call(name), 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_twenty_runs_on_a_gpu_give_the_same_bits(name, dtype):
    large = dict(HQ=16, H=2, D=64, DV=64, L=9, dtype=dtype, device="cuda")
    assert_reproducible(make_call(name, **large, T=700, S=900), 20)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_twenty_runs_of_a_split_plan_give_the_same_bits(name):
    large = dict(HQ=16, H=2, D=64, DV=64, L=9, T=700, S=700, dtype=torch.bfloat16, device="cuda")
    call = make_call("attention", **large)._replace(options=dict(plan="split"))
    assert_reproducible(backward_of(call) if "backward" in name else call, 20)


def test_a_stream_gives_the_same_bits(device):
    on_gpu = device.type == "cuda"
    x = torch.randn(2, *((700, 4, 64) if on_gpu else (7, 2, 8)))
    x = x.to(device, torch.bfloat16 if on_gpu else torch.float32).requires_grad_()
    first = stream_results(x)
    for _ in range(19):
        for a, b in zip(stream_results(x), first, strict=True):
            assert torch.equal(a, b)
