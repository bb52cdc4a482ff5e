"""What must hold of the operator whatever its form: symmetries, merges and limits."""

import numpy as np
import pytest

from moda_reference import attention, attention_backward, attention_tiled

forms = pytest.mark.parametrize("form", [attention, attention_tiled])


@forms
def test_order_of_slots_does_not_matter(form, make_inputs, assert_same):
    inputs = make_inputs(L=5)
    order = [3, 0, 4, 2, 1]
    shuffled = inputs | {name: inputs[name][:, :, order] for name in ("k_depth", "v_depth")}
    assert_same(form(**shuffled), form(**inputs))

    dout = np.ones_like(form(**inputs)[0])
    expected = attention_backward(dout, **inputs).dk_depth[:, :, order]
    assert_same(attention_backward(dout, **shuffled).dk_depth, expected)


@forms
def test_key_sets_merge_by_lse(form, make_inputs, assert_same):
    x = make_inputs(T=7, S=4, L=5)  # the first rows see nothing of the sequence
    none = {"k": x["k"][:, :0], "v": x["v"][:, :0]}
    parts = [
        form(x["q"], x["k"], x["v"]),
        form(x["q"], **none, k_depth=x["k_depth"][:, :, :2], v_depth=x["v_depth"][:, :, :2]),
        form(x["q"], **none, k_depth=x["k_depth"][:, :, 2:], v_depth=x["v_depth"][:, :, 2:]),
    ]
    lse = np.logaddexp.reduce([lse for _, lse in parts])
    out = sum(out * np.exp(part - lse).swapaxes(1, 2)[..., None] for out, part in parts)
    assert_same((out, lse), form(**x))


@forms
def test_a_slot_that_repeats_a_key_is_that_key_twice(form, make_inputs, assert_same):
    x = make_inputs(T=5, L=0)
    q, k, v = x["q"], x["k"], x["v"]
    out, lse = form(q, k, v, k_depth=[k], v_depth=[v])
    for t in range(5):
        keys, values = (np.concatenate([a[:, : t + 1], a[:, t : t + 1]], axis=1) for a in (k, v))
        out_t, lse_t = form(q[:, t : t + 1], keys, values)
        assert_same((out[:, t : t + 1], lse[:, :, t : t + 1]), (out_t, lse_t))


@forms
def test_depth_keys_are_read_by_their_own_token_and_kv_head_only(form, make_inputs):
    x = make_inputs(T=5, H=2, G=3)
    before = form(**x)[0]
    x["k_depth"][:, 2, :, 1] += 1
    x["v_depth"][:, 2, :, 1] += 1
    changed = (form(**x)[0] != before).any(axis=(0, 3))
    expected = np.zeros((5, 6), dtype=bool)
    expected[2, 3:] = True
    assert (changed == expected).all()


@forms
@pytest.mark.parametrize("mask", [{"causal": True}, {"causal": False, "window": 0}], ids=str)
def test_masks_never_touch_depth(form, mask, make_inputs, assert_same):
    x = make_inputs(S=0, L=3)
    assert_same(form(**x, **mask), form(**x, causal=False), tolerance=0)


@forms
def test_a_group_shares_its_kv_head(form, make_inputs, assert_same):
    x = make_inputs(H=2, G=3)
    repeated = {name: x[name].repeat(3, axis=-2) for name in ("k", "v", "k_depth", "v_depth")}
    assert_same(form(x["q"], **repeated), form(**x))


@forms
def test_queries_are_the_last_of_a_longer_sequence(form, make_inputs, assert_same):
    x = make_inputs(T=7)
    last = x | {name: x[name][:, 4:] for name in ("q", "k_depth", "v_depth")}
    out, lse = form(**x, window=(3, None))
    assert_same(form(**last, window=(3, None)), (out[:, 4:], lse[:, :, 4:]))


@forms
def test_scale_multiplies_and_defaults_to_the_root_of_d(form, make_inputs, assert_same):
    x = make_inputs(D=4)
    assert_same(form(**x), form(**x, scale=0.5))
    assert_same(form(**x, scale=0.6), form(**x | {"q": x["q"] * 0.3}, scale=2))
    zero_scale, _ = form(**x, scale=0, causal=False)
    values = np.concatenate([x["v"][:, None].repeat(5, axis=1), x["v_depth"]], axis=2)
    assert_same(zero_scale, values.mean(axis=2).repeat(3, axis=-2))


@forms
def test_softcap_bounds_every_score(form, make_inputs, assert_same):
    x = make_inputs(T=5, L=2)
    assert_same(form(**x, softcap=1e6), form(**x), tolerance=1e-9)
    _, lse = form(**x, softcap=0.01, causal=False)
    assert abs(lse - np.log(5 + 2)).max() < 0.01


@forms
def test_depth_scores_do_not_depend_on_position_if_depth_keys_are_rotated(
    form, make_inputs, assert_same
):
    """The rotary rule: a depth key is stored after rotation at its own token."""
    x = make_inputs(T=5, D=4)

    def at(start: float, *, rotate_depth: bool):
        position = start + np.arange(5.0)
        rotated = x | {name: rotate(x[name], position) for name in ("q", "k")}
        if rotate_depth:
            rotated["k_depth"] = rotate(x["k_depth"], position)
        return form(**rotated)

    assert_same(at(0, rotate_depth=True), at(100, rotate_depth=True), tolerance=1e-11)
    depth_alone = {"k": x["k"][:, :0], "v": x["v"][:, :0]}
    rotated = x | {name: rotate(x[name], np.arange(5.0)) for name in ("q", "k_depth")}
    assert_same(form(**rotated | depth_alone), form(**x | depth_alone))
    assert abs(at(0, rotate_depth=False)[1] - at(100, rotate_depth=False)[1]).max() > 0.1


def rotate(x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rotary embedding of x (B, T, ..., D): pair i turns by position / 10^i."""
    half = x.shape[-1] // 2
    angle = np.multiply.outer(position, 10.0 ** -np.arange(half))
    angle = angle.reshape(len(position), *[1] * (x.ndim - 3), half)
    pair = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([pair.real, pair.imag], axis=-1)
