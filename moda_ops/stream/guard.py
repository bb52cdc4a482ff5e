"""Which slots of each stream's buffer are written: what makes writing in place sound.

Every real write claims its slot, and every real read checks its slots. So a slot is written once,
but for a recomputation, which must bring the same values (``MODA_DEBUG=1`` compares them), and no
slot is read before it is written. It also remembers which slots a reentrant checkpoint wrote
without gradients. :mod:`moda_ops.stream.operators` says why this is enough.
"""

import os
import threading
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moda_ops import private
from moda_ops.stream.checkpointing import REENTRANT, in_reentrant_forward, recomputation

DEBUG = os.environ.get("MODA_DEBUG") == "1"


class Record:
    """What is known of one buffer: which slots are written, one bit each, and who allocated it."""

    def __init__(self, buffer: Tensor) -> None:
        self.storage = StorageWeakRef(buffer.untyped_storage())
        self.written = 0
        self.backward = private.graph_task_id()  # -1 outside of any
        self.inside_reentrant = not torch.is_grad_enabled() and in_reentrant_forward()
        self.without_gradient = False  # written in the first pass of a reentrant checkpoint


_records: dict[int, Record] = {}
"""The record of every living buffer, by the address of its storage's control block.

A record's weak reference keeps the control block, so no other storage gets the same address.
"""
_lock = threading.RLock()  # of a record's bits; reentrant: the garbage collector may run code


def remember(buffer: Tensor) -> None:
    """Begin the record of a new buffer, and forget the buffers that are gone."""
    for key, record in list(_records.items()):  # which keeps the records, so their keys stay theirs
        if record.storage.expired():
            _records.pop(key, None)
    record = Record(buffer)
    _records[record.storage.cdata] = record


def record_of(buffer: Tensor) -> Record | None:
    """None if this is not a stream's own memory, but a copy or a plain tensor."""
    record = _records.get(buffer.untyped_storage()._cdata)
    return None if buffer.storage_offset() else record


def _capturing(buffer: Tensor) -> bool:
    return buffer.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_still_inside(record: Record) -> None:
    """Raise RuntimeError if the stream has left the reentrant checkpoint that allocated it."""
    if record.inside_reentrant and not in_reentrant_forward():
        raise RuntimeError(REENTRANT)


def mark_without_gradient(buffer: Tensor) -> None:
    """Note that a reentrant checkpoint writes to it in its pass without gradients."""
    if record := record_of(buffer):
        record.without_gradient = True


def check_gradients(buffer: Tensor) -> None:
    """Raise RuntimeError where a slot should have a gradient that such a pass has dropped."""
    record = record_of(buffer)
    if record and record.without_gradient and not in_reentrant_forward():
        raise RuntimeError(REENTRANT)


def _refuse_copy() -> NoReturn:
    raise RuntimeError(
        "this is a copy of a depth stream (cloned, cast, moved, unpickled, or what a CUDA graph "
        "returned), so it is not known which of its slots are written: go on with the stream "
        "itself, or move it with stream.to(device)"
    )


def claim(buffer: Tensor, slot: int, k: Tensor, v: Tensor) -> None:
    """Mark a slot as written, with these values next. Raise RuntimeError if that may not be."""
    if _claimed_again(buffer, slot) and DEBUG:
        _check_same(slot, buffer[slot], k, v)


def _claimed_again(buffer: Tensor, slot: int) -> bool:
    """Whether a recomputation writes the slot again."""
    record = record_of(buffer)
    if record is None:
        if _capturing(buffer):
            raise RuntimeError(
                "a CUDA graph that is being captured would write to a copy of the depth stream; "
                "allocate the DepthStream inside the captured function"
            )
        if recomputation() in ("checkpoint", "compiled"):
            return False  # a hook has brought it back from the CPU: only this block reads it
        _refuse_copy()
    _check_still_inside(record)
    with _lock:
        again = bool(record.written >> slot & 1)
        record.written |= 1 << slot
    if again or private.graph_task_id() != record.backward:
        kind = recomputation()
        if kind == "reentrant":
            raise RuntimeError(REENTRANT)
        if again and kind is None:
            raise RuntimeError(
                f"slot {slot} of the depth stream is written twice: a stream value can be "
                "continued once; allocate a new DepthStream for every forward pass"
            )
    return again


def check_written(buffer: Tensor, places: Sequence[int], *, forward: bool = True) -> None:
    """Raise RuntimeError if one of these slots holds nothing, as far as it is known.

    Two kinds of copies are read: what a hook has moved to the CPU and back, in backward, and what a
    CUDA graph makes of its inputs. A meta tensor holds nothing that could be wrong.
    """
    if buffer.is_meta:
        return
    record = record_of(buffer)
    if record is None:
        in_backward = private.graph_task_id() != -1 or recomputation() is not None
        if forward and not in_backward and not _capturing(buffer):
            _refuse_copy()
        return
    if forward:
        _check_still_inside(record)
    if not all(record.written >> place & 1 for place in places):
        raise RuntimeError(
            f"the depth stream's buffer has only {record.written.bit_count()} of the "
            f"{len(places)} slots that are read from it: a compiler has moved or recomputed its "
            "allocation; allocate the DepthStream outside of the compiled function"
        )


def _check_same(slot: int, first: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise RuntimeError unless a recomputation gives the values that this slot holds."""
    again = torch.cat([k, v], -1)
    if not torch.equal(first.isnan(), again.isnan()) or not torch.equal(
        first.nan_to_num(), again.nan_to_num()
    ):
        difference = (first.double() - again.double()).abs().max().item()
        raise RuntimeError(
            f"slot {slot} of the depth stream is recomputed with other values: the greatest "
            f"difference is {difference:.3g}. A checkpointed block must compute the same again; "
            "look for dropout, autocast or state that differs between forward and backward"
        )
