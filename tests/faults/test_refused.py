"""A disk that does not let a model go, for a moment or for long."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import onnxport
from faults.disk import Rule, mounted, why_not
from faults.ground import EVERY, Net, left_behind, missing, train, undisturbed, wrong_models
from onnxport import OnnxExport, PublishError
from onnxport.callbacks.owed import is_owed
from onnxport.callbacks.refused import hand_in, keep
from onnxport.callbacks.withdrawals import Withdrawals
from onnxport.exporter import writer
from onnxport.exporter.writer import withdraw_model

if TYPE_CHECKING:
    from pathlib import Path

    from faults.disk import Mounted

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(why_not() != "", reason=why_not()),
]


END = -1


class Refuses(Callback):
    """Gives the disk a rule before a step and takes it back before another one.

    Args:
        disk: The disk.
        rules: What it refuses.
        steps: From the first to before the second, or to the end.
    """

    def __init__(self, disk: Mounted, rules: tuple[Rule, ...], steps: tuple[int, int]) -> None:
        self.disk, self.rules, self.steps = disk, rules, steps
        self.found: list[list[str]] = []
        self.fired: list[str] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        begin, end = self.steps
        if trainer.global_step == begin:
            self.disk.fail(*self.rules)
        elif trainer.global_step == end:
            self._take_back()
        if trainer.global_step % EVERY == 1:  # a step after a save
            self._judge()

    def on_train_end(self, *_: Any) -> None:
        if self.steps[1] == END:
            self._judge()
            self._take_back()

    def _take_back(self) -> None:
        self.fired = self.disk.fired
        self.disk.fail()

    def _judge(self) -> None:
        kept = self.disk.kept / "c"
        if not kept.is_dir():  # models are elsewhere than checkpoints
            return
        with torch.random.fork_rng():  # judging draws numbers
            self.found.append(wrong_models(kept, kept))


def refused(tmp_path: Path, *rules: Rule, steps: tuple[int, int]) -> tuple[Refuses, Path]:
    """Train on such a disk; return what was found at each save, and what is there then."""
    with mounted(tmp_path) as disk:
        refuses = Refuses(disk, rules, steps)
        export = OnnxExport(core="trace", mlflow=False, background=False)
        run = train(disk.folder / "c", export, refuses, steps=8)
        assert run.error is None
        assert tuple(run.losses) == undisturbed(8)
        assert refuses.fired
    return refuses, disk.kept / "c"


def test_a_name_that_cannot_be_changed_is_removed(tmp_path: Path) -> None:
    with mounted(tmp_path) as disk:
        folder = disk.folder / "c"
        train(folder, OnnxExport(core="trace", mlflow=False, background=False), steps=2)
        disk.fail(Rule(operations=("rename",), times=-1))
        withdraw_model(folder / "last.onnx")
        assert disk.fired
        assert {path.name for path in folder.glob("last*")} == {"last.ckpt"}


def test_a_model_goes_as_soon_as_the_disk_lets_it(tmp_path: Path) -> None:
    rule = Rule(operations=("rename", "unlink", "create", "mkdir"), match="c/*onnx*", times=-1)
    refuses, kept = refused(tmp_path, rule, steps=(7, END))
    # The last save has left what the disk did not let go, until training was over.
    assert set(refuses.found[-1]) == {
        "epoch=0-step=4.onnx has no checkpoint",
        "last.onnx holds other weights than its checkpoint",
    }
    assert wrong_models(kept, kept) == []


def test_what_could_not_be_noted_is_noted_once_it_can_be(tmp_path: Path) -> None:
    rule = Rule(operations=("create", "mkdir"), match="c/*onnx*", times=-1, error=errno.ENOSPC)
    _, kept = refused(tmp_path, rule, steps=(5, END))
    assert {path.name for path in kept.glob(".*.pending")} == {
        ".epoch=0-step=6.onnx.pending",
        ".epoch=0-step=8.onnx.pending",
        ".last.onnx.pending",
    }
    run = train(kept, OnnxExport(core="trace", mlflow=False, background=False), steps=4)
    assert [report.error for report in run.reports if not report.ok] == []
    assert wrong_models(kept, kept) + missing(kept, kept) + left_behind(kept) == []


def test_a_model_that_cannot_be_read_is_withdrawn_by_who_has_made_it(tmp_path: Path) -> None:
    rule = Rule(operations=("open", "read"), match="c/*.onnx*", times=-1, error=errno.EIO)
    refuses, kept = refused(tmp_path, rule, steps=(3, 5))
    assert refuses.found == [[]] * len(refuses.found)
    assert wrong_models(kept, kept) + left_behind(kept) == []


@pytest.mark.parametrize("name", ["last.onnx", "last.onnx.json"])
def test_a_model_of_an_earlier_run_that_cannot_be_read_once_is_withdrawn(
    name: str, tmp_path: Path
) -> None:
    with mounted(tmp_path) as disk:
        folder = disk.folder / "c"
        train(folder, OnnxExport(core="trace", mlflow=False, background=False), steps=2)
        disk.fail(Rule(operations=("open", "read"), match=f"c/{name}"))
        Withdrawals("").withdraw(folder / "last.onnx", str(folder / "last.ckpt"))
        assert disk.fired
        assert not (folder / "last.onnx").exists()


@pytest.mark.parametrize("operation", ["create", "open"])
def test_a_disk_that_fails_where_a_model_is_made_is_no_verdict(
    operation: str, tmp_path: Path
) -> None:
    rule = Rule(operations=(operation,), match="c/.onnxport-*/*.onnx", times=-1)
    with mounted(tmp_path) as disk:
        refuses = Refuses(disk, (rule,), (3, 5))
        export = OnnxExport(core="trace", mlflow=False, background=False)
        run = train(disk.folder / "c", export, refuses, steps=8)
    assert refuses.fired
    assert {report.code for report in run.reports if not report.ok} == {"OX500"}


@pytest.mark.worker
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("operation", ["getattr", "readdir"])
def test_a_folder_that_cannot_be_looked_at_does_not_end_training(
    operation: str, background: bool, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"
        rule = Rule(operations=(operation,), match="models*", times=-1, error=errno.ESTALE)
        refuses = Refuses(disk, (rule,), (3, END))
        export = OnnxExport(core="trace", mlflow=False, background=background, dirpath=models)
        run = train(checkpoints, export, refuses, steps=8)
    assert refuses.fired
    assert run.error is None
    assert tuple(run.losses) == undisturbed(8)
    reported = {report.checkpoint for report in run.reports}
    assert {str(path) for path in checkpoints.glob("*.ckpt")} <= reported
    # No verdict: the next start makes them.
    assert {report.code for report in run.reports if not report.ok} <= {"OX500", "OX600"}


def test_a_model_whose_report_is_refused_does_not_stay(tmp_path: Path) -> None:
    rules = (
        Rule(operations=("create",), match="*.onnx.json*", times=-1, error=errno.ENOSPC),
        Rule(operations=("open", "read"), match="c/last.onnx*", times=-1, error=errno.EIO),
    )
    refuses, kept = refused(tmp_path, *rules, steps=(5, END))
    assert refuses.found[-1] == []
    assert not (kept / "last.onnx").exists()


def test_who_has_published_a_model_takes_it_back_if_its_report_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path) as disk:
        disk.fail(
            Rule(operations=("create",), match="*.onnx.json", times=-1, error=errno.ENOSPC),
            Rule(operations=("open", "read"), match="m.onnx", times=-1, error=errno.EIO),
        )
        with pytest.raises(onnxport.OnnxportError, match="No space left"):
            onnxport.export(
                torch.nn.Linear(2, 2), torch.zeros(3, 2), disk.folder / "m.onnx", core="trace"
            )
        assert disk.fired
        assert list(disk.kept.glob("m.onnx*")) == []


def test_what_cannot_be_read_is_ours_where_nothing_was_before(tmp_path: Path) -> None:
    made = tmp_path / "made.onnx"
    onnxport.export(torch.nn.Linear(2, 2), torch.zeros(3, 2), made, core="trace")
    with mounted(tmp_path) as disk:
        withdrawals = Withdrawals("")
        (disk.folder / "c").mkdir()
        for name in ("ours", "of somebody else"):
            model = disk.folder / "c" / f"{name}.onnx"
            if name != "ours":
                model.write_bytes(made.read_bytes())
            withdrawals.withdraw(model, str(model.with_suffix(".ckpt")))
            model.write_bytes(made.read_bytes())
        disk.fail(Rule(operations=("open", "read"), match="*.onnx", times=-1, error=errno.EIO))
        for name in ("ours", "of somebody else"):
            model = disk.folder / "c" / f"{name}.onnx"
            withdrawals.withdraw(model, str(model.with_suffix(".ckpt")))
        assert [path.name for path in disk.kept.glob("c/*.onnx")] == ["of somebody else.onnx"]


def test_a_model_that_the_disk_may_not_hold_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer, "sync_file", fails)
    with writer.staging(tmp_path / "a.onnx") as staged:
        staged.write_bytes(b"a model")
        with pytest.raises(PublishError, match="Input/output error"):
            writer.publish(staged, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


EVERYTHING = Rule(
    operations=("create", "mkdir", "write", "rename", "unlink", "sync"),
    match="models*",
    times=-1,
    error=errno.EROFS,
)


def trained(
    checkpoints: Path, models: Path, *callbacks: Any, steps: int, background: Any = False
) -> list[Any]:
    export = OnnxExport(core="trace", mlflow=False, background=background, dirpath=models)
    run = train(checkpoints, export, *callbacks, steps=steps)
    assert run.error is None
    assert tuple(run.losses) == undisturbed(steps)
    return run.reports


@pytest.mark.worker
@pytest.mark.parametrize("background", [False, True])
def test_what_a_folder_of_models_refuses_to_the_end_is_noted_beside_the_checkpoints(
    background: bool, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"
        never = 99
        refuses = Refuses(disk, (EVERYTHING,), (3, never))
        reports = trained(checkpoints, models, refuses, steps=8, background=background)
        assert disk.fired
        disk.fail()
        refused = [report for report in reports if not report.ok]
        assert refused
        assert list(checkpoints.glob(".*.refused"))
        said = [str(report.error) for report in refused]
        # With a worker a report may come while the next save takes one note for the other.
        unsaid = [text for text in said if "The next fit with this checkpoint" not in text]
        assert background or unsaid == []
        if not background:  # a worker may have made nothing before
            # Nobody could take away what is of older weights now.
            assert wrong_models(models, checkpoints) != []
        said = onnxport.resume(checkpoints)
        saved = set(map(str, checkpoints.glob("*.ckpt")))
        if background:  # and what was on its way is noted still
            saved.discard(str(checkpoints / "last.ckpt"))
        assert {report.checkpoint for report in said} >= saved
        assert all("has taken no note" in str(report.error) for report in said)

        again = trained(checkpoints, models, steps=10)
        assert [report.error for report in again if not report.ok] == []
        assert wrong_models(models, checkpoints) + missing(models, checkpoints) == []
        assert left_behind(models) + left_behind(checkpoints) == []


def test_notes_beside_checkpoints_go_once_the_folder_of_models_takes_them(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"

        class Looks(Callback):
            found = 0

            def on_train_batch_end(self, *_: Any) -> None:
                self.found = max(self.found, len(list(checkpoints.glob(".*.refused"))))

        looks = Looks()
        trained(checkpoints, models, Refuses(disk, (EVERYTHING,), (3, 7)), looks, steps=8)
        assert looks.found
        assert wrong_models(models, checkpoints) == []
        assert left_behind(checkpoints) == []
        trained(checkpoints, models, steps=10)
        assert missing(models, checkpoints) + left_behind(models) == []


def test_what_a_new_folder_of_models_refuses_from_the_beginning_is_noted(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"
        disk.fail(EVERYTHING)
        trained(checkpoints, models, steps=2)
        disk.fail()
        assert len(list(checkpoints.glob(".*.refused"))) == 2
        trained(checkpoints, models, steps=4)
        assert missing(models, checkpoints) + left_behind(checkpoints) == []


def test_nothing_is_owed_of_what_no_model_is_wanted_of(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        disk.fail(EVERYTHING)
        export = OnnxExport(
            core="trace", mlflow=False, background=False, dirpath=disk.folder / "models", when="end"
        )
        train(checkpoints, export, steps=8)
        assert len(list(checkpoints.glob(".*.refused"))) <= 1  # of the best


def test_a_module_that_does_not_export_is_owed_nothing(tmp_path: Path) -> None:
    class Never(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise RuntimeError("never exports")
            return super().forward(x)

    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"
        disk.fail(Rule(operations=("create",), match="models/.*pending*", times=-1))
        export = OnnxExport(core="trace", mlflow=False, background=False, dirpath=models)
        run = train(checkpoints, export, steps=4, make=Never)
        assert disk.fired
        assert {report.code for report in run.reports} == {"OX300"}
        assert left_behind(checkpoints) == []


@pytest.fixture
def older(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, and in another folder an older model of it; a note of that."""
    checkpoint, model = tmp_path / "c" / "last.ckpt", tmp_path / "m" / "last.onnx"
    run = train(
        checkpoint.parent,
        OnnxExport(core="trace", mlflow=False, background=False, dirpath=model.parent),
        steps=2,
    )
    assert run.error is None
    assert model.exists()
    note = keep(model, "", str(checkpoint))
    assert note is not None
    return checkpoint, model, note


