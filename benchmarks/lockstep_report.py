"""What the lockstep benchmark writes: figures as JSON, tables to read, a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HAND_WRITTEN", "ROWS", "about", "part_about", "write_results"]

Found = dict[str, Any]

ROOT = f"{Path(__file__).resolve().parent.parent}/"
PACKAGES = ("torch", "lightning", "onnx", "onnxscript", "onnxruntime", "onnxport")
ROWS = {
    "none": "no export",
    "beside": "torch.save beside",
    "background": "OnnxExport()",
    "waiting": "OnnxExport(), waiting",
    "inline": "OnnxExport(background=False)",
    "end": 'OnnxExport(when="end")',
    "dynamo": "to_onnx(dynamo=True)",
    "torchscript": "to_onnx(dynamo=False)",
}
HAND_WRITTEN = ("dynamo", "torchscript")
LARGE = 100e6
"""Bytes of weights from which memory and a refresh are held against these, not against imports."""
TARGETS = {
    "stall_of_save": 0.5,
    "stall_of_dynamo": 1 / 50,
    "refresh_of_save": 2.5,
    "refresh_speedup": 15.0,
    "first_of_raw": 1.5,
    "fit_ratio": 1.10,
    "trainer_added": 1.1,
    "worker_above": 1.5,
}
PAGE_CACHE = {
    True: """\
The page cache was full before each fit, as it is on any machine that has run for a while: a \
virtual machine has to get memory that was free from its host again, at seconds per gigabyte.""",
    False: "The page cache was as it was.",
}
ABOUT = """\
Every fit ran in a process of its own on the CPU, with {threads} torch thread(s) in training and \
one in the worker, {epochs} epochs with a checkpoint at the end of each, the same steps and \
random data in all rows of a model, and as many steps per epoch as take {epoch_s:g} s. AdamW, or \
SGD without momentum for plain wide layers; of these, where they are large, the two newest \
checkpoints are kept. {page_cache}

*Stall*: the time inside of `trainer.save_checkpoint`, callbacks included, less the writing of \
the file (`TorchCheckpointIO.save_checkpoint`, *own save*), less the same difference in the row \
without export. The hand-written callbacks export right after that, with the batch axis stated \
by hand and in eval mode; theirs is added. *Later*: all checkpoints but the first; median (p95). \
*Refresh*: the stages of a worker that fills weights into the graph that is there and proves the \
model. *Waiting*: training sleeps until each model is there, so that nothing runs beside the \
worker, and then saves the weights to a new file. *Beside*: no export; another process of low \
priority saves the weights beside training, to new files. *To proven*: from the saved checkpoint \
to the published model. *Trainer +*: its peak resident memory, copies of weights in memory files \
included, over that of the row without export. *Worker*: peaks of its own memory (anonymous and \
shared) and of all resident memory, pages of files included, while it refreshes, over what a \
worker has that made models of nearly no weights, which is imports. Fit includes making the \
callback and waiting for the last models."""


def about() -> Found:
    """Return what the figures depend on, without names or paths of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory": f"{memory:.0f} GiB",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def part_about() -> Found:
    """Return when a part was measured, and of which source."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whichever git there is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": described.stdout.strip() or "unknown",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_results(folder: Path, results: Found) -> None:
    """Write ``lockstep.json``, ``lockstep.md`` and ``lockstep.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    results = _plain(results)
    models = results["models"]
    results["figures"] = {name: figures_of(part) for name, part in models.items()}
    results["targets"] = [
        target for name, figures in results["figures"].items() for target in judge(name, figures)
    ]
    results["growth_figures"] = growth_of(results["growth"])
    results["leak_figures"] = leak_of(results["leak"])
    (folder / "lockstep.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    drawn = _plot(folder / "lockstep.svg", results)
    text = "\n".join(_markdown(results, drawn=drawn)) + "\n"
    (folder / "lockstep.md").write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Name files as in the repository and in the packages, not as on this machine."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str):
        text = re.sub(r"(?:/[^\s/'\"]+)*/site-packages/", "", value.replace(ROOT, ""))
        text = re.sub(r"(?:/[^\s/'\":]+)*/onnxport-lockstep-[^\s/'\":]+/?", "", text)
        for folder in (sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(Path.home())):
            text = text.replace(f"{folder}/", "")
        return text
    return value


# Figures.


def p95(values: list[float]) -> float:
    """Return the 95th percentile, between neighbours."""
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Iterable[float]) -> Found | None:
    """Return median and 95th percentile."""
    known = list(values)
    return {"median": median(known), "p95": p95(known), "n": len(known)} if known else None


