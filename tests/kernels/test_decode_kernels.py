"""The decoding kernels against the NumPy reference, compiled or through Triton's interpreter."""

import itertools
from functools import partial

import pytest
import torch

import moda_kernels
from helpers import COMPILED, FORMS, assert_decodes, by_turns, in_dtypes, make_decoding
from moda_kernels import decode_merge, decode_split, tuning

HEAD_DIMS = (16, 24, 64, 70, 128, 256)
GROUPS = (1, 2, 3, 8)
TOKENS = (1, 3, 16)
PAGE_SIZES = (None, 16, 5, 64, 1, 128)


def run_kernels(scale=None, window=None, softcap=None):
    """``assert_decodes``'s run."""
    left = window[0] if isinstance(window, tuple) else window

    def run(case):
        q, _, _, k_depth, v_depth = case.inputs
        scale_ = q.shape[-1] ** -0.5 if scale is None else scale
        _, _, k_cache, v_cache, *rest = case
        return moda_kernels.decode(
            q, k_cache, v_cache, k_depth, v_depth, *rest, scale_, left, softcap
        )

    return run


def check(case, **options):
    assert_decodes(case, run_kernels(**options), **options)


@pytest.fixture
def force_splits(monkeypatch):
    def force(splits):
        monkeypatch.setattr(tuning, "decode_splits", lambda *_: splits)

    return force


def shapes():
    """Head dims x groups, each pair with one of the N, L, page sizes, DV, splits and forms, if the
    interpreter copes; and turns for each to meet each dtype."""
    turns = TOKENS, (0, 7, 1, 40), PAGE_SIZES, (None, None, 40), (1, 3, 2, 5, 20), FORMS
    turn = zip(*map(itertools.cycle, turns), (i % 3 > 0 for i in itertools.count()), strict=False)
    for (d, D), (g, G) in itertools.product(enumerate(HEAD_DIMS), enumerate(GROUPS)):
        N, L, page, DV, splits, form, append = next(turn)
        name = f"D{D}-G{G}-N{N}-L{L}-P{page}-DV{DV}-{splits}-{form}-{'new' if append else 'old'}"
        if COMPILED or D * G * N <= 4096:
            yield from in_dtypes(d + g, D, G, N, L, page, DV, splits, form, append, id=name)


@pytest.mark.parametrize(
    ("D", "G", "N", "L", "page_size", "DV", "splits", "form", "append", "dtype"), list(shapes())
)
def test_shapes(D, G, N, L, page_size, DV, splits, form, append, dtype, device, force_splits):
    force_splits(splits)
    check(
        make_decoding(
            [0, 137, 64] if append else [N, 66, 172], N, 2 * G, 2, D, L, DV=DV,
            page_size=page_size, append=append, dtype=dtype, device=device, form=form,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "splits", "page_size", "dtype"),
    by_turns([dict(window=37), dict(window=(0, 5)), dict(softcap=1.5)], [1, 3], [None, 16, 64]),
)
def test_window_and_softcap(options, splits, page_size, dtype, device, force_splits):
    """Tokens that have left the window are gone from the caches, and their pages too."""
    force_splits(splits)
    left = options.get("window")
    left = left[0] if isinstance(left, tuple) else left
    case = make_decoding(
        [3, 210, 258], 3, 6, 2, 16, 5, page_size=page_size, append=True, left=left,
        dtype=dtype, device=device,
    )  # fmt: skip
    check(case, **options)


@pytest.mark.parametrize("splits", [1, 2, 40])
@pytest.mark.parametrize("lengths", [[65, 64, 63], [128, 1, 2], [0, 33, 96]])
def test_lengths_around_blocks_and_splits(lengths, splits, device, force_splits):
    """More splits than blocks of keys, and than the merge takes at a time."""
    force_splits(splits)
    check(make_decoding(lengths, 1, 3, 1, 16, 2, page_size=16, device=device))
    check(make_decoding(lengths, 2, 3, 1, 16, 2, append=True, device=device))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("L", [0, 3])
@pytest.mark.parametrize("append", [False, True])
def test_empty_sequences(append, L, splits, device, force_splits):
    """Without new tokens in the cache the first rows see nothing of it, or nothing at all."""
    force_splits(splits)
    check(make_decoding([0, 0, 2], 4, 2, 1, 16, L, append=append, device=device))


@pytest.mark.parametrize(("G", "dtype"), by_turns([16, 64, 80]))
def test_groups_wider_than_a_tile(G, dtype, device, force_splits):
    force_splits(2)
    check(make_decoding([70, 5], 2, G, 1, 16, 9, append=True, dtype=dtype, device=device))


@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("G", [1, 8])
@pytest.mark.parametrize("form", FORMS)
def test_slots_are_split_too(form, G, splits, device, force_splits):
    force_splits(splits)
    case = make_decoding([0, 40], 1, G, 1, 16, 72, dtype=torch.float16, device=device, form=form)
    check(case)


