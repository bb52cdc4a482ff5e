"""Generation: the full forward's logits token by token, no depth kept, draws, stops."""

import builtins
import gc
import math
import sys
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

from helpers import assert_accurate
from moda_ops.nn import (
    CachedStream,
    Depth,
    KVCache,
    MoDAConfig,
    MoDALanguageModel,
    Norm,
    decode_step,
    generate,
    generation,
    prefill,
    token_probabilities,
)

CONFIG = MoDAConfig(vocab_size=61, layers=3, width=36, heads=6, kv_heads=2, head_dim=6, hidden=50)
every_depth = pytest.mark.parametrize("depth", get_args(Depth))
every_norm = pytest.mark.parametrize("norm", get_args(Norm))


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> MoDALanguageModel:
    torch.manual_seed(0)
    model = MoDALanguageModel(replace(CONFIG, **options))
    with torch.no_grad():
        model.embedding.weight *= 20  # logits of size 1, and no ties among the largest
    return model.to(dtype)


def make_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, shape, generator=generator)


def make_prompts(*lengths: int) -> list[Tensor]:
    return [make_tokens(n, seed=n) for n in lengths]


def cache_of(model: MoDALanguageModel, batch: int, capacity: int) -> KVCache:
    weight = model.embedding.weight
    options = dict(dtype=weight.dtype, device=weight.device)
    return KVCache.allocate(model.config, batch, capacity, **options)


def served_logits(
    model: MoDALanguageModel, texts: Tensor, lengths: Tensor, chunk: int
) -> list[Tensor]:
    """After prompts of these lengths, and after each further token of the texts."""
    prompts = texts[:, : int(lengths.max())]
    steps = texts.shape[1] - prompts.shape[1]
    kv = cache_of(model, len(texts), texts.shape[1])
    batch = torch.arange(len(texts), device=texts.device)
    logits = [prefill(model, prompts, lengths, kv, chunk=chunk)]
    for _ in range(steps):
        logits.append(decode_step(model, texts[batch, kv.lengths.long()], kv))
    assert torch.equal(kv.lengths, lengths + steps)
    return logits


@torch.no_grad()
def greedy_loop(model: MoDALanguageModel, prompt: Tensor, steps: int) -> Tensor:
    text = prompt
    for _ in range(steps):
        text = torch.cat((text, model(text[None])[0, -1:].argmax(-1)))
    return text[len(prompt) :]


# The same numbers as the full forward


@cache
def exact_logits(depth: Depth, norm: Norm) -> Tensor:
    with torch.no_grad():
        return make_model(depth=depth, norm=norm)(make_tokens(4, 13))


@torch.no_grad()
def assert_served_as_forward(
    depth: Depth, norm: Norm, chunk: int, dtype: torch.dtype, device: torch.device
) -> None:
    """In float64 within 1e-12 of the full forward; in other dtypes at most twice as far from
    float64 as it is, plus one rounding."""
    model, exact = make_model(dtype, depth=depth, norm=norm).to(device), exact_logits(depth, norm)
    texts, lengths = make_tokens(4, 13).to(device), torch.tensor([7, 1, 4, 6]).int().to(device)
    size, forward_error = exact.abs().max(), (model(texts).cpu() - exact).abs().max()
    bound = 2 * forward_error + torch.finfo(dtype).eps * size
    if dtype == torch.float64:
        bound = 1e-12 * size
    for step, logits in enumerate(served_logits(model, texts, lengths, chunk)):
        assert logits.dtype == dtype
        for row, length in enumerate(lengths.tolist()):
            at = length + step - 1
            assert (logits[row].cpu() - exact[row, at]).abs().max() <= bound, (row, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 3, 512])
@every_norm
@every_depth
def test_logits_are_those_of_the_full_forward(
    depth: Depth, norm: Norm, chunk: int, dtype: torch.dtype
) -> None:
    assert_served_as_forward(depth, norm, chunk, dtype, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 3, 512])