def ratio(value: float | None, of: float | None) -> float | None:
    """Divide what is known."""
    return None if value is None or not of else value / of


def _middle(found: Found | None) -> float | None:
    return None if found is None else float(found["median"])


def _outside(row: Found) -> list[float]:
    return [save["total"] - save["inner"] for save in row["saves"]]


def figures_of(part: Found) -> Found:
    """Return the figures of a model, row by row."""
    rows = {name: row for name, row in part["rows"].items() if "failed" not in row}
    found: Found = {"weights": part["weights"], "steps": part["steps"], "step_s": part["step_s"]}
    costs = part["primitives"]
    if "failed" not in costs:
        found |= {"save_s": median(costs["save_s"]), "copy_s": median(costs["copy_s"])}
        idle = costs["worker_idle"]
        found |= {
            "raw_s": costs.get("raw_s") or None,
            "raw_error": costs.get("raw_error"),
            "worker_idle": {"own": idle["anon"] + idle["shmem"], "rss": idle["rss"]},
            "worker_loaded": costs.get("worker_loaded"),
        }
    none = rows.get("none")
    found["rows"] = {
        name: row_figures(row, none, found) for name, row in rows.items() if row["saves"]
    }
    found["failed"] = {name: r["failed"] for name, r in part["rows"].items() if "failed" in r}
    return found


def row_figures(row: Found, none: Found | None, part: Found) -> Found:
    """Return the figures of a row, some of them against the row without export."""
    base = median(_outside(none)) if none else 0.0
    stalls = [outside - base for outside in _outside(row)]
    done = [report for report in row["reports"] if report["ok"]]
    later = [report for report in done if report["epoch"] != 0]
    fresh = [report for report in later if report["how"] == "refresh"]
    total = row["fit_s"] + row["make_s"]
    hooks = row["hooks"]
    figures: Found = {
        "own_save": spread(save["inner"] for save in row["saves"][1:]),
        "stall_first": stalls[0],
        "stall": spread(stalls[1:]),
        "to_proven_first": next((r["total_s"] for r in done if r["epoch"] == 0), None),
        "to_proven": spread(report["total_s"] for report in later),
        "refresh": spread(report["worker_s"] for report in fresh),
        "save": spread(row.get("save_s", [])),
        "stages": _stages(fresh),
        "how": [report["how"] for report in done],
        "reports_failed": [r["error"] for r in row["reports"] if not r["ok"]],
        "preflight": [sum(report["stages"].values()) for report in row["preflight"]],
        "preflight_stages": [report["stages"] for report in row["preflight"]],
        "fit_s": total,
        "at_end_s": hooks.get("on_fit_end", {}).get("sum"),
        "batch_hook_max": hooks.get("on_train_batch_start", {}).get("max"),
        "written": row["trainer_written"] + row["worker_written"],
        "models": row["models"],
        "checkpoints": row["checkpoints"],
        "workers": row["workers"],
        "errors": row["errors"],
        "log": row["log"],
    }
    if none:
        peak = max(row["trainer_peak"], row["trainer_with_copies"])
        figures |= {
            "fit_ratio": total / (none["fit_s"] + none["make_s"]),
            "trainer_added": peak - max(none["trainer_peak"], none["trainer_with_copies"]),
            "same_training": row["weights_sum"] == none["weights_sum"],
        }
    return figures | _worker_figures(row, part.get("worker_loaded"))


