"""Errors of exporters in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import onnxport
from onnxport.errors import VerificationError
from onnxport.exporter.base import ExportRequest
from onnxport.exporter.explain import classify, explain, explain_mismatch
from onnxport.exporter.torchscript import ScriptCore
from onnxport.report import Check

if TYPE_CHECKING:
    from collections.abc import Callable

TORCH = Path(torch.__file__).parent
OWN = Path(onnxport.__file__).parent


def caught(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the error is what is asked for
        return error
    raise AssertionError("no error")


def users_function(folder: Path, source: str) -> Callable[..., Any]:
    """Write a file of the user's and return its ``forward``."""
    file = folder / "net.py"
    file.write_text(source, encoding="utf-8")
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(source, str(file), "exec"), scope)  # noqa: S102 - our own text
    return scope["forward"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        (
            "No ONNX function found for <OpOverload(op='aten.eigvals', overload='default')>. No.",
            "aten.eigvals",
        ),
        (
            "Exporting the operator 'aten::det' to ONNX opset version 20 is not supported.",
            "aten::det",
        ),
        ("Unsupported: operator aten::foo is unknown", "aten::foo"),
        ("While executing node, target: aten.nonzero.default, args", "aten.nonzero.default"),
    ],
)
def test_an_operator_without_a_translation_is_named(text: str, operator: str) -> None:
    said = explain(RuntimeError(text))
    assert said.startswith(f"The operator {operator} has no ONNX translation in this core. Rewrite")


def test_the_operator_is_found_in_the_cause_too() -> None:
    outer = RuntimeError("Failed to convert the exported program.")
    outer.__cause__ = ValueError("Exporting the operator 'aten::foo' to ONNX is not supported")
    assert explain(outer).startswith("The operator aten::foo has no ONNX translation in this core.")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The serialized model is larger than the 2GiB limit imposed by protobuf", "too large"),
        ("onnx.ModelProto exceeds maximum protobuf size of 2GB: 3000000000", "too large"),
        ("CUDA out of memory. Tried to allocate 20.00 GiB", "out of memory"),
        ("A process in the process pool was terminated abruptly while running", "crash"),
        ("Not all values of batch are valid: generated guard Eq(Mod(s0, 8), 0)", "size must be"),
        ("Constraints violated (batch)! For more information", "dimension specialised"),
        ("Can't call numpy() on Tensor that requires grad", "numpy"),
        ("something that nobody has seen before", ""),
    ],
)
def test_what_is_too_dear_to_provoke_is_known_by_its_words(text: str, name: str) -> None:
    known = classify(RuntimeError(text))
    assert (known.name if known else "").startswith(name)
    assert (known is None) == (not name)


def test_a_multiple_that_a_size_must_be_is_told() -> None:
    said = explain(RuntimeError("the generated guard Eq(Mod(s0, 8), 0) does not hold"))
    assert said.startswith("A dynamic dimension must be a multiple of 8: ")
    assert "Pad to a multiple of 8" in said


def test_the_calling_script_is_not_what_could_not_be_exported(tmp_path: Path) -> None:
    # The traceback starts in the script, then comes onnxport, then torch.
    call = users_function(tmp_path, "def forward(run):\n    return run()\n")
    bad: Any = "no module"
    request = ExportRequest(
        module=bad,
        args=(),
        input_names=(),
        output_names=(),
        input_axes=(),
        output_axes=(),
        opset=20,
    )
    text = explain(caught(lambda: call(lambda: ScriptCore().export(request))))
    assert "net.py" not in text


def check(rows: str, size: int, *, ok: bool) -> Check:
    return Check(
        provider="CPU", sizes={"batch": size}, rows=rows, reference="table", outputs=(), ok=ok
    )


@pytest.mark.parametrize(
    ("before", "why"),
    [
        ((), "the first comparison already fails"),
        ((("real", 6),), "other sizes agree"),
        ((("real", 6), ("real", 2)), "other values of the same size agree"),
    ],
)
def test_what_changed_since_the_last_agreement_is_the_cause(
    before: tuple[tuple[str, int], ...], why: str
) -> None:
    passed = [check(rows, size, ok=True) for rows, size in before]
    error = VerificationError("They disagree.", (*passed, check("negated", 2, ok=False)))
    said = explain_mismatch(error, "dynamo")
    assert said.startswith(f"They disagree: {why}")


