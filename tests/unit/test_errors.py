"""What an error says, is and holds."""

from __future__ import annotations

import pytest

from onnxport import errors
from onnxport._optional import is_available, optional_import
from onnxport.errors import (
    ConfigurationError,
    ExportError,
    MissingDependencyError,
    OnnxportError,
    VerificationError,
)
from onnxport.report import Check, ExportReport

CHECK = Check(provider="CPU", sizes={}, rows="real", reference="table", outputs=(), ok=False)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_caught_as_ours(name: str) -> None:
    assert issubclass(getattr(errors, name), OnnxportError)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigurationError", ValueError),
        ("MissingDependencyError", ImportError),
        ("ExportError", RuntimeError),
        ("VerificationError", RuntimeError),
        ("PublishError", RuntimeError),
        ("TrackingError", RuntimeError),
    ],
)
def test_errors_are_also_what_python_calls_them(name: str, builtin: type) -> None:
    assert issubclass(getattr(errors, name), builtin)


def test_an_export_error_shows_its_text_only_and_holds_its_report() -> None:
    report = ExportReport(ok=False, error="why")
    error = ExportError("No model.", report)
    assert str(error) == "No model."
    assert error.report is report
    assert ExportError("No model.").report is None


def test_an_export_error_has_the_code_of_its_report() -> None:
    full = ExportReport(ok=False, error="The disk is full.", code=errors.PublishError.code)
    assert ExportError("No model.", full).code == "OX500"
    assert errors.code_of(ExportError("No model.")) == ExportError.code == "OX300"


def test_a_verification_error_shows_its_text_only_and_holds_its_checks() -> None:
    error = VerificationError("They differ.", (CHECK,))
    assert str(error) == "They differ."
    assert error.checks == (CHECK,)
    assert VerificationError("They differ.").checks == ()


def test_a_missing_module_says_what_needs_it_and_what_to_install() -> None:
    match = r"Proving needs the module 'onnxport_absent'.*pip install 'onnxport\[ort\]'"
    with (
        pytest.raises(MissingDependencyError, match=match) as caught,
        optional_import(extra="ort", needed_for="Proving"),
    ):
        import onnxport_absent  # type: ignore[import-not-found]  # noqa: F401
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_only_import_errors_are_translated() -> None:
    with (
        pytest.raises(ConfigurationError, match="as it was"),
        optional_import(extra="ort", needed_for="Proving"),
    ):
        raise ConfigurationError("as it was")


def test_a_module_is_looked_up_without_importing_it() -> None:
    assert is_available("json")
    assert not is_available("onnxport_absent")