def _stages(reports: list[Found]) -> Found:
    names = dict.fromkeys(name for report in reports for name in report["stages"])
    return {name: median(r["stages"].get(name, 0.0) for r in reports) for name in names}


def _worker_figures(row: Found, before: Found | None) -> Found:
    late, rest = row["worker_at_refresh"], row["worker_at_rest"]
    if not before or before["own"] is None or late["own"] is None:
        return {}
    return {
        "worker_above": {kind: late[kind] - before[kind] for kind in before},
        # With several workers, one after the other, the least is one that has just begun.
        "worker_rest_above": {kind: rest[kind] - before[kind] for kind in before}
        if row["workers"] == 1
        else None,
    }


# Targets.


def judge(name: str, figures: Found) -> list[Found]:
    """Return what the background row reaches."""
    rows, weights = figures["rows"], figures["weights"]
    row, dynamo = rows.get("background"), rows.get("dynamo")
    if row is None:
        return []
    stall, refresh = _middle(row["stall"]), _middle(row["refresh"])
    export = _middle(dynamo["stall"]) if dynamo and not dynamo["errors"] else None
    raw = (figures.get("raw_s") or [None])[0]
    above = row.get("worker_above", {})
    waiting, beside = rows.get("waiting", {}), rows.get("beside", {})
    known: list[tuple[str, str, float | None]] = [
        ("stall_of_save", "stall later / own save", ratio(stall, _middle(row["own_save"]))),
        ("stall_of_dynamo", "stall later / that of dynamo", ratio(stall, export)),
        ("first_of_raw", "first export, proven / raw dynamo", ratio(_first(waiting), raw)),
        ("first_of_raw", "the same, export beside training", ratio(_first(row), raw)),
        ("fit_ratio", "fit / fit without export", row.get("fit_ratio")),
        ("trainer_added", "trainer's memory + / weights", ratio(row.get("trainer_added"), weights)),
    ]
    if name == "encoder":
        speedup = ratio(export, refresh)  # both in a run with training
        known.append(("refresh_speedup", "dynamo export / refresh", speedup))
    if weights >= LARGE:
        alone = ratio(_middle(waiting.get("refresh")), _middle(waiting.get("save")))
        both = ratio(refresh, _middle(beside.get("save")))
        mine, resident = (ratio(above.get(kind), weights) for kind in ("own", "rss"))
        known += [
            ("refresh_of_save", "refresh / torch.save, training waiting", alone),
            ("refresh_of_save", "refresh / torch.save, both beside training", both),
            ("worker_above", "worker's own memory / weights", mine),
            ("worker_above", "worker's resident memory / weights", resident),
        ]
    return [_target(name, key, text, value) for key, text, value in known]


def _first(row: Found) -> float | None:
    return row["preflight"][0] if row.get("preflight") else None


def _target(model: str, key: str, text: str, value: float | None) -> Found:
    limit = TARGETS[key]
    least = key == "refresh_speedup"
    reached = None if value is None else (value >= limit if least else value <= limit)
    return {
        "model": model,
        "what": text,
        "target": f"{'>=' if least else '<='} {limit:g}",
        "value": value,
        "reached": reached,
    }


# Growth and leak.


