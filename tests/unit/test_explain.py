"""Errors of exporters in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import onnxport
from onnxport.exporter.explain import explain

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
        ("No ONNX function found for <built-in function pow>", "built-in function pow"),
        (
            "Exporting the operator 'aten::fft_fft2' to ONNX opset version 20 is not supported.",
            "aten::fft_fft2",
        ),
        ("Unsupported: operator aten::foo is unknown", "aten::foo"),
        ("While executing node, target: aten.nonzero.default, args", "aten.nonzero.default"),
    ],
)
def test_an_operator_without_a_translation_is_named(text: str, operator: str) -> None:
    expected = f"The operator {operator} has no ONNX translation in this core."
    assert explain(RuntimeError(text)) == expected


def test_the_operator_is_found_in_the_cause_too() -> None:
    outer = RuntimeError("Failed to convert the exported program.")
    outer.__cause__ = ValueError("Exporting the operator 'aten::foo' to ONNX is not supported")
    assert explain(outer) == "The operator aten::foo has no ONNX translation in this core."


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
