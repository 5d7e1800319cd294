"""CUDA graphs of the functions that a cohort calls again and again over static memory.

A function that allocates nothing which outlives it, reads nothing back to the host and decides nothing by value is the
same work each time; on CUDA it is recorded once and replayed, which takes one launch in place of dozens. On a CPU it is
called.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache

import torch

from bpf.algorithms import Algorithm, Network

Held = Callable[[], Mapping[str, object]]
"""What must stay the same objects, by what a person calls them; numbers and texts must stay equal."""
OFF = "BPF_NO_CAPTURE"
_SYNCHRONISES = "called a synchronizing CUDA operation"


class Recorder:
    """Records what is run by name. `who` is the rule whose steps these are; `notice` is told, if they cannot be.

    The first call of a name warms up, the second is watched for what would make a recording wrong, and the third
    records. None of them computes other numbers than a replay. With the environment variable BPF_NO_CAPTURE, and where
    `able` is false, everything is called.
    """

    def __init__(self, device: torch.device, who: str, notice: Callable[[str], None], able: bool = True) -> None:
        self._who, self._notice = who, notice
        self.active = able and device.type == "cuda" and not os.environ.get(OFF)
        self._calls: dict[str, int] = {}
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        if self.active:
            self._stream = _stream_of(device)
            self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Where recordings are made and replayed; whoever runs something, runs it and reads its results in here."""
        if not self.active:
            yield
            return
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def run(self, name: str, function: Callable[[], None], held: Held | None = None) -> None:
        if not self.active:
            return function()
        if name in self._graphs:
            return self._graphs[name].replay()
        self._calls[name] = calls = self._calls.get(name, 0) + 1
        if calls == 1:
            function()
        elif calls == 2:
            self._watch(function, held or dict)
        else:
            self._record(name, function)

    def clear(self) -> None:
        """Let go of the recordings and their memory."""
        self._graphs.clear()

    def _watch(self, function: Callable[[], None], held: Held) -> None:
        before, reason = held(), None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for one in said:
            if _SYNCHRONISES in str(one.message):
                reason = reason or f"it waits for the GPU in {one.filename}, line {one.lineno}"
            elif "Synchronization debug mode" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if replaced := changed(before, held()):
            reason = reason or f"it changes {replaced[0]} by Python, which a recording would not"
        if reason:
            self._give_up(reason)

    def _record(self, name: str, function: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the calls before have left, as a recording has memory of its own
        collects = gc.isenabled()
        gc.disable()  # freeing what belongs to CUDA would break the recording
        try:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # what happened first is what matters
                    graph.capture_end()
                raise
            graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._give_up(str(error).strip().splitlines()[0])
            torch.cuda.synchronize()
            return function()
        finally:
            if collects:
                gc.enable()
        self._graphs[name] = graph
        graph.replay()

    def _give_up(self, reason: str) -> None:
        self.active = False
        self.clear()
        self._notice(f"The steps of {self._who} are not recorded as CUDA graphs and take longer: {reason}.")


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: libraries keep working memory for each."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def held(rule: Algorithm, network: Network) -> dict[str, object]:
    """What a recording of a rule's step holds on to: the rule's attributes, and where the network's tensors lie."""
    tensors = network.parameters | network.buffers | {f"gradient.{n}": t for n, t in network.gradients.items()}
    return {f"its {name}": value for name, value in vars(rule).items()} | {
        f"the tensor {name}": tensor.data_ptr() for name, tensor in tensors.items()
    }


def changed(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What is held now and was not, or was another object."""
    return [name for name, value in now.items() if not _same(before.get(name), value)]


def _same(before: object, now: object) -> bool:
    return before is now or (isinstance(now, int | float | str) and type(before) is type(now) and before == now)
