"""The command line: ``moda-ops demo``, ``digits``, ``bench`` and ``doctor``."""

import sys
from importlib.util import find_spec
from pathlib import Path

import click
import torch

import moda_ops
from moda_ops.tools.bench.contenders import SWEEPS


def _device(context: click.Context, option: click.Parameter, name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no CUDA device is available", context, option)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and find_spec("triton") is None:
        message = "a CUDA device needs Triton, which is not installed; --device cpu does not"
        raise click.BadParameter(message, context, option)
    return torch.device(name)


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    callback=_device,
    help="auto takes a GPU if there is one.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moda_ops.__version__, prog_name="moda-ops")
def main() -> None:
    """Mixture-of-Depths Attention operators for torch.compile.

    Train a small model (demo, digits), time the operators beside their parts and peers (bench), see
    what runs on this machine and whether it is right (doctor).
    """


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/demo"),
    show_default=True,
    help="Folder for checkpoint.pt, loss.png and sample.txt.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=120,
    show_default=True,
    help="Training time; compilation comes on top.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Stop after this many steps, if earlier.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
@click.pass_context
def demo(
    ctx: click.Context,
    output: Path,
    seconds: float,
    steps: int | None,
    seed: int,
    device: torch.device,
) -> None:
    """Train a small MoDA language model on the Python standard library's source."""
    require("demo", "matplotlib", "tqdm")
    from moda_ops.tools.demo import FILES, prepare_output, run

    by_default = ctx.get_parameter_source("output") is click.core.ParameterSource.DEFAULT
    try:
        prepare_output(output, parents=by_default)
    except OSError as error:
        raise click.ClickException(f"cannot write to --output: {error}") from None
    try:
        passed = run(output, seconds=seconds, steps=steps, seed=seed, device=device)
    except KeyboardInterrupt:
        kept = [str(output / name) for name in FILES if (output / name).exists()]
        click.echo(f"\nInterrupted. Kept: {', '.join(kept) or 'nothing yet'}.", err=True)
        sys.exit(130)
    sys.exit(0 if passed else 1)


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/digits"),
    show_default=True,
    help="Folder for digits.json.",
)
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Train with seeds 0 to N - 1.",
)
@device_option
def digits(output: Path, steps: int, seeds: int, device: torch.device) -> None:
    """Train image classifiers with and without depth on scikit-learn's digits."""
    require("digits", "sklearn", "tqdm")
    from moda_ops.tools.digits import DEPTHS, run

    make_folder(output)
    run(output, depths=DEPTHS, steps=steps, seeds=seeds, device=device, echo=click.echo)


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/bench"),
    show_default=True,
    help="Folder for bench.json and the plots.",
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    type=click.Choice(list(SWEEPS)),
    help="Which shapes; may be repeated. tokens, groups, slots: those of the paper's Table 2. "
    "[default: main; on a CPU tiny]",
)
@click.option(
    "--only",
    "names",
    multiple=True,
    metavar="NAME",
    help="Time this row alone, as moda or cuDNN; may be repeated. A wrong NAME lists them all.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="[default: bfloat16; on a CPU float32]",
)
@device_option
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.2,
    show_default=True,
    help="How long each pass of each row is timed.",
)
def bench(
    output: Path,
    sweeps: tuple[str, ...],
    names: tuple[str, ...],
    dtype: str | None,
    device: torch.device,
    seconds: float,
) -> None:
    """Time the operator, its parts and its peers side by side; write JSON and plots.

    Each row is compared with float64 before it is timed. The exit code is 1 if a row is wrong, or
    if one of the operator fails; a peer may fail, and any row may need more memory than there is.
    """
    require("bench", "matplotlib", "tabulate", "tqdm")
    from moda_ops.tools.bench.contenders import contenders
    from moda_ops.tools.bench.report import run

    known = [contender.name for contender in contenders(device)]
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"{name!r} is not among the contenders here: {', '.join(known)}",
                param_hint="--only",
            )
    make_folder(output)
    on_cpu = device.type == "cpu"
    right = run(
        output,
        sweeps=list(sweeps) or ["tiny" if on_cpu else "main"],
        names=list(names) or known,
        dtype=getattr(torch, dtype or ("float32" if on_cpu else "bfloat16")),
        device=device,
        seconds=seconds,
        echo=click.echo,
    )
    sys.exit(0 if right else 1)


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot write to --output: {error}") from None


def require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"moda-ops {extra} needs {' and '.join(missing)}: pip install 'moda-ops[{extra}]'"
        )


@main.command()
def doctor() -> None:
    """Report versions and devices, and check the operator on each device."""
    from moda_ops.tools.doctor import report

    sys.exit(0 if report() else 1)
