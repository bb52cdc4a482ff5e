"""What the public function adds to the implementation it calls, at shapes of one element on a CPU.

"implementation" is ``moda_ops.eager`` called directly; "inference" adds argument checks and the
dispatcher, "training" also autograd.
"""

from typing import Any

import pytest
import torch

from moda_ops import eager, moda_attention


@pytest.mark.parametrize("slots", [0, 8, 72])
@pytest.mark.parametrize("call", ["implementation", "inference", "training"])
def test_host_overhead(benchmark: Any, slots: int, call: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 1, 1)
    k_depth, v_depth = ([torch.randn(1, 1, 1, 1) for _ in range(slots)] for _ in range(2))
    benchmark.group = f"{slots} slots"
    if call == "implementation":
        out, _ = benchmark(eager.attention, q, k, v, k_depth, v_depth, 1.0, None, 0, None)
    else:
        q.requires_grad_(call == "training")
        out = benchmark(moda_attention, q, k, v, k_depth, v_depth)
        assert out.requires_grad == (call == "training")
    assert out.shape == (1, 1, 1, 1)
