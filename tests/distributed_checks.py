"""What every rank runs in ``test_distributed.py``: a sharded computation against a whole one."""

import contextlib
import importlib
import io
import pathlib
import sys
import warnings
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moda_ops.distributed  # noqa: F401
from helpers import (
    Inputs,
    assert_accurate,
    assert_matches_reference,
    make_cotangents,
    make_inputs,
)
from moda_ops import (
    DepthSlots,
    moda_attention,
    moda_attention_varlen,
    moda_chunk_attention,
    moda_depth_attention,
)
from moda_ops.nn import MoDAConfig, MoDALanguageModel
from moda_ops.nn.context_parallel import ContextParallel
from moda_ops.nn.pipeline import PipelineStage
from moda_ops.nn.tensor_parallel import tensor_parallel


def device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh(device().type, sizes, mesh_dim_names=names)


# DTensor: each axis by the place of its size in (batch, tokens, heads)

AXES = {"batch": Shard(0), "tokens": Shard(1), "heads": Shard(2)}
OPERATORS = {
    "attention": moda_attention,
    "chunk_attention": moda_chunk_attention,
    "depth_attention": lambda q, k, v, *depth, **options: moda_depth_attention(
        q, *depth, **options
    ),
}


def check_dtensor(
    operator: str,
    axes: list[str | None],
    options: dict[str, Any],
    shape: dict[str, Any],
    keys: str | None = None,
) -> None:
    """``axes`` shard q and depth, one for each dimension of a mesh; ``keys`` shards k and v."""
    mesh = mesh_of(*([1] * (len(axes) - 1) + [dist.get_world_size()]))
    where = [Replicate() if axis is None else AXES[axis] for axis in axes]
    elsewhere = where if keys is None else [*where[:-1], AXES[keys]]
    inputs = make_inputs(**shape, device=device())

    def place(name: str, x: Tensor) -> DTensor:
        placements = elsewhere if name in ("k", "v") else where
        if x.dim() == 5:  # packed
            placements = [Shard(3) if p == Shard(2) else p for p in placements]
        return distribute_tensor(x.detach(), mesh, placements).requires_grad_()

    def run(inputs: Inputs, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Inputs]:
        q, k, v = (place(name, x) for name, x in zip("qkv", inputs[:3], strict=True))
        depth = [[place("depth", x) for x in slots] for slots in inputs[3:]]
        leaves = Inputs(q, k, v, *depth)
        packed = [x[0] if shape.get("form") == "packed" else x for x in depth]
        out, lse = OPERATORS[operator](q, k, v, *packed, return_lse=True, **options)
        assert out.placements == tuple(where)
        grads = torch.autograd.grad(
            [out, lse],
            leaves.leaves(),
            [distribute_tensor(x, mesh, [Replicate()] * mesh.ndim) for x in (dout, dlse)],
            materialize_grads=True,
            allow_unused=True,
        )
        for grad, leaf in zip(grads, leaves.leaves(), strict=True):
            assert grad.placements == leaf.placements
        whole = iter([x.full_tensor() for x in grads])
        return out.full_tensor(), lse.full_tensor(), inputs.map(lambda x: next(whole))

    if operator == "depth_attention":
        inputs = inputs._replace(k=inputs.k[:, :0], v=inputs.v[:, :0])
        options = options | {"causal": False}
        specified = options
        options = {name: x for name, x in options.items() if name != "causal"}
    else:
        specified = options
    assert_matches_reference(inputs, run, make_cotangents(inputs), **specified)


def check_packed_documents() -> None:
    mesh, T = mesh_of(dist.get_world_size()), 9
    lengths = torch.tensor([0, T, T], dtype=torch.int32, device=device())  # the second is empty

    def run(inputs: Inputs, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Inputs]:
        parts = inputs.map(lambda x: distribute_tensor(x[0], mesh, [Shard(1)]).requires_grad_())
        out, lse = moda_attention_varlen(*parts, lengths, lengths, return_lse=True)
        assert out.placements == (Shard(1),) and lse.placements == (Shard(0),)
        cotangents = [distribute_tensor(x[0], mesh, [Replicate()]) for x in (dout, dlse)]
        grads = torch.autograd.grad([out, lse], parts.leaves(), cotangents)
        whole = iter([x.full_tensor()[None] for x in (out, lse, *grads)])
        return next(whole), next(whole), inputs.map(lambda x: next(whole))

    assert_matches_reference(make_inputs(1, T, 6, 2, 8, 3, device=device()), run)


