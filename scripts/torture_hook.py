"""Inside a tuned process: counts its durable steps, and pulls the plug at the n-th.

Durable steps are the commits and mode changes of the record, every fsync, rename and removal, and the
writing of derived files. The hook replaces library functions that hpt_torch calls, which knows nothing of it.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOMENTS = ("before", "half", "after")  # half: a derived file is cut; for all other steps the same as before
TARGETS = ("group", "coordinator", "worker")


@dataclass(frozen=True, kw_only=True)
class Plug:
    """When it is pulled, and on whom. step 0: never."""

    log: Path  # one line a step, and one when the plug is pulled
    root: Path  # the run directory: removals and writes elsewhere are nobody's loss
    step: int = 0
    moment: str = "before"
    target: str = "group"


def children(pid: int) -> list[int]:
    """The process ids of the living children of a process; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def kill(pid: int, target: str) -> bool:
    """SIGKILL for a coordinator, its whole process group, or one of its workers; False where that is gone."""
    try:
        if target == "group":
            os.killpg(pid, signal.SIGKILL)  # it leads its group: no other process can be meant
        elif target == "coordinator":
            os.kill(pid, signal.SIGKILL)
        else:
            workers = children(pid)
            if not workers:
                return False
            os.kill(random.choice(workers), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def install(plug: Plug) -> None:
    """Counts from now on, in this process and not in those that it forks."""
    owner, count = os.getpid(), 0
    fsync, replace, unlink, connect = os.fsync, os.replace, os.unlink, sqlite3.connect
    write_text, write_bytes = Path.write_text, Path.write_bytes
    log = os.open(plug.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(name: str, action: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        nonlocal count
        if os.getpid() != owner:
            return action()
        count += 1
        os.write(log, f"{count} {name}\n".encode())
        if count != plug.step:
            return action()
        if plug.moment == "half" and half is not None:
            half()
        if plug.moment != "after":
            _pull(name)
        result = action()
        if plug.moment == "after":
            _pull(name)
        return result

    def _pull(name: str) -> None:
        # Said before, because nothing can be said after it; where no worker lives, nothing happens.
        if plug.target != "worker" or children(owner):
            os.write(log, f"pulled {plug.target} {plug.moment} {name}\n".encode())
            kill(owner, plug.target)

    def inside(path: Any) -> bool:
        return str(path).startswith(str(plug.root))

    class Counted(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            def run() -> sqlite3.Cursor:
                return super(Counted, self).execute(sql, *arguments)

            return step(sql, run) if sql.startswith("PRAGMA journal_mode") else run()  # type: ignore[no-any-return]

        def executescript(self, sql: str) -> sqlite3.Cursor:
            return step("schema", lambda: super(Counted, self).executescript(sql))  # type: ignore[no-any-return]

        def __exit__(self, *details: Any) -> Any:
            return step("commit", lambda: super(Counted, self).__exit__(*details))

    def counted_connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if options.get("uri"):  # to read only
            return connect(*arguments, **options)
        return connect(*arguments, factory=Counted, **options)

    def counted_unlink(path: Any, *arguments: Any, **options: Any) -> None:
        if inside(path):
            step(f"unlink {Path(path).name}", lambda: unlink(path, *arguments, **options))
        else:
            unlink(path, *arguments, **options)

    def counted_write(write: Callable[..., int]) -> Callable[..., int]:
        def written(path: Path, data: Any, *arguments: Any, **options: Any) -> int:
            def action(data: Any = data) -> int:
                return write(path, data, *arguments, **options)

            if not inside(path):
                return action()
            return step(f"write {path.name}", action, lambda: action(data[: len(data) // 2]))  # type: ignore[no-any-return]

        return written

    os.fsync = lambda descriptor: step("fsync", lambda: fsync(descriptor))
    os.replace = lambda a, b: step(f"rename to {Path(b).name}", lambda: replace(a, b))  # type: ignore[assignment,misc]
    os.unlink = counted_unlink  # type: ignore[assignment]
    sqlite3.connect = counted_connect  # type: ignore[assignment]
    Path.write_text, Path.write_bytes = counted_write(write_text), counted_write(write_bytes)  # type: ignore[method-assign,assignment]


def main(arguments: list[str]) -> None:
    """`hpt` with these arguments, with the plug that the environment describes."""
    step, moment, target, log, root = os.environ["HPT_TORTURE"].split("|")
    install(Plug(log=Path(log), root=Path(root), step=int(step), moment=moment, target=target))
    from hpt_torch import cli

    sys.argv = ["hpt", *arguments]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
