"""Launches are prepared once per layout: what that saves, and that no call gets another's."""

import pytest
import torch
from test_attention_kernels import run_kernels

from helpers import assert_matches_reference, make_inputs
from moda_kernels import backward_delta, backward_depth, backward_dkv, backward_dq, forward
from moda_kernels.launch import Launch, layout


class Recorder:
    """Stands for a Triton kernel, or for its compiled code: notes its launches."""

    arg_names = ("q_ptr", "n", "BLOCK")

    def __init__(self, name, calls, result=None):
        self.name, self.calls, self.result = name, calls, result

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.calls.append((self.name, grid, arguments, constants))
            return self.result

        return launch


def test_triton_sees_the_first_call_alone():
    calls = []
    prepared = Launch(
        Recorder("kernel", calls, result=Recorder("compiled", calls)), 7, 5, BLOCK=64, num_warps=2
    )
    for pointer in "abc":
        prepared(pointer)
    assert calls == [
        ("kernel", (7, 1, 1), ("a", 5), dict(BLOCK=64, num_warps=2)),
        ("compiled", (7, 1, 1), ("b", 5, None), {}),  # a place for BLOCK, none for num_warps
        ("compiled", (7, 1, 1), ("c", 5, None), {}),
    ]


def test_the_interpreter_sees_every_call():
    calls = []
    prepared = Launch(Recorder("kernel", calls), 7, 5, BLOCK=64)
    for pointer in "ab":
        prepared(pointer)
    assert [call[2] for call in calls] == [("a", 5), ("b", 5)]


def shifted(x, by):
    """The same numbers in the same layout, but ``by`` elements after an allocation's start."""
    larger = x.new_full((x.numel() + by,), float("nan"))
    return larger[by:].view(x.shape).copy_(x)


@pytest.mark.parametrize("form", ["list", "packed"])
def test_calls_of_one_shape_differ_in_numbers_and_alignment(form, device):
    for by in (0, 0, 1, 3, 0):
        inputs = make_inputs(
            2, 13, 4, 2, 16, 3, dtype=torch.float16, device=device, form=form, seed=by
        )
        assert_matches_reference(inputs.map(lambda x, by=by: shifted(x, by)), run_kernels())


def test_a_layout_says_what_triton_inspects():
    x = torch.zeros(8, 8)
    others = [x.half(), x.T, x[:4], shifted(x, 1), x.to("meta")]
    assert len({layout(x), *map(layout, others)}) == 6
    assert layout(x) == layout(x.clone())
    assert layout(None) is None


@pytest.mark.gpu
def test_one_compilation_serves_all_lengths_depths_and_windows():
    passes = forward, backward_delta, backward_depth, backward_dq, backward_dkv
    kernels = [f for module in passes for n, f in vars(module).items() if n.endswith("_kernel")]
    assert len(kernels) == 5

    def compiled():
        return sum(len(kernel.device_caches[0][0]) for kernel in kernels)

    counts = []
    for T, L, window in [(48, 2, 5), (1, 1, 1), (17, 16, 16), (64, 3, 4), (300, 33, 100)]:
        inputs = make_inputs(2, T, 6, 3, 48, L, dtype=torch.bfloat16, device="cuda")
        assert_matches_reference(inputs, run_kernels(window=window), window=window)
        counts.append(compiled())
    assert counts == counts[:1] * 5
