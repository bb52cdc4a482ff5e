"""What ``generate`` refuses, and how it says so: the argument, what was given, what is allowed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moda_ops.nn import CachedStream, KVCache, generate
from test_generation import CONFIG, make_model


def make_cache(
    layers: int = 3,
    batch: int = 1,
    capacity: int = 2,
    dtype: Any = torch.float64,
    device: str = "cpu",
) -> KVCache:
    config = replace(CONFIG, layers=layers)
    return KVCache.allocate(config, batch, capacity, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model=torch.nn.Linear(1, 1)), TypeError, "model must be a MoDALanguageModel, got Linear"),
        (dict(prompts="text"), TypeError, "prompts must be a list of integer tensors or of lists of ints, or a tensor (B, T), got str"),
        (dict(prompts=[]), ValueError, "prompts must hold at least one prompt, got none"),
        (dict(prompts=torch.tensor([1, 2])), ValueError, "prompts must be (B, T) if a tensor, got shape (2,)"),
        (dict(prompts=[1, 2]), TypeError, "prompts[0] must be an integer tensor or a list of ints, got 1"),
        (dict(prompts=[[1], [1.0]]), TypeError, "prompts[1] must be an integer tensor or a list of ints, got [1.0]"),
        (dict(prompts=[[True]]), TypeError, "prompts[0] must be an integer tensor or a list of ints, got [True]"),
        (dict(prompts=[torch.ones(2)]), TypeError, "prompts[0] must have an integer dtype, got torch.float32"),
        (dict(prompts=[torch.ones(2).bool()]), TypeError, "prompts[0] must have an integer dtype, got torch.bool"),
        (dict(prompts=[torch.ones(1, 2).int()]), ValueError, "prompts[0] must have shape (T,), got (1, 2)"),
        (dict(prompts=[[1], []]), ValueError, "prompts[1] must hold at least one token, got none"),
        (dict(prompts=[torch.tensor([], dtype=torch.long)]), ValueError, "prompts[0] must hold at least one token, got none"),
        (dict(prompts=[[60, 61]]), ValueError, "prompts[0] must hold tokens in 0 .. 60, the vocabulary, got 61"),
        (dict(prompts=[[3, -1]]), ValueError, "prompts[0] must hold tokens in 0 .. 60, the vocabulary, got -1"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=2.0), TypeError, "max_new_tokens must be an int, got 2.0"),
        (dict(max_new_tokens=True), TypeError, "max_new_tokens must be an int, got True"),
        (dict(prefill_chunk=0), ValueError, "prefill_chunk must be at least 1, got 0"),
        (dict(temperature=-0.5), ValueError, "temperature must be 0 (greedy) or a finite number of at least 1e-06, got -0.5"),
        (dict(temperature=1e-9), ValueError, "temperature must be 0 (greedy) or a finite number of at least 1e-06, got 1e-09"),
        (dict(temperature=math.nan), ValueError, "temperature must be 0 (greedy) or a finite number of at least 1e-06, got nan"),
        (dict(temperature=math.inf), ValueError, "temperature must be 0 (greedy) or a finite number of at least 1e-06, got inf"),
        (dict(temperature="1"), TypeError, "temperature must be a number, got '1'"),
        (dict(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (dict(top_k=1.5), TypeError, "top_k must be an int, got 1.5"),
        (dict(top_p=0.0), ValueError, "top_p must be in (0, 1], got 0.0"),
        (dict(top_p=1.1), ValueError, "top_p must be in (0, 1], got 1.1"),
        (dict(top_p=math.nan), ValueError, "top_p must be in (0, 1], got nan"),
        (dict(top_p="x"), TypeError, "top_p must be a number, got 'x'"),
        (dict(seed=1.0), TypeError, "seed must be None or an int, got 1.0"),
        (dict(seed=-1), ValueError, "seed must be in 0 .. 2^64 - 1, got -1"),
        (dict(stop_tokens=5), TypeError, "stop_tokens must be a sequence of ints, got 5"),
        (dict(stop_tokens=["x"]), TypeError, "stop_tokens must be a sequence of ints, got ['x']"),
        (dict(stop_tokens=[61]), ValueError, "stop_tokens must be in 0 .. 60, the vocabulary, got 61"),
        (dict(cache=0), TypeError, "cache must be None or a KVCache, got int"),
        (dict(cache=make_cache(layers=2)), ValueError, "cache must have the model's 3 layers, got 2"),
        (dict(cache=make_cache(batch=2)), ValueError, "cache must have tensors (B, capacity, H, D) = (1, 2 or more, 2, 6), got (2, 2, 2, 6)"),
        (dict(cache=make_cache(capacity=1)), ValueError, "cache must have tensors (B, capacity, H, D) = (1, 2 or more, 2, 6), got (1, 1, 2, 6)"),
        (dict(cache=make_cache(dtype=torch.float32)), TypeError, "cache must have dtype torch.float64, as the model's keys, got torch.float32"),
        (dict(cache=make_cache(device="meta")), ValueError, "cache must be on the model's device cpu, got meta"),
        (dict(compile=1), TypeError, "compile must be a bool, got 1"),
        (dict(progress="yes"), TypeError, "progress must be a bool, got 'yes'"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(model=make_model(), prompts=[[1]], max_new_tokens=2) | change
    with pytest.raises(error) as caught:
        generate(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("keys", "message"),
    [(None, "the depth stream is empty"), (torch.zeros(1, 1, 2, 8), "k is given but v is None")],
)
def test_a_layer_without_keys_or_values(keys: torch.Tensor | None, message: str) -> None:
    stream = CachedStream(KVCache.allocate(CONFIG, batch=1, capacity=8), start=0)
    with pytest.raises(ValueError, match=message):
        stream.attend(torch.zeros(1, 1, 4, 8), keys)
