"""What ``moda-ops doctor`` reports: versions, devices, what runs where, and whether it is right."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import click
import torch

from moda_ops.tools.selfcheck import operator_errors

DTYPES = {
    "cpu": [torch.float32],
    "cuda": [torch.float32, torch.float16, torch.bfloat16],
}


def report() -> bool:
    """Print the report; True if every self-check passed."""
    _row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    _row("moda-ops", _version("moda-ops"))
    _row("torch", torch.__version__)  # whose build, +cpu or +cu130, its package may not tell
    for package in ("triton", "numpy"):
        _row(package, _version(package))
    click.echo()
    _row("cpu tensors", "plain PyTorch: the only implementation for a CPU")
    _row("cuda tensors", _cuda())
    if torch.cuda.is_available() and find_spec("triton"):
        for label, value in plans(torch.device("cuda"), torch.bfloat16):
            _row(label, value)
    click.echo()
    click.echo("self-check, forward and backward against moda_reference in float64")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    passed = [_check(name, dtype) for name in devices for dtype in DTYPES[name.partition(":")[0]]]
    return all(passed)


def _row(name: str, value: str) -> None:
    click.echo(f"{name:<17} {value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        if not find_spec("triton"):
            return f"none on {name}: the kernels need Triton, which is not installed"
        return f"Triton kernels (moda_kernels) on {name}, capability {major}.{minor}"
    if torch.version.cuda is None:
        return "none: this PyTorch is built without CUDA"
    return f"none: PyTorch is built for CUDA {torch.version.cuda} but sees no device"


def plans(device: torch.device, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Which plan "auto" gives each pass at some shapes of training, and why."""
    from moda_kernels import tuning
    from moda_kernels.launch import Problem
    from moda_kernels.plans import backward_plan, forward_plan

    rows = []
    for T, G, L, D in (
        (2048, 2, 47, 64),
        (4096, 8, 64, 64),
        (16384, 8, 64, 64),
        (4096, 8, 64, 128),
    ):
        q, k = (torch.empty(1, T, heads, D, device=device, dtype=dtype) for heads in (8 * G, 8))
        p = Problem(1, T, T, L, 8, G, D, D, D**-0.5, None, 0, None)
        two_kernels = tuning.forward_two_kernels(device, dtype, G, D, D, True)
        forward = forward_plan("auto", p, q, k, k, two_kernels)
        chosen = forward, backward_plan("auto", p, q, k, k, None)
        said = (f"{'split' if plan.library else 'fused'} ({plan.reason})" for plan in chosen)
        rows.append(
            (
                f"T={T} G={G} L={L} D={D}",
                f"{p.flops / 1e9:.0f} GFLOP: " + "forward {}, backward {}".format(*said),
            )
        )
    return rows


def _check(device: str, dtype: torch.dtype) -> bool:
    """Two slots, grouped heads, odd sizes; prints one line."""
    label = f"{device} {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(2, 67, heads, dim, generator=generator).to(device, dtype)

    q, k, v = random(6, 40), random(2, 40), random(2, 24)
    k_depth, v_depth = [random(2, 40) for _ in range(2)], [random(2, 24) for _ in range(2)]
    try:
        errors = operator_errors(q, k, v, k_depth, v_depth)
    except Exception as error:  # a report says what is broken; it does not break
        first_line = str(error).partition("\n")[0]
        _row(label, f"FAILED: {type(error).__name__}: {first_line}")
        return False
    ok = all(error.ok for error in errors)
    worst = max(errors, key=lambda error: error.error / error.tolerance)
    _row(label, f"{'ok' if ok else 'FAILED'}: relative error of {errors[0]}; of {worst}")
    return ok
