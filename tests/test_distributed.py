"""Two processes against one: DTensor, tensor, data, context and pipeline parallelism."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import distributed_checks as checks
from moda_ops import DepthSlots, DepthStream
from moda_ops.nn.context_parallel import ContextParallel
from moda_ops.nn.pipeline import PipelineStage
from moda_ops.nn.tensor_parallel import tensor_parallel
from ranks import Ranks

BACKENDS = ["gloo"]
if torch.cuda.device_count() > 1:
    BACKENDS.append(pytest.param("nccl", marks=pytest.mark.gpu))


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request):
    group = Ranks(2, request.param)
    yield group
    group.stop()


SHAPE = dict(B=2, T=7, HQ=6, H=2, D=8, L=3, DV=5)


DTENSORS = [
    ("attention", {}),
    ("attention", {"window": 2, "softcap": 3.0}),
    ("attention", {"causal": False}),
    ("depth_attention", {"scale": 0.3}),
    ("chunk_attention", {"chunk_size": 3}),  # whose tokens stay together
]


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize(
    ("operator", "options", "axis"),
    [
        (*case, axis)
        for case in DTENSORS
        for axis in ("batch", "tokens", "heads", None)
        if (case[0], axis) != ("chunk_attention", "tokens")
    ],
)
def test_dtensor(ranks, operator, options, axis, form):
    ranks(checks.check_dtensor, operator, [axis], options, SHAPE | {"form": form})


@pytest.mark.parametrize(
    ("axes", "keys", "shape"),
    [
        (["tokens"], "heads", {"S": 12}),  # keys come from where they were, gradients go back
        (["tokens"], None, {"S": 4}),
        (["heads"], "tokens", {}),
        ([None], "tokens", {}),
        (["tokens"], "tokens", {"T": 1, "S": 5}),  # a rank without tokens
        (["batch", "tokens"], "tokens", {"form": "packed"}),
        (["tokens", "heads"], "heads", {"L": 0}),
    ],
)
def test_dtensor_arguments_that_lie_elsewhere(ranks, axes, keys, shape):
    window = {"window": 3} if axes == ["tokens"] else {}
    ranks(checks.check_dtensor, "attention", axes, window, SHAPE | shape, keys)


def test_dtensor_packed_documents(ranks):
    ranks(checks.check_packed_documents)


@pytest.mark.parametrize(
    ("axis", "operator", "forward", "backward"),
    [
        ("heads", "attention", {}, {}),
        ("batch", "attention", {}, {}),
        ("tokens", "depth_attention", {}, {}),
        (
            "tokens",
            "attention",
            {"all_gather_into_tensor": 2},
            {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2},
        ),
    ],
)
def test_dtensor_communication(ranks, axis, operator, forward, backward):
    ranks(checks.check_communication, axis, operator, forward, backward)


def test_dtensor_saves_no_gathered_keys(ranks):
    ranks(checks.check_saved_tensors_are_shards)


@pytest.mark.parametrize(
    ("axis", "dynamic", "lengths"), [("heads", False, [6]), ("tokens", True, [6, 8])]
)
def test_dtensor_compiles(ranks, axis, dynamic, lengths):
    ranks(checks.check_compiled, axis, dynamic, lengths)


def test_dtensor_errors(ranks):
    ranks(checks.check_dtensor_errors)


EVERY_OPTION = {"depth": "kv+ffn+attn", "norm": "pre", "qk_norm": True, "bias": True}


@pytest.mark.parametrize(
    "options",
    [{}, EVERY_OPTION, {"depth": "kv"}, {"depth": "attention"}, {"depth": "residual"}],
    ids=str,
)
def test_context_parallel(ranks, options):
    ranks(checks.check_context_parallel, options)


def test_context_parallel_order(ranks):
    ranks(checks.check_context_parallel_order)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION, {"depth": "residual"}], ids=str)
def test_tensor_parallel(ranks, options):
    ranks(checks.check_tensor_parallel, options)


@pytest.mark.parametrize(
    ("options", "backward"),
    [({"depth": "kv"}, 6), ({}, 6 + 2), ({"depth": "kv+ffn+attn"}, 6 + 4)],  # of three blocks
    ids=str,
)
def test_tensor_parallel_communication(ranks, options, backward):
    ranks(checks.check_tensor_parallel_communication, options, backward)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("options", [{}, {"depth": "attention"}], ids=str)
def test_fully_sharded(ranks, options, functional):
    ranks(checks.check_fully_sharded, options, functional)


@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
@pytest.mark.parametrize("name", ["DDP", "FSDP", "FSDP-checkpointed"])
def test_two_processes_train_as_one(ranks, name, kind):
    if ranks.backend == "nccl":
        pytest.skip("computes on CPUs")
    ranks(checks.check_data_parallel, name, kind)


@pytest.mark.parametrize("cast", [False, True])
def test_an_embedding_sharded_by_itself(ranks, cast):
    ranks(checks.check_embedding_sharded_by_itself, cast)


@pytest.mark.parametrize("data", [1, 2])
def test_tensor_parallel_and_fully_sharded(ranks, data):
    ranks(checks.check_tensor_parallel, EVERY_OPTION, data)


def test_context_parallel_and_fully_sharded(ranks):
    ranks(checks.check_fully_sharded_context)


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION, {"depth": "residual"}], ids=str)
def test_pipeline(ranks, options, microbatches):
    ranks(checks.check_pipeline, options, microbatches)


def test_context_parallel_recomputes(ranks):
    ranks(checks.check_activation_checkpointing)


def test_context_parallel_saves_no_gathered_keys(ranks):
    ranks(checks.check_context_saves_no_gathered_keys)


@pytest.mark.parametrize("cast", [False, True])
def test_fully_sharded_mixed_precision(ranks, cast):
    ranks(checks.check_mixed_precision, cast)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=str)
def test_stages_in_one_process(options):
    """Three stages, one of which neither takes tokens nor returns logits."""
    config = replace(checks.CONFIG, **options)
    whole, parted = (checks.make_model(config, torch.float64) for _ in range(2))
    tokens = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator())
    x = (tokens,)
    for i in range(3):
        x = PipelineStage(parted, i, i + 1)(*x)
    expected = whole(tokens)
    torch.testing.assert_close(x, expected)
    dlogits = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(x, list(parted.parameters()), dlogits),
        torch.autograd.grad(expected, list(whole.parameters()), dlogits),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "command",
    [
        ["docs/examples/train_parallel.py", "--steps=20", "--tensor=2"],
        ["docs/examples/train_pipeline.py", "--steps=20"],
        ["tests/benchmarks/parallel_step.py", "--depths", "kv+ffn"],
    ],
    ids=lambda command: command[0],
)
def test_scripts(ranks, command):
    if ranks.backend == "nccl" and "benchmarks" in command[0]:
        pytest.skip("full size on GPUs: run it by itself")
    ranks(checks.check_script, *command)


def test_example_under_torchrun(device):
    """As the documentation starts it; on a free port."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    root = checks.ROOT
    script = root / "docs" / "examples" / "train_parallel.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "reference"))
    result = subprocess.run(
        [sys.executable, *launch, str(script), "--context", "2", "--steps", "20"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, last = (float(line.split()[-1]) for line in result.stdout.splitlines())
    assert last < first / 2


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_errors(alone):
    config = checks.CONFIG
    model = checks.make_model(config)
    other = checks.make_model(replace(config, depth="attention"))
    plane = init_device_mesh("cpu", (1, 1))
    context = ContextParallel()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    stream = model.stream(1, 2)
    parts = context.stream(stream, model.stream(1, 2))
    q, k = torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 2, 6)
    for text, call in (
        ("mesh must have one dimension, got 2", lambda: tensor_parallel(model, plane)),
        ("depth = 'attention' cannot be tensor", lambda: tensor_parallel(other, alone)),
        ("depth = 'attention' cannot be a pipe", lambda: PipelineStage(other, 0, 1)),
        ("first = 2 and last = 2 must be a range", lambda: PipelineStage(model, 2, 2)),
        ("x has 5 tokens, which must be a multip", lambda: context.shard(torch.zeros(5), 0)),
        ("stream must be None if context is give", lambda: model(tokens, stream, context=context)),
        ("nothing is written since the last read", lambda: parts.attend(q)),
        ("slots cannot be dropped under context", lambda: parts.keep([])),
        ("causal must be True under context para", lambda: parts.attend(q, k, k, causal=False)),
        ("q and k must have this rank's two chun", lambda: parts.attend(q, k, k)),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
        parts.write(None, k)
    with pytest.raises(TypeError, match="scale must be a number"):
        parts.attend(q, k, k, scale="1")


def test_one_rank_is_the_model(alone):
    checks.check_context_parallel({})
