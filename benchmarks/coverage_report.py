"""What the coverage benchmark writes: all rows as JSON, and a summary to read."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["write_results"]

ROOT = f"{Path(__file__).resolve().parent.parent}/"
RAW = ("raw_dynamo", "raw_torchscript")
MODES = (*RAW, "onnxport")
OUTCOMES = ("right", "static", "wrong", "failed", "timeout", "crashed")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "lightning", "onnxport")

Row = dict[str, Any]
Table = dict[str, dict[str, Row]]


def write_results(folder: Path, rows: list[Row], spent_s: float, *, merge: bool) -> None:
    """Write ``coverage.json`` and ``coverage.md``; with ``merge``, into what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coverage.json"
    kept: dict[tuple[str, str], Row] = {}
    if merge and path.exists():
        kept = {(r["case"], r["mode"]): r for r in json.loads(path.read_text())["rows"]}
    kept |= {(r["case"], r["mode"]): _plain(r) | {"commit": _commit()} for r in rows}
    table: Table = defaultdict(dict)
    for (case, mode), row in sorted(kept.items()):
        table[case][mode] = row
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": ", ".join(sorted({row.get("commit", "?") for row in kept.values()})),
        "last_run_s": round(spent_s),
    }
    figures = summarise(table)
    ordered = [row for modes in table.values() for row in modes.values()]
    data = {"about": about, "figures": figures, "rows": ordered}
    path.write_text(json.dumps(data, indent=1) + "\n")
    text = "\n".join(_markdown(about, figures, table)) + "\n"
    (folder / "coverage.md").write_text(text)
    print("\n".join(_figures(figures)))


def _plain(value: Any) -> Any:
    """Name files as in the repository and in the packages, not as on this machine."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        text = re.sub(r"(?:/[^\s/'\"]+)*/site-packages/", "", value.replace(ROOT, ""))
        # Reasons are cut, so a path may end anywhere.
        for folder in (sys.prefix, tempfile.gettempdir()):
            text = text.replace(f"{folder}/", "").replace(str(Path(folder).parent) + "/.venv", "")
        return text
    return value


def _commit() -> str:
    """Return which source was measured, with a mark if it has changes of its own."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whichever git there is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is(modes: dict[str, Row], mode: str, outcome: str = "right") -> bool:
    return modes.get(mode, {}).get("outcome") == outcome


def summarise(table: Table) -> dict[str, Any]:
    """Compute the figures of the summary; only cases that ran in all three modes count."""
    full = {case: modes for case, modes in table.items() if all(m in modes for m in MODES)}
    union = {case: m for case, m in full.items() if any(_is(m, raw) for raw in RAW)}
    neither = {
        case: m
        for case, m in full.items()
        if case not in union
        and not m["onnxport"]["inexpressible"]
        and not any(row.get("random") for row in m.values())
    }
    wrong = [case for case, m in table.items() if _is(m, "onnxport", "wrong")]
    return {
        "cases": len(table),
        "ours": sum(next(iter(m.values()))["ours"] for m in table.values()),
        "in_all_modes": len(full),
        "inexpressible": sorted(c for c, m in full.items() if m["onnxport"]["inexpressible"]),
        "random": sorted(c for c, m in full.items() if any(r.get("random") for r in m.values())),
        "raw_dynamo_right": sum(_is(m, "raw_dynamo") for m in full.values()),
        "raw_torchscript_right": sum(_is(m, "raw_torchscript") for m in full.values()),
        "union_right": len(union),
        "onnxport_right": sum(_is(m, "onnxport") for m in full.values()),
        "of_union": _share(union),
        "of_neither": _share(neither),
        "wrong_published": wrong,
        "raw_wrong": sum(_is(m, raw, "wrong") for m in full.values() for raw in RAW),
        "time_ratio": _time_ratio(full),
        "latency_ratio": _latency_ratio(full),
    }


def _share(cases: Table) -> dict[str, Any]:
    right = sum(_is(m, "onnxport") for m in cases.values())
    missed = [case for case, m in cases.items() if not _is(m, "onnxport")]
    return {"n": len(cases), "right": right, "missed": missed}


def _time_ratio(full: Table) -> dict[str, Any]:
    ratios = [
        m["onnxport"]["export_s"] / m["raw_dynamo"]["export_s"]
        for m in full.values()
        if m["onnxport"].get("rung") == 0 and _is(m, "raw_dynamo")
    ]
    return {"n": len(ratios), "median": round(median(ratios), 3) if ratios else None}


def _latency_ratio(full: Table) -> dict[str, Any]:
    ratios = {}
    for case, m in full.items():
        times = m["onnxport"].get("latency_ms", {})
        raw = [times[mode] for mode in RAW if mode in times]
        if raw:
            ratios[case] = round(times["onnxport"] / min(raw), 3)
    worst = sorted(ratios, key=lambda case: -ratios[case])[:5]
    return {
        "n": len(ratios),
        "median": round(median(ratios.values()), 3) if ratios else None,
        "worst": {case: ratios[case] for case in worst},
    }


def _percent(share: dict[str, Any]) -> str:
    if not share["n"]:
        return "no case"
    return f"{100 * share['right'] / share['n']:.1f} % ({share['right']} of {share['n']})"