@every_depth
def test_logits_are_those_of_the_full_forward_on_a_gpu(depth: Depth, chunk: int) -> None:
    assert_served_as_forward(depth, "post", chunk, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("extra", [{}, {"qk_norm": True, "bias": True, "write_last": True}])
@every_norm
@every_depth
def test_greedy_tokens_are_those_of_a_loop_over_the_model(
    depth: Depth, norm: Norm, extra: dict[str, bool]
) -> None:
    model, prompts = make_model(depth=depth, norm=norm, **extra), make_prompts(5, 1, 9)
    for chunk in (1, 4, 512):
        new = generate(model, prompts, 7, prefill_chunk=chunk)
        for prompt, tokens in zip(prompts, new, strict=True):
            assert torch.equal(tokens, greedy_loop(model, prompt, 7))


def test_a_prompt_does_not_know_its_batch() -> None:
    model, prompts = make_model(), make_prompts(5, 1, 9)
    together = generate(model, prompts, 6)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(tokens, generate(model, [prompt], 6)[0])


def test_forms_of_prompts() -> None:
    model, tokens = make_model(), make_tokens(2, 5)
    expected = generate(model, list(tokens), 4)
    for prompts in (tokens, tokens.tolist(), (tokens[0].int(), tokens[1].tolist())):
        for x, y in zip(generate(model, prompts, 4), expected, strict=True):
            assert torch.equal(x, y) and x.dtype == torch.int64


def test_a_cache_may_be_used_again() -> None:
    model, kv = make_model(), cache_of(make_model(), 2, 20)
    for lengths in ((9, 1), (2, 5), (14, 14)):
        prompts = make_prompts(*lengths)
        actual = generate(model, prompts, 7, cache=kv)
        assert all(map(torch.equal, actual, generate(model, prompts, 7)))
        assert torch.equal(kv.lengths, torch.tensor(lengths) + 6)


def test_one_new_token_needs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "decode_step", None)
    model, (prompt,) = make_model(), make_prompts(4)
    assert torch.equal(generate(model, [prompt], 1)[0], greedy_loop(model, prompt, 1))


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[KVCache]:
    """Those that are allocated, by ``generate`` too."""
    made, allocate = list[KVCache](), KVCache.allocate

    def spy(*args: Any, **options: Any) -> KVCache:
        made.append(allocate(*args, **options))
        return made[-1]

    monkeypatch.setattr(KVCache, "allocate", spy)
    return made


def test_under_autocast_the_cache_is_in_its_dtype(caches: list[KVCache]) -> None:
    prompts = make_prompts(3, 2)
    for depth in get_args(Depth):
        model = make_model(torch.float32, depth=depth)
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, prompts, 3)
        assert {x.dtype for x in (*caches[-1].k, *caches[-1].v)} == {torch.bfloat16}


def test_model_and_random_state_stay_as_they_are() -> None:
    model = make_model()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    (tokens,) = generate(model, make_prompts(3), 4, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    assert not tokens.is_inference()  # it may become a training text
    model(tokens[None]).sum().backward()


# Memory: keys and values of the sequence, and nothing of depth


class SlotWatch:
    """Weak references to every depth slot that passes a model's blocks."""

    def __init__(self, model: MoDALanguageModel) -> None:
        self.slots, self.most = list[weakref.ref[Tensor]](), 0
        model.blocks[0].register_forward_pre_hook(self.at_first_block)
        for block in model.blocks:
            block.register_forward_hook(self.after_block)

    def at_first_block(self, _: Any, args: Any) -> None:
        """Only the slots that this token brings, which is the embedding's or none."""
        stream: CachedStream = args[2]
        assert self.alive() == 0
        assert stream.written == len(stream.slots.k) <= 1

    def after_block(self, _: Any, args: Any, result: Any) -> None:
        stream: CachedStream = result[1]
        known = {id(ref()) for ref in self.slots}
        new = [x for x in (*stream.slots.k, *stream.slots.v) if id(x) not in known]
        self.slots.extend(weakref.ref(x) for x in new)
        self.most = max(self.most, self.alive())

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.slots)


@pytest.mark.parametrize("depth", ["kv", "kv+ffn", "kv+ffn+attn", "attention"])
def test_no_depth_slot_outlives_its_step(depth: Depth) -> None:
    gc.disable()  # they go at once, not when the collector comes
    try:
        model = make_model(depth=depth)
        watch = SlotWatch(model)
        generate(model, make_prompts(5, 2), 6, prefill_chunk=2)
    finally:
        gc.enable()
    written = model.config.depth_slots()
    assert len(watch.slots) == 2 * written * (3 + 5)  # chunks and steps
    assert watch.most == 2 * written
    assert watch.alive() == 0


def live_bytes() -> int:
    """Of the distinct storages of all tensors that Python knows."""
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, torch.nn.Parameter)  # not a compiler's FakeTensor
    }
    return sum(storages.values())


