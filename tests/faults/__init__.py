"""Faults of disks, processes, servers, weights and user code, and what must be true after each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults.catalogue import Fault

_AREAS = (
    *("disks", "leftovers", "servers_down", "surroundings", "trainers", "user_code", "weights"),
    *("workers", "couriers"),
)


def registered() -> list[Fault]:
    """Return every kind of fault."""
    for area in _AREAS:
        import_module(f"faults.{area}")
    return import_module("faults.catalogue").CATALOGUE