def test_the_lines_at_which_the_tracer_warned_are_told_once(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("\n    if x.sum() > 0:\n", encoding="utf-8")
    warned = f"{file}:2: TracerWarning: To a Python boolean\n  if x.sum() > 0:\n"
    library = f"{TORCH}/nn/module.py:3: TracerWarning: Converting a tensor\n"
    error = VerificationError("They disagree.", (check("real", 1, ok=False),))
    said = explain_mismatch(error, "trace", warned + library + warned)
    assert f"as it warned at {file}:2 (`if x.sum() > 0:`). Choose" in said
    assert "warned" not in explain_mismatch(error, "dynamo", warned)


def test_a_mismatch_of_unknown_cause_stays_the_fact() -> None:
    error = VerificationError("The provider CUDA was asked for and not used.")
    assert explain_mismatch(error, "trace", "x.py:1: TracerWarning: y") == str(error)


def test_without_an_operator_it_is_the_first_line_of_the_root_error() -> None:
    outer = RuntimeError("outer")
    outer.__cause__ = KeyError("=====\n\nthe root of it:\nmore lines")
    assert explain(outer).startswith("KeyError: ")
    assert "outer" not in explain(outer)
    assert explain(ValueError("-----\nthe root of it:\nmore")) == "ValueError: the root of it."


def test_an_error_raised_while_handling_another_is_explained_by_that_one() -> None:
    def fail() -> None:
        try:
            {}["the root"]
        except KeyError:
            raise RuntimeError("the shell")  # noqa: B904

    assert explain(caught(fail)).startswith("KeyError: 'the root'")


def test_a_context_that_was_cut_off_is_not_looked_at() -> None:
    def fail() -> None:
        try:
            {}["hidden"]
        except KeyError:
            raise RuntimeError("shown") from None

    assert explain(caught(fail)).startswith("RuntimeError: shown")


def test_errors_that_cause_each_other_end() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert explain(first) == "RuntimeError: second."


def test_an_error_without_text_is_named() -> None:
    assert explain(NotImplementedError()) == "NotImplementedError."
    assert explain(ValueError("123\n---")) == "ValueError."


def test_a_long_text_is_cut() -> None:
    text = explain(ValueError("x" * 10_000))
    assert len(text) < 420
    assert text.endswith("….")


def test_the_users_own_line_is_named_with_its_source(tmp_path: Path) -> None:
    forward = users_function(tmp_path, "def forward(x):\n    return torch.add(x, 'one')\n")
    text = explain(caught(lambda: forward(torch.zeros(1))))
    where = f"{tmp_path / 'net.py'}:2 in forward (`return torch.add(x, 'one')`)."
    assert text.startswith("TypeError: add()")
    assert text.endswith(f", at {where}")


def test_of_several_lines_of_the_user_the_innermost_is_named(tmp_path: Path) -> None:
    source = "def helper(x):\n    raise ValueError('no')\n\ndef forward(x):\n    return helper(x)\n"
    forward = users_function(tmp_path, source)
    assert "net.py:2 in helper" in explain(caught(lambda: forward(0)))


def test_a_line_of_a_library_is_not_the_users(tmp_path: Path) -> None:
    forward = users_function(tmp_path, "def forward(x):\n    return torch.nn.Linear(1, 1)(x)\n")
    text = explain(caught(lambda: forward(torch.zeros(3, 3))))
    assert "net.py:2 in forward" in text
    assert str(TORCH) not in text


def test_without_a_line_of_the_user_only_the_error_is_told() -> None:
    libraries = f'File "{TORCH}/nn/module.py", line 3, in forward\n  File "{OWN}/api.py", line 1'
    assert explain(RuntimeError(f"it failed\n{libraries}, in run")) == "RuntimeError: it failed."


@pytest.mark.parametrize(
    "frames",
    [
        'File "/home/u/net.py", line 12, in forward\n',
        "/home/u/net.py(12): forward\n",
        'File "/home/u/net.py", line 12\n    return x\n',
    ],
    ids=["python", "trace", "script"],
)
def test_lines_that_stand_only_in_the_text_are_found(frames: str) -> None:
    text = explain(RuntimeError(f"it failed\n{frames}"))
    assert text == "RuntimeError: it failed, at /home/u/net.py:12 in forward."


def test_a_cell_of_a_notebook_is_the_users() -> None:
    text = explain(RuntimeError('it failed\nFile "<ipython-input-3-abc>", line 2, in forward\n'))
    assert "<ipython-input-3-abc>:2 in forward" in text


def test_generated_code_is_not_the_users() -> None:
    text = explain(RuntimeError('it failed\nFile "<eval_with_key>.1", line 2, in forward\n'))
    assert text == "RuntimeError: it failed."


def test_a_package_of_the_user_whose_name_starts_like_ours_is_the_users() -> None:
    file = OWN.with_name("onnxport_models") / "net.py"
    text = explain(RuntimeError(f'it failed\nFile "{file}", line 2, in forward\n'))
    assert text.endswith(f"at {file}:2 in forward.")


def test_explaining_keeps_the_error_as_it_is() -> None:
    error = caught(lambda: sys.intern(3))  # type: ignore[arg-type]
    before = (error.args, error.__cause__, error.__context__, error.__traceback__)
    explain(error)
    assert (error.args, error.__cause__, error.__context__, error.__traceback__) == before
