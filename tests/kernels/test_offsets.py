"""Strides of any size: offsets are 64-bit numbers in every kernel."""

import numpy as np
import pytest
import torch

import moda_kernels
from helpers import Inputs, make_cotangents, make_inputs

STRIDE = 2**29  # elements from one token, or page, to the next: 4 of them overflow 32 bits
TOKENS = 5


class Far:
    """Copies of tensors whose axis 1 has STRIDE, side by side in 10 GB; a CPU touches few."""

    def __init__(self, dtype, device):
        size = 2**31 + TOKENS * STRIDE  # an offset that wraps around still lies inside
        if device.type == "cpu":
            self.memory = torch.from_numpy(np.zeros(size, np.float16))
        else:
            self.memory = torch.zeros(size, dtype=dtype, device=device)
        self.start = 2**31

    def __call__(self, x):
        inner = x.new_empty(x[:, :1].shape).stride()
        strides = inner[0], STRIDE, *inner[2:]
        far = self.memory.as_strided(x.shape, strides, self.start)
        self.start += x[:, :1].numel()
        return far.copy_(x)


@pytest.fixture
def far(device):
    return Far(torch.float16, device)


def assert_same(results, expected):
    for actual, x in zip(results, expected, strict=True):
        assert torch.equal(actual, x)


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize(
    ("operator", "G"),
    [("attention", 16), ("attention_varlen", 2), ("chunk_attention", 2)],  # at 16 in two tiles
)
def test_attention_and_its_backward(operator, G, form, far, device):
    inputs = make_inputs(1, TOKENS, G, 1, 16, 2, dtype=torch.float16, device=device, form=form)
    dout, dlse = make_cotangents(inputs)
    name, arguments = "attention", (0.25, None, 0, None)
    if operator == "attention_varlen":
        cu = torch.tensor([0, 1, TOKENS], dtype=torch.int32, device=device)
        arguments = *arguments, "fused", (cu, cu)
    elif operator == "chunk_attention":
        name, arguments = operator, (2, 0.25, None, None)
    results = []
    for case, grad in ((inputs, dout), (inputs.map(far), far(dout))):
        out, lse = getattr(moda_kernels, name)(*case, *arguments)
        grads = getattr(moda_kernels, f"{name}_backward")(grad, dlse, *case, out, lse, *arguments)
        results.append([out, lse, *Inputs(*grads).leaves()])
    assert_same(*results)


def test_gradients_that_are_written_and_added_to(far, device):
    inputs = make_inputs(1, TOKENS, 2, 1, 16, 2, dtype=torch.float16, device=device, form="packed")
    dout, _ = make_cotangents(inputs)
    arguments = 0.25, None, 0, None, "fused", None
    out, lse = moda_kernels.attention(*inputs, *arguments)
    into = [torch.zeros_like(x) for x in inputs.leaves()[1:]]
    running = [torch.ones_like(x) for x in into]
    results = []
    for place in (lambda x: x, far):
        (k, v, *depth), (k_running, v_running, *depth_running) = (
            [place(x) for x in tensors] for tensors in (into, running)
        )
        grads = moda_kernels.attention_backward(
            dout, None, *inputs, out, lse, *arguments,
            grads=(k, v, *([x] for x in depth)),
            running=(k_running, v_running, *([x] for x in depth_running)),
        )  # fmt: skip
        results.append(Inputs(*grads).leaves())
    assert_same(*results)


def test_depth_alone_and_its_mass(far, device):
    inputs = make_inputs(
        1, TOKENS, 2, 1, 16, 2, S=0, dtype=torch.float16, device=device, form="packed"
    )
    dout, _ = make_cotangents(inputs)
    arguments = 0.25, None, None, None
    results = []
    for case, grad in (
        (inputs, dout),
        (
            inputs._replace(
                q=far(inputs.q), k_depth=[far(inputs.k_depth[0])], v_depth=[far(inputs.v_depth[0])]
            ),
            far(dout),
        ),
    ):
        out, lse = moda_kernels.attention(*case, *arguments)
        grads = moda_kernels.attention_backward(grad, None, *case, out, lse, *arguments)
        mass = moda_kernels.depth_mass(case.q, case.k_depth, lse, 0.25, None)
        results.append([out, lse, mass, *Inputs(*grads).leaves()])
    assert_same(*results)


@pytest.mark.parametrize("page_size", [None, 16, 3])
def test_decoding(page_size, far, device):
    S = TOKENS * (page_size or 1)
    q, k, v, *depth = make_inputs(1, 2, 2, 1, 16, 1, S=S, dtype=torch.float16, device=device)
    new = k[:, :2] + 1, v[:, :2] + 1
    lengths = torch.tensor([S - 2], dtype=torch.int32, device=device)
    table = None
    if page_size is not None:  # pages far from each other
        k, v = (x.view(TOKENS, page_size, 1, 16) for x in (k, v))
        table = torch.arange(TOKENS, dtype=torch.int32, device=device)[None]
    results = []
    for place in (torch.clone, far):
        if table is not None and place is far:
            caches = [far(x.transpose(0, 1)).transpose(0, 1) for x in (k, v)]
        else:
            caches = [place(x) for x in (k, v)]
        out = moda_kernels.decode(q, *caches, *depth, lengths, table, *new, 0.25, None, None)
        results.append([*out, *caches])
    assert_same(*results)
