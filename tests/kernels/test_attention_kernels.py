"""Every kernel against the NumPy reference, compiled or through Triton's interpreter."""

import itertools

import pytest
import torch

import moda_kernels
from helpers import (
    COMPILED,
    DTYPES,
    FORMS,
    Inputs,
    assert_matches_reference,
    in_dtypes,
    make_inputs,
)
from moda_kernels import forward, tuning

HEAD_DIMS = (16, 24, 64, 70, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 5, 8, 64)
SLOTS = (0, 1, 7, 72 if COMPILED else 20)
TOKENS = (1, 63, 111, 128, 1000) if COMPILED else (1, 9, 17)


def run_kernels(causal=True, scale=None, window=None, softcap=None, **more):
    """``assert_matches_reference``'s run: options in the form that the launchers take."""
    left, right = window if isinstance(window, tuple) else (window, window)

    def run(inputs, dout, dlse):
        options = (scale or inputs.q.shape[-1] ** -0.5, left, 0 if causal else right, softcap)
        out, lse = moda_kernels.attention(*inputs, *options, **more)
        grads = moda_kernels.attention_backward(dout, dlse, *inputs, out, lse, *options, **more)
        return out, lse, Inputs(*grads)

    return run


def check(inputs, **options):
    assert_matches_reference(inputs, run_kernels(**options), **options)


def heads():
    """Head dims x groups, if the interpreter copes, and turns for each to meet each dtype."""
    for (d, D), (g, G) in itertools.product(enumerate(HEAD_DIMS), enumerate(GROUPS)):
        if COMPILED or D * G <= 1024:
            yield d + g, D, G


def shapes():
    """Head dims x groups, each pair with one of the L, T, S - T, DV and depth forms in turn; and
    values narrower than keys in rows that no vector load fits."""
    turns = [SLOTS, TOKENS, (0, 0, 37), (None, None, None, 40), FORMS]
    turn = zip(*map(itertools.cycle, turns), strict=False)
    for dtype, D, G in heads():
        L, T, extra, DV, form = next(turn)
        name = f"D{D}-G{G}-L{L}-T{T}-S{T + extra}-DV{DV}-{form}"
        yield from in_dtypes(dtype, D, G, L, T, T + extra, DV, form, id=name)
    for dtype, (D, DV) in enumerate([(20, 12), (40, 24)]):
        for T in (13, 67) if COMPILED else (13,):
            yield from in_dtypes(dtype, D, 3, 2, T, T + 4, DV, "list", id=f"D{D}-DV{DV}-T{T}")


@pytest.mark.parametrize(("D", "G", "L", "T", "S", "DV", "form", "dtype"), list(shapes()))
def test_shapes(D, G, L, T, S, DV, form, dtype, device):
    B, H = (1, 1) if G == 64 else (2, 2) if COMPILED or T < 17 else (1, 2)
    inputs = make_inputs(B, T, G * H, H, D, L, S=S, DV=DV, dtype=dtype, device=device, form=form)
    check(inputs)


def masks():
    masks = [
        (False, None),
        (True, 11),
        (False, (20, 3)),
        (False, (None, 5)),
        (False, (4, None)),
        (True, 0),
    ]
    for (m, mask), (s, softcap) in itertools.product(enumerate(masks), enumerate([None, 1.5])):
        yield from in_dtypes(m + s, *mask, softcap, id=f"{mask}-{softcap}")


@pytest.mark.parametrize(("causal", "window", "softcap", "dtype"), list(masks()))
def test_masks_and_softcap(causal, window, softcap, dtype, device):
    """T and S span several blocks, so that blocks before, in and after the band all occur."""
    T, S = (90, 140) if COMPILED or dtype is torch.float16 else (50, 100)  # in smaller blocks
    L = 5 if COMPILED or window in (None, 0) else 0  # masks do not concern depth
    inputs = make_inputs(1, T, 2, 1, 16, L, S=S, dtype=dtype, device=device, form="embedded")
    check(inputs, causal=causal, window=window, softcap=softcap)


