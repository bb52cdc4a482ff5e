"""What no query of a call sees may hold NaN or Inf: no result shows it, forward and backward."""

import itertools

import pytest
import torch

import moda_reference
from moda_ops import DepthSlots, DepthStream, moda_decode, moda_depth_mass, moda_sink_mass
from moda_ops.rules.autograd import flatten
from operators import make_call

POISON = [float("nan"), float("inf")]
ROWS = "q", "dout", "out", "dq", "k_depth", "v_depth", "dk_depth", "dv_depth"  # what tokens lead
SEQUENCE = [
    pytest.param("attention", dict(S=12), {}, id="keys left of the windows"),
    pytest.param("attention", dict(T=9, S=5), {}, id="queries before the keys"),
    pytest.param(
        "attention", dict(T=9, S=2), dict(causal=False, window_right=1), id="to the right"
    ),
    pytest.param("chunk_attention", dict(S=12), {}, id="chunks, keys left of the windows"),
    pytest.param("chunk_attention", dict(T=9, S=5), {}, id="chunks, queries before the keys"),
    pytest.param("attention_varlen", dict(T=20, S=28), {}, id="documents with padding"),
    pytest.param(
        "attention_varlen", dict(T=20, S=28), dict(causal=True, window_left=1), id="causal"
    ),
]
BORDERS = [2, 5, 5, 10, 12, 16], [3, 12, 15, 15, 20, 22]  # a document has no query, one has no key


def poison_call(name, inputs, options):
    """The call, and which sequence keys each query sees, [T, S]."""
    call = make_call(name, dtype=torch.float64, **inputs)
    options = call.options | options
    arguments = list(call.arguments)
    causal = options.get("causal", True)
    window = options.get("window_left"), options.get("window_right")
    if name != "attention_varlen":
        T, S = arguments[0].shape[1], arguments[1].shape[1]
        sees = moda_reference.visible(T, S, causal, window)
        return call._replace(options=options), torch.from_numpy(sees)
    device = arguments[0].device
    arguments[5:] = (torch.tensor(x, dtype=torch.int32, device=device) for x in BORDERS)
    sees = torch.zeros(len(arguments[0]), len(arguments[1]), dtype=torch.bool)
    for (a, b), (c, d) in zip(*map(itertools.pairwise, BORDERS), strict=True):
        sees[a:b, c:d] = torch.from_numpy(moda_reference.visible(b - a, d - c, causal, window))
    return call._replace(options=options, arguments=arguments), sees


