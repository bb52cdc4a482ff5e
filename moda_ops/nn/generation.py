"""Text from a language model: prompts in chunks, then one token a step against a static cache.

:func:`generate` does it all; :func:`prefill` and :func:`decode_step` are its two parts, with the
cache in the caller's hands.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moda_ops import private
from moda_ops.nn.cache import CachedStream, KVCache
from moda_ops.nn.config import BlockConfig
from moda_ops.nn.layers import rotary_angles
from moda_ops.nn.model import MoDALanguageModel
from moda_ops.operators.arguments import check_bool, check_int
from moda_ops.rules.autocast import compute_dtype

LEAST_TEMPERATURE = 1e-6  # below it scores leave the range of float32
STOP_CHECK_STEPS = 16
LONG_RUN_SECONDS = 2.0


@torch.no_grad()
def generate(
    model: MoDALanguageModel,
    prompts: Sequence[Tensor | Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    compile: bool = False,
    cache: KVCache | None = None,
    progress: bool | None = None,
) -> list[Tensor]:
    """Continue prompts, which may have different lengths, in one batch.

    Each step's logits are those of ``model(tokens)`` at the last token, up to rounding. Every token
    passes the layers once; what is kept of it is its :class:`KVCache` entry, and nothing of depth.
    Nothing waits for the device between steps, except, with ``stop_tokens``, every sixteenth step,
    to see whether all texts have ended. Under autocast the cache has autocast's dtype.

    Args:
        model: on any device, in any mode; nothing of it is changed.
        prompts: B of them, each at least one token id in 0 .. vocab_size - 1: integer tensors (T,)
            or sequences of int, of any lengths; or one integer tensor (B, T).
        max_new_tokens: at most so many for each prompt.
        temperature: 0 takes the most probable token; otherwise tokens are drawn from
            softmax(logits / temperature), see :func:`token_probabilities`.
        top_k: draw among the k most probable tokens.
        top_p: draw among the most probable tokens that together have at least this probability.
        seed: of the draws, which have a random generator of their own; the same seed gives the same
            tokens on the same kind of device. None draws other ones in every call.
        stop_tokens: token ids after which a text ends.
        prefill_chunk: tokens of the prompts that pass the layers at a time; bounds memory.
        compile: compile the decoding step as one graph, ``mode="reduce-overhead"``: on a GPU it is
            replayed as a CUDA graph. Later calls compile nothing, but capture a graph for every
            new cache, which PyTorch keeps, and up to a limit: give them the same ``cache``.
        cache: use this one, which must fit: B texts, room for the longest prompt and
            max_new_tokens - 1 more. What it holds is lost. Default: one of that size, for this
            call.
        progress: show a bar of the tokens so far on standard error. None shows it on a terminal,
            in runs of more than two seconds. There is none without tqdm.

    Returns:
        The new tokens of each prompt, (n,) int64 on the model's device, 1 <= n <= max_new_tokens.
        They end with the first stop token, if there is one.

    Raises:
        TypeError: an argument is of the wrong type; the text names it.
        ValueError: an argument is outside its range, or a token outside the vocabulary.

    Example:
        >>> from moda_ops.nn import MoDAConfig, MoDALanguageModel, generate
        >>> torch.manual_seed(0)  # of the weights
        <torch._C.Generator object at ...>
        >>> model = MoDALanguageModel(MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... ))
        >>> short, long = generate(model, [[1], [2, 3, 4]], 5)
        >>> len(short), len(long)
        (5, 5)
        >>> text = torch.tensor([2, 3, 4])
        >>> for token in long:
        ...     assert token == model(text[None])[0, -1].argmax()
        ...     text = torch.cat((text, token[None]))
        >>> (drawn,) = generate(model, [[1]], 5, temperature=0.8, top_p=0.9, seed=1)
        >>> torch.equal(drawn, generate(model, [[1]], 5, temperature=0.8, top_p=0.9, seed=1)[0])
        True
    """
    if not isinstance(model, MoDALanguageModel):
        raise TypeError(f"model must be a MoDALanguageModel, got {type(model).__name__}")
    if not model.config.causal:
        raise ValueError("model must be causal to generate text, got one with causal = False")
    vocabulary, weight = model.config.vocab_size, model.embedding.weight
    rows = _prompt_rows(prompts, vocabulary)
    check_int("max_new_tokens", max_new_tokens, 1)
    check_int("prefill_chunk", prefill_chunk, 1)
    _check_sampling(temperature, top_k, top_p)
    _check_seed(seed)
    stops = torch.tensor(_checked_stops(stop_tokens, vocabulary), dtype=torch.long)
    check_bool("compile", compile)
    if progress is not None:
        check_bool("progress", progress)
    longest = max(map(len, rows))
    tokens = pad_sequence(rows, batch_first=True)
    tokens = tokens if weight.is_meta else tokens.to(weight.device)  # meta: offloaded
    x = model.embedding(tokens[:, :1])
    device = x.device
    cache = _fitting_cache(cache, model.config, x, longest + max_new_tokens - 1)

    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens, stops = tokens.to(device), stops.to(device)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32).to(device)
    step: Callable[[MoDALanguageModel, Tensor, KVCache], Tensor] = decode_step
    if compile:
        step = _compiled_step()
        for tensor in (
            *cache.k,
            *cache.v,
            cache.lengths,
        ):  # a CUDA graph may then change them in place
            private.mark_static_address(tensor)

    new, ended = list[Tensor](), torch.zeros(len(rows), dtype=torch.bool, device=device)
    with _Bar(longest + max_new_tokens, progress) as bar:
        logits = prefill(model, tokens, lengths, cache, chunk=prefill_chunk, advance=bar.advance)
        while True:
            new.append(_choose(logits, temperature, top_k, top_p, generator))
            bar.advance(1)
            if len(new) == max_new_tokens:
                break
            if stop_tokens and len(new) % STOP_CHECK_STEPS == 0:
                ended |= _among(torch.stack(new[-STOP_CHECK_STEPS:], 1), stops).any(1)
                if bool(ended.all()):
                    break
            logits = step(model, new[-1], cache)
    return _until_stop(torch.stack(new, 1), stops)


@torch.no_grad()
def prefill(
    model: MoDALanguageModel,
    tokens: Tensor,
    lengths: Tensor,
    cache: KVCache,
    *,
    chunk: int = 512,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Fill an empty cache with prompts, and predict the token after each.

    A prompt's padding writes keys past its end, which none of its tokens sees and which the tokens
    that are generated overwrite.

    Args:
        model: see :func:`generate`.
        tokens: (B, T), integer: prompts, padded on the right with any token ids.
        lengths: (B,) int32, tokens of each prompt, 1 .. T.
        cache: of B texts and a capacity of at least T; its lengths become ``lengths``.
        chunk: tokens of each prompt that pass the layers at a time.
        advance: called after each chunk with the number of its tokens.

    Returns:
        Logits (B, vocab_size) of the token after each prompt's last.

    Example:
        >>> from moda_ops.nn import KVCache, MoDAConfig, MoDALanguageModel, decode_step, prefill
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, cache = MoDALanguageModel(config), KVCache.allocate(config, 2, capacity=10)
        >>> prompts, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]).int()
        >>> prefill(model, prompts, lengths, cache).shape
        torch.Size([2, 256])
        >>> logits = decode_step(model, torch.tensor([7, 8]), cache)
        >>> expected = model(torch.tensor([[4, 8]]))[0, -1]
        >>> torch.allclose(logits[1], expected, atol=1e-5), cache.lengths
        (True, tensor([4, 2], dtype=torch.int32))
    """
    last, batch = lengths - 1, torch.arange(len(tokens), device=tokens.device)
    hidden: Tensor | None = None
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1], device=tokens.device)
        x = _hidden(model, part, positions, CachedStream(cache, start))
        here = x[batch, (last - start).clamp(0, part.shape[1] - 1)]
        hidden = here if hidden is None else here.where((last >= start)[:, None], hidden)
        if advance is not None:
            advance(part.shape[1])
    cache.lengths.copy_(lengths)
    assert hidden is not None
    return model.logits(hidden)