def check_communication(axis: str, operator: str, forward: dict[str, int], both: dict[str, int]):
    mesh = mesh_of(dist.get_world_size())
    inputs = make_inputs(2, 8, 4, 2, 8, 3, device=device())
    leaves = inputs.map(lambda x: distribute_tensor(x, mesh, [AXES[axis]]).requires_grad_())
    with CommDebugMode() as seen:
        out = OPERATORS[operator](*leaves)
        assert counts(seen) == forward
        dout = distribute_tensor(torch.ones(out.shape, device=device()), mesh, out.placements)
    with CommDebugMode() as seen_backward:
        used = leaves.leaves() if operator == "attention" else [leaves.q, *leaves.leaves()[3:]]
        torch.autograd.grad(out, used, dout)
    assert counts(seen_backward) == both


def counts(seen: CommDebugMode) -> dict[str, int]:
    return {op.__name__: n for op, n in seen.get_comm_counts().items() if n}


def check_saved_tensors_are_shards() -> None:
    mesh, T = mesh_of(dist.get_world_size()), 8
    leaves = make_inputs(1, T, 4, 2, 16, 2, device=device()).map(
        lambda x: distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        moda_attention(*leaves)
    local = [x.to_local() if isinstance(x, DTensor) else x for x in saved]
    assert len(local) == len(leaves.leaves()) + 2
    assert all(T not in x.shape for x in local[:-1]), [x.shape for x in local]


def check_compiled(axis: str, dynamic: bool, lengths: list[int]) -> None:
    mesh = mesh_of(dist.get_world_size())
    torch._dynamo.reset()
    compiled = torch.compile(moda_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in lengths:
        whole = make_inputs(2, T, 4, 2, 8, 2, device=device())
        leaves = whole.map(lambda x: distribute_tensor(x, mesh, [AXES[axis]]).requires_grad_())
        results = []
        for function in (moda_attention, compiled):
            out = function(*leaves)
            dout = torch.ones_like(out)
            results.append([out, *torch.autograd.grad(out, leaves.leaves(), dout)])
        for a, b in zip(*results, strict=True):
            assert a.placements == b.placements
            assert torch.equal(a.full_tensor(), b.full_tensor())


def check_dtensor_errors() -> None:
    size = dist.get_world_size()
    mesh, plane = mesh_of(size), mesh_of(1, size)
    q, k, v, k_depth, v_depth = make_inputs(1, 4, 6, 3, 8, 1, device=device())

    def raises(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=text):
            moda_attention(*args, **options)

    sharded, whole = (
        [distribute_tensor(x, mesh, [p]) for x in (q, k, v)] for p in (Shard(2), Shard(1))
    )
    raises(ValueError, "must divide the key/value heads H = 3", *sharded)
    raises(TypeError, "k must be a DTensor", whole[0], k, v)
    raises(TypeError, "q must be a DTensor", q, *whole[1:])
    raises(TypeError, r"k_depth must be a DTensor", *whole, k_depth, v_depth)
    raises(ValueError, "cannot be sharded over tokens", *whole, causal=False, window=1)
    twice = [distribute_tensor(x, plane, [Shard(1), Shard(1)]) for x in (q, k, v)]
    raises(ValueError, "by one mesh dimension", *twice)


# Language models: the gradients of a step

CONFIG = MoDAConfig(vocab_size=60, layers=3, width=36, heads=6, kv_heads=2, head_dim=6, hidden=50)
BATCH, TOKENS = 4, 16
ROUNDINGS = 4


def make_model(config: MoDAConfig, dtype: torch.dtype = torch.float32) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(config).to(dtype)


def make_text() -> tuple[Tensor, Tensor]:
    """Tokens and targets."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(CONFIG.vocab_size, (BATCH, TOKENS + 1), generator=generator)
    return text[:, :-1].contiguous().to(device()), text[:, 1:].to(device())


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(model: MoDALanguageModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@cache
def whole_step(config: MoDAConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Gradients in float64, what one process makes of them in float32, and what rounding every
    parameter once changes."""

    def step(model: MoDALanguageModel) -> dict[str, Tensor]:
        tokens, targets = (x.to(model.embedding.weight.device) for x in make_text())
        loss_of(model(tokens), targets).backward()
        return gradients(model)

    exact, plain = step(make_model(config, torch.float64)), step(make_model(config).to(device()))
    floor = dict.fromkeys(exact, 0.0)
    for seed in range(ROUNDINGS):
        model = make_model(config, torch.float64)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + torch.finfo(torch.float32).eps * (torch.randint_like(p, 2) * 2 - 1)
        for name, x in step(model).items():
            floor[name] = max(floor[name], (x - exact[name]).abs().max().item())
    return exact, plain, floor


def assert_same_step(config: MoDAConfig, grads: dict[str, Tensor]) -> None:
    exact, plain, floor = whole_step(config)
    for name, x in grads.items():
        x = x.full_tensor() if isinstance(x, DTensor) else x
        assert_accurate(name, x, exact[name], plain[name], floor[name])
    assert grads.keys() == exact.keys()


def average(model: MoDALanguageModel) -> dict[str, Tensor]:
    """Gradients as data parallelism averages them."""
    for x in gradients(model).values():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return gradients(model)


def check_context_parallel(options: dict[str, Any]) -> None:
    config = replace(CONFIG, **options)
    model, context = make_model(config).to(device()), ContextParallel()
    tokens, targets = (context.shard(x, 1) for x in make_text())
    loss_of(model(tokens, context=context), targets).backward()
    assert_same_step(config, average(model))


def check_context_parallel_order() -> None:
    """A rank's tokens are those that PyTorch's own context parallelism gives it."""
    context, whole = ContextParallel(), torch.arange(BATCH * TOKENS, device=device())
    whole = whole.view(BATCH, TOKENS)
    buffer = whole.clone()
    with context_parallel(mesh_of(context.size), buffers=[buffer], buffer_seq_dims=[1]):
        assert torch.equal(context.shard(whole, 1), buffer)
    assert torch.equal(context.gather(context.shard(whole, 1), 1), whole)
    assert torch.equal(context.scatter_sum(whole, 1), context.size * context.shard(whole, 1))
    assert torch.equal(
        context.positions(TOKENS // context.size, device()), context.shard(whole, 1)[0]
    )


def check_tensor_parallel(options: dict[str, Any], data: int | None = None) -> None:
    """With ``data``, on a mesh of so many by the rest, and blocks sharded over the first."""
    config = replace(CONFIG, **options)
    model, (tokens, targets) = make_model(config).to(device()), make_text()
    ranks = dist.get_world_size()
    mesh = mesh_of(data or 1, ranks // (data or 1), names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    if data is not None:
        shard_blocks(model, mesh=mesh["data"])
        tokens, targets = (x.chunk(data)[mesh.get_local_rank("data")] for x in (tokens, targets))
    with loss_parallel():
        loss_of(model(tokens), targets).backward()
    assert_same_step(config, gradients(model))


def check_tensor_parallel_communication(options: dict[str, Any], backward: int) -> None:
    """Sums over the ranks: two per block in forward, ``backward`` in all in backward."""
    config = replace(CONFIG, **options)
    model, tokens = make_model(config).to(device()), make_text()[0]
    tensor_parallel(model, mesh_of(dist.get_world_size()))
    with CommDebugMode() as seen:
        # Its module hooks cannot follow the embedding, which is called twice.
        seen.advanced_module_tracker._fw_pre_handle.remove()
        seen.advanced_module_tracker._fw_post_handle.remove()
        logits = model(tokens)
    assert counts(seen) == {"all_reduce": 1 + 2 * config.layers}  # one for the embedding
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # that of CommDebugMode
    with CommDebugMode() as seen:
        logits.backward(torch.ones_like(logits))
    assert counts(seen) == {"all_reduce": 1 + backward}  # one for the output layer


def shard_blocks(model: MoDALanguageModel, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # unchanged


def check_fully_sharded(options: dict[str, Any], functional: bool) -> None:
    config = replace(CONFIG, **options)
    model, ranks = make_model(config).to(device()), dist.get_world_size()
    shard_blocks(model, mesh=mesh_of(ranks))
    tokens, targets = (x.chunk(ranks)[dist.get_rank()] for x in make_text())
    loss_of(model(tokens, DepthSlots() if functional else None), targets).backward()
    assert_same_step(config, gradients(model))


def check_data_parallel(name: str, kind: type) -> None:
    """Half of every batch on each of two ranks: its own losses, and one process's gradients."""
    from test_training import assert_same, checkpoint_blocks, make_model, train

    model = make_model(torch.float64)
    if name == "DDP":
        model = DistributedDataParallel(model)
    else:
        if name == "FSDP-checkpointed":
            checkpoint_blocks(model)
        shard_blocks(model, mesh=mesh_of(2))
    mine = train(model, kind, rows=slice(dist.get_rank(), None, 2))
    both = [torch.stack([x, x]) for x in mine]
    for pair, x in zip(both, mine, strict=True):
        dist.all_gather(list(pair.unbind()), x)
    own = sum(not torch.equal(*pair) for pair in both)
    assert own == 2, "each process has its own two losses, and the same gradients"
    exact, plain = (train(make_model(dtype), kind) for dtype in (torch.float64, torch.float32))
    assert_same([pair.mean(0) for pair in both], exact, plain)


def check_embedding_sharded_by_itself(cast: bool) -> None:
    """FSDP2 has the embedding's weight in place for both of its calls, in training and without.

    Outside of them the weight is this rank's shard, in another dtype if ``cast``.
    """
    config, ranks = CONFIG, dist.get_world_size()
    dtype = torch.bfloat16 if cast else torch.float32
    options = dict(
        mesh=mesh_of(ranks),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False),
    )
    model = make_model(config).to(device())
    fully_shard(model.embedding, **options)
    shard_blocks(model, **options)
    tokens, targets = (x.chunk(ranks)[dist.get_rank()] for x in make_text())
    whole = make_model(config).to(device(), dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), whole(tokens))
    logits = model(tokens)
    torch.testing.assert_close(logits, whole(tokens))
    loss_of(logits.float(), targets).backward()
    if not cast:
        assert_same_step(config, gradients(model))


def check_fully_sharded_context() -> None:
    """Tokens and parameters sharded over the same ranks."""
    model, context = make_model(CONFIG).to(device()), ContextParallel()
    shard_blocks(model, mesh=mesh_of(context.size))
    tokens, targets = (context.shard(x, 1) for x in make_text())
    loss_of(model(tokens, context=context), targets).backward()
    assert_same_step(CONFIG, gradients(model))


def check_pipeline(options: dict[str, Any], microbatches: int) -> None:
    """Two stages that PyTorch's engine runs, the output layer's weight in both."""
    config = replace(CONFIG, **options)
    model, rank = make_model(config).to(device()), dist.get_rank()
    part = PipelineStage(model, *[(0, 2), (2, 3)][rank])
    stage = pipelining.PipelineStage(part, rank, 2, device())
    schedule = pipelining.Schedule1F1B(stage, microbatches, loss_fn=loss_of)
    tokens, targets = make_text()
    schedule.step(*((tokens,) if rank == 0 else ()), target=targets if rank == 1 else None)
    dist.all_reduce(part.embedding.weight.grad)
    exact, plain, floor = whole_step(config)
    mine = [("blocks.0.", "blocks.1.", "embedding."), ("blocks.2.", "embedding.", "norm.")][rank]
    grads = {name: p.grad for name, p in part.named_parameters()}
    assert grads.keys() == {name for name in exact if name.startswith(mine)}
    for name, x in grads.items():
        assert_accurate(name, x, exact[name], plain[name], floor[name])


def check_activation_checkpointing() -> None:
    """A recomputed block gathers its keys again, and writes its slots again."""
    model, context = make_model(CONFIG).to(device()), ContextParallel()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    tokens, targets = (context.shard(x, 1) for x in make_text())
    loss_of(model(tokens, context=context), targets).backward()
    grads = {
        name.replace("_checkpoint_wrapped_module.", ""): x for name, x in average(model).items()
    }
    assert_same_step(CONFIG, grads)


def check_context_saves_no_gathered_keys() -> None:
    """Of sequence keys, a layer saves its rank's own: a shorter sequence on fewer ranks saves as
    much."""
    sizes = []
    context = ContextParallel()
    for tokens, options in ((TOKENS, {"context": context}), (TOKENS // context.size, {})):
        model, saved = make_model(CONFIG).to(device()), {}

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        part = make_text()[0][:, : tokens // (context.size if options else 1)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = model(part, **options)
        sizes.append(sum(saved.values()))
        del logits
    H, D, layers = CONFIG.kv_heads, CONFIG.head_dim, CONFIG.layers
    own = BATCH * TOKENS // context.size * H * 2 * D * 4  # bytes of a layer's keys and values
    assert sizes[0] <= sizes[1] + layers * own * 1.5, sizes


def check_mixed_precision(cast: bool) -> None:
    """The stream takes the dtype that blocks compute in, and running gradients keep theirs."""
    model, ranks = make_model(CONFIG).to(device()), dist.get_world_size()
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=cast
    )
    shard_blocks(model, mesh=mesh_of(ranks), mp_policy=policy)
    tokens, targets = (x.chunk(ranks)[dist.get_rank()] for x in make_text())
    loss_of(model(tokens).float(), targets).backward()
    exact, _, _ = whole_step(CONFIG)
    half = make_model(CONFIG).to(device(), torch.bfloat16)
    loss_of(half(make_text()[0]).float(), make_text()[1]).backward()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        e = exact[name].to(device())
        error, plain = (
            (x.double() - e).norm() for x in (p.grad.full_tensor(), half.get_parameter(name).grad)
        )
        assert error <= 2 * plain, (name, error, plain)


ROOT = pathlib.Path(__file__).parents[1]


def check_script(path: str, *arguments: str) -> None:
    """The script's ``main`` in the processes that there are."""
    sys.path.insert(0, str((ROOT / path).parent))
    script = importlib.import_module(pathlib.Path(path).stem)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    with (
        mock.patch.object(script, "start", device),
        mock.patch.object(torch.cuda, "is_available", return_value=device().type == "cuda"),
        mock.patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        script.main(list(arguments))
    losses = [float(line.split()[-1]) for line in printed.getvalue().splitlines() if "loss" in line]
    assert all(b < a / 2 for a, b in pairwise(losses)), losses