def _figures(figures: dict[str, Any]) -> list[str]:
    time, latency, n = figures["time_ratio"], figures["latency_ratio"], figures["in_all_modes"]
    wrong = figures["wrong_published"]
    return [
        (
            f"- {figures['cases']} cases, {figures['ours']} of them written for this benchmark; "
            f"{n} ran in all three modes, which the shares below count."
        ),
        (
            f"- right, of {n}: raw dynamo {figures['raw_dynamo_right']}, raw TorchScript "
            f"{figures['raw_torchscript_right']}, either {figures['union_right']}, "
            f"**onnxport {figures['onnxport_right']}**."
        ),
        f"- of what a raw core exports right: **{_percent(figures['of_union'])}** by onnxport.",
        (
            "- of what neither can and ONNX can express: "
            f"**{_percent(figures['of_neither'])}** by onnxport."
        ),
        f"- wrong models published by onnxport: **{len(wrong)}**"
        + (f" ({', '.join(wrong)})" if wrong else "")
        + f"; files of a raw core that are wrong: {figures['raw_wrong']}.",
        (
            f"- time of `onnxport.export` to raw dynamo where the first rung won: median "
            f"{time['median']} over {time['n']}."
        ),
        (
            f"- latency in ONNX Runtime to the better raw model: median {latency['median']} over "
            f"{latency['n']}."
        ),
    ]


def _markdown(about: dict[str, Any], figures: dict[str, Any], table: Table) -> Iterable[str]:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    yield "# Coverage: which models come out, and are right\n"
    where = f"{about['date']}; {about['machine']}; Python {about['python']}"
    yield f"{where}; {versions} at {about['commit']}.\n"
    yield (
        "Raw exports get their axes by hand, onnxport gets no argument. Each model is compared "
        "with eager PyTorch in ONNX Runtime (CPU) at sizes and values that no export has seen. "
        "*right*: "
        "all agree and every axis that varies is dynamic; *static*: right, but an axis is fixed; "
        "*wrong*: a file that does not load, fails or disagrees at a size where PyTorch runs; "
        "*failed*: no file, with a reason.\n"
    )
    yield from _figures(figures)
    yield "\n## Families\n"
    yield from _families(table)
    yield "\n## Cases\n"
    yield from _cases(table)
    yield "\n## What onnxport does not export right\n"
    yield from _failures(table, ("onnxport",))
    cannot = [(c, m) for c, m in table.items() if next(iter(m.values()))["inexpressible"]]
    yield "\n## What ONNX cannot express\n"
    yield from (f"- {case}: {next(iter(m.values()))['inexpressible']}" for case, m in cannot)
    yield from (f"- {case}: random in eval mode" for case in figures["random"])
    yield "\n## What the raw cores do not export right\n"
    yield from _failures(table, RAW)


def _families(table: Table) -> Iterable[str]:
    families: dict[str, list[dict[str, Row]]] = defaultdict(list)
    for modes in table.values():
        families[next(iter(modes.values()))["family"]].append(modes)
    yield "| family | n | dynamo | TorchScript | either | onnxport | static | wrong | failed |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for family, cases in sorted(families.items()):
        right = [sum(_is(m, mode) for m in cases) for mode in MODES]
        either = sum(any(_is(m, raw) for raw in RAW) for m in cases)
        static, wrong = (sum(_is(m, "onnxport", o) for m in cases) for o in ("static", "wrong"))
        rest = sum(
            m.get("onnxport", {}).get("outcome") in {"failed", "timeout", "crashed"} for m in cases
        )
        yield (
            f"| {family} | {len(cases)} | {right[0]} | {right[1]} | {either} | **{right[2]}** "
            f"| {static} | {wrong} | {rest} |"
        )


def _cases(table: Table) -> Iterable[str]:
    yield "| case | dynamo | TorchScript | onnxport | by | onnxport, s | dynamo, s | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for case, modes in table.items():
        ours = modes.get("onnxport", {})
        states = " | ".join(modes.get(mode, {}).get("outcome", "-") for mode in MODES)
        by = " ".join(part for part in (ours.get("core"), ours.get("variant")) if part)
        error = f"{ours['max_error']:.1g}" if "max_error" in ours else ""
        seconds = " | ".join(_seconds(modes.get(mode, {})) for mode in ("onnxport", "raw_dynamo"))
        yield f"| {case} | {states} | {by} | {seconds} | {error} |"


def _seconds(row: Row) -> str:
    return f"{row['export_s']:.2f}" if "export_s" in row else ""


def _failures(table: Table, which: tuple[str, ...]) -> Iterable[str]:
    for case, modes in table.items():
        for mode in which:
            row = modes.get(mode)
            if row is None or row["outcome"] == "right":
                continue
            name = f"**{case}**" if mode == "onnxport" else f"{case} ({mode})"
            text = " ".join(row["reason"].split()).replace("|", "\\|")
            cannot = f" ONNX cannot express it: {row['inexpressible']}" * bool(row["inexpressible"])
            yield f"- {name}, {row['outcome']}: {text}{cannot}"
            for attempt in row.get("attempts", []):
                reason = " ".join(attempt["reason"].split())[:240]
                if reason:
                    yield f"  - {attempt['core']} {attempt['variant']}: {reason}"
