"""Models of other people, and how they are called: what the coverage benchmark exports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.base import Case

__all__ = ["FAMILIES", "all_cases"]

FAMILIES = (
    *("exportdb", "torch_modules", "huggingface", "handmade"),
    *("vision", "monai_zoo", "graphs", "forecasting", "tabular", "misc_packages"),
)
"""Modules of this package, each with ``cases()``."""


def all_cases(families: tuple[str, ...] = FAMILIES) -> list[Case]:
    """Collect the cases of every family whose package imports; say which do not.

    Raises:
        ValueError: If two cases have one name.
    """
    found: dict[str, Case] = {}
    for family in families:
        try:
            module = importlib.import_module(f"{__name__}.{family}")
            cases = module.cases() if hasattr(module, "cases") else module.CASES
        except Exception as error:  # noqa: BLE001 - a package that is broken here must not stop the rest
            print(f"family {family} is left out: {type(error).__name__}: {error}")
            continue
        for case in cases:
            if case.name in found:
                raise ValueError(f"Two cases are named {case.name!r}.")
            found[case.name] = case
    return list(found.values())
