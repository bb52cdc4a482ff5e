"""Which depth slots stay when a layer may read no more than a budget of them.

A policy is a function of plain numbers, ``policy(layer, slots, budget) -> slots``: before layer
``layer`` (from 0) reads, the slots with these numbers are there, ascending, counted in the order
they were written; it returns the numbers of those that stay, ascending, at most ``budget``. What it
drops is gone for all later layers. It is asked once, before any tensor exists, by
:func:`kept_slots`; so a compiled model finds constants, and has no branch on data.

Bounded depth slots are future work in arXiv 2603.15619. The policies are those known for caches of
tokens: recent ones, first and recent ones (arXiv 2309.17453), evenly spaced ones, and those with
the largest share of attention (arXiv 2306.14048).
"""

from collections.abc import Callable, Sequence

from moda_ops.operators.arguments import check_int

SlotPolicy = Callable[[int, tuple[int, ...], int], Sequence[int]]
"""``policy(layer, slots, budget)``: which of the slots stay before this layer reads."""


def recent(layer: int, slots: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """The most recent slots.

    Example:
        >>> recent(5, (3, 4, 5, 6, 7), 3)
        (5, 6, 7)
    """
    return slots[-budget:]


def first_and_recent(first: int) -> SlotPolicy:
    """The slots 0 .. ``first`` - 1, and the most recent ones.

    Example:
        >>> first_and_recent(1)(5, (0, 3, 4, 5, 6), 3)
        (0, 5, 6)
    """
    check_int("first", first, 0)

    def policy(layer: int, slots: tuple[int, ...], budget: int) -> tuple[int, ...]:
        kept = [slot for slot in slots if slot < first][:budget]
        return (*kept, *_last(slots[len(kept) :], budget - len(kept)))

    return policy


def every(step: int) -> SlotPolicy:
    """The slots whose number ``step`` divides, the most recent of them if they are too many; room
    that they leave goes to the most recent others.

    In the paper's default model even numbers are attention layers' slots, odd ones feed-forward
    layers': an odd step takes both.

    Example:
        >>> every(4)(5, (0, 4, 5, 6, 7), 4)
        (0, 4, 6, 7)
        >>> every(2)(9, (4, 6, 8, 10, 11), 3)
        (6, 8, 10)
    """
    check_int("step", step, 1)

    def policy(layer: int, slots: tuple[int, ...], budget: int) -> tuple[int, ...]:
        kept = _last([slot for slot in slots if slot % step == 0], budget)
        others = [slot for slot in slots if slot % step]
        return tuple(sorted((*kept, *_last(others, budget - len(kept)))))

    return policy


def most_mass(mass: Sequence[Sequence[float]]) -> SlotPolicy:
    """The slots that this layer and the later ones gave most probability when it was measured.

    Args:
        mass: ``mass[layer][slot]``, the probability that each layer gave each slot that it read,
            as :func:`moda_ops.nn.measure_depth_mass` measures it with all slots there.

    Example:
        >>> mass = [[], [0.5], [0.1, 0.3], [0.1, 0.2, 0.3]]
        >>> most_mass(mass)(2, (0, 1), 1)  # 0.1 + 0.1 against 0.3 + 0.2
        (1,)
    """
    table = [[float(x) for x in row] for row in mass]

    def policy(layer: int, slots: tuple[int, ...], budget: int) -> tuple[int, ...]:
        def to_come(slot: int) -> tuple[float, int]:
            return sum(row[slot] for row in table[layer:] if slot < len(row)), slot

        return tuple(sorted(sorted(slots, key=to_come, reverse=True)[:budget]))

    return policy


def kept_slots(
    writes: Sequence[int], budget: int, policy: SlotPolicy = recent
) -> tuple[tuple[int, ...], ...]:
    """The slots that each layer may read: the policy's choices, from the first layer to the last.

    For your own model: ``keep`` of :class:`moda_ops.DepthStream` and of
    :class:`moda_ops.DepthSlots` takes them as :func:`positions` turns them.
    :meth:`moda_ops.nn.BlockConfig.bounded` does both.

    Args:
        writes: how many slots are written before each layer, and after the layer before it.
        budget: the largest number of slots that a layer may read; at least 1.
        policy: see above.

    Returns:
        For each layer the numbers of the slots that are there, ascending.

    Raises:
        TypeError: a number that is no int, or a policy that is not callable.
        ValueError: a budget below 1, or a policy that returns more slots than the budget, not in
            order, or one that is not there.

    Example:
        >>> kept_slots([0, 2, 2, 2], budget=3, policy=first_and_recent(1))
        ((), (0, 1), (0, 2, 3), (0, 4, 5))
    """
    check_int("budget", budget, 1)
    if not callable(policy):
        raise TypeError(f"policy must be a function (layer, slots, budget), got {policy!r}")
    there: tuple[int, ...] = ()
    kept, end = [], 0
    for layer, more in enumerate(writes):
        there = (*there, *range(end, end + check_int("writes", more, 0)))
        end += more
        chosen = tuple(policy(layer, there, budget))
        if len(chosen) > budget:
            raise ValueError(
                f"policy must keep at most the budget of {budget} slots, kept {len(chosen)} before "
                f"layer {layer}"
            )
        positions(there, chosen)
        there = chosen
        kept.append(chosen)
    return tuple(kept)


def positions(there: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """Where the slots that stay are among those that are there, as ``keep`` of a stream takes them.

    Raises:
        ValueError: kept slots that are not ascending, or not there.

    Example:
        >>> positions(there=(0, 4, 5, 6), kept=(0, 6))
        (0, 3)
    """
    place = {slot: i for i, slot in enumerate(there)}
    for slot in kept:
        if slot not in place:
            raise ValueError(f"slot {slot} cannot stay: only {list(there)} are there")
    found = tuple(place[slot] for slot in kept)
    if sorted(set(found)) != list(found):
        raise ValueError(f"slots that stay must be ascending, got {list(kept)}")
    return found


def _last(slots: Sequence[int], n: int) -> Sequence[int]:
    return slots[-n:] if n > 0 else ()