def test_large_scores_stay_finite(device, force_splits):
    """Scores beyond exp's range, in the splits and between them."""
    force_splits(3)
    case = make_decoding([200, 77], 2, 2, 1, 16, 20, append=True, device=device)
    check(case._replace(inputs=case.inputs._replace(q=case.inputs.q * 60)))


def test_scale_and_window_beyond_32_bits(device):
    check(make_decoding([9, 40], 1, 2, 1, 16, 1, device=device), scale=0.3, window=2**40)


def test_what_does_not_fit_is_neither_written_nor_seen(device):
    """A cache of 6 whose sequences would have 5, 7 and 2^31 tokens."""
    case = make_decoding([3, 5, 2], 2, 2, 1, 16, 1, append=True, spare=0, device=device)
    seqlens = torch.tensor([3, 5, 2**31 - 1], dtype=torch.int32, device=device)
    case = case._replace(
        k_cache=case.k_cache[:, :6], v_cache=case.v_cache[:, :6], cache_seqlens=seqlens
    )
    out, _ = run_kernels()(case)
    assert not out[:2].isnan().any()
    for cache, x in ((case.k_cache, case.inputs.k), (case.v_cache, case.inputs.v)):
        assert torch.equal(cache[0, :5], x[0, :5]) and cache[0, 5:].isnan().all()
        assert torch.equal(cache[1], x[1, :6])
        assert torch.equal(cache[2, :2], x[2, :2]) and cache[2, 2:].isnan().all()
        assert cache._base[:, 0].isnan().all() and cache._base[:, 7:].isnan().all()


@pytest.mark.parametrize("beyond", [False, True])
def test_a_page_that_does_not_exist_holds_nothing(beyond, device):
    """The second token's page is the one before the first, or after the last."""
    case = make_decoding([3], 2, 2, 1, 16, 1, page_size=4, append=True, device=device)
    pages, first = len(case.k_cache), int(case.block_table[0, 0])
    table = torch.tensor([[first, pages if beyond else -1]], dtype=torch.int32, device=device)
    larger = [x.new_full((pages + 2, *x.shape[1:]), float("nan")) for x in (case.k_cache,) * 2]
    caches = [x[1:-1] for x in larger]
    for cache, x in zip(caches, (case.k_cache, case.v_cache), strict=True):
        cache.copy_(x)
    out, lse = run_kernels()(case._replace(k_cache=caches[0], v_cache=caches[1], block_table=table))
    expected, expected_lse = run_kernels()(
        make_decoding([3], 2, 2, 1, 16, 1, append=True, device=device)
    )
    assert torch.equal(out[:, 0], expected[:, 0]) and torch.equal(lse[..., 0], expected_lse[..., 0])
    assert not out.isnan().any()
    for x, new in zip(larger, (case.k_new, case.v_new), strict=True):
        assert torch.equal(x[1 + first, 3], new[0, 0])
        assert (~x.isnan()).any(-1).any(-1).nonzero().tolist() == [[1 + first, n] for n in range(4)]


@pytest.mark.parametrize(("B", "N"), [(0, 1), (2, 0)])
@pytest.mark.parametrize("append", [False, True])
def test_no_sequences_and_no_tokens(append, B, N, device):
    case = make_decoding([3] * B, N, 2, 1, 16, 2, append=append, device=device)
    out, lse = run_kernels()(case)
    assert out.shape == (B, N, 2, 16) and lse.shape == (B, 2, N)


def test_one_result_for_all_forms_of_a_cache(device, force_splits):
    """Bitwise: where keys lie makes no difference to the sums."""
    force_splits(3)
    results = [
        run_kernels()(
            make_decoding([40, 200], 2, 4, 2, 16, 3, page_size=page_size, append=append,
                          dtype=torch.float16, device=device)
        )
        for page_size, append in [(None, True), (16, True), (7, True), (64, True)]
    ]  # fmt: skip
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_splits_fill_the_multiprocessors():
    cpu, tile = torch.device("cpu"), tuning.Tile(16, 64, 4, 3)
    units, splits = tuning.multiprocessors(cpu), partial(tuning.decode_splits, cpu, tile)
    assert splits(256, 1, 10**6) == 2 * units
    assert splits(256, 2, 10**6) == units
    assert splits(512, 1, 10**6) == units
    assert splits(256, 2 * units + 1, 10**6) == 1
    assert splits(256, 1, 200) == 2
    assert splits(256, 1, 0) == 1


@pytest.mark.gpu
def test_one_compilation_serves_all_sizes_but_those_of_heads(force_splits):
    modules = decode_split, decode_merge
    kernels = [f for module in modules for n, f in vars(module).items() if n.endswith("_kernel")]
    assert len(kernels) == 2
    counts = []
    for length, B, L, window, splits in [
        (48, 2, 2, 5, 2), (1, 1, 1, 1, 3), (300, 16, 16, 16, 16), (64, 7, 33, 9, 5),
    ]:  # fmt: skip
        force_splits(splits)
        case = make_decoding(
            [length] * B, 1, 6, 3, 48, L, page_size=16, append=True, left=window,
            dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        check(case, window=window)
        counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    assert counts == counts[:1] * 4
