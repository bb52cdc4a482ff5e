"""The transformers model: the same numbers as moda_ops.nn, and what users of transformers do."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from helpers import assert_accurate
from moda_ops import hf, nn
from moda_ops.hf import MoDACache, MoDAConfig, MoDAForCausalLM

SIZES = nn.MoDAConfig(vocab_size=61, layers=3, width=36, heads=6, kv_heads=2, head_dim=6, hidden=50)
PAD = 60
OLD = transformers.__version__ < "5"
CACHE = hf.release.CACHE  # what this release of transformers calls it
PROMPTS = [[5, 9, 11, 40, 3, 2, 17], [31], [8, 30, 2, 2, 1]]
every_depth = pytest.mark.parametrize("depth", get_args(nn.Depth))
every_side = pytest.mark.parametrize("side", ["left", "right", "holes"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def make_model(seed: int = 0, **options: Any) -> MoDAForCausalLM:
    """In training mode. Logits differ, and texts do not repeat their last token for ever."""
    torch.manual_seed(seed)
    inner = nn.MoDALanguageModel(replace(SIZES, **options))
    with torch.no_grad():
        inner.embedding.weight.mul_(20)
        for name, weight in inner.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.mul_(4)
    return MoDAForCausalLM.from_nn(inner, pad_token_id=PAD)


def padded(texts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), one column longer than the longest text."""
    columns = 1 + max(map(len, texts))
    ids, mask = torch.full((len(texts), columns), PAD), torch.zeros(len(texts), columns).long()
    for row, text in enumerate(texts):
        free = columns - len(text)
        at = torch.arange(len(text)) + {"left": free, "right": 0, "holes": free // 2}[side]
        if side == "holes":
            at[len(text) // 2 :] += free - free // 2  # padding within the text
        ids[row, at], mask[row, at] = torch.tensor(text, dtype=torch.long), 1
    return ids, mask


def cache_of(output: Any) -> MoDACache:
    return output[CACHE]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To float32 rounding of logits of about 10, after some layers."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# Configurations and files


def test_config_goes_both_ways(tmp_path: Path) -> None:
    inner = nn.MoDAConfig(
        vocab_size=7, layers=2, width=12, heads=3, kv_heads=1, head_dim=4, hidden=5,
        depth="attention", norm="pre", qk_norm=True, bias=True, write_last=True, rope_base=5e3,
        depth_keep=((0,), (0, 2)),
    )  # fmt: skip
    defaults = asdict(MoDAConfig().to_nn())
    assert [k for k, v in asdict(inner).items() if v == defaults[k]] == ["causal"]
    config = MoDAConfig.from_nn(inner, eos_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoDAConfig and loaded.to_nn() == inner and loaded.eos_token_id == 3
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "moda" and saved["rope_base"] == 5e3


def test_a_bounded_model_goes_both_ways(tmp_path: Path) -> None:
    inner = nn.MoDALanguageModel(replace(SIZES, layers=4).bounded(2))
    MoDAForCausalLM.from_nn(inner).save_pretrained(tmp_path)
    loaded = MoDAForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_nn() == inner.config
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(tokens).logits, inner(tokens))


def test_config_knows_the_names_of_transformers() -> None:
    config = MoDAConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2)
    assert config.to_nn() == replace(MoDAConfig().to_nn(), width=24, heads=4, kv_heads=2)
    assert (config.num_hidden_layers, config.intermediate_size) == (36, 4096)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@every_depth
def test_save_and_load(depth: nn.Depth, saved: torch.dtype, tmp_path: Path) -> None:
    model = make_model(depth=depth, norm="pre", qk_norm=True, bias=True).to(saved).eval()
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == {f"model.{name}" for name in model.model.state_dict()}
    assert weights["model.embedding.weight"].dtype == saved

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=saved)
    assert type(loaded) is MoDAForCausalLM and loaded.model.config == model.model.config
    ids, mask = padded(PROMPTS, "left")
    with torch.no_grad():
        assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)


def test_a_folder_with_its_own_code_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``register_for_auto_class`` writes ``auto_map`` and copies the classes' files."""
    for kind, auto in ((MoDAConfig, "AutoConfig"), (MoDAForCausalLM, "AutoModelForCausalLM")):
        monkeypatch.setattr(kind, "_auto_class", auto)
    folder, tokens = tmp_path / "saved", torch.tensor([[1, 2, 3]])
    model = make_model().eval()
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {(folder / f"{x.split('.')[0]}.py").exists() for x in saved.values()} == {True}
    code = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(model(torch.tensor({tokens.tolist()})).logits.abs().sum().item())
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout) == pytest.approx(model(tokens).logits.abs().sum().item(), rel=1e-4)


