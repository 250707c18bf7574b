"""Faults of the disk that models are written to; checkpoints are on another one."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from faults.catalogue import CATALOGUE, Fault, Outcome
from faults.disk import Rule, mounted

if TYPE_CHECKING:
    from faults.catalogue import Site

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ESTALE)
OPERATIONS = (
    *("mkdir", "create", "write", "sync", "rename", "unlink", "open", "read"),
    *("getattr", "readdir"),  # a handle that is stale, a folder that may not be entered any more
)
STAGES = {
    "getattr": 80,
    "readdir": 12,
    "mkdir": 4,
    "create": 12,
    "write": 60,
    "sync": 6,
    "rename": 8,
    "unlink": 4,
    "open": 12,
    "read": 12,
}
"""So many operations of a kind go well at most before one fails."""
_ONCE = "that model until the next start; its report says why"
_FOR_EVER = "models of that time, whose notes the disk did not take either; reports say why"


def _fails(site: Site, operation: str, error: int, *, times: int) -> Outcome:
    with mounted(site.folder / "bad") as disk:
        site.models = disk.folder / "models"
        after = site.random.randrange(STAGES[operation])
        rule = Rule(operations=(operation,), match="models*", after=after, times=times, error=error)
        disk.fail(rule)
        run = site.train()
        fired = disk.fired
        disk.fail()
        return site.judge(run, "; ".join(fired[:3]), owed=times > 0)


def _is_slow(site: Site) -> Outcome:
    with mounted(site.folder / "bad") as disk:
        site.models = disk.folder / "models"
        disk.fail(Rule(operations=("sync",), times=3, error=0, wait_s=1.0))
        run = site.train()
        fired = disk.fired
        disk.fail()
        return site.judge(run, "; ".join(fired))


def _kills(site: Site) -> Outcome:
    with mounted(site.folder / "bad") as disk:
        site.models = disk.folder / "models"
        # The trainer, which is this process, makes no such file.
        rule = Rule(
            operations=("create", "write", "sync"),
            match="models/.onnxport-*/*.onnx",
            after=site.random.randrange(24),
            error=0,
            kill=True,
        )
        disk.fail(rule)
        run = site.train()
        fired = disk.fired
        disk.fail()
        return site.judge(run, "; ".join(fired))


def _register() -> None:
    for operation in OPERATIONS:
        for error in ERRORS:
            for times, often in ((1, "once"), (-1, "from then on")):
                inject = partial(_fails, operation=operation, error=error, times=times)
                name = f"{errno.errorcode[error]} at {operation}, {often}"
                lost = _ONCE if times > 0 else _FOR_EVER
                CATALOGUE.append(Fault(name, "disk of models", lost, inject, 2))
    CATALOGUE.append(Fault("fsync takes a second", "disk of models", "", _is_slow, 5))
    CATALOGUE.append(
        Fault("SIGKILL of whoever changes a staged file", "disk of models", "", _kills, 60)
    )


_register()
