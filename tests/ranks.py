"""Processes of a group that run the same function, started once for many tests."""

import importlib
import multiprocessing
import pathlib
import queue
import tempfile
import time
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240  # for one call; the first one loads PyTorch, and on a GPU compiles kernels


def _serve(rank: int, size: int, backend: str, store: str, calls: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, device_id=device
    )
    while (call := calls.get()) is not None:
        module, name, args = call
        try:
            function = getattr(importlib.import_module(module), name)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
                function(*args)
            answers.put((rank, None))
        except Exception:
            answers.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Calls a function of an importable module on every rank; a failure on one fails the call."""

    def __init__(self, size: int, backend: str) -> None:
        self.size, self.backend = size, backend
        self.processes: list[Any] = []

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = pathlib.Path(self.folder.name, "store")  # a file: no port that may be taken
        self.answers = spawn.Queue()
        self.calls = [spawn.Queue() for _ in range(self.size)]
        self.processes = [
            spawn.Process(
                target=_serve,
                args=(rank, self.size, self.backend, str(store), calls, self.answers),
                daemon=True,
            )
            for rank, calls in enumerate(self.calls)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes = []

    def __call__(self, function: Any, *args: Any) -> None:
        if not self.processes:
            self.start()
        for calls in self.calls:
            calls.put((function.__module__, function.__name__, args))
        error, deadline = None, time.monotonic() + SECONDS
        for _ in range(self.size):
            try:
                rank, error = self.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                rank, error = None, f"no answer within {SECONDS} s"
            if error is not None:  # the others may wait for this rank for ever
                self.stop()
                raise AssertionError(f"rank {rank}: {error}")
