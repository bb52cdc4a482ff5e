"""What the layers of a language model attend to: probability by slot, attention sinks, heat maps.

:func:`depth_use` for figures to log, :func:`measure_depth_mass` for
:func:`moda_ops.policies.most_mass`, :func:`attention_map` and :func:`plot_attention` for pictures
like figure 5 of arXiv 2603.15619. All stand on a :class:`WatchedStream`, which takes the place of
the stream of a forward pass, with gradients or without, and shows every read of it to a function.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.nn.layers import check_tokens
from moda_ops.nn.model import MoDALanguageModel
from moda_ops.nn.watch import Reading, WatchedStream
from moda_ops.operators import eager
from moda_ops.operators.arguments import check_int, window_sides
from moda_ops.operators.depth_mass import moda_depth_mass, moda_sink_mass


class DepthUse(NamedTuple):
    """Where the probability of one attention call went, mean over tokens.

    Attributes:
        slots: the numbers of the depth slots that it read.
        mass: (B, HQ, L), what each of them received; see :func:`moda_ops.moda_depth_mass`.
        sink: (B, HQ), what the first key of the sequence received, see
            :func:`moda_ops.moda_sink_mass`; None where depth alone was read.
    """

    slots: tuple[int, ...]
    mass: Tensor
    sink: Tensor | None

    @classmethod
    def of(cls, reading: Reading, *, sink_keys: int = 1) -> "DepthUse":
        """Of what a :class:`WatchedStream` shows; ``sink_keys`` first keys are the sink.

        Reads q and lse twice and the depth keys once; nothing waits for the device.
        """
        q, k, options = reading.q, reading.k, dict(reading.options)
        options.pop("plan", None)
        scores = {name: options[name] for name in ("scale", "softcap") if name in options}
        mass = moda_depth_mass(q, reading.k_depth, reading.lse, **scores)
        if k is None:
            return cls(reading.slots, mass, None)
        sink = moda_sink_mass(q, k, reading.lse, keys=sink_keys, **options)
        return cls(reading.slots, mass, sink)


@torch.no_grad()
def depth_use(model: MoDALanguageModel, tokens: Tensor, *, sink_keys: int = 1) -> list[DepthUse]:
    """Where the probability of every attention layer goes on some tokens.

    One forward pass without gradients, and one pass over each layer's queries and depth keys. To
    log it from the training step's own forward pass give that a :class:`WatchedStream`.

    Args:
        model: any.
        tokens: (B, T), integer.
        sink_keys: how many first keys of the sequence are the sink.

    Returns:
        One :class:`DepthUse` for each attention call, in order: for each block one; under
        ``depth="attention"`` three, for its sequence and twice for depth.

    Example:
        >>> from moda_ops.nn import MoDAConfig
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> uses = depth_use(MoDALanguageModel(config), torch.randint(256, (2, 16)))
        >>> [use.mass.shape[-1] for use in uses], uses[2].sink.shape
        ([0, 2, 4], torch.Size([2, 4]))
    """
    uses: list[DepthUse] = []
    _watch(model, tokens, lambda reading: uses.append(DepthUse.of(reading, sink_keys=sink_keys)))
    return uses


def measure_depth_mass(model: MoDALanguageModel, batches: Iterable[Tensor]) -> list[list[float]]:
    """The probability that each block gives each depth slot: what ``most_mass`` chooses by.

    Args:
        model: with all slots: ``config.depth_keep`` is None.
        batches: tokens (B, T) each, of the text that the model is for.

    Returns:
        ``mass[layer][slot]``, mean over batches, texts, heads and tokens. Under
        ``depth="attention"`` of a block's second read of depth, which sees all slots of the first.

    Raises:
        ValueError: a bounded model, or no batches.

    Example:
        >>> from moda_ops.policies import most_mass
        >>> from moda_ops.nn import MoDAConfig
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model = MoDALanguageModel(config)
        >>> mass = measure_depth_mass(model, [torch.randint(256, (2, 16)) for _ in range(2)])
        >>> bounded = MoDALanguageModel(config.bounded(2, most_mass(mass)))
        >>> _ = bounded.load_state_dict(model.state_dict())
        >>> bounded.config.depth_reads()
        [0, 2, 2, 2]
    """
    if model.config.depth_keep is not None:
        raise ValueError(
            "model must have all its depth slots (config.depth_keep = None) to be measured; give "
            "one of that config these weights"
        )
    calls = 3 if model.config.depth == "attention" else 1
    sums: list[Tensor] = []
    count = 0
    for tokens in batches:
        uses = depth_use(model, tokens)[calls - 1 :: calls]
        means = [use.mass.mean((0, 1)) for use in uses]
        sums = [a + b for a, b in zip(sums, means, strict=True)] if sums else means
        count += 1
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none")
    return [(x / count).tolist() for x in sums]


class AttentionMap(NamedTuple):
    """Every probability of one attention call.

    Attributes:
        sequence: (B, HQ, T, S), of each query for each key of the sequence; S = 0 where depth alone
            is read.
        depth: (B, HQ, T, L), for each depth slot at its own token.
        slots: the numbers of these slots.
    """

    sequence: Tensor
    depth: Tensor
    slots: tuple[int, ...]


@torch.no_grad()
def attention_map(model: MoDALanguageModel, tokens: Tensor, layer: int) -> AttentionMap:
    """The probabilities of one attention call, T (S + L) of them for each head: for few tokens.

    Args:
        model: any.
        tokens: (B, T), integer.
        layer: which call, from 0: the block; see :class:`Reading`.

    Raises:
        ValueError: there is no such call.

    Example:
        >>> from moda_ops.nn import MoDAConfig
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> p = attention_map(MoDALanguageModel(config), torch.randint(256, (1, 16)), layer=2)
        >>> p.sequence.shape, p.depth.shape, p.slots
        (torch.Size([1, 4, 16, 16]), torch.Size([1, 4, 16, 4]), (0, 1, 2, 3))
        >>> torch.allclose(p.sequence.sum(-1) + p.depth.sum(-1), torch.ones(1, 4, 16))
        True
    """
    calls = model.config.layers * (3 if model.config.depth == "attention" else 1)
    check_int("layer", layer, 0)
    if layer >= calls:
        raise ValueError(f"layer must be below the model's {calls} attention calls, got {layer}")
    maps: list[AttentionMap] = []
    _watch(model, tokens, lambda r: maps.append(_map_of(r)) if r.layer == layer else None)
    return maps[0]


def plot_attention(
    model: MoDALanguageModel,
    tokens: Tensor,
    layer: int,
    head: int,
    *,
    labels: Sequence[str] | None = None,
) -> Any:
    """The probabilities of one head as a heat map over [sequence | depth], with their boundary.

    As figure 5 of arXiv 2603.15619. A row is a query, a column a key of the sequence or a depth
    slot; colors are logarithmic, and keys that a query does not see are left white.

    Args:
        model: any.
        tokens: (1, T), integer; some dozens.
        layer: which attention call, from 0; see :class:`Reading`.
        head: query head, from 0.
        labels: for each token what to write at its row and column; default: its position.

    Returns:
        A ``matplotlib.figure.Figure``: ``figure.savefig("depth.png")``. It needs matplotlib and no
        display.

    Raises:
        ValueError: more than one text, or no such layer, head, or number of labels.
    """
    if tokens.dim() != 2 or tokens.shape[0] != 1:
        raise ValueError(f"tokens must be one text, (1, T), got shape {tuple(tokens.shape)}")
    heads, T = model.config.heads, tokens.shape[1]
    check_int("head", head, 0)
    if head >= heads:
        raise ValueError(f"head must be below the model's {heads} query heads, got {head}")
    if labels is not None and len(labels) != T:
        raise ValueError(f"labels must be one for each of the {T} tokens, got {len(labels)}")
    p = attention_map(model, tokens, layer)
    return _heat_map(p, head, f"attention layer {layer}, query head {head}", labels)


def _heat_map(p: AttentionMap, head: int, title: str, labels: Sequence[str] | None) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    probabilities = torch.cat((p.sequence, p.depth), -1)[0, head].double().cpu()
    (T, columns), S = probabilities.shape, p.sequence.shape[-1]
    size = 0.16 if labels is None else 0.2  # inches of a cell, as far as that fits a page
    width, height = (min(max(size * n, 3.0), 12.0) for n in (columns, T))
    figure = Figure(figsize=(width + 1.8, height + 1.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    image = axes.imshow(
        probabilities.masked_fill(probabilities == 0, float("nan")).numpy(),
        norm=LogNorm(1e-3, 1, clip=True),
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
    )
    if 0 < S < columns:
        axes.axvline(S - 0.5, color="red", linewidth=1.5)
    token_ticks, slot_ticks = _ticks(S, 16 if labels is None else S), _ticks(columns - S, 16)
    position = list(map(str, range(max(T, S)))) if labels is None else labels
    names = [*(position[n] for n in token_ticks), *(f"d{p.slots[n]}" for n in slot_ticks)]
    turned = 90 if max(map(len, names), default=0) > 3 else 0
    axes.set_xticks([*token_ticks, *(S + n for n in slot_ticks)], names, rotation=turned)
    rows = _ticks(T, 16 if labels is None else T)
    axes.set_yticks(rows, [position[n] for n in rows])
    axes.tick_params(labelsize=7)
    kind = "position" if labels is None else "token"
    axes.set(
        title=title, xlabel=f"key ({kind}) or depth slot (d, number)", ylabel=f"query ({kind})"
    )
    parts = {"sequence": (0, S), "depth": (S, columns)}
    centers = {name: (end + begin - 1) / 2 for name, (begin, end) in parts.items() if end > begin}
    axes.secondary_xaxis("top").set_xticks([*centers.values()], [*centers], size=9)
    figure.colorbar(image, ax=axes, label="probability (0.001 and below in one color)")
    return figure


def _ticks(n: int, most: int) -> list[int]:
    return list(range(0, n, -(-n // most))) if n else []


def _map_of(reading: Reading) -> AttentionMap:
    """By the formula, for float32 inputs or narrower ones in float32."""
    q, k, options = reading.q, reading.k, reading.options
    H = reading.k_depth[0].shape[2] if k is None else k.shape[2]
    k = q.new_empty(q.shape[0], 0, H, q.shape[3]) if k is None else k
    left, right = window_sides(options.get("window"))
    right = 0 if options.get("causal", True) else right
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = eager.probabilities(q, k, reading.k_depth, scale, left, right, options.get("softcap"))
    return AttentionMap(p[..., : k.shape[1]], p[..., k.shape[1] :], reading.slots)


def _watch(model: MoDALanguageModel, tokens: Tensor, observe: Callable[[Reading], object]) -> None:
    check_tokens("tokens", tokens)
    x = model.embedding(tokens)
    stream = WatchedStream(model.stream(*tokens.shape, like=x), observe)
    model.hidden(x, model.rotary(tokens.shape[1], device=x.device), stream)