@pytest.mark.parametrize("causal", [True, False])
def test_window_beyond_32_bits(causal, device):
    inputs = make_inputs(1, 9, 2, 1, 16, 1, S=12, device=device)
    check(inputs, causal=causal, window=2**40)


@pytest.mark.parametrize("L", [0, 3])
@pytest.mark.parametrize(("T", "S"), [(7, 0), (70, 20) if COMPILED else (30, 9)])
def test_rows_without_keys(T, S, L, device):
    """S < T hides all keys from the first rows; without depth these see nothing at all."""
    check(make_inputs(2, T, 3, 1, 16, L, S=S, device=device))


@pytest.mark.parametrize(("G", "dtype"), [*in_dtypes(0, 80, id="80"), *in_dtypes(1, 130, id="130")])
def test_group_wider_than_a_block(G, dtype, device):
    check(make_inputs(1, 3, G, 1, 64, 40, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("G", [1, 2, 3, 8, 16] if COMPILED else [1, 3, 8])
def test_several_slot_blocks(G, dtype, device):
    """The online softmax over depth is rescaled from block to block, in dots and in sums."""
    check(make_inputs(1, 6, G, 1, 16, 40, dtype=dtype, device=device, form="packed"))


@pytest.mark.parametrize("form", FORMS)
def test_scale_and_batch(form, device):
    check(make_inputs(3, 5, 6, 3, 32, 4, device=device, form=form), scale=0.3)


def test_large_scores_stay_finite(device):
    """Scores beyond exp's range: every rescaling must go through the running maximum."""
    inputs = make_inputs(1, 70 if COMPILED else 40, 2, 1, 16, 20, device=device)
    check(inputs._replace(q=inputs.q * 60))


def test_results_do_not_depend_on_the_form_of_depth(device):
    T = 33 if COMPILED else 9
    packed = make_inputs(2, T, 8, 1, 64, 19, dtype=torch.float16, device=device, form="packed")
    slots = packed._replace(
        k_depth=list(packed.k_depth[0].unbind(2)), v_depth=list(packed.v_depth[0].unbind(2))
    )
    dout, dlse = torch.randn(2, T, 8, 64).to(packed.q), torch.randn(2, 8, T).to(device)
    out, lse, grads = run_kernels()(packed, dout, dlse)
    slot_out, slot_lse, slot_grads = run_kernels()(slots, dout, dlse)
    assert torch.equal(out, slot_out) and torch.equal(lse, slot_lse)
    for a, b in zip(grads[:3], slot_grads[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(grads[3:], slot_grads[3:], strict=True):
        assert torch.equal(a[0], torch.stack(b, 2))


def test_runs_are_bitwise_equal(device):
    T, runs = (40, 20) if COMPILED else (9, 2)
    inputs = make_inputs(1, T, 4, 2, 64, 9, dtype=torch.float16, device=device)
    dout, dlse = torch.randn(1, T, 4, 64).to(inputs.q), torch.randn(1, 4, T).to(device)
    runs = [run_kernels()(inputs, dout, dlse) for _ in range(runs)]
    for out, lse, grads in runs[1:]:
        for a, b in zip(grads.leaves(), runs[0][2].leaves(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(out, runs[0][0]) and torch.equal(lse, runs[0][1])


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_empty_batch_and_sequence(B, T, device):
    inputs = make_inputs(B, T, 2, 1, 16, 2, S=3, device=device)
    out, lse, grads = run_kernels()(inputs, inputs.q, torch.zeros(B, 2, T, device=device))
    assert out.shape == inputs.q.shape and lse.shape == (B, 2, T)
    assert all(
        not g.any() and g.shape == x.shape
        for g, x in zip(grads.leaves(), inputs.leaves(), strict=True)
    )


@pytest.fixture(params=[2, 3])
def parts(request, monkeypatch):
    monkeypatch.setattr(tuning, "backward_dkv_parts", lambda *sizes: request.param)


def shared_rows():
    masks = [(True, None), (False, None), (True, 30), (False, (50, 9))]
    lengths = [(1, 5), (70, 100) if COMPILED else (40, 70)]
    for (m, mask), (n, (T, S)) in itertools.product(enumerate(masks), enumerate(lengths)):
        yield from in_dtypes(m // 2 + n, *mask, T, S, id=f"{mask}-T{T}-S{S}")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("causal", "window", "T", "S", "dtype"), list(shared_rows()))
def test_programs_share_the_rows_of_keys(T, S, causal, window, dtype, device):
    L = 2 if COMPILED else 0  # other kernels do depth
    inputs = make_inputs(1, T, 3, 1, 24, L, S=S, DV=40, dtype=dtype, device=device)
    check(inputs, causal=causal, window=window)


@pytest.mark.usefixtures("parts")
def test_shares_add_up_on_the_running_gradient(device):
    inputs = make_inputs(1, 20, 4, 1, 16, 0, device=device)
    options = 0.25, None, 0, None
    out, lse = moda_kernels.attention(*inputs, *options)
    saved = out, None, *inputs, out, lse, *options, "fused"
    _, dk, dv, *_ = moda_kernels.attention_backward(*saved)
    running = torch.randn_like(dk), torch.randn_like(dv), [], []
    grads = torch.empty_like(dk), torch.empty_like(dv), [], []
    moda_kernels.attention_backward(*saved, grads=grads, running=running[:2])
    torch.testing.assert_close(grads[:2], (dk + running[0], dv + running[1]), rtol=0, atol=0)


def test_programs_share_rows_where_they_are_few(monkeypatch):
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    measured = {(64, 65536): 8, (128, 8192): 4, (256, 16384): 2, (512, 32768): 1, (64, 2048): 4}
    parts = [tuning.backward_dkv_parts(torch.device("cpu"), *sizes) for sizes in measured]
    assert parts == list(measured.values())
    assert tuning.backward_dkv_parts(torch.device("cpu"), 1, 512) == 1


@pytest.mark.parametrize(
    ("G", "T"), [(2, 130), (2, 170), (8, 40)] if COMPILED else [(2, 66), (2, 100), (8, 20)]
)
def test_the_order_of_programs_makes_no_difference(G, T, monkeypatch, device):
    inputs = make_inputs(1, T, 2 * G, 2, 16, 5, dtype=torch.float16, device=device, form="packed")
    results = []
    for mixed in (True, False):
        monkeypatch.setattr(tuning, "forward_mixed", lambda *a, mixed=mixed: mixed)
        forward._prepare.cache_clear()
        results += moda_kernels.attention(*inputs, 0.25, None, 0, None, "fused")
    forward._prepare.cache_clear()
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.usefixtures("h100")
def test_programs_are_mixed_where_that_was_faster():
    """Rows of docs/performance.md: B H tiles programs, D, packed or a list."""
    faster = {(1024, 64, True), (2048, 64, True), (512, 64, True)}
    slower = {(4096, 64, True), (8192, 64, True), (1024, 128, True), (1024, 64, False)}
    for programs, D, packed in faster | slower:
        mixed = tuning.forward_mixed(torch.device("cpu"), programs, D, D, packed)
        assert mixed == ((programs, D, packed) in faster), (programs, D, packed)


@pytest.mark.usefixtures("h100")
def test_depth_has_a_kernel_of_its_own_where_sums_cost_more_than_a_pass():
    sizes = itertools.product((1, 2, 3, 4, 6, 8, 12, 16), (True, False))
    two_kernels = {
        (G, packed)
        for G, packed in sizes
        if tuning.forward_two_kernels(torch.device("cpu"), torch.float16, G, 64, 64, packed)
    }
    assert two_kernels == {(G, packed) for G in (3, 6, 12) for packed in (True, False)} | {
        (4, False)
    }


@pytest.mark.parametrize(
    ("G", "dtype"),
    [case for i, G in enumerate([1, 2, 3, 8, 80]) for case in in_dtypes(i, G, id=str(G))],
)
def test_depth_alone(G, dtype, device):
    check(make_inputs(2, 3, G, 1, 64, 20, S=0, dtype=dtype, device=device, form="packed"))