def test_a_missing_weight_is_initialized_and_no_other(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    missing = "model.blocks.1.feed_forward.out_proj.weight"
    del weights[missing]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = MoDAForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name == missing:
            std = (SIZES.hidden * 2 * SIZES.layers) ** -0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.1)
        else:
            assert (parameter == 7).all(), name


def test_a_new_model_is_initialized_as_ours() -> None:
    set_seed(0)
    fresh = MoDAForCausalLM(MoDAConfig.from_nn(SIZES))
    ours = nn.MoDALanguageModel(SIZES)
    for (name, x), y in zip(fresh.model.named_parameters(), ours.parameters(), strict=True):
        if x.dim() == 2:
            assert not torch.equal(x, y), name
            assert x.std().item() == pytest.approx(y.std().item(), rel=0.15), name
        else:
            assert torch.equal(x, y), name


# Logits, loss and gradients


@every_depth
def test_logits_are_those_of_the_model_within(depth: nn.Depth) -> None:
    model, tokens = make_model(depth=depth), torch.randint(60, (2, 9))
    assert torch.equal(model(tokens).logits, model.model(tokens))


@every_side
@every_depth
def test_padding_is_seen_by_nobody(depth: nn.Depth, side: str) -> None:
    model = make_model(depth=depth)
    ids, mask = padded(PROMPTS, side)
    logits = model(ids, mask).logits
    for row, text in enumerate(PROMPTS):
        assert_close(logits[row, mask[row] == 1], model(torch.tensor([text])).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
@every_depth
def test_gradients_of_padded_texts_are_those_of_the_texts(depth: nn.Depth, side: str) -> None:
    model = make_model(depth=depth)
    ids, mask = padded(PROMPTS, side)
    padding = mask == 0
    loss = model(ids, mask, labels=ids.masked_fill(padding, -100)).loss
    predicted = sum(len(text) - 1 for text in PROMPTS)
    alone = [torch.tensor([text]) for text in PROMPTS if len(text) > 1]
    expected = sum(model(x, labels=x).loss * (x.shape[1] - 1) for x in alone) / predicted
    parameters = list(model.parameters())
    torch.testing.assert_close(loss, expected)
    for x, y in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_loss_is_shifted_ignores_and_divides() -> None:
    model, tokens = make_model(), torch.randint(60, (2, 9))
    labels = tokens.clone()
    labels[0, 3:6] = -100
    output = model(tokens, labels=labels)
    logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels[:, 1:].flatten()))
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    divided = model(tokens, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(divided, total / 50)


@every_side
def test_hidden_states_embeddings_and_kept_logits(side: str) -> None:
    model = make_model(norm="pre").eval()
    ids, mask = padded(PROMPTS, side)
    output = model(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == SIZES.layers + 1
    real = mask == 1
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(output.hidden_states[0][real], embedded[real])
    assert torch.equal(model.model.logits(output.hidden_states[-1]), output.logits)
    by_embedding = model(inputs_embeds=embedded, attention_mask=mask)
    assert torch.equal(by_embedding.logits[real], output.logits[real])
    assert_close(model(ids, mask, logits_to_keep=2).logits, output.logits[:, -2:])
    columns = torch.tensor([3, 1])
    assert_close(model(ids, mask, logits_to_keep=columns).logits, output.logits[:, columns])
    (logits,) = model(ids, mask, return_dict=False)
    assert torch.equal(logits, output.logits)


# Generation


def greedy(model: MoDAForCausalLM, new_tokens: int = 20, **options: Any) -> Tensor:
    """New tokens (B, n) after the prompts, padded on the left."""
    ids, mask = padded(PROMPTS, "left")
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options
    )
    assert torch.equal(out[:, : ids.shape[1]], ids)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False])
@every_depth
def test_greedy_tokens_are_those_of_generate(depth: nn.Depth, use_cache: bool) -> None:
    model = make_model(depth=depth).eval()
    expected = torch.stack(nn.generate(model.model, PROMPTS, 20))
    assert len(expected.unique()) > 10
    assert torch.equal(greedy(model, use_cache=use_cache), expected)


