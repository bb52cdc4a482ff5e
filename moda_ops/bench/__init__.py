"""``moda-ops bench``: the operator, its parts and its peers, timed side by side."""

from moda_ops.bench.contenders import SWEEPS, contenders
from moda_ops.bench.report import run

__all__ = ["SWEEPS", "contenders", "run"]
