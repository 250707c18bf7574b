"""``python -m onnxport.page FOLDER``: what ``onnxport report`` does, with the least to import."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from onnxport.errors import OnnxportError, code_of
from onnxport.page.document import PAGE, write_page
from onnxport.page.folder import history_of


def main() -> int:
    """Write the page of a run; return 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m onnxport.page", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help=f"the page; FOLDER/{PAGE} if not given")
    parser.add_argument("--nice", action="store_true", help="let everybody else go first")
    given = parser.parse_args()
    if given.nice and hasattr(os, "nice"):
        os.nice(19)
    try:
        write_page(history_of(given.folder), given.output or given.folder / PAGE)
    except (OnnxportError, OSError) as error:
        sys.stderr.write(f"{error} [{code_of(error)}]\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
