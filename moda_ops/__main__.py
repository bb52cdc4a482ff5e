"""``python -m moda_ops``."""

from moda_ops.tools.cli import main

main(prog_name="python -m moda_ops")