def growth_of(growth: Found | None) -> Found | None:
    """Return one line per size, and the exponents of what grows."""
    if not growth:
        return None
    lines = []
    for point in growth["points"]:
        figures = figures_of(point | {"rows": {"background": point["row"]}})
        row = figures["rows"].get("background")
        if row is None:
            continue
        above, rest = row.get("worker_above", {}), row.get("worker_rest_above") or {}
        lines.append(
            {
                "weights": figures["weights"],
                "save_s": figures["save_s"],
                "refresh": row["refresh"],
                "stall": row["stall"],
                "own": above.get("own"),
                "rss": above.get("rss"),
                "rest_own": rest.get("own"),
                "rest_rss": rest.get("rss"),
                "how": row["how"],
            }
        )
    sizes = [line["weights"] for line in lines]
    return {
        "lines": lines,
        "exponents": {
            "torch.save": exponent(sizes, [line["save_s"] for line in lines]),
            "refresh": exponent(sizes, [_middle(line["refresh"]) for line in lines]),
            "worker own": exponent(sizes, [line["own"] for line in lines]),
            "worker resident": exponent(sizes, [line["rss"] for line in lines]),
        },
    }


def exponent(sizes: list[float], values: list[float | None]) -> float | None:
    """Return the slope of a line through the logarithms."""
    known = [(s, v) for s, v in zip(sizes, values, strict=True) if v is not None and v > 0]
    return slope([(math.log(size), math.log(value)) for size, value in known])


def slope(points: list[tuple[float, float]]) -> float | None:
    """Return the slope of the line of least squares."""
    if len({x for x, _ in points}) <= 1:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def leak_of(leak: Found | None) -> Found | None:
    """Return memory at the first counted and at the last checkpoint, and bytes per checkpoint."""
    if not leak:
        return None
    found: Found = {}
    for name, row in leak["rows"].items():
        for who, series in row.get("series", {}).items():
            late = [(count, value) for count, value in series if count >= leak["from"]]
            if late:
                found[f"{who}, {ROWS[name]}"] = {
                    "from": late[0],
                    "to": late[-1],
                    "slope": slope(late),
                }
    return found


# To read.