def test_a_cache_with_room_does_not_grow_and_a_small_one_does() -> None:
    model = make_model().eval()
    for capacity in (1, 100):
        cache = MoDACache(model.config, 3, capacity)
        assert torch.equal(greedy(model, **{CACHE: cache}), greedy(model, use_cache=False))
        assert cache.capacity == cache.kv.k[0].shape[1] == {1: 32, 100: 100}[capacity]
        assert cache.get_seq_length() == 8 + 19
        assert cache.kv.lengths.tolist() == [len(text) + 19 for text in PROMPTS]


def test_texts_end_and_are_padded() -> None:
    model = make_model().eval()
    free = greedy(model)
    stop = int(free[0, 6])
    ended = greedy(model, eos_token_id=stop)
    for row, plain in zip(ended, free, strict=True):
        hit = (plain == stop).nonzero()
        end = int(hit[0]) + 1 if len(hit) else 20
        assert torch.equal(row[:end], plain[:end]) and (row[end:] == PAD).all()


def test_beams_with_a_cache_are_those_without() -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.model.embedding.weight.mul_(0.2)  # close scores: beams change places
    beams = greedy(model, num_beams=4)
    assert torch.equal(beams, greedy(model, num_beams=4, use_cache=False))
    assert not torch.equal(beams, greedy(model))


def test_samples_depend_on_the_seed_alone() -> None:
    model, drawn = make_model().eval(), []
    for seed, use_cache in ((1, True), (1, False), (2, True)):
        set_seed(seed)
        ids, mask = padded(PROMPTS, "left")
        options = dict(do_sample=True, num_return_sequences=2, use_cache=use_cache)
        drawn.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, **options))
    assert drawn[0].shape == (6, 8 + 9)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_assisted_generation_takes_tokens_back() -> None:
    model = make_model().eval()
    prompt = torch.tensor([[5, 9, 11, 5, 9, 11, 5, 9, 11, 5]])
    options = dict(
        max_new_tokens=20, do_sample=False, eos_token_id=PAD
    )  # transformers 5.0 wants one
    assisted = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted, model.generate(prompt, **options))


@pytest.mark.skipif(
    OLD, reason="transformers 4 gives position_ids with each chunk, which are refused"
)
def test_prompts_in_chunks() -> None:
    model = make_model().eval()
    cache = MoDACache(model.config, 3, 10)
    chunked = greedy(model, prefill_chunk_size=3, **{CACHE: cache})
    assert torch.equal(chunked, greedy(model))


@torch.no_grad()
def test_a_cropped_cache_goes_on_from_there() -> None:
    model = make_model().eval()
    ids, mask = padded(PROMPTS, "left")
    cache = cache_of(model(ids, mask))
    for columns in (-4, ids.shape[1], 2 * ids.shape[1]):  # to remove, to keep, more than there are
        model(IDS[:1].expand(3, 4), cache=cache)
        cache.crop(columns)
    cache.crop(-4)
    assert cache.get_seq_length() == ids.shape[1]
    logits = model(torch.full((3, 1), 4), cache=cache).logits
    for row, text in zip(logits, PROMPTS, strict=True):
        assert_close(row[0], model(torch.tensor([[*text, 4]])).logits[0, -1])


@every_depth
@torch.no_grad()
def test_a_cache_is_continued_with_padded_turns(depth: nn.Depth) -> None:
    model = make_model(depth=depth).eval()
    turns = [padded(PROMPTS, "holes"), padded([[1, 2], [7, 8, 9, 10], [4]], "right")]
    turns.append(padded([[3], [3, 3], []], "left"))
    cache, masks = None, []
    for ids, mask in turns:
        masks.append(mask)
        output = model(ids, torch.cat(masks, 1), cache=cache, use_cache=True)
        cache = cache_of(output)
        done = torch.cat([ids for ids, _ in turns[: len(masks)]], 1), torch.cat(masks, 1)
        whole = model(*done, use_cache=False).logits[:, -ids.shape[1] :]
        assert_close(output.logits[mask == 1], whole[mask == 1])


@torch.no_grad()
def test_texts_of_a_cache_are_selected_and_repeated() -> None:
    model = make_model().eval()
    ids, mask = padded(PROMPTS, "left")
    cache = cache_of(model(ids, mask))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert len(cache) == 3 and cache.batch_size == 2
    next_token = torch.tensor([[4], [4]])
    logits = model(next_token, cache=cache).logits
    for row, text in zip(logits, (PROMPTS[2], PROMPTS[0]), strict=True):
        assert_close(row[0], model(torch.tensor([[*text, 4]])).logits[0, -1])
    cache.reset()
    again = model(ids[:2], mask[:2], cache=cache).logits
    assert torch.equal(again, model(ids[:2], mask[:2]).logits)