@pytest.mark.parametrize("layers", [2, 5])
@every_depth
def test_what_lives_between_steps_is_the_cache(depth: Depth, layers: int) -> None:
    gc.collect()
    gc.freeze()  # what is counted from here on is new
    model, B, capacity = make_model(torch.float32, depth=depth, layers=layers), 3, 20
    prompts, lengths, token = make_tokens(B, 4), torch.tensor([4, 1, 2]).int(), make_tokens(B)
    before = live_bytes()
    kv = cache_of(model, B, capacity)
    cache_bytes = sum(x.untyped_storage().nbytes() for x in (*kv.k, *kv.v))
    assert cache_bytes == 2 * layers * B * capacity * CONFIG.kv_heads * CONFIG.head_dim * 4
    logits = prefill(model, prompts, lengths, kv, chunk=3)
    alive = cache_bytes + kv.lengths.nbytes + logits.nbytes
    assert live_bytes() - before == alive
    for _ in range(10):
        logits = decode_step(model, token, kv)
        assert live_bytes() - before == alive


def test_a_step_frees_all_it_allocates_but_its_logits() -> None:
    """By the allocator, which also knows of tensors that Python does not."""
    model, B = make_model(torch.float32), 3
    kv, token = cache_of(model, B, 20), make_tokens(B)
    prefill(model, token[:, None], torch.ones(B).int(), kv)
    decode_step(model, token, kv)
    for steps in (1, 4):
        logits = list[Tensor]()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            logits = [decode_step(model, token, kv) for _ in range(steps)]
        left = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        sizes = sum(math.ceil(x.nbytes / 64) * 64 for x in logits)
        assert sum(x.nbytes for x in logits) <= left <= sizes


# Draws


def test_probabilities_by_hand() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)

    def kept(**options: Any) -> list[list[float]]:
        rows = token_probabilities(p.log(), 1.0, **options)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, dtype=torch.float64))
        expected = torch.where(rows > 0, p, 0.0)
        torch.testing.assert_close(rows, expected / expected.sum(-1, keepdim=True))
        return [(row > 0).nonzero().flatten().tolist() for row in rows]

    everything = [0, 1, 2, 3]
    assert kept() == kept(top_k=4) == kept(top_k=99) == kept(top_p=1.0) == [everything] * 2
    assert kept(top_k=1) == [[1], everything]  # ties stay
    assert kept(top_k=2) == [[1, 3], everything]
    assert kept(top_p=1e-9) == [[1], everything]
    assert kept(top_p=0.39) == [[1], everything]
    assert kept(top_p=0.41) == [[1, 3], everything]
    assert kept(top_p=0.71) == [[1, 2, 3], everything]
    assert kept(top_k=3, top_p=0.5) == [[1, 3], everything]  # 0.4 / 0.9 is less than 0.5
    assert kept(top_k=3, top_p=0.44) == [[1], everything]


def test_temperature_sharpens_and_never_overflows() -> None:
    logits = make_tokens(5, 9).float() * 1e4
    for temperature in (1e-6, 1e-3, 1.0, 1e6):
        p = token_probabilities(logits, temperature)
        assert p.isfinite().all()
    p = token_probabilities(torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(p, torch.tensor([2.0, 4.0]).softmax(0))
    assert token_probabilities(torch.zeros(3).bfloat16(), 1.0).dtype == torch.float32


def test_draws_follow_the_probabilities(device: torch.device) -> None:
    """Pearson's statistic; with 7 degrees of freedom it exceeds 30 once in 10,000 seeds."""
    n = 100_000
    logits = torch.linspace(-1, 1.5, 8, device=device)
    generator = torch.Generator(device).manual_seed(0)
    drawn = generation._choose(logits.expand(n, 8), 0.7, None, None, generator)
    expected = n * (logits / 0.7).softmax(0)
    observed = torch.bincount(drawn, minlength=8)
    assert ((observed - expected) ** 2 / expected).sum() < 30


def test_the_seed_decides() -> None:
    model, prompts = make_model(), make_prompts(4, 2)

    def drawn(seed: int | None, **options: Any) -> list[list[int]]:
        # so hot that two draws of 24 tokens do not agree by chance
        new = generate(model, prompts, 12, temperature=50.0, seed=seed, **options)
        return [tokens.tolist() for tokens in new]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)
    assert drawn(2**64 - 1) == drawn(2**64 - 1)
    greedy = [tokens.tolist() for tokens in generate(model, prompts, 12)]
    assert drawn(1, top_k=1) == drawn(2, top_p=1e-6) == greedy
    torch.manual_seed(5)
    before = drawn(3)
    torch.manual_seed(6)
    assert drawn(3) == before


