"""The keyword-only arguments of the operators."""

import math
from typing import NamedTuple

OPTIONS = (
    "*, bool causal=True, Scalar? scale=None, SymInt? window_left=None, SymInt? window_right=None, "
    "Scalar? softcap=None, str plan='auto'"
)
"""The schema of all of them. Some operators have a part."""


class Options(NamedTuple):
    """What a caller gave, and what the schemas have in its place where he gave nothing.

    Keyword-only because the dispatcher drops positional arguments that equal their defaults, and
    register_autograd then refuses the gradients of an op with Tensor[] arguments.
    """

    causal: bool = True
    scale: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    plan: str = "auto"
    chunk_size: int = 1

    def resolved(self, head_dim: int) -> tuple[float, int | None, int | None, float | None, str]:
        """(scale, left, right, softcap, plan) as implementations take them: causal is right = 0."""
        scale = 1 / math.sqrt(head_dim) if self.scale is None else float(self.scale)
        softcap = None if self.softcap is None else float(self.softcap)
        right = 0 if self.causal else self.window_right
        return scale, self.window_left, right, softcap, self.plan
