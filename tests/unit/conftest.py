"""One profile for all property tests: reproducible, without a clock, and nothing left behind."""

from __future__ import annotations

from hypothesis import settings

# The machines of continuous integration are shared: a deadline would test them, not the code.
settings.register_profile("onnxport", deadline=None, derandomize=True, database=None)
settings.load_profile("onnxport")
