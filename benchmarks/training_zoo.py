"""Measure what ``OnnxExport()`` makes of models of many kinds in real training runs.

Cases of the zoo are wrapped in a plain LightningModule and trained for two steps, without and with
the callback, each case in a process of its own with a time limit. Its model is then compared with
a fresh module that has the checkpoint's weights, at sizes and values that training has not seen::

    python benchmarks/training_zoo.py [--filter PART,PART] [--jobs 1] [--style forward]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Another file here is called like a package that others import if it is there.
sys.modules.setdefault("coverage", None)  # type: ignore[arg-type]
sys.path.append(str(Path(__file__).parent.parent))

import coverage_modes as modes_of  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from zoo import all_cases  # noqa: E402

from onnxport import OnnxExport  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from zoo.base import Case

    from onnxport import ExportReport

Row = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

STEPS = 2
LIMIT_S = 140.0
POLL_S = 0.02
PRELOAD = ("onnxruntime", "onnxscript", "transformers")
PACKAGES = ("torch", "lightning", "onnx", "onnxscript", "onnxruntime", "transformers", "onnxport")
MODEL = "model."
"""What the names of weights begin with in a checkpoint."""
OUTCOMES = {
    "right": "published, and agrees at every size; every axis that varies is dynamic",
    "static": "published, and agrees; an axis is fixed that need not be",
    "wrong": "published, and does not load, fails or disagrees",
    "refused": "no model, with a reason; training goes on",
    "disturbed": "losses or weights are not those of the run without the callback",
    "broken": "training ends with an error only with the callback",
    "untrained": "training ends with an error without the callback, too: not counted",
    "timeout": "over the time limit",
    "crashed": "the process died",
}
CASES = (
    *("lightning/boring_model", "lightning/demo_lstm", "lightning/demo_transformer"),
    *("torch/lstm", "torch/gru_bidirectional", "torch/transformer_encoder_padding"),
    *("torch/batch_norm1d", "huggingface/bert", "huggingface/gpt2", "huggingface/llama"),
    *("huggingface/t5", "huggingface/deberta_v2", "huggingface/vit", "huggingface/segformer"),
    *("huggingface/wav2vec2", "huggingface/clip", "timm/resnet18", "timm/vit_tiny_patch16_224"),
    *("timm/mobilenetv3_small_050", "segmentation/unet", "monai/UNet", "monai/AttentionUnet"),
    *("geometric/GCN", "geometric/GAT", "geometric/GIN-pooled", "neuralforecast/NHITS"),
    *("neuralforecast/LSTM", "pytorch-forecasting/DeepAR", "pytorch-forecasting/NHiTS"),
    *("gluonts/SimpleFeedForwardModel", "gluonts/DLinearModel", "tabnet/TabNet-sparsemax"),
    *("pytorch-tabular/FTTransformerModel", "pytorch-tabular/CategoryEmbeddingModel"),
    *("x-transformers/Decoder-rotary", "x-transformers/Encoder", "handmade/data_branch"),
    *("handmade/dict", "handmade/keywords", "handmade/packed", "handmade/running_mean"),
)
"""What runs without ``--filter``."""


# Training.


class CallsModel(pl.LightningModule):
    """Its steps call the model, and ``forward`` is not defined."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def predict(self, batch: Call) -> Any:
        """Call the model."""
        args, kwargs = batch
        return self.model(*args, **kwargs)

    def training_step(self, batch: Call, _batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return _loss(self.predict(batch))

    def validation_step(self, batch: Call, _batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return _loss(self.predict(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class CallsItself(CallsModel):
    """Its steps call ``self(...)``."""

    def predict(self, batch: Call) -> Any:
        """Call this module."""
        args, kwargs = batch
        return self(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass everything on."""
        return self.model(*args, **kwargs)


STYLES = {"model": CallsModel, "forward": CallsItself}


def _loss(output: Any) -> torch.Tensor:
    """Mean of squares of all float outputs; a mask's infinities are left out."""
    flat = [t.flatten() for t in modes_of.tensors(output) if t.is_floating_point()]
    values = torch.cat([t.float() for t in flat])
    return values[values.isfinite()].square().mean()


class Losses(pl.Callback):
    """Writes down the losses, exactly."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_end(self, _trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        """Keep the loss of a step."""
        self.found.append(float(outputs["loss"]).hex())

    def on_validation_batch_end(self, _trainer: Any, _module: Any, outputs: Any, *_: Any) -> None:
        """Keep the loss of a validation step."""
        self.found.append(float(outputs).hex())


class Calls(Dataset[Call]):
    """The calls of a case at its observed sizes; a module may change what it is given."""

    def __init__(self, case: Case, seed: int) -> None:
        sizes = [case.observed[i % len(case.observed)] for i in range(STEPS)]
        self._calls = [
            modes_of.inputs_of(modes_of.seeded_call(case, size, seed + i))
            for i, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: int) -> Call:
        return copy.deepcopy(self._calls[index])


def _same(batch: Any) -> Any:
    return batch


@dataclasses.dataclass
class Fit:
    """What one training run left."""

    losses: list[str]
    state: Mapping[str, Any]
    checkpoint: str
    seconds: float


def fit(case: Case, style: str, folder: Path, export: OnnxExport | None) -> Fit:
    """Train a case for two steps, with validation before and after."""
    torch.manual_seed(0)
    module = STYLES[style](case.build())
    loaders = [
        DataLoader(Calls(case, seed), batch_size=None, collate_fn=_same) for seed in (11, 21)
    ]
    losses, saver = Losses(), ModelCheckpoint(dirpath=folder)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, saver, *([export] if export else [])],
    )
    pl.seed_everything(1)
    started = time.perf_counter()
    trainer.fit(module, *loaders)
    seconds = round(time.perf_counter() - started, 3)
    return Fit(losses.found, module.state_dict(), saver.best_model_path, seconds)


def _differs(one: Fit, other: Fit) -> str:
    if len(one.losses) < 2 * STEPS:
        return f"only {len(one.losses)} losses were seen"
    if one.losses != other.losses:
        return f"losses {one.losses} became {other.losses}"
    for name, value in one.state.items():
        same = name in other.state and (
            torch.equal(value.nan_to_num(), other.state[name].nan_to_num())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else not isinstance(value, torch.Tensor) or torch.equal(value, other.state[name])
        )
        if not same:
            return f"weight {name} became another"
    return "" if len(one.state) == len(other.state) else "there are other weights"


# One case.


def run_case(case: Case, style: str, folder: Path, stage: Callable[[str], None]) -> Row:
    """Train one case without and with the callback and judge the model.

    Returns:
        What goes into the row: outcome, reason, and what was found.
    """
    stage("training without the callback")
    try:
        plain = fit(case, style, folder / "plain", None)
    except Exception as error:  # noqa: BLE001 - the case is not one for training
        traceback.print_exc()
        return {"outcome": "untrained", "reason": modes_of.first_line(error)}
    stage("training with the callback")
    export = OnnxExport()
    try:
        watched = fit(case, style, folder / "watched", export)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return {"outcome": "broken", "reason": modes_of.first_line(error)}
    row: Row = {
        "losses": [float.fromhex(loss) for loss in plain.losses],
        "fit_s": {"plain": plain.seconds, "watched": watched.seconds},
        "identical": True,
        "published": False,
    }
    difference = _differs(plain, watched)
    if difference:
        stage("training again without the callback")
        again = fit(case, style, folder / "again", None)
        row["random"] = bool(_differs(plain, again))
        row["identical"] = None if row["random"] else False
    report = export.reports[-1] if export.reports else None
    if report is None:
        found = {"outcome": "refused", "reason": "no report"}
    elif not report.ok:
        row |= _of_report(report)
        found = {"outcome": "refused", "reason": str(report.error)}
    else:
        stage("check")
        row |= _of_report(report) | _axes(case, report) | {"published": True}
        found = modes_of.judge(
            _with_weights(case, watched.checkpoint),
            Path(str(report.path)),
            [spec.name for spec in report.inputs],
        )
    if row["identical"] is False:
        found |= {"outcome": "disturbed", "reason": f"{difference}; {found['reason']}".strip("; ")}
    return row | found


def _with_weights(case: Case, checkpoint: str) -> Case:
    """Give the same case with a module that has the weights of a checkpoint."""
    state = torch.load(checkpoint, weights_only=False, map_location="cpu")["state_dict"]
    own = {name.removeprefix(MODEL): value for name, value in state.items()}

    def build() -> nn.Module:
        module = case.build()
        module.load_state_dict(own)
        return module

    return dataclasses.replace(case, build=build)


def _of_report(report: ExportReport) -> Row:
    won = next((attempt for attempt in report.attempts if attempt.ok), None)
    return {
        "core": report.core,
        "variant": won.variant if won else None,
        "target": report.target,
        "export_s": report.seconds.get("total"),
        "attempts": [
            {"core": a.core, "variant": a.variant, "ok": a.ok, "reason": a.reason[:400]}
            for a in report.attempts
        ],
        "warnings": list(report.warnings),
        "proof_max_error": report.max_abs_error,
        "dynamic_axes": {
            name: {str(axis): dim for axis, dim in dims.items()}
            for name, dims in report.dynamic_axes.items()
        },
    }


def _axes(case: Case, report: ExportReport) -> Row:
    """Compare the dynamic axes of the inputs with those that the case's own calls have."""
    wanted = list(case.axes().items())
    flat = modes_of.axes(case)
    specs = report.inputs
    row: Row = {"axes_expected": {leaf: {str(a): d for a, d in x.items()} for leaf, x in wanted}}
    if len(flat) != len(specs):
        text = f"{len(specs)} inputs for {len(flat)} tensors"
        return row | {"axes_ok": None, "axes_reason": text}
    missing, extra, symbols = [], [], {}
    for spec, axes in zip(specs, flat, strict=True):
        missing += [f"{spec.name}[{a}] ({axes[a]})" for a in axes if a not in spec.dynamic_axes]
        extra += [f"{spec.name}[{a}]" for a in spec.dynamic_axes if a not in axes]
        for axis, dim in axes.items():
            symbols.setdefault(dim, set()).add(spec.dynamic_axes.get(axis))
    split = [f"{dim} has {len(found)} names" for dim, found in symbols.items() if len(found) > 1]
    parts = [
        *([f"fixed: {', '.join(missing)}"] if missing else []),
        *([f"dynamic, too: {', '.join(extra)}"] if extra else []),
        *(split if not missing else []),
    ]
    return row | {"axes_ok": not missing and not extra, "axes_reason": "; ".join(parts)}


# Processes.


@dataclasses.dataclass
class Slot:
    """A case at work."""

    case: Case
    style: str
    folder: Path
    pid: int
    started: float


def run_all(
    work: list[tuple[Case, str]],
    jobs: int,
    limit_s: float,
    done: Callable[[Row], None],
    logs: Path | None = None,
) -> None:
    """Run each case in a forked process, so imports are paid once and crashes stay there."""
    queue, slots = list(work), []
    with tempfile.TemporaryDirectory(prefix="training-zoo-") as root:
        try:
            while queue or slots:
                while queue and len(slots) < jobs:
                    case, style = queue.pop(0)
                    folder = Path(root) / case.name.replace("/", "--")
                    folder.mkdir()
                    sys.stdout.flush()
                    pid = os.fork()
                    slots.append(Slot(case, style, folder, pid, time.monotonic()))
                    if pid == 0:
                        _child(slots[-1])
                time.sleep(POLL_S)
                slots = [slot for slot in slots if not _ended(slot, limit_s, done, logs)]
        finally:
            for slot in slots:
                _kill(slot.pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _ended(slot: Slot, limit_s: float, done: Callable[[Row], None], logs: Path | None) -> bool:
    pid, status = os.waitpid(slot.pid, os.WNOHANG)
    if pid == 0 and time.monotonic() - slot.started <= limit_s:
        return False
    _kill(slot.pid)  # With what it may have started itself.
    if pid == 0:
        os.waitpid(slot.pid, 0)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(slot.folder / "log", logs / f"{slot.folder.name}.log")
    where = slot.folder / "stage"
    stage = where.read_text() if where.exists() else "start"
    result = slot.folder / "row.json"
    if pid == 0:
        row = {"outcome": "timeout", "reason": f"over {limit_s:g} s in {stage}"}
    elif result.exists():
        row = json.loads(result.read_text())
    else:
        number = os.waitstatus_to_exitcode(status)
        name = signal.Signals(-number).name if number < 0 else f"exit status {number}"
        row = {"outcome": "crashed", "reason": f"{name} in {stage}"}
    about = {"case": slot.case.name, "family": slot.case.family, "style": slot.style}
    spent = round(time.monotonic() - slot.started, 2)
    done(about | row | {"seconds": spent})
    return True


def _child(slot: Slot) -> None:
    """Run one case in this forked process and leave without any clean-up of the parent's."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(slot.folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Nothing learnt in one case may help or harm another.
    os.environ["XDG_CACHE_HOME"] = str(slot.folder / "cache")
    os.chdir(slot.folder)
    warnings.simplefilter("ignore")
    try:
        row = run_case(slot.case, slot.style, slot.folder, (slot.folder / "stage").write_text)
    except BaseException as error:  # noqa: BLE001 - the benchmark's own mistake, shown as such
        traceback.print_exc()
        row = {"outcome": "crashed", "reason": f"benchmark: {modes_of.first_line(error)}"}
    partial = slot.folder / "row.partial"
    partial.write_text(json.dumps(row, default=str))
    partial.rename(slot.folder / "row.json")
    os._exit(0)


# Results.


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _earlier(folder: Path, names: list[str]) -> list[Row]:
    """Read the rows of the last run but those of the cases that run again."""
    path = folder / "training_zoo.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["case"] not in names]


def summarise(rows: list[Row]) -> Row:
    ran = [row for row in rows if row["outcome"] != "untrained"]
    compared = [row for row in ran if row.get("identical") is not None]
    published = [row for row in ran if row.get("published")]
    cores: dict[str, int] = {}
    for row in published:
        cores[row["core"]] = cores.get(row["core"], 0) + 1
    return {
        "cases": len(rows),
        "ran": len(ran),
        "families": len({row["family"] for row in ran}),
        "published": len(published),
        "axes_as_expected": sum(bool(row.get("axes_ok")) for row in published),
        "outcomes": {
            name: count
            for name in OUTCOMES
            if (count := sum(row["outcome"] == name for row in rows))
        },
        "cores": cores,
        "compared": len(compared),
        "identical": sum(bool(row["identical"]) for row in compared),
    }


def write_results(folder: Path, rows: list[Row], spent_s: float) -> None:
    """Write ``training_zoo.json`` and ``training_zoo.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "last_run_s": round(spent_s),
    }
    figures = summarise(rows)
    data = {"about": about, "figures": figures, "rows": rows}
    (folder / "training_zoo.json").write_text(_without_paths(json.dumps(data, indent=1)) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Training: what the callback makes of models of many kinds\n",
        f"{about['date']}; {about['machine']}; Python {about['python']}; {versions}.\n",
        (
            "Each model was wrapped in a plain LightningModule whose steps call `self(...)` "
            "(forward) or `self.model(...)` (model), and trained for two steps on the CPU with "
            "validation and a `ModelCheckpoint`, once without and once with `OnnxExport()` without "
            "arguments. What was published is compared in ONNX Runtime with a fresh module that "
            "has the checkpoint's weights, at sizes and values that training has not seen.\n"
        ),
        *(f"- *{name}*: {text}." for name, text in OUTCOMES.items()),
        "\n## Summary\n",
        *figure_lines(figures),
        "\n## Cases\n",
        "| case | calls | outcome | by | axes as expected | same training | export, s | error |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "\n## What is not right\n",
        *(line for row in rows for line in _failure(row)),
    ]
    (folder / "training_zoo.md").write_text(_without_paths("\n".join(lines)) + "\n")


def _without_paths(text: str) -> str:
    """Leave out where this machine keeps things: reasons name lines of code."""
    text = re.sub(r"/[^\s'\":]*/(site-packages|training-zoo-[^/]*)/", "", text)
    return text.replace(f"{Path(__file__).parent.parent}/", "")


def figure_lines(figures: Row) -> list[str]:
    outcomes = ", ".join(f"{name} {count}" for name, count in figures["outcomes"].items())
    cores = ", ".join(f"{name} {count}" for name, count in figures["cores"].items())
    return [
        (
            f"- {figures['cases']} cases, {figures['ran']} of them can be trained, of "
            f"{figures['families']} families: {outcomes}."
        ),
        f"- published: **{figures['published']}** of {figures['ran']} ({cores or 'none'}).",
        (
            f"- dynamic axes as expected: {figures['axes_as_expected']} of {figures['published']} "
            "published."
        ),
        (
            f"- losses and weights bit-identical with and without the callback: "
            f"**{figures['identical']}** of {figures['compared']} whose training repeats itself."
        ),
    ]


def _line(row: Row) -> str:
    said = {True: "yes", False: "**no**", None: "-"}
    by = " ".join(part for part in (row.get("core"), row.get("variant")) if part)
    seconds = f"{row['export_s']:.2f}" if row.get("export_s") is not None else ""
    error = f"{row['max_error']:.1g}" if "max_error" in row else ""
    same = "random by itself" if row.get("random") else said[row.get("identical")]
    cells = (row["case"], row["style"], row["outcome"], by, said[row.get("axes_ok")], same)
    return "| " + " | ".join((*cells, seconds, error)) + " |"


def _failure(row: Row) -> list[str]:
    if row["outcome"] == "right":
        note = row.get("axes_reason")
        return [f"- {row['case']}, right, but: {note}"] if note else []
    text = " ".join(row["reason"].split()).replace("|", "\\|")
    lines = [f"- **{row['case']}**, {row['outcome']}: {text}"]
    for attempt in row.get("attempts", []):
        reason = " ".join(attempt["reason"].split())[:240]
        if reason and row["outcome"] == "refused":
            lines.append(f"  - {attempt['core']} {attempt['variant']}: {reason}")
    return lines


def preload() -> None:
    """Import what every process needs, and export once, so tables and registries are filled."""
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            __import__(name)
    net = torch.nn.Linear(2, 2).eval()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        shapes, sample = {"input": {0: "batch"}}, (torch.zeros(3, 2),)
        torch.onnx.export(net, sample, dynamo=True, dynamic_shapes=shapes, verbose=False)
        torch.onnx.export(net, sample, f"{folder}/net.onnx", dynamo=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="parts of names, with commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--merge", action="store_true", help="keep other rows of the last run")
    parser.add_argument("--logs", type=Path, help="folder for what each process says")
    parser.add_argument(
        "--style", choices=("both", *STYLES), default="both", help="who is called; both: in turn"
    )
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    found = {case.name: case for case in all_cases()}
    if options.filter:
        parts = options.filter.split(",")
        names = [name for name in found if any(part in name for part in parts)]
    else:
        names = [name for name in CASES if name in found]
        left = [name for name in CASES if name not in found]
        print(*(f"{name} is not here" for name in left), sep="\n", end="\n" if left else "")
    if not names:
        print("No case matches.", file=sys.stderr)
        return 2
    in_turn = list(STYLES) if options.style == "both" else [options.style]
    work = [(found[name], in_turn[place % len(in_turn)]) for place, name in enumerate(names)]
    preload()
    rows = _earlier(options.out, names) if options.merge else []
    order = {name: index for index, name in enumerate(found)}
    started = time.monotonic()

    def done(row: Row) -> None:
        rows.append(row)
        rows.sort(key=lambda r: order.get(r["case"], len(order)))
        axes = f" [axes: {row['axes_reason']}]" if row.get("axes_reason") else ""
        text = f"{row['reason'][:140]}{axes}"
        core = str(row.get("core") or "-")
        print(f"{row['case']:40} {row['style']:8} {row['outcome']:10} {core:7}", end="")
        print(f"{row['seconds']:7.1f} s  {text}", flush=True)
        write_results(options.out, rows, time.monotonic() - started)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        run_all(work, options.jobs, options.limit_s, done, options.logs)
    print("\n".join(figure_lines(summarise(rows))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
