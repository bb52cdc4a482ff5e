"""Two processes against one: DTensor, tensor, data, context and pipeline parallelism."""

from dataclasses import replace

import pytest
import torch

import distributed_checks as checks
from moda_ops.nn.pipeline import PipelineStage
from ranks import Ranks


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request):
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    group = Ranks(2, request.param)
    yield group
    group.stop()


SHAPE = dict(B=2, T=7, HQ=6, H=2, D=8, L=3, DV=5)


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("axis", ["batch", "tokens", "heads", None])
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("attention", {}),
        ("attention", {"window": 2, "softcap": 3.0}),
        ("attention", {"causal": False}),
        ("depth_attention", {"scale": 0.3}),
        ("chunk_attention", {"chunk_size": 3}),
    ],
)
def test_dtensor(ranks, operator, options, axis, form):
    if operator == "chunk_attention" and axis == "tokens":
        pytest.skip("a chunk's tokens stay together")
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


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("options", [{}, {"depth": "attention"}], ids=str)
def test_fully_sharded(ranks, options, functional):
    ranks(checks.check_fully_sharded, options, functional)


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
