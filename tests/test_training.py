"""Training as users do it: compiled, checkpointed, in bfloat16, in parts, in several threads."""

import copy
import gc
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from helpers import Inputs, plain_attention
from moda_ops import DepthSlots, DepthStream
from moda_ops.nn import MoDAConfig, MoDALanguageModel, compile_blocks, depth_use, generate
from moda_ops.operators import eager

CONFIG = MoDAConfig(vocab_size=31, layers=3, width=24, heads=4, kv_heads=2, head_dim=6, hidden=32)
OPTIONS: list[dict[str, Any]] = [
    dict(depth="kv+ffn"),
    dict(depth="kv+ffn+attn", norm="pre", qk_norm=True, bias=True),
    dict(depth="attention", norm="pre"),
]
LIMIT = torch._dynamo.config.recompile_limit  # of variants of one function
ATTENTION = (torch.ops.moda.attention.default, torch.ops.moda.stream_attention.default)
Kind = type[DepthStream] | type[DepthSlots]
Run = Callable[..., Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo's own
every_stream = pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
every_model = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["depth"])


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(replace(CONFIG, **options)).to(dtype)


def make_tokens(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=generator)


def loss_of(run: Run, tokens: Tensor, kind: Kind) -> Tensor:
    logits = run(tokens, DepthSlots() if kind is DepthSlots else None)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module) -> list[Tensor]:
    """Of every parameter, also of one that is sharded."""
    grads = [x.grad for x in model.parameters() if x.grad is not None]
    return [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in grads]


def results(
    model: nn.Module, kind: Kind, tokens: Tensor | None = None, run: Run | None = None
) -> list[Tensor]:
    """Loss and gradients of one step, through ``run`` or the model itself."""
    model.zero_grad()
    tokens = make_tokens() if tokens is None else tokens
    loss = loss_of(model if run is None else run, tokens, kind)
    loss.backward()
    return [loss.detach(), *gradients(model)]


def train(
    model: nn.Module, kind: Kind, run: Run | None = None, rows: slice = slice(None)
) -> list[Tensor]:
    """Losses and gradients of two steps on ``rows`` of the batches."""
    steps = list[Tensor]()
    for seed in range(2):
        steps += results(model, kind, make_tokens(4, seed=seed)[rows], run)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return steps


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square of every tensor's relative distance."""
    pairs = zip(actual, expected, strict=True)
    relative = [((a.double() - e).norm() / e.norm()).item() for a, e in pairs]
    return (sum(x * x for x in relative) / len(relative)) ** 0.5


def assert_same(actual: list[Tensor], expected: list[Tensor], plain: list[Tensor]) -> None:
    """Twice the error of ``plain``, the same in float32, in units of float64's eps."""
    assert {x.dtype for x in actual} == {torch.float64}
    units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    error, allowed = distance(actual, expected), 2 * units * distance(plain, expected)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    assert all(map(torch.equal, actual, expected)) and len(actual) == len(expected)


# torch.compile


@every_stream
@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: options["depth"])
def test_a_compiled_model_trains_as_in_eager(options: dict[str, Any], kind: Kind) -> None:
    options = options | dict(layers=2)
    model = make_model(**options)
    model.compile(backend="aot_eager", fullgraph=True)
    plain = train(make_model(torch.float32, **options), kind)
    assert_same(train(model, kind), train(make_model(**options), kind), plain)


def test_a_block_through_inductor_trains_as_eager_does() -> None:
    """In float32: the angles of the rotary embedding are, and Inductor rounds them differently."""
    model = make_model(torch.float32, layers=2)
    model.blocks[1].compile(fullgraph=True)
    exact, plain = (
        results(make_model(dtype, layers=2), DepthStream)
        for dtype in (torch.float64, torch.float32)
    )
    assert distance(results(model, DepthStream), exact) <= 2 * distance(plain, exact)


