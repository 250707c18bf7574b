"""Names of models that are not there yet, and notes of what is owed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxport.callbacks.kept import KeptReports
from onnxport.callbacks.owed import note, note_anew, owed, settle, sweep, ticket, used_below
from onnxport.callbacks.paths import ModelPaths
from onnxport.report import AxisEvidence, Check, ExportReport, OutputError, Provenance

if TYPE_CHECKING:
    import pytest


def checkpoint(folder: Path, name: str = "epoch=0.ckpt") -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("a checkpoint")
    return str(folder / name)


def test_a_name_is_taken_by_a_model_on_its_way(tmp_path: Path) -> None:
    paths = ModelPaths(tmp_path / "models")
    first, second = (checkpoint(tmp_path / name) for name in ("a", "b"))
    assert paths.of(first) == tmp_path / "models" / "epoch=0.onnx"
    assert paths.of(second) != paths.of(first)
    assert paths.of(second) == paths.of(second)
    assert paths.of(first) == tmp_path / "models" / "epoch=0.onnx"


def test_the_name_of_a_removed_checkpoint_is_free(tmp_path: Path) -> None:
    paths = ModelPaths(tmp_path / "models")
    first, second = (checkpoint(tmp_path / name) for name in ("a", "b"))
    paths.of(first)
    (tmp_path / "a" / "epoch=0.ckpt").unlink()
    assert paths.of(second) == tmp_path / "models" / "epoch=0.onnx"


def test_what_is_noted_is_owed_until_it_is_settled(tmp_path: Path) -> None:
    origin = Provenance(
        checkpoint=checkpoint(tmp_path / "a"), epoch=3, metrics={"acc": 0.5}, mode="max"
    )
    model = tmp_path / "models" / "epoch=0.onnx"
    note(model, "-net", origin)
    (debt,) = owed([tmp_path], "-net")
    assert (debt.model, debt.name, debt.origin) == (model, "-net", origin)
    assert list(owed([tmp_path])) == [debt]
    assert list(owed([tmp_path], "")) == []
    settle(model)
    settle(model)
    assert list(owed([tmp_path], "-net")) == []


def test_what_a_removed_checkpoint_owed_is_forgotten(tmp_path: Path) -> None:
    note(tmp_path / "m.onnx", "", Provenance(checkpoint=str(tmp_path / "gone.ckpt")))
    assert list(owed([tmp_path, tmp_path / "nowhere"], "")) == []
    assert list(tmp_path.iterdir()) == []


def test_half_a_note_says_nothing(tmp_path: Path) -> None:
    (tmp_path / ".m.onnx.pending").write_text('{"name": "", "ori')
    assert list(owed([tmp_path], "")) == []


def test_a_damaged_note_of_a_checkpoint_beside_it_is_guessed_from_its_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "epoch=0.ckpt")
    (tmp_path / ".epoch=0-net.onnx.pending").write_bytes(b"")
    unclear: list[Path] = []
    assert list(owed([tmp_path], None, lambda model, _: unclear.append(model))) == []
    assert list(owed([tmp_path], "-other", lambda model, _: unclear.append(model))) == []
    assert unclear == [tmp_path / "epoch=0-net.onnx"] * 2
    (debt,) = owed([tmp_path], "-net")
    assert (debt.model, debt.checkpoint) == (tmp_path / "epoch=0-net.onnx", Path(path))


def test_a_note_that_is_renewed_makes_tickets_void(tmp_path: Path) -> None:
    path, model = checkpoint(tmp_path), tmp_path / "epoch=0.onnx"
    note(model, "", Provenance(checkpoint=path, epoch=7))
    before = ticket(model)
    assert before is not None
    assert before.is_valid()
    note_anew(model, "", path)
    assert not before.is_valid()
    (debt,) = owed([tmp_path], "")
    assert debt.origin == Provenance(checkpoint=path)


def test_a_note_that_cannot_be_renewed_is_none_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = checkpoint(tmp_path), tmp_path / "epoch=0.onnx"
    note(model, "", Provenance(checkpoint=path, epoch=7))

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("onnxport.callbacks.owed.replace_content", full)
    note_anew(model, "", path)
    assert list(owed([tmp_path], "")) == []


def test_folders_with_anything_of_ours_are_swept(tmp_path: Path) -> None:
    for name in ("a", "b/c", "d", "e"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / ".x.onnxport-template").write_bytes(b"")
    (tmp_path / "b" / "c" / ".onnxport-abc").mkdir()
    (tmp_path / "d" / ".m.onnx.tracking.tmp").write_bytes(b"")
    (tmp_path / "e" / "of somebody else").write_bytes(b"")
    used = set(used_below(tmp_path))
    assert used == {tmp_path / "a", tmp_path / "b" / "c", tmp_path / "d"}
    sweep(used)
    assert {path.name for path in tmp_path.rglob("*")} == {*"abcde", "of somebody else"}


def test_a_folder_that_is_none_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    model = tmp_path / "blocked" / "m.onnx"
    note(model, "", Provenance(checkpoint="x.ckpt"))
    settle(model)


def test_reports_stand_in_the_order_of_their_checkpoints(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []
    kept = KeptReports(said.append)
    places = [kept.next_place() for _ in range(3)]
    for epoch in (2, 0, 1):
        report = ExportReport(
            ok=False, epoch=epoch, error="no", evidence=(AxisEvidence(dim="b", kind="k", text="t"),)
        )
        kept.keep(report, {"total": 1.0}, places[epoch])
    assert [report.epoch for report in kept.reports] == [0, 1, 2]
    assert len({id(report.evidence) for report in kept.reports}) == 1
    failure = kept.take_failure()
    assert failure is not None
    assert failure.report is not None
    assert failure.report.epoch == 2
    assert kept.take_failure() is None
    assert caplog.text.count("Training goes on") == 3
    assert caplog.text.count("No ONNX model for the final weights: no") == 1
    assert caplog.text.count("No ONNX model for the final weights, as before.") == 2
    assert said == []


def test_reports_share_what_is_the_same_and_say_what_each_says() -> None:
    def told(step: int, error: float) -> ExportReport:
        output = OutputError(name="scores" * 2, max_abs_error=error, budget=1e-5, ok=True)
        check = Check(
            provider="CPU" * 3,
            sizes={"batch": 40000},
            rows="real",
            reference="float64",
            outputs=(output, replace(output, name="more" * 2, max_abs_error=1e-9)),
            ok=True,
            seconds=step * 1e-3,
        )
        report = ExportReport(
            ok=True, global_step=step, metrics={"loss": 0.0 if step else -0.0}, checks=(check,)
        )
        return ExportReport.from_json(report.to_json())

    kept = KeptReports(lambda _: None)
    said = [told(0, 1e-6), told(1, 2e-6), told(2, 2e-6)]
    for report in said:
        kept.keep(report, {}, kept.next_place())
    assert [report.to_json() for report in kept.reports] == [each.to_json() for each in said]
    checks = [report.checks[0] for report in kept.reports]
    assert len({id(check.sizes) for check in checks}) == 1
    assert len({id(check.provider) for check in checks}) == 1
    assert checks[0].outputs[1] is checks[2].outputs[1]
    assert checks[1].outputs is checks[2].outputs
    assert len({id(report.metrics) for report in kept.reports}) == 2