def test_autocast_generates_in_bfloat16() -> None:
    model = make_model().eval()
    ids, mask = padded(PROMPTS, "left")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert cache_of(model(ids, mask)).kv.k[0].dtype == torch.bfloat16
        assert torch.equal(greedy(model, 5), greedy(model, 5, use_cache=False))


# Training


CHECKPOINTING = f"{'activation' if CACHE == 'cache' else 'gradient'}_checkpointing"


def set_checkpointing(model: MoDAForCausalLM, use_reentrant: bool = False, **options: Any) -> None:
    enable = getattr(model, f"{CHECKPOINTING}_enable")
    enable({"use_reentrant": use_reentrant}, **options)


def test_checkpointing_gives_the_same_and_runs_blocks_twice() -> None:
    model, (ids, mask) = make_model(), padded(PROMPTS, "right")
    calls = list[str]()
    for block in model.model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append("block"))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        calls.clear()
        model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    assert len(calls) == SIZES.layers
    set_checkpointing(model)
    for x, y in zip(gradients(), expected, strict=True):
        assert torch.equal(x, y)
    assert len(calls) == 2 * SIZES.layers
    getattr(model, f"{CHECKPOINTING}_disable")()
    gradients()
    assert len(calls) == SIZES.layers


@pytest.mark.skipif(not OLD, reason="the default of transformers 5 is right")
def test_reentrant_checkpointing_by_default_is_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        make_model().gradient_checkpointing_enable()