def _markdown(results: Found, *, drawn: bool) -> list[str]:
    machine = results["about"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    facts = [
        f"{machine['system']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory']}",
        f"Python {machine['python']}; {versions}",
        *_measured(results),
    ]
    lines = ["# Lockstep: every checkpoint a model, and what it costs", ""]
    cache = PAGE_CACHE[results["settings"].get("filled", False)]
    text = ABOUT.format(**results["settings"], page_cache=cache)
    lines += [*(f"- {fact}" for fact in facts), "", text, ""]
    if results["settings"]["quick"]:
        lines += ["**A quick run of tiny models: it shows that the benchmark works.**", ""]
    if drawn:
        lines += ["![Stalls, and how a refresh grows with the weights](lockstep.svg)", ""]
    if results["targets"]:
        lines += ["## Targets", "", *_target_lines(results["targets"]), ""]
    for name, figures in results["figures"].items():
        lines += [f"## {name}, {_mb(figures['weights'])} MB", "", *_model_lines(figures), ""]
    if results["growth_figures"]:
        lines += ["## Growth with the weights", "", *_growth_lines(results["growth_figures"]), ""]
    if results["leak_figures"]:
        lines += ["## Memory over many checkpoints", "", *_leak_lines(results), ""]
    return lines


def _measured(results: Found) -> list[str]:
    parts = dict(results["models"]) | {key: results[key] for key in ("growth", "leak")}
    groups: dict[str, list[str]] = {}
    for name, part in parts.items():
        if part:
            when = f"{part['about']['date']} at {part['about']['commit']}"
            groups.setdefault(when, []).append(name)
    return [f"{when}: {', '.join(names)}" for when, names in groups.items()]


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _target_lines(targets: list[Found]) -> list[str]:
    said = {True: "reached", False: "**not reached**", None: "not measured"}
    rows = (
        (t["model"], t["what"], t["target"], _number(t["value"]), said[t["reached"]])
        for t in targets
    )
    return _table(("model", "what", "target", "measured", ""), rows)


def _model_lines(figures: Found) -> list[str]:
    raw = " / ".join(map(_seconds, figures.get("raw_s") or []))
    lines = [
        (
            f"{figures['steps']} steps per epoch of {_seconds(figures['step_s'])}; torch.save "
            f"{_seconds(figures.get('save_s'))}, copy of the file "
            f"{_seconds(figures.get('copy_s'))}, raw dynamo export {raw or '-'} (first / second). "
            f"A worker has {_both(figures.get('worker_idle'))} MB (own / resident) after its first "
            f"imports, and {_both(figures.get('worker_loaded'))} MB with nearly no weights."
        ),
        "",
    ]
    head = (
        *("row", "own save", "stall first", "stall later", "to proven first", "later"),
        *("refresh", "fit", "of it at the end", "x none", "trainer +, MB"),
        *("worker own / resident, MB", "written, MB", "models"),
    )
    lines += _table(head, (_row_cells(name, row) for name, row in figures["rows"].items()))
    notes = [note for name, row in figures["rows"].items() for note in _notes(name, row)]
    notes += [f"{ROWS[name]} failed: {_line(text)}" for name, text in figures["failed"].items()]
    if figures.get("raw_error"):
        notes.append(f"The raw export failed: {_line(figures['raw_error'])}")
    return [*lines, "", *(f"- {note}" for note in notes)]


def _row_cells(name: str, row: Found) -> tuple[str, ...]:
    above = row.get("worker_above") if row["workers"] else None
    same = name == "none"
    return (
        ROWS[name],
        _spread(row["own_save"]),
        "-" if same else _seconds(row["stall_first"]),
        "-" if same else _spread(row["stall"]),
        _seconds(row["to_proven_first"]),
        _spread(row["to_proven"]),
        _spread(row["refresh"]),
        _seconds(row["fit_s"]),
        _seconds(row["at_end_s"]),
        _number(row.get("fit_ratio")),
        "-" if same else _mb(row.get("trainer_added")),
        _both(above),
        _mb(row["written"]),
        f"{row['models']} of {row['checkpoints']}",
    )


def _notes(name: str, row: Found) -> list[str]:
    notes = []
    if row["preflight"]:
        rest = row.get("worker_rest_above")
        held = f"; between them the worker has {_both(rest)} MB" if rest else ""
        first, stages = _listed(row["preflight_stages"][0]), _listed(row["stages"])
        notes.append(
            f"{ROWS[name]}: first export {_seconds(row['preflight'][0])} ({first}); longest "
            f"batch hook {_seconds(row['batch_hook_max'])}; refreshes: {stages or 'none'}; "
            f"{', '.join(row['how'])}{held}."
        )
    if row.get("save"):
        notes.append(f"{ROWS[name]}: torch.save of the weights {_spread(row['save'])}.")
    if row["workers"] > 1:
        notes.append(f"{ROWS[name]}: {row['workers']} worker processes, one after the other.")
    if row.get("same_training") is False:
        notes.append(f"{ROWS[name]}: the weights at the end are not those of the run without.")
    problems = [*row["errors"], *row["reports_failed"], *row["log"]]
    for text, count in {text: problems.count(text) for text in problems}.items():
        notes.append(f"{ROWS[name]}: {_line(str(text))}{f' ({count} times)' * (count > 1)}")
    return notes


def _listed(stages: Found) -> str:
    return ", ".join(f"{stage} {_seconds(s)}" for stage, s in stages.items())


def _growth_lines(growth: Found) -> list[str]:
    head = (
        *("weights, MB", "torch.save", "refresh", "stall later"),
        *("worker own / resident, MB", "the same at rest, MB"),
    )
    rows = (
        (
            _mb(line["weights"]),
            _seconds(line["save_s"]),
            _spread(line["refresh"]),
            _spread(line["stall"]),
            _both(line),
            _both({"own": line["rest_own"], "rss": line["rest_rss"]}),
        )
        for line in growth["lines"]
    )
    powers = ", ".join(f"{name} {_number(v)}" for name, v in growth["exponents"].items())
    return [
        *_table(head, rows),
        "",
        f"Exponents of a power of the weights (least squares over logarithms): {powers}.",
    ]


def _leak_lines(results: Found) -> list[str]:
    head = ("process", "checkpoint: MB", "checkpoint: MB", "kB per checkpoint")
    rows = (
        (
            name,
            f"{found['from'][0]}: {found['from'][1] / 1e6:.1f}",
            f"{found['to'][0]}: {found['to'][1] / 1e6:.1f}",
            "-" if found["slope"] is None else f"{found['slope'] / 1e3:.1f}",
        )
        for name, found in results["leak_figures"].items()
    )
    text = f"Anonymous memory over {results['leak']['checkpoints']} checkpoints of a small model."
    return [text, "", *_table(head, rows)]


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def _both(found: Found | None) -> str:
    return f"{_mb(found['own'])} / {_mb(found['rss'])}" if found else "-"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"


def _spread(found: Found | None) -> str:
    return "-" if not found else f"{_seconds(found['median'])} ({_seconds(found['p95'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# To see.


def _plot(file: Path, results: Found) -> bool:
    """Draw stalls and growth; without matplotlib nothing is drawn."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "lockstep", "font.size": 9, "axes.grid": True}
    from matplotlib import pyplot as plt

    figures, growth, leak = results["figures"], results["growth_figures"], results["leak"]
    panels = [
        *([(_draw_stalls, figures)] if figures else []),
        *([(_draw_growth, growth)] if growth and growth["lines"] else []),
        *([(_draw_leak, leak)] if leak else []),
    ]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for (draw, data), place in zip(panels, axes[0], strict=True):
        draw(place, data)
        place.grid(alpha=0.3)
        place.legend(fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


def _draw_stalls(place: Any, figures: Found) -> None:
    rows = [row for row in ROWS if row != "none"]
    for index, row in enumerate(rows):
        bars = [
            (model + (index - 2) * 0.16, max(1e-4, stall))
            for model, found in enumerate(figures.values())
            if (stall := _middle(found["rows"].get(row, {}).get("stall"))) is not None
        ]
        if bars:
            place.bar(*zip(*bars, strict=True), width=0.15, label=ROWS[row])
    saves = [(i, f["save_s"]) for i, f in enumerate(figures.values()) if f.get("save_s")]
    if saves:
        place.scatter(*zip(*saves, strict=True), marker="_", s=900, color="black", zorder=3)
        place.scatter([], [], marker="_", color="black", label="torch.save of the weights")
    names = [f"{name}\n{found['weights'] / 1e6:.0f} MB" for name, found in figures.items()]
    place.set_xticks(range(len(names)), names)
    place.set_yscale("log")
    place.set_ylabel("stall of training at a later checkpoint, s")


def _draw_growth(place: Any, growth: Found) -> None:
    lines = growth["lines"]
    sizes = [line["weights"] / 1e6 for line in lines]
    known = {
        "refresh, s": [_middle(line["refresh"]) for line in lines],
        "torch.save, s": [line["save_s"] for line in lines],
        "worker's own memory +, GB": [_giga(line["own"]) for line in lines],
        "worker's resident memory +, GB": [_giga(line["rss"]) for line in lines],
    }
    for name, values in known.items():
        place.plot(sizes, [math.nan if v is None else v for v in values], "o-", label=name)
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel("weights, MB")


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _draw_leak(place: Any, leak: Found) -> None:
    for name, row in leak["rows"].items():
        for who, series in row.get("series", {}).items():
            late = [(count, value / 1e6) for count, value in series if count > 0]
            if late:
                place.plot(*zip(*late, strict=True), label=f"{who}, {ROWS[name]}")
    place.set_xlabel("checkpoints")
    place.set_ylabel("anonymous memory, MB")
    place.set_ylim(0, 1.1 * place.dataLim.ymax)
