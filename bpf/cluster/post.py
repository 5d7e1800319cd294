"""The post: an actor that carries questions from workers to the driver, and the answers back.

It goes to its node as it is written here, so that it needs no bpf there: nothing but Python is imported.
"""

import asyncio
import os
from typing import Any

FORGET_SECONDS = 150.0
"""Nobody waits longer for an answer: who has had none asks again."""


class Post:
    """Questions wait here until the driver takes them, and their askers until it gives the answers.

    When it dies, those who wait learn of it and ask again.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[tuple[bytes, bytes]]] = {}
        self._untaken: list[tuple[str, bytes, bytes]] = []
        self._something = asyncio.Event()
        self._name, self._number = os.urandom(8).hex(), 0

    async def ask(self, question: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """The driver's answer."""
        self._number += 1
        ticket = f"{self._name}/{self._number}"
        answer: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        self._untaken.append((ticket, question, payload))
        self._something.set()
        try:
            return await asyncio.wait_for(answer, FORGET_SECONDS)
        finally:
            self._waiting.pop(ticket, None)

    async def exchange(self, answers: list[tuple[str, bytes, bytes]], seconds: float) -> list[tuple[str, bytes, bytes]]:
        """Give answers; returns the questions that nobody has taken: as soon as there are any, or none in the end."""
        await self.give(answers)
        try:
            await asyncio.wait_for(self._something.wait(), seconds)
        except TimeoutError:
            return []
        self._something.clear()
        taken, self._untaken = self._untaken, []
        return taken

    async def give(self, answers: list[tuple[str, bytes, bytes]]) -> None:
        """Answers to taken questions; those that nobody waits for any more are dropped."""
        for ticket, answer, payload in answers:
            waiting = self._waiting.get(ticket)
            if waiting is not None and not waiting.done():
                waiting.set_result((answer, payload))


class Seat:
    """A place for a worker: an actor with a processor core, a GPU or a share of one.

    Ray restarts it when its process or its node dies; the driver then asks it to work again.
    """

    def prepare(self) -> None:
        """Import what a worker needs; what cannot be imported is told when there is work."""
        from contextlib import suppress

        with suppress(Exception):
            from bpf.extras import importing

            with importing():
                import bpf.cluster.seated  # noqa: F401

    def work(self, order: dict[str, Any], post: Any) -> dict[str, Any]:
        """Train until nothing is left to claim; returns how the worker ended.

        `unfit` means that this node lacks something, as the text says; then nothing was tried.
        """
        problem = _problem(order["needs"], order["names"], order["code"])
        if problem:
            return {"how": "unfit", "text": f"{_node()}: {problem}", "exit_code": 2, "node": _node_id()}
        self.prepare()
        from bpf.cluster.seated import work

        return work(order, post)


def code_of(package: str) -> str:
    """A digest of the source files of a package, which need not be imported; empty if there is no such package."""
    import hashlib
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(package)
    if spec is None:
        return ""
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob("*.py")}
    if not folders and spec.origin:
        files = {"": Path(spec.origin)}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _problem(needs: dict[str, str], names: dict[str, list[str]], code: dict[str, str]) -> str:
    """What is missing here or another one than where bpf was started: distributions, plugins and code; or nothing."""
    from importlib import metadata

    found = []
    for package, wanted in needs.items():
        try:
            there = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
            continue
        if there != wanted:
            found.append(f"{package} is {there}, and {wanted} where bpf was started")
    for group, wanted_names in names.items():
        known = {entry.name for entry in metadata.entry_points(group=group)}
        found += [f"no plugin {name!r} in {group}" for name in wanted_names if name not in known]
    if not found:  # else it is said already
        found = [f"the code of {package} is another one" for package in code if code_of(package) != code[package]]
    return "; ".join(found)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _node() -> str:
    import socket

    import ray

    return f"Node {ray.util.get_node_ip_address()} ({socket.gethostname()})"