def unknown(_: Path, __: Path) -> bool:
    return False


def test_an_older_model_is_withdrawn_and_owed(older: tuple[Path, Path, Path]) -> None:
    checkpoint, model, note = older
    hand_in([checkpoint.parent], "", lambda _: model, unknown)
    assert not model.exists()
    assert is_owed(model)
    assert not note.exists()


@pytest.mark.parametrize("together", [False, True])
def test_folders_may_be_moved_meanwhile(older: tuple[Path, Path, Path], together: bool) -> None:
    checkpoint, model, _ = older
    if together:
        root = checkpoint.parents[1] / "moved"
        root.mkdir()
        model.parent.rename(root / "m")
        model = root / "m" / model.name
    else:
        root = checkpoint.parents[1]
        (root / "elsewhere").mkdir()
    folder = checkpoint.parent.rename(root / ("c" if together else "elsewhere/c"))
    hand_in([folder], "", lambda _: model, unknown)
    assert not model.exists()
    assert is_owed(model)
    assert left_behind(folder) == []


def test_an_older_model_goes_with_its_checkpoint(older: tuple[Path, Path, Path]) -> None:
    checkpoint, model, note = older
    checkpoint.unlink()
    hand_in([checkpoint.parent], "", lambda _: model, unknown)
    assert not model.exists()
    assert not is_owed(model)
    assert not note.exists()