# Where texts end


def test_a_text_ends_with_its_first_stop_token() -> None:
    model, prompts = make_model(), make_prompts(5, 1, 9)
    free = generate(model, prompts, 40, temperature=1.0, seed=0)
    stops = {int(free[0][3]), int(free[1][7])}
    cut = generate(model, prompts, 40, temperature=1.0, seed=0, stop_tokens=sorted(stops))
    for whole, tokens in zip(free, cut, strict=True):
        at = next((i for i, t in enumerate(whole.tolist()) if t in stops), len(whole) - 1)
        assert torch.equal(tokens, whole[: at + 1])
    assert len(cut[0]) <= 4 and len(cut[1]) <= 8


def test_nothing_is_computed_long_after_all_texts_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = list[Tensor]()

    def counted(model: MoDALanguageModel, tokens: Tensor, kv: KVCache) -> Tensor:
        steps.append(tokens)
        return decode_step(model, tokens, kv)

    monkeypatch.setattr(generation, "decode_step", counted)
    model, prompts = make_model(), make_prompts(3)
    (first,) = generate(model, prompts, 1)
    (tokens,) = generate(model, prompts, 1000, stop_tokens=[int(first)])
    assert torch.equal(tokens, first)
    assert len(steps) < generation.STOP_CHECK_STEPS


# Compiled


def assert_compiled_as_eager(
    model: MoDALanguageModel,
    prompts: list[Tensor],
    steps: int,
    caches: list[KVCache],
    cache: KVCache | None = None,
    **options: Any,
) -> None:
    """The same tokens; and the keys and values that the steps leave, for most texts repeat a token
    whatever the steps do. These are at most twice as far from a float64 prefill of the whole texts
    as eager ones, plus one rounding."""
    caches.clear()
    expected = generate(model, prompts, steps, **options)
    actual = generate(model, prompts, steps, compile=True, cache=cache, **options)
    assert all(map(torch.equal, actual, expected))
    eager, compiled = caches if cache is None else (*caches, cache)
    texts = [torch.cat((p, new[:-1].cpu())) for p, new in zip(prompts, actual, strict=True)]
    lengths, padded = torch.tensor([*map(len, texts)]).int(), pad_sequence(texts, batch_first=True)
    reference = deepcopy(model).cpu().double()
    exact = cache_of(reference, *padded.shape)
    prefill(reference, padded, lengths, exact)
    for kv in (eager, compiled):
        assert torch.equal(kv.lengths.cpu(), lengths)
    there = torch.arange(padded.shape[1]) < lengths[:, None]
    for layer in range(model.config.layers):
        actual_kv, exact_kv, eager_kv = (
            torch.stack((kv.k[layer], kv.v[layer])).cpu()[:, there]
            for kv in (compiled, exact, eager)
        )
        assert_accurate(f"layer {layer}", actual_kv, exact_kv, eager_kv, 0.0)


