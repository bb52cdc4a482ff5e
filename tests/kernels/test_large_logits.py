"""Float32 gradients at logits of 1,000, through the kernels."""

import numpy as np
import pytest

import moda_kernels
from helpers import COMPILED
from moda_ops.operators import definition as ops
from test_large_numbers import test_gradients_are_as_precise_as_those_of_plain_pytorch as check


@pytest.mark.parametrize("run", ["attention", "chunks", "depth", "documents", "stream"])
def test_gradients_are_as_precise_as_those_of_plain_pytorch(run, device, monkeypatch):
    if not COMPILED:  # the interpreter rounds the product of a multiply-add, which no GPU does
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        def fma(self, x, y, z):
            exact = x.data.astype(np.float64) * y.data + z.data
            return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

        monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    check(run, 1000, device)
