"""Bounded depth slots: what each policy costs in loss, and what a bound saves in memory.

    python tests/benchmarks/bounded_slots.py [--json FILE] [--only loss memory]

loss     bits per byte on held-out text after a short training run, the same bytes in the same order
         for every policy, beside the unbounded model and the one without depth; the demo's text and
         recipe, deeper and narrower. "most mass" is chosen by the unbounded model of the first
         seed, on training text.
memory   of models of several depths: saved for backward (the distinct storages that autograd holds
         after forward, parameters left out), the largest gradient of depth slots in backward, and
         in inference the most depth slots that are alive at a time.

A loss that is not finite, or more slots than a bound allows, makes the exit code 1.
"""

import argparse
import gc
import json
import math
import pathlib
import sys
import time
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "benchmarks")]

from stream_memory import MIB, saved_bytes  # noqa: E402

from moda_ops import DepthSlots  # noqa: E402
from moda_ops.nn import MoDAConfig, MoDALanguageModel, measure_depth_mass  # noqa: E402
from moda_ops.policies import every, first_and_recent, most_mass  # noqa: E402
from moda_ops.tools import demo  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Row = dict[str, Any]


def newest_of_attention(layer: int, slots: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """A user's own policy: no slots of feed-forward layers."""
    return tuple(slot for slot in slots if slot % 2 == 0)[-budget:]


def trained(
    config: MoDAConfig,
    recipe: demo.Recipe,
    texts: tuple[Tensor, Tensor],
    arguments: argparse.Namespace,
    seed: int,
) -> tuple[MoDALanguageModel, float]:
    """The model after training, and its bits per byte on held-out text."""
    steps = arguments.steps
    torch.manual_seed(seed)
    model = MoDALanguageModel(config).to(DEVICE)
    generator, fixed = (torch.Generator().manual_seed(n) for n in (seed, 0))
    held_out = [demo.draw(texts[1], recipe, fixed) for _ in range(arguments.held_out)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_on(batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = (x.to(DEVICE) for x in batch)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / math.log(2)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * demo.schedule(step / steps)
        loss_on(demo.draw(texts[0], recipe, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model, sum(loss_on(batch).item() for batch in held_out) / len(held_out)


def loss(arguments: argparse.Namespace) -> list[Row]:
    texts, recipe = demo.read_corpus(), replace(demo.RECIPES["cpu"], learning_rate=2e-3)
    config = replace(
        recipe.model, layers=arguments.layers, width=64, heads=4, head_dim=16, hidden=192
    )
    budget, rows, mass = arguments.budget, [], None
    for seed in range(arguments.seeds):
        models = {
            "all slots": config,
            "no depth": replace(config, depth="residual"),
            "recent": config.bounded(budget),
            "first and recent": config.bounded(budget, first_and_recent(1)),
            "every third": config.bounded(budget, every(3)),
            "most mass": config,
            "attention's, recent": config.bounded(budget, newest_of_attention),
        }
        for name, model_config in models.items():
            if name == "most mass":
                assert mass is not None
                model_config = config.bounded(budget, most_mass(mass))
            start = time.perf_counter()
            model, bits = trained(model_config, recipe, texts, arguments, seed)
            if mass is None:
                generator = torch.Generator().manual_seed(1)
                batches = [demo.draw(texts[0], recipe, generator)[0] for _ in range(4)]
                mass = measure_depth_mass(model, [batch.to(DEVICE) for batch in batches])
            keep = model_config.depth_keep
            rows.append(
                dict(
                    policy=name, seed=seed, bits_per_byte=bits, seconds=time.perf_counter() - start,
                    last_reads=None if keep is None else list(keep[-1]),
                )
            )  # fmt: skip
            print(" ", rows[-1], flush=True)
            if not math.isfinite(bits):
                sys.exit("failed: the loss is not finite")
    return rows


class Gradients(TorchDispatchMode):
    """The largest gradient of a stream's slots, in slots."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.moda.stream_attention_backward:
            self.most = max(self.most, len(result[2]))
        return result


class Alive(DepthSlots):
    """Counts the slots that are alive whenever one is written."""

    keys: tuple[Any, ...] = ()
    most = 0

    def write(self, k: Tensor, v: Tensor) -> "Alive":
        Alive.keys = *(key for key in Alive.keys if key() is not None), weakref.ref(k)
        Alive.most = max(Alive.most, len(Alive.keys))
        return Alive(*super().write(k, v))

    def keep(self, slots: Any) -> "Alive":
        return Alive(*super().keep(slots))


def memory(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for layers in arguments.depths:
        config = MoDAConfig(
            vocab_size=256, layers=layers, width=256, heads=4, kv_heads=4, head_dim=64, hidden=1024
        )
        for name, model_config in (
            ("no depth", replace(config, depth="residual")),
            ("all slots", config),
            ("recent", config.bounded(arguments.budget)),
            ("attention's, recent", config.bounded(arguments.budget, newest_of_attention)),
        ):
            with DEVICE:
                model, ids = MoDALanguageModel(model_config), torch.randint(256, (1, 64))
            saved = [
                saved_bytes(lambda s=s, m=model, x=ids: m(x, s).square().mean(), model)
                for s in (None, DepthSlots())
            ]
            loss = model(ids).square().mean()
            with Gradients() as gradients:
                loss.backward()
            gc.collect()
            Alive.keys, Alive.most = (), 0
            with torch.no_grad():
                model(ids, Alive())
            rows.append(
                dict(
                    layers=layers, policy=name, reads=sum(model_config.depth_reads()),
                    stream_saved_mib=saved[0] / MIB, list_saved_mib=saved[1] / MIB,
                    gradient_slots=gradients.most, inference_slots=Alive.most,
                )
            )  # fmt: skip
            print(" ", rows[-1], flush=True)
            # Backward: what is kept, the two slots that this reader drops, its own keys.
            n = arguments.budget if model_config.depth_keep else 2 * layers
            if gradients.most > n + 3 or Alive.most > n + 2:
                sys.exit(f"wrong: more than {n} + 3 slots in a gradient, or {n} + 2 alive")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sections = dict(loss=loss, memory=memory)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    parser.add_argument("--layers", type=int, default=12, help="of the models that are trained")
    parser.add_argument(
        "--depths", nargs="+", type=int, default=[8, 16, 32, 48], help="layers for memory"
    )
    parser.add_argument("--budget", type=int, default=4)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--held-out", type=int, default=16, help="batches of held-out text")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    names = "layers", "budget", "steps", "held_out", "seeds"
    record: Row = machine(DEVICE) | {name: getattr(arguments, name) for name in names}
    print(", ".join(f"{name} {value}" for name, value in record.items()))
    for name in arguments.only:
        print(name)
        record[name] = sections[name](arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