def test_compiles_as_one_graph() -> None:
    model, (ids, mask) = make_model(), padded(PROMPTS, "left")
    labels = ids.masked_fill(mask == 0, -100)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(model(ids, mask, labels=labels).loss, list(model.parameters()))
    actual = torch.autograd.grad(compiled(ids, mask, labels=labels).loss, list(model.parameters()))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def collate(texts: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    ids, mask = padded([text["input_ids"] for text in texts], side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # of no use, but old releases of transformers count it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def training_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Plain gradient descent, one epoch in batches of two."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_smoothing_shifts_the_labels(side: str, tmp_path: Path) -> None:
    """A text's first token has no prediction: padding before it has none either, but counts."""
    texts, smoothing = [{"input_ids": text} for text in PROMPTS[::2]], 0.1
    by_hand, model = make_model(), make_model()
    batch = collate(texts, side)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    uniform = counted & (batch["attention_mask"][:, :-1] == 0)
    logp = by_hand(**batch).logits[:, :-1].log_softmax(-1)
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -(1 - smoothing) * picked - smoothing * logp.mean(-1)
    assert int(uniform.sum()) == (2 if side == "left" else 0)
    torch.testing.assert_close(loss[uniform], torch.full_like(loss[uniform], math.log(61)))
    mean = loss[counted].mean()
    mean.backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0 if p.grad is None else 0.05 * p.grad

    arguments = training_arguments(tmp_path, label_smoothing_factor=smoothing, save_strategy="no")
    trainer = InOrder(model, arguments, partial(collate, side=side), train_dataset=texts)
    assert trainer.train().training_loss == pytest.approx(mean.item(), rel=1e-5)
    for (name, x), y in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)


def test_noise_on_the_embedding_is_refused(tmp_path: Path) -> None:
    texts = [{"input_ids": text} for text in PROMPTS]
    arguments = training_arguments(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="neftune_noise_alpha must be None: the embedding is"):
        Trainer(make_model(), arguments, collate, train_dataset=texts).train()


def test_trainer_takes_the_steps_of_a_hand_written_loop(tmp_path: Path) -> None:
    """Two steps of two micro-batches each, whose losses count by their tokens."""
    texts = [{"input_ids": text} for text in [*PROMPTS, [1, 2], [3, 4, 5], [7, 7, 8, 8], [2], [1]]]
    batches = [collate(texts[i : i + 2]) for i in range(0, 8, 2)]
    by_hand, model = make_model(), make_model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for step in (batches[:2], batches[2:]):
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
        for batch in step:
            logits = by_hand(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            targets = batch["labels"][:, 1:].flatten()
            (F.cross_entropy(logits, targets, reduction="sum") / items).backward()
        optimizer.step()
        optimizer.zero_grad()

    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    arguments = training_arguments(
        tmp_path, gradient_accumulation_steps=2, save_steps=2, eval_strategy="epoch", **options
    )
    trainer = InOrder(model, arguments, collate, train_dataset=texts, eval_dataset=texts[:4])
    trainer.train()
    for (name, x), y in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.state.global_step == 2
    saved = MoDAForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(saved.model.embedding.weight, model.model.embedding.weight)


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resizing_keeps_the_logits_of_old_tokens(mean_resizing: bool, tmp_path: Path) -> None:
    model, tokens = make_model().eval(), torch.randint(60, (2, 9))
    before = model(tokens).logits
    embedding = model.resize_token_embeddings(70, mean_resizing=mean_resizing)
    assert embedding is model.get_input_embeddings() is model.model.embedding
    assert model.config.vocab_size == model.model.config.vocab_size == 70
    after = model(torch.cat((tokens, torch.full((2, 1), 69)), 1)).logits
    assert after.shape == (2, 10, 70) and after.isfinite().all()
    torch.testing.assert_close(after[:, :9, :61], before)
    model.save_pretrained(tmp_path)
    assert MoDAForCausalLM.from_pretrained(tmp_path).model.embedding.num_embeddings == 70
    assert len(nn.generate(model.model, [[69]], 3)[0]) == 3


# Models in parts: weights that are elsewhere, adapters


def test_sizes_and_modules_go_by_the_names_that_others_look_for() -> None:
    model = make_model()
    sizes = dict(
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=50,
        vocab_size=61,
    )
    assert sizes.items() <= model.config.to_dict().items()
    assert {type(block).__name__ for block in model.model.blocks} <= set(model._no_split_modules)
    assert {type(block).__name__ for block in make_model(depth="attention").model.blocks} <= set(
        model._no_split_modules
    )
    layer, hidden = model.get_output_embeddings(), torch.randn(2, 36)
    assert layer in set(model.modules())  # peft looks for its name
    assert layer is not model.get_input_embeddings()  # accelerate's FSDP wraps both
    assert not list(layer.named_parameters()) and not list(layer.children())
    assert layer.weight is model.get_input_embeddings().weight
    assert torch.equal(layer(hidden), model.model.logits(hidden))
    model.set_output_embeddings(layer)
    with pytest.raises(
        ValueError, match="the output layer is the embedding: call set_input_embeddings"
    ):
        model.set_output_embeddings(torch.nn.Linear(36, 61))


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # weights are meta
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "device_map"])
def test_weights_that_come_when_they_are_needed(where: str, tmp_path: Path) -> None:
    model, (ids, mask) = make_model(norm="pre").eval(), padded(PROMPTS, "left")
    with torch.no_grad():
        expected, tokens = model(ids, mask).logits, greedy(model, 5)
    if where == "device_map":
        model.save_pretrained(tmp_path)
        options = dict(device_map={"": "cpu"}, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    elif where == "cpu_offload":
        accelerate.cpu_offload(model, "cpu")
    else:
        accelerate.disk_offload(model, tmp_path, "cpu")
    with torch.no_grad():
        assert model.get_input_embeddings().weight.is_meta == (where != "device_map")
        assert torch.equal(model(ids, mask).logits, expected)
        assert torch.equal(greedy(model, 5), tokens)
        assert torch.equal(torch.stack(nn.generate(model.model, PROMPTS, 5)), tokens)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize("rank", [0, 4])
def test_adapters_on_the_embedding_are_on_the_output_layer_too(rank: int) -> None:
    """LoRA, or with rank 0 a copy that is trained: merged, they give the same logits."""
    peft = pytest.importorskip("peft")
    model, tokens = make_model(), torch.randint(60, (2, 9))
    plain = model(tokens).logits.detach()
    options = dict(modules_to_save=["embedding"], target_modules="all-linear")
    if rank:
        options = dict(target_modules=["embedding", "q_proj"], r=rank)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "modules_to_save" in name:
                p += 1
    output = adapted(input_ids=tokens, labels=tokens)
    output.loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(grad.norm() > 0 for grad in trained.values()) and len(trained) > 6
    merged = adapted.merge_and_unload()
    assert not torch.allclose(output.logits, plain, rtol=0.1, atol=0.1)
    assert type(merged) is MoDAForCausalLM
    assert_close(merged(tokens).logits, output.logits)


def test_blocks_on_several_devices_are_refused() -> None:
    model = make_model().eval()
    for block, device in zip(model.model.blocks, ("cpu", "cpu", "meta"), strict=True):
        hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device(device))
        accelerate.hooks.add_hook_to_module(block, hook)
    with pytest.raises(
        ValueError, match=r"blocks must compute on one device.* got cpu, meta: load"
    ):
        model(IDS)