def fill(call, named, keys, rows, value):
    """Copies with ``value`` where ``keys`` (S,) and ``rows`` (T,) say, by argument name."""

    def filled(name, x):
        if isinstance(x, list):
            return [filled(name, slot) for slot in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        tokens = 0 if call.name.startswith("attention_varlen") else 1
        if name in ("k", "v", "dk", "dv"):
            return x.index_fill(tokens, keys.nonzero()[:, 0], value)
        if name in ROWS:
            return x.index_fill(tokens, rows.nonzero()[:, 0], value)
        return x.index_fill(x.dim() - 1, rows.nonzero()[:, 0], value)  # lse, dlse

    return {name: filled(name, x) for name, x in named.items()}


def both_passes(call, sees, rows, value):
    """Results of forward and backward by name, of the clean inputs and of the poisoned ones."""
    keys = ~sees.any(0)
    results = []
    for poison in (None, value):
        named, saved = dict(zip(names(call.name), call.arguments, strict=True)), {}
        if poison is not None:
            named = fill(call, named, keys, rows, poison)
        out, lse = call._replace(arguments=list(named.values())).run()
        generator = torch.Generator().manual_seed(1)
        for name, x in (("dout", out), ("dlse", lse)):
            saved[name] = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        saved |= dict(out=out, lse=lse)
        if poison is not None:
            saved = fill(call, saved, keys, rows, poison)
        op = getattr(torch.ops.moda, f"{call.name}_backward")
        backward = [(saved | named)[name] for name in names(op.__name__)]
        grads = op(*backward, **call.options)
        results.append(dict(zip(("out", "lse", *GRADS), (out, lse, *grads), strict=True)))
    return results


GRADS = "dq", "dk", "dv", "dk_depth", "dv_depth"


def names(op):
    arguments = getattr(torch.ops.moda, op).default._schema.arguments
    return [x.name for x in arguments if not x.kwarg_only]


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("L", [0, 2])
@pytest.mark.parametrize(("name", "inputs", "options"), SEQUENCE)
def test_keys_that_no_query_sees(name, inputs, options, L, value):
    """And, without depth, queries that see nothing, whatever gradients arrive there."""
    call, sees = poison_call(name, inputs | dict(L=L), options)
    blind = ~sees.any(1)
    assert blind.any() or not sees.any(0).all()
    rows = blind if L == 0 else torch.zeros_like(blind)
    clean, poisoned = both_passes(call, sees, rows, value)
    for result in clean:
        for a, b in zip(flatten([clean[result]]), flatten([poisoned[result]]), strict=True):
            assert torch.equal(a, b), result


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize(("name", "inputs", "options"), SEQUENCE)
def test_queries_that_see_their_depth_alone(name, inputs, options, value):
    """What such a token holds, as in the padding of a pack, stays with the token."""
    call, sees = poison_call(name, inputs, options)
    rows = ~sees.any(1)
    chunk = call.options.get("chunk_size", 1)
    clean, poisoned = both_passes(call, sees, rows, value)
    theirs = rows.clone()
    for token in rows.nonzero()[:, 0].tolist():  # a chunk shares its depth
        theirs[token // chunk * chunk : token // chunk * chunk + chunk] = True
    for x, y in zip(
        *(fill(call, x, torch.zeros(0), theirs, 0.0).items() for x in (clean, poisoned)),
        strict=True,
    ):
        for a, b in zip(flatten([x[1]]), flatten([y[1]]), strict=True):
            assert torch.equal(a, b), x[0]


@pytest.mark.parametrize("value", POISON)
def test_documents_do_not_see_each_other(value):
    call, _ = poison_call("attention_varlen", dict(T=20, S=28), {})
    keys, rows = torch.zeros(28, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    rows[BORDERS[0][3] : BORDERS[0][4]] = keys[BORDERS[1][3] : BORDERS[1][4]] = True
    seen = torch.ones(1, 28, dtype=torch.bool) & ~keys
    clean, poisoned = both_passes(call, seen, rows, value)
    clean, poisoned = (fill(call, x, keys, rows, 0.0) for x in (clean, poisoned))
    for result in clean:
        for a, b in zip(flatten([clean[result]]), flatten([poisoned[result]]), strict=True):
            assert torch.equal(a, b), result


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("kind", [DepthStream, DepthSlots])
def test_padding_of_a_pack_in_a_stream(kind, value):
    """Three layers; the gradients that later readers hand on hold NaN in the padding, too."""
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(3, 1, 9, 2, 8, generator=generator, dtype=torch.float64)
    results = []
    for padding in (0.0, value):
        padded = draws.index_fill(2, torch.arange(6, 9), padding)
        leaves = [x.clone().requires_grad_() for x in padded]
        y, k, v = leaves
        stream = kind.allocate(3, 1, 9, 2, 8, dtype=y.dtype) if kind is DepthStream else kind()
        for layer in range(3):
            stream = stream.write(k * (layer + 1), v)
            y, stream = stream.attend(y, cu_seqlens=(cu, cu), window=1)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        results.append([x[:, :6] for x in (y, *grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("window", [None, 2])
def test_places_of_a_cache_that_are_not_read(window, page_size, value):
    """Past its length, left of the window, and in pages that no table names."""
    q = torch.randn(2, 3, 4, 8)
    k, v = torch.randn(2, 2, 16, 2, 8)
    lengths, results = torch.tensor([5, 9], dtype=torch.int32), []
    for fill_value in (0.0, value):
        caches = [x.clone() for x in (k, v)]
        for cache in caches:
            for b, length in enumerate(lengths.tolist()):
                cache[b, length:] = fill_value
                if window is not None:
                    cache[b, : length - 3 - window] = fill_value
        table = None
        if page_size is not None:
            caches = [
                torch.cat([x.flatten(0, 1), x.new_full((4, 2, 8), fill_value)]) for x in caches
            ]
            caches = [x.unflatten(0, (-1, page_size)) for x in caches]
            table = torch.arange(8, dtype=torch.int32).view(2, 4)
            table[:, 3] = torch.tensor([-1, 2**31 - 1])
        results.append(
            moda_decode(
                q, *caches, None, None, lengths, block_table=table, window=window, return_lse=True
            )
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", POISON)
def test_mass_of_tokens_that_saw_nothing(value):
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 7, 2, 8)
    lse = torch.full((1, 2, 5), float("-inf"))
    lse[..., :3] = 1.0
    borders = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3], [1, 5, 6])]
    results = []
    for fill_value in (0.0, value):
        q[:, 3:], k[:, 0], k[:, 6:] = fill_value, fill_value, fill_value
        results.append(
            [
                moda_depth_mass(q, [q], lse),
                moda_sink_mass(q, k, lse, keys=9, cu_seqlens=(*borders,)),
            ]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