def test_a_model_that_this_run_has_made_stays(older: tuple[Path, Path, Path]) -> None:
    checkpoint, model, note = older
    asked = []
    hand_in([checkpoint.parent], "", lambda _: model, lambda *found: not asked.append(found))
    assert asked == [(model, note)]
    assert model.exists()


NUL = json.dumps({"checkpoint": "\0", "name": "", "model": ""})


@pytest.mark.parametrize("content", ["", "[]", NUL])
def test_a_damaged_note_is_guessed_from_its_name(
    older: tuple[Path, Path, Path], content: str
) -> None:
    checkpoint, model, note = older
    note.write_text(content)
    hand_in([checkpoint.parent], "", lambda _: model, unknown)
    assert is_owed(model)
    assert not note.exists()


def test_a_note_touches_nothing_that_is_no_place_of_this_run(
    older: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    checkpoint, model, note = older
    (note.parent / f"{note.name}.tmp").touch()  # who wrote it was killed
    other = tmp_path / "another" / model.name
    hand_in([checkpoint.parent], "", lambda _: other, unknown)
    assert model.exists()
    assert not other.parent.exists()
    assert [path.name for path in note.parent.glob(".*")] == [note.name]
    (report,) = onnxport.resume(checkpoint.parent)
    assert f"Remove {note}" in str(report.error)


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "c" / "last.ckpt", tmp_path / "m" / "last.onnx"
    for file in (checkpoint, model):
        file.parent.mkdir()
        file.write_bytes(b"of somebody else")
    note = keep(model, "", str(checkpoint))
    hand_in([checkpoint.parent], "", lambda _: model, unknown)
    assert model.read_bytes() == b"of somebody else"
    assert note is not None
    assert not note.exists()


def test_one_callback_does_not_make_the_models_of_another(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with mounted(tmp_path / "bad") as disk:
        models = disk.folder / "models"

        def exports() -> list[OnnxExport]:
            options = {"core": "trace", "mlflow": False, "background": False}
            half = OnnxExport(dirpath=models / "half", precision="fp16", **options)
            return [OnnxExport(dirpath=models, **options), half]

        disk.fail(EVERYTHING)
        first, second = exports()
        train(checkpoints, first, second, steps=4)
        disk.fail()
        first, second = exports()
        train(checkpoints, first, second, steps=6)
        kinds = {
            path: facts.graph.output[0].type.tensor_type.elem_type
            for path in models.rglob("*.onnx")
            for facts in [onnx.load(path)]
        }
        assert len(kinds) > 4
        for path, kind in kinds.items():
            assert (kind == onnx.TensorProto.FLOAT16) == (path.parent.name == "half")