def test_any_embedding_is_the_output_layer() -> None:
    model, tokens = make_model(), torch.randint(60, (2, 9))
    other = torch.nn.Embedding.from_pretrained(model.model.embedding.weight.detach().clone())
    expected = model(tokens).logits
    model.set_input_embeddings(other)
    assert_close(model(tokens).logits, expected)


# Errors

IDS = torch.ones(2, 4, dtype=torch.long)
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(), ValueError, "one of input_ids and inputs_embeds, got 0"),
    (dict(input_ids=IDS, inputs_embeds=torch.ones(2, 4, 36)), ValueError, "got 2"),
    (dict(input_ids=IDS[0]), ValueError, r"input_ids must have 2 dimensions.*\(4,\)"),
    (dict(input_ids=IDS[:, :0]), ValueError, r"input_ids must have .* \(2, 0\)"),
    (dict(input_ids=[[1]]), TypeError, "input_ids must be a torch.Tensor, got list"),
    (dict(input_ids=IDS.float()), TypeError, "input_ids must be integers, got torch.float32"),
    (dict(input_ids=IDS, attention_mask=IDS[:, 1:]), ValueError, r"attention_mask must be .*\(2, 4\), got \(2, 3\)"),
    (dict(input_ids=IDS, attention_mask=IDS[:, None, None]), ValueError, "attention_mask must be"),
    (dict(input_ids=IDS, attention_mask=[1]), TypeError, "attention_mask must be None or"),
    (dict(input_ids=IDS, labels=IDS[:1]), ValueError, "labels must be"),
    (dict(input_ids=IDS, labels=IDS, logits_to_keep=1), ValueError, "logits_to_keep must be 0"),
    (dict(input_ids=IDS, position_ids=IDS), TypeError, "position_ids is not supported: positions follow from attention_mask"),
    (dict(input_ids=IDS, output_attentions=True), TypeError, "output_attentions is not supported: attention weights"),
    (dict(input_ids=IDS, cache=IDS, past_key_values=IDS), ValueError, "one of cache and past_key_values.* got both"),
    (dict(input_ids=IDS, token_type_ids=IDS), TypeError, "token_type_ids is not supported"),
    (dict(input_ids=IDS, use_cache=True), ValueError, "a cache carries no gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "text"), CASES)
def test_forward_rejects(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_model()(**arguments)


@torch.no_grad()
def test_caches_that_do_not_fit_are_rejected() -> None:
    model = make_model().eval()
    with pytest.raises(TypeError, match="must be a MoDACache, got DynamicCache"):
        model(IDS, cache=DynamicCache())
    with pytest.raises(ValueError, match=r"must hold B = 2 texts.* got 3"):
        model(IDS, cache=MoDACache(model.config, 3, 9))
    cache = cache_of(model(IDS))
    with pytest.raises(ValueError, match=r"attention_mask must be .*\(2, 8\), got \(2, 4\)"):
        model(IDS, attention_mask=IDS, cache=cache)


def test_options_that_cannot_be_are_rejected() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        set_checkpointing(model, use_reentrant=True)
    if CHECKPOINTING == "activation_checkpointing":
        with pytest.raises(ValueError, match="every_n_layers must be 1, got 2"):
            set_checkpointing(model, every_n_layers=2)
    with pytest.raises(ValueError, match="tie_word_embeddings must be True"):
        MoDAConfig(tie_word_embeddings=False)
    with pytest.raises(ValueError, match="kv_heads = 3 must divide heads = 16"):
        MoDAConfig(kv_heads=3)
    with pytest.raises(ValueError, match="config must be causal"):
        MoDAConfig.from_nn(replace(SIZES, causal=False))


@pytest.mark.gpu
@every_depth
def test_on_a_gpu_in_bfloat16(depth: nn.Depth, device: torch.device) -> None:
    model = make_model(depth=depth, width=48, head_dim=8).to(torch.bfloat16).eval()
    ids, mask = padded(PROMPTS, "left")
    with torch.no_grad():  # the operators of a CPU are plain PyTorch
        plain = model(ids, mask).logits[mask == 1]
        exact = deepcopy(model).double()(ids, mask, use_cache=False).logits[mask == 1]
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    logits = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    logits.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        cached = model(ids, mask).logits[mask == 1].cpu()
    assert_accurate("logits", cached, exact, plain, floor=0.0)
    model = model.float()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    expected = torch.stack(nn.generate(model.model, PROMPTS, 9))
    assert torch.equal(out[:, ids.shape[1] :], expected)