@pytest.mark.parametrize(
    ("depth", "backend"),
    [("residual", "aot_eager"), ("kv+ffn", "inductor"), ("attention", "aot_eager")],
)
def test_a_compiled_step_leaves_the_same(
    depth: Depth, backend: str, caches: list[KVCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    if backend != "inductor":
        step = torch.compile(decode_step, backend=backend, fullgraph=True)
        monkeypatch.setattr(generation, "_compiled_step", lambda: step)
    model = make_model(torch.float32, depth=depth)  # a third layer's keys depend on depth
    for lengths in ((5, 1), (3, 6)):  # with the second sizes become symbols
        prompts = make_prompts(*lengths)
        for options in (dict[str, Any](), dict[str, Any](temperature=0.9, seed=1)):
            assert_compiled_as_eager(model, prompts, 9, caches, **options)


def test_compiled_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    model = make_model(torch.float32, layers=2)
    generate(model, make_prompts(5, 2), 9, compile=True)
    kv = cache_of(model, 2, 5 + 8)
    with torch.compiler.set_stance("fail_on_recompile"):
        generate(model, make_prompts(1, 5), 9, compile=True)
        generate(model, make_prompts(1, 3), 6, compile=True, cache=kv)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("depth", get_args(Depth))
def test_a_compiled_step_is_replayed_as_a_graph(depth: Depth, caches: list[KVCache]) -> None:
    torch._dynamo.reset()
    model = make_model(torch.float32, depth=depth, head_dim=16, heads=4, width=64).cuda()
    prompts, options = make_prompts(40, 3), dict[str, Any](temperature=0.9, seed=1)
    kv = cache_of(model, 2, 40 + 19)
    for arguments in (dict[str, Any](), options, dict[str, Any](cache=kv)):
        assert_compiled_as_eager(model, prompts, 20, caches, **arguments)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        generate(model, prompts, 20, compile=True, cache=kv)
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert sum(n for key, n in counts.items() if "GraphLaunch" in key) == 19
    assert not any("BeginCapture" in key for key in counts)


def captured_step(
    model: MoDALanguageModel, token: Tensor, kv: KVCache
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    lengths, stream = kv.lengths.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_step(model, token, kv)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(model, token, kv)
    kv.lengths.copy_(lengths)
    return graph, logits


@pytest.mark.gpu
def test_a_step_captured_by_hand() -> None:
    model = make_model(torch.float32, head_dim=16, heads=4, width=64).cuda()
    texts, lengths = make_tokens(2, 30).cuda(), torch.tensor([4, 9]).int().cuda()
    expected = served_logits(model, texts, lengths, 512)[1:]
    kv = cache_of(model, 2, 30)
    prefill(model, texts[:, :9], lengths, kv)
    token, batch = texts[:, 0].clone(), torch.arange(2, device="cuda")
    graph, logits = captured_step(model, token, kv)
    for row in expected:
        token.copy_(texts[batch, kv.lengths.long()])
        graph.replay()
        torch.testing.assert_close(logits, row, rtol=0, atol=0)


@pytest.mark.gpu
def test_steps_wait_for_nothing_and_leave_nothing() -> None:
    model = make_model(torch.float32, head_dim=16, heads=4, width=64).cuda()
    kv, token = cache_of(model, 3, 50), make_tokens(3).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    prefill(model, token[:, None], torch.ones(3).int().cuda(), kv)
    allocated = set[int]()
    for step in range(20):
        if step == 2:  # kernels are compiled and workspaces allocated
            torch.cuda.set_sync_debug_mode("error")
        try:
            logits = decode_step(model, token, kv)
            token = generation._choose(logits, 0.9, 8, 0.9, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step >= 2:
            allocated.add(torch.cuda.memory_allocated())
    assert len(allocated) == 1


# The progress bar


class Bar:
    """What stands in for tqdm's."""

    made: "list[Bar]"

    def __init__(self, total: int, unit: str, **options: Any) -> None:
        self.total, self.options, self.done, self.closed = total, options, 0, False
        self.made.append(self)

    def update(self, n: int) -> None:
        self.done += n

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    Bar.made = []
    monkeypatch.setattr("tqdm.tqdm", Bar)
    return Bar.made


def test_progress_counts_the_tokens_of_prompts_and_answers(bars: list[Bar]) -> None:
    model, prompts = make_model(), make_prompts(5, 2)
    generate(model, prompts, 4, prefill_chunk=2, progress=True)
    generate(model, prompts, 4)
    generate(model, prompts, 4, progress=False)
    shown, default = bars
    for bar in bars:
        assert bar.done == bar.total == 9 and bar.closed
    assert shown.options == {}
    assert default.options == dict(disable=None, delay=generation.LONG_RUN_SECONDS)


def test_a_bar_is_closed_after_an_error(bars: list[Bar]) -> None:
    model = make_model()
    model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, make_prompts(2), 4)
    assert bars[0].closed


def test_short_runs_and_pipes_stay_silent(capfd: pytest.CaptureFixture[str]) -> None:
    model, prompts = make_model(), make_prompts(2)
    generate(model, prompts, 4)
    assert capfd.readouterr() == ("", "")
    generate(model, prompts, 4, progress=True)
    assert "6/6" in capfd.readouterr().err


def test_tqdm_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (prompt,) = make_model(), make_prompts(3)
    importing = builtins.__import__

    def without_tqdm(name: str, *args: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return importing(name, *args)

    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    for progress in (None, True, False):
        (tokens,) = generate(model, [prompt], 3, progress=progress)
        assert torch.equal(tokens, greedy_loop(model, prompt, 3))