def compiled(model: MoDALanguageModel) -> MoDALanguageModel:
    compile_blocks(model, backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("options", "graphs"),
    # PyTorch compiles for 0 and for 1 written slots, and once for all other numbers. The last block
    # of a MoDA model differs in what it writes.
    [(OPTIONS[0], 3), (OPTIONS[1], 3), (OPTIONS[2], 2), (dict(depth="kv"), 4)],
    ids=lambda x: x["depth"] if isinstance(x, dict) else None,
)
def test_compiled_blocks_share_graphs_and_train_as_in_eager(
    options: dict[str, Any], graphs: int
) -> None:
    options = options | dict(layers=7)
    actual = train(compiled(make_model(**options)), DepthStream)
    assert counters["stats"]["unique_graphs"] == graphs
    exact, plain = (
        train(make_model(dtype, **options), DepthStream) for dtype in (torch.float64, torch.float32)
    )
    assert_same(actual, exact, plain)


def test_compiled_blocks_train_as_in_eager_over_a_list_of_slots() -> None:
    plain = train(make_model(torch.float32), DepthSlots)
    actual = train(compiled(make_model()), DepthSlots)
    assert_same(actual, train(make_model(), DepthSlots), plain)


def test_graphs_of_compiled_blocks_do_not_grow_with_lengths() -> None:
    model, graphs = compiled(make_model(layers=2)), list[int]()
    for length in (11, 13, 17):
        tokens = make_tokens(length=length)
        exact, plain = (
            results(make_model(dtype, layers=2), DepthStream, tokens)
            for dtype in (torch.float64, torch.float32)
        )
        assert_same(results(model, DepthStream, tokens), exact, plain)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2]


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, [3, 6, 6, 6, 9]), (True, [3, 3, 3, 3, 6])])
def test_graphs_of_compiled_blocks_in_training_and_evaluation(
    dynamic: bool | None, graphs: list[int]
) -> None:
    """First, middle and last block, times the second length, and times evaluation: no more."""
    model, seen = make_model(torch.float32, layers=3), list[int]()
    compile_blocks(model, backend="eager", dynamic=dynamic)
    plain = copy.deepcopy(model)
    assert all(block._compiled_call_impl is None for block in plain.blocks)
    for length in (11, 13, 17, 31):
        tokens = make_tokens(length=length)
        loss_of(model, tokens, DepthStream).backward()
        seen.append(counters["stats"]["unique_graphs"])
    with torch.no_grad():
        for length in (31, 11, 13, 17):
            tokens = make_tokens(length=length)
            torch.testing.assert_close(model(tokens), plain(tokens))
    assert [*seen, counters["stats"]["unique_graphs"]] == graphs


def test_blocks_of_a_bounded_model_stay_below_the_recompile_limit() -> None:
    model = make_model(torch.float32, layers=5, depth="kv")
    bounded = MoDALanguageModel(model.config.bounded(2))
    bounded.load_state_dict(model.state_dict())
    plain = copy.deepcopy(bounded)
    compile_blocks(bounded, backend="eager")
    for length in (11, 13, 17):
        tokens = make_tokens(length=length)
        logits = bounded(tokens)
        torch.testing.assert_close(logits, plain(tokens))
        logits.sum().backward()
        with torch.no_grad():
            bounded(tokens)


def test_compiled_blocks_serve_what_is_done_with_a_model() -> None:
    """Streams that grow with the layers make no variants; over a list a block has its own graph."""
    model, tokens = make_model(torch.float32, layers=LIMIT + 1), make_tokens()
    plain = copy.deepcopy(model)
    compile_blocks(model, backend="eager")
    for length in (9, 5, 12):
        loss_of(model, make_tokens(length=length), DepthStream).backward()
    prompts = [[1, 2, 3], [4, 5]]
    ours, theirs = (generate(x, prompts, 4) for x in (model, plain))
    assert all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(
        *(tree_leaves(depth_use(x, tokens)) for x in (model, plain)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(model(tokens, DepthSlots()), plain(tokens, DepthSlots()))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens))