@torch.no_grad()
def decode_step(model: MoDALanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token to every text, and predict the next.

    It waits for nothing and allocates nothing that lasts: a CUDA graph of one call, captured by
    hand or by ``torch.compile``, can be replayed at any lengths. A text that has reached the
    capacity of the cache takes no further key, and its logits are then wrong.

    Args:
        model: see :func:`generate`.
        tokens: (B,), integer.
        cache: of the B texts; their keys and values are added in place, and ``lengths`` grow by 1.

    Returns:
        Logits (B, vocab_size) of the token after it.

    Example:
        >>> from moda_ops.nn import KVCache, MoDAConfig, MoDALanguageModel, decode_step
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, cache = MoDALanguageModel(config), KVCache.allocate(config, 2, capacity=10)
        >>> for token in range(3):
        ...     logits = decode_step(model, torch.tensor([token, 7]), cache)
        >>> logits.shape, cache.lengths
        (torch.Size([2, 256]), tensor([3, 3], dtype=torch.int32))
    """
    positions = cache.lengths[:, None]
    hidden = _hidden(model, tokens[:, None], positions, CachedStream(cache))
    cache.lengths.add_(1)
    return model.logits(hidden[:, 0])


def token_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities that tokens are drawn with.

    softmax(logits / temperature), then 0 for all but the ``top_k`` most probable tokens, then 0 for
    all but the smallest set of most probable tokens whose probability reaches ``top_p`` (nucleus
    sampling, arXiv 1904.09751, section 3.1), scaled to a sum of 1 after each. The most probable
    token always stays, and tokens as probable as the last one that stays, stay too.

    Args:
        logits: (..., vocab_size), floating-point.
        temperature: at least 1e-6.
        top_k: at least 1; None is all.
        top_p: in (0, 1]; None is 1.

    Returns:
        Probabilities in logits' shape, float32 (float64 for float64 logits).

    Example:
        >>> logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
        >>> token_probabilities(logits, 1.0, top_k=3)
        tensor([0.4444, 0.0000, 0.3333, 0.2222])
        >>> token_probabilities(logits, 1.0, top_p=0.6)
        tensor([0.5714, 0.0000, 0.4286, 0.0000])
        >>> token_probabilities(logits, 0.5)  # squares
        tensor([0.5333, 0.0333, 0.3000, 0.1333])
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    p = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered = p.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        p = p.masked_fill(p < least, 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Token ids (B,): the largest logit, or a draw.

    The smallest of exponential variables E_i / p_i is the i-th with probability p_i.
    ``torch.multinomial`` would do the same but wait for a GPU.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = token_probabilities(logits, temperature, top_k, top_p)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def _hidden(
    model: MoDALanguageModel, tokens: Tensor, positions: Tensor, stream: CachedStream
) -> Tensor:
    c = model.config
    rotary = rotary_angles(positions, c.head_dim, c.rope_base)
    return model.hidden(model.embedding(tokens), rotary, stream)


def _fitting_cache(cache: object, c: BlockConfig, x: Tensor, capacity: int) -> KVCache:
    """The given one, or a new one, in the dtype of keys that blocks compute of such x (B, T, C)."""
    batch, dtype = len(x), compute_dtype(x.dtype, x.device)
    if cache is None:
        return KVCache.allocate(c, batch, capacity, dtype=dtype, device=x.device)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be None or a KVCache, got {type(cache).__name__}")
    if not len(cache.k) == len(cache.v) == c.layers:
        raise ValueError(f"cache must have the model's {c.layers} layers, got {len(cache.k)}")
    for part in (*cache.k, *cache.v):
        room = part.shape[1]
        if part.shape != (batch, room, c.kv_heads, c.head_dim) or room < capacity:
            raise ValueError(
                f"cache must have tensors (B, capacity, H, D) = ({batch}, {capacity} or more, "
                f"{c.kv_heads}, {c.head_dim}), got {tuple(part.shape)}"
            )
        if part.dtype != dtype:
            raise TypeError(f"cache must have dtype {dtype}, as the model's keys, got {part.dtype}")
        if part.device != x.device:
            raise ValueError(f"cache must be on the model's device {x.device}, got {part.device}")
    return cache


@cached
def _compiled_step() -> Callable[[MoDALanguageModel, Tensor, KVCache], Tensor]:
    return torch.compile(decode_step, mode="reduce-overhead", fullgraph=True)


def _among(tokens: Tensor, stops: Tensor) -> Tensor:
    return (tokens[..., None] == stops).any(-1)


def _until_stop(tokens: Tensor, stops: Tensor) -> list[Tensor]:
    """The rows of (B, n), each cut after its first stop token."""
    hit = _among(tokens, stops)
    ends = torch.where(hit.any(1), hit.int().argmax(1) + 1, tokens.shape[1]).tolist()
    return [row[:end].clone() for row, end in zip(tokens, ends, strict=True)]


class _Bar:
    """A progress bar of ``total`` tokens; nothing where it is not wanted or there is no tqdm."""

    def __init__(self, total: int, shown: bool | None) -> None:
        self.bar: Any = None
        if shown is not False:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            waits = dict(disable=None, delay=LONG_RUN_SECONDS) if shown is None else {}
            self.bar = tqdm(total=total, unit=" tokens", **waits)

    def advance(self, tokens: int) -> None:
        if self.bar is not None:
            self.bar.update(tokens)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _check_sampling(temperature: object, top_k: object, top_p: object) -> None:
    t = _check_number("temperature", temperature)
    if t != 0 and not LEAST_TEMPERATURE <= t < math.inf:
        raise ValueError(
            f"temperature must be 0 (greedy) or a finite number of at least {LEAST_TEMPERATURE}, "
            f"got {temperature}"
        )
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if top_p is not None and not 0 < _check_number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def _check_seed(seed: object) -> None:
    if seed is None:
        return
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be None or an int, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0 .. 2^64 - 1, got {seed}")


def _checked_stops(stop_tokens: object, vocabulary: int) -> list[int]:
    if not isinstance(stop_tokens, Sequence) or not all(map(_is_int, stop_tokens)):
        raise TypeError(f"stop_tokens must be a sequence of ints, got {stop_tokens!r}")
    for token in stop_tokens:
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"stop_tokens must be in 0 .. {vocabulary - 1}, the vocabulary, got {token}"
            )
    return list(stop_tokens)


def _prompt_rows(prompts: object, vocabulary: int) -> list[Tensor]:
    """The prompts as int64 tensors (T,) on the CPU."""
    if not isinstance(prompts, (list, tuple, Tensor)):
        raise TypeError(
            "prompts must be a list of integer tensors or of lists of ints, or a tensor (B, T), "
            f"got {type(prompts).__name__}"
        )
    if isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise ValueError(f"prompts must be (B, T) if a tensor, got shape {tuple(prompts.shape)}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, got none")
    return [_prompt_row(f"prompts[{i}]", prompt, vocabulary) for i, prompt in enumerate(prompts)]


def _prompt_row(name: str, prompt: object, vocabulary: int) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dtype.is_floating_point or prompt.dtype.is_complex or prompt.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {prompt.dtype}")
        if prompt.dim() != 1:
            raise ValueError(f"{name} must have shape (T,), got {tuple(prompt.shape)}")
        row = prompt.cpu().long()
    elif isinstance(prompt, (list, tuple)) and all(map(_is_int, prompt)):
        row = torch.tensor(prompt, dtype=torch.long)
    else:
        raise TypeError(f"{name} must be an integer tensor or a list of ints, got {prompt!r}")
    if len(row) == 0:
        raise ValueError(f"{name} must hold at least one token, got none")
    for token in (int(row.min()), int(row.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name} must hold tokens in 0 .. {vocabulary - 1}, the vocabulary, got {token}"
            )
    return row
