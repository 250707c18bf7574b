"""Files that are damaged at random are refused as is said; `make fuzz` tries millions."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from faults.parsers import PARSERS, seeds

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.worker, pytest.mark.filterwarnings("ignore")]

EXAMPLES = 300
FOREIGN = (b"\xff", b"\x00" * 9, b"9" * 20, b"[", b"{", b'"', b"null", b"-1", b"1e999", b"NaN")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Files as they should be."""
    return seeds(tmp_path_factory.mktemp("seeds"))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return a file with a few wrong bytes, cut, doubled, or with something foreign in it."""
    raw = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        place = chance.randrange(len(raw) + 1)
        what = chance.randrange(4)
        if what == 0:
            raw[place : place + 1] = chance.randbytes(1)
        elif what == 1:
            del raw[place : place + chance.randrange(1, 64)]
        elif what == 2:
            raw[place:place] = raw[max(0, place - 8) : place] * chance.randrange(1, 4)
        else:
            raw[place : place + 1] = chance.choice(FOREIGN)
    return bytes(raw)


@pytest.mark.parametrize("name", PARSERS)
def test_a_damaged_file_is_refused_as_it_should_be(
    name: str, files: dict[str, list[bytes]], tmp_path: Path
) -> None:
    chance = random.Random(2)  # noqa: S311
    for content in files[name]:
        PARSERS[name].run(content, tmp_path)
    for _ in range(EXAMPLES):
        PARSERS[name].run(damaged(chance.choice(files[name]), chance), tmp_path)


def test_a_number_that_is_infinite_is_no_job(files: dict[str, list[bytes]], tmp_path: Path) -> None:
    (content,) = [each for each in files["a job for the server"] if b'"identity"' in each][:1]
    head, _, tail = content.partition(b'"identity": [')
    wrong = head + b'"identity": [1e999, ' + tail.partition(b", ")[2]
    assert wrong != content
    PARSERS["a job for the server"].run(wrong, tmp_path)