def test_each_compiled_model_has_its_own_variants() -> None:
    for _ in range(LIMIT // 2 + 1):  # each with two variants of a block
        model = make_model(torch.float32, layers=2)
        compile_blocks(model, backend="eager")
        model(make_tokens()).sum().backward()
        with torch.no_grad():
            model(make_tokens())


def test_a_bounded_compiled_model_is_evaluated() -> None:
    config = make_model(torch.float32, layers=LIMIT + 4, depth="kv").config
    model = MoDALanguageModel(config.bounded(LIMIT + 1))
    plain = copy.deepcopy(model)
    compile_blocks(model, backend="eager")
    model(make_tokens()).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(make_tokens()), plain(make_tokens()))


def test_a_stream_must_be_empty() -> None:
    model = make_model(torch.float32, layers=2)
    H, D = model.kv_heads, model.config.head_dim
    x = torch.randn(*make_tokens().shape, H, D)
    with pytest.raises(ValueError, match="stream must be empty before the first block"):
        model(make_tokens(), DepthSlots().write(x, x))


def test_compiled_inference_before_training() -> None:
    model, tokens = make_model(layers=2), make_tokens()
    model.compile(backend="aot_eager", fullgraph=True)
    expected, plain = (
        results(make_model(d, layers=2), DepthStream) for d in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        loss = loss_of(model, tokens, DepthStream)
    assert_same([loss, *results(model, DepthStream)], [expected[0], *expected], [plain[0], *plain])


# Activation checkpointing


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = dict(context_fn=partial(create_selective_checkpoint_contexts, save_attention))


def checkpoint_blocks(model: MoDALanguageModel, **options: Any) -> MoDALanguageModel:
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


class Storages(TorchDispatchMode):
    """The storages of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict[StorageWeakRef, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.bytes[StorageWeakRef(storage)] = storage.nbytes()
        return result


def bytes_after_forward(model: MoDALanguageModel, kind: Kind) -> int:
    """What a loss keeps alive beside the model."""
    with Storages() as storages:
        loss = loss_of(model, make_tokens(), kind)
    gc.collect()
    own = {StorageWeakRef(x.untyped_storage()) for x in model.parameters()}
    alive = [n for x, n in storages.bytes.items() if not x.expired() and x not in own]
    assert loss.requires_grad
    return sum(alive)


@every_stream
@every_model
@pytest.mark.parametrize("context", [{}, SELECTIVE], ids=["full", "selective"])
def test_checkpointed_blocks_give_the_same(
    context: dict[str, Any], options: dict[str, Any], kind: Kind
) -> None:
    model = checkpoint_blocks(make_model(**options), **context)
    assert_equal(train(model, kind), train(make_model(**options), kind))


@every_stream
@pytest.mark.parametrize("context", [{}, SELECTIVE], ids=["full", "selective"])
def test_a_checkpointed_model_gives_the_same(context: dict[str, Any], kind: Kind) -> None:
    model = make_model()
    run = partial(checkpoint, model, use_reentrant=False, **context)
    assert_equal(results(model, kind, run=run), results(make_model(), kind))


@every_stream
def test_checkpointed_blocks_save_less(kind: Kind) -> None:
    def saved(layers: int, **context: Any) -> int:
        model = make_model(layers=layers)
        return bytes_after_forward(checkpoint_blocks(model, **context), kind)

    full, selective = ([saved(n, **context) for n in (4, 8)] for context in ({}, SELECTIVE))
    plain = bytes_after_forward(make_model(layers=4), kind)
    assert full[0] < selective[0] < plain
    # Per layer its input, its two slots, and the one number of a token.
    numbers = make_tokens().numel() * (CONFIG.width + 2 * 2 * CONFIG.kv_width)
    numbers += kind is DepthStream
    assert full[1] - full[0] == 4 * numbers * torch.float64.itemsize


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one number whenever attention runs forward."""
    attention, calls = eager.attention, list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return attention(*args, **options)

    monkeypatch.setattr(eager, "attention", counted)
    return calls


@every_stream
@pytest.mark.parametrize(("context", "times"), [({}, 2), (SELECTIVE, 1)], ids=["full", "selective"])
def test_selective_checkpointing_runs_attention_once(
    context: dict[str, Any], times: int, kind: Kind, attention_calls: list[int]
) -> None:
    results(checkpoint_blocks(make_model(), **context), kind)
    assert len(attention_calls) == CONFIG.layers * times


@every_stream
def test_compiled_with_checkpointed_blocks(kind: Kind, attention_calls: list[int]) -> None:
    """The same results; less is saved; attention runs twice, but once under the policy."""
    exact, plain = (results(make_model(d, layers=2), kind) for d in (torch.float64, torch.float32))
    saved, calls = list[int](), list[int]()
    for context in (None, SELECTIVE, {}):
        model, storages = make_model(layers=2), dict[int, torch.UntypedStorage]()
        if context is not None:
            checkpoint_blocks(model, **context)
        model.compile(backend="aot_eager", fullgraph=True)

        def pack(tensor: Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        attention_calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            actual = results(model, kind)
        assert_same(actual, exact, plain)
        saved.append(sum(storage.nbytes() for storage in storages.values()))
        calls.append(len(attention_calls))
    assert saved[0] > saved[1] > saved[2]
    assert calls == [2, 2, 4]


@pytest.mark.parametrize("context", [{}, SELECTIVE], ids=["full", "selective"])
def test_checkpointed_compiled_blocks_give_the_same(context: dict[str, Any]) -> None:
    model = make_model()
    for block in model.blocks:
        compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        block.forward = partial(checkpoint, compiled, use_reentrant=False, **context)
    plain = train(make_model(torch.float32), DepthStream)
    assert_same(train(model, DepthStream), train(make_model(), DepthStream), plain)


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model_in_one_selective_checkpoint(inside: bool) -> None:
    """There the compiler would recompute the buffer and, attention being saved, not the writes."""
    model, tokens = make_model(), make_tokens()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(tokens: Tensor, stream: DepthStream | None) -> Tensor:
        return checkpoint(model, tokens, stream, use_reentrant=False, **SELECTIVE)

    def run(tokens: Tensor, _: None) -> Tensor:
        return compiled(tokens, None if inside else model.stream(*tokens.shape))

    if inside:
        with pytest.raises(RuntimeError, match="allocate the DepthStream outside of the compiled"):
            results(model, DepthStream, run=run)
    else:
        exact, plain = (results(make_model(d), DepthStream) for d in (torch.float64, torch.float32))
        assert_same(results(model, DepthStream, tokens, run), exact, plain)


# bfloat16


@every_stream
@every_model
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_accurate_as_plain_attention_in_it(
    autocast: bool, options: dict[str, Any], kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(torch.float32 if autocast else torch.bfloat16, **options)
    exact, streams = results(copy.deepcopy(model).double(), kind), list[Any]()

    def run(*args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(*args)

    def plain_slots(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_depth: list[Tensor],
        v_depth: list[Tensor],
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        out, lse = plain_attention(Inputs(q, k, v, k_depth, v_depth), **options)
        return (out, lse) if return_lse else out

    model.blocks[-1].register_forward_hook(lambda *args: streams.append(args[-1][1]))
    actual = results(model, kind, run=run)
    tensors = [x for x in tree_leaves(streams) if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in tensors} == {torch.bfloat16}
    assert {x.dtype for x in actual[1:]} == {model.embedding.weight.dtype}

    def plain_depth(q: Tensor, k: list[Tensor], v: list[Tensor], **options: Any) -> Tensor:
        out: Tensor = plain_slots(q, k[0][:, :0], v[0][:, :0], k, v, **options)
        return out

    monkeypatch.setattr("moda_ops.stream.depth_slots.moda_attention", plain_slots)
    monkeypatch.setattr("moda_ops.stream.depth_slots.moda_depth_attention", plain_depth)
    plain = results(model, DepthSlots, run=run)
    assert distance(actual, exact) <= 2 * distance(plain, exact)


@every_stream
def test_bfloat16_autocast_trains(kind: Kind) -> None:
    model, losses = make_model(torch.float32), list[float]()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, make_tokens(), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


# Steps in parts


@every_stream
@every_model
@pytest.mark.parametrize("in_turns", [True, False])
def test_gradients_add_up_over_micro_batches(
    in_turns: bool, options: dict[str, Any], kind: Kind
) -> None:
    tokens, model = make_tokens(6), make_model(**options)
    exact, plain = (
        results(make_model(dtype, **options), kind, tokens)
        for dtype in (torch.float64, torch.float32)
    )
    losses = (loss_of(model, part, kind) / 3 for part in tokens.chunk(3))
    for loss in losses if in_turns else list(losses):
        loss.backward()
    assert_same(gradients(model), exact[1:], plain[1:])


@every_stream
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("last_first", [False, True])
def test_models_that_take_turns_do_not_meet(
    last_first: bool, checkpointed: bool, kind: Kind
) -> None:
    models = [make_model(**options) for options in OPTIONS]
    if checkpointed:
        models = [checkpoint_blocks(model) for model in models]
    for step in range(2):
        tokens = [make_tokens(seed=seed) for seed in range(step, step + 3)]
        losses = [loss_of(model, x, kind) for model, x in zip(models, tokens, strict=True)]
        for loss in reversed(losses) if last_first else losses:
            loss.backward()
        for model, loss, x, options in zip(models, losses, tokens, OPTIONS, strict=True):
            actual = [loss.detach(), *gradients(model)]
            assert_equal(actual, results(make_model(**options), kind, x))
            model.zero_grad()


@every_stream
def test_blocks_of_two_models_take_turns(kind: Kind) -> None:
    """As in a pipeline: two forward passes within one another."""
    models, tokens = [make_model(), make_model(norm="pre")], make_tokens()
    expected = [results(model, kind, tokens) for model in models]
    rotary = models[0].rotary(tokens.shape[1])
    states = [
        (m.embedding(tokens), DepthSlots() if kind is DepthSlots else m.stream(*tokens.shape))
        for m in models
    ]
    for blocks in zip(*(model.blocks for model in models), strict=True):
        states = [
            block(x, rotary, stream) for block, (x, stream) in zip(blocks, states, strict=True)
        ]
    for model, (x, _), (loss, *grads) in zip(models, states, expected, strict=True):
        model.zero_grad()
        logits = F.linear(model.norm(x), model.embedding.weight)
        actual = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        actual.backward()
        assert_equal([actual.detach(), *gradients(model)], [loss, *grads])


@every_stream
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_second_backward_doubles_the_gradients(checkpointed: bool, kind: Kind) -> None:
    model = make_model()
    once = results(model, kind)[1:]
    if checkpointed:
        checkpoint_blocks(model)
    model.zero_grad()
    loss = loss_of(model, make_tokens(), kind)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_equal(gradients(model), [2 * x for x in once])


def fail(*args: Any) -> None:
    raise ArithmeticError


def fail_in_forward(model: MoDALanguageModel, loss: Callable[[], Tensor]) -> None:
    hook = model.blocks[1].feed_forward.register_forward_pre_hook(fail)
    try:
        loss()
    finally:
        hook.remove()


def fail_in_loss(model: MoDALanguageModel, loss: Callable[[], Tensor]) -> None:
    fail(loss())


def fail_in_backward(model: MoDALanguageModel, loss: Callable[[], Tensor]) -> None:
    """Between the second block's gradient and the first's."""

    def watch(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        output[0].register_hook(fail)

    hook = model.blocks[0].register_forward_hook(watch)
    try:
        loss().backward()
    finally:
        hook.remove()


@every_stream
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("place", [fail_in_forward, fail_in_loss, fail_in_backward])
def test_a_failed_step_leaves_nothing_behind(
    place: Callable[..., None], checkpointed: bool, kind: Kind
) -> None:
    model = checkpoint_blocks(make_model()) if checkpointed else make_model()
    with pytest.raises(ArithmeticError):
        place(model, lambda: loss_of(model, make_tokens(seed=1), kind))
    assert_equal(train(model, kind), train(make_model(), kind))


@every_stream
@every_model
@pytest.mark.parametrize("checkpointed", [False, True])
def test_frozen_parameters_change_no_other_gradient(
    checkpointed: bool, options: dict[str, Any], kind: Kind
) -> None:
    model = make_model(**options)
    results(model, kind)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for frozen in (
        ["embedding"],
        ["embedding", "blocks.0"],  # its slots need no gradient
        ["blocks.1"],
        ["blocks.2"],
        ["_write"],
        ["attention."],
    ):
        model = make_model(**options)
        if checkpointed:
            checkpoint_blocks(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        results(model, kind)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, expected[name]), (frozen, name)


# Inference, copies and files


@every_stream
@every_model
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_what_training_does(
    mode: Callable[[], AbstractContextManager[None]], options: dict[str, Any], kind: Kind
) -> None:
    model = make_model(**options)
    with mode():
        loss = loss_of(model, make_tokens(), kind)
    assert not loss.requires_grad
    expected = results(make_model(**options), kind)
    assert_equal([loss, *results(model, kind)], [expected[0], *expected])


def pickled(model: MoDALanguageModel) -> MoDALanguageModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_stream
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_and_its_original_train(
    copied: Callable[[MoDALanguageModel], MoDALanguageModel], kind: Kind
) -> None:
    model = make_model()
    results(model, kind)
    twin = copied(model)
    expected = train(make_model(), kind)
    assert_equal(train(twin, kind), expected)
    assert_equal(train(model, kind), expected)


@every_model
def test_safetensors(options: dict[str, Any], tmp_path: Path) -> None:
    """The embedding is the output layer too, and is one tensor of the file."""
    model, file = make_model(**options), tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    weights = safetensors.torch.load_file(file)
    assert sum(x.numel() for x in weights.values()) == model.num_parameters()
    loaded = MoDALanguageModel(model.config).double()
    loaded.load_state_dict(weights)
    assert_equal(results(loaded, DepthStream), results(model, DepthStream))
    safetensors.torch.save_model(model, str(file))
    loaded.reset_parameters()
    assert safetensors.torch.load_model(loaded, file) == (set(), [])
    assert_equal(results(loaded, DepthStream), results(model, DepthStream))


@every_stream
def test_training_resumes_from_a_file(kind: Kind) -> None:
    def step(model: MoDALanguageModel, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        loss_and_gradients = results(model, kind)
        optimizer.step()
        return loss_and_gradients

    model, file = make_model(), io.BytesIO()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed = MoDALanguageModel(CONFIG).double()
    resumed_optimizer = torch.optim.AdamW(resumed.parameters())
    for part, state in zip((resumed, resumed_optimizer), torch.load(file), strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        assert_equal(step(resumed, resumed_optimizer), step(model, optimizer))


# Several threads; for several processes see test_distributed.py


@every_stream
def test_threads_train_as_alone(kind: Kind) -> None:
    models = [make_model() for _ in range(4)]
    with ThreadPoolExecutor(len(models)) as pool:
        steps = list(pool.map(lambda model: train(model, kind), models))
    for step in steps:
        assert_equal(step, train(make_model(), kind))


def test_threads_allocate_streams() -> None:
    def allocate(_: int) -> None:
        for _ in range(300):
            streams = [DepthStream.allocate(1, 1, 1, 1, 1) for _ in range(10)]
            assert {stream.slots for stream in streams} == {1}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(allocate, range(4)))
    finally:
        sys.setswitchinterval(interval)
