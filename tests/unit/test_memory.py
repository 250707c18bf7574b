"""What won last time is tried first: remembered between runs, and never trusted blindly."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from onnxport.exporter.ladder import Rung, rungs
from onnxport.exporter.memory import CACHE_VARIABLE, RungMemory, model_key
from onnxport.exporter.patches import PATCHES

if TYPE_CHECKING:
    from pathlib import Path

LADDERS = ("auto", "dynamo", "torchscript", "trace", "script")
NAMES = [patch.name for patch in PATCHES]
PATCH_SETS = [
    frozenset(some)
    for count in (0, 1, len(NAMES) - 1, len(NAMES))
    for some in itertools.combinations(NAMES, count)
]


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU())


class Decoder(Encoder):
    """Another class with the same parts."""


def every_rung() -> list[Any]:
    return [
        pytest.param(
            core,
            rung,
            id=f"{core}: {rung.core.name} {rung.variant}".strip(),
        )
        for core in LADDERS
        for rung in rungs(core)
    ]


# --- the rung that won ------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "rung"), every_rung())
def test_each_rung_is_recalled_as_it_was_remembered_with_its_patches(
    core: str, rung: Rung, tmp_path: Path
) -> None:
    memory = RungMemory(tmp_path)
    for number, patches in enumerate(PATCH_SETS):
        won = Rung(rung.core, patches)
        memory.remember(f"model{number}", core, won)
        assert RungMemory(tmp_path).recall(f"model{number}", core) == won


@pytest.mark.parametrize(("core", "rung"), every_rung())
def test_a_rung_that_won_before_is_tried_first_and_none_is_lost(core: str, rung: Rung) -> None:
    won = Rung(rung.core, frozenset({"math attention"}))
    ladder = rungs(core, won)
    assert ladder[0] == won
    assert set(ladder[1:]) == set(rungs(core))


def test_every_rung_of_a_ladder_has_a_name_of_its_own() -> None:
    for core in LADDERS:
        keys = [Rung(rung.core, some).key for rung in rungs(core) for some in PATCH_SETS]
        assert len(set(keys)) == len(keys)


def test_the_last_winner_counts(tmp_path: Path) -> None:
    memory, ladder = RungMemory(tmp_path), rungs("auto")
    memory.remember("model", "auto", ladder[-1])
    memory.remember("model", "auto", ladder[0])
    assert memory.recall("model", "auto") == ladder[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_models_and_options_are_remembered_apart(tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    memory.remember("model", "torchscript", rungs("torchscript")[0])
    assert memory.recall("other", "torchscript") is None
    assert memory.recall("model", "auto") is None
    assert memory.recall("model", "torchscript") == rungs("torchscript")[0]


def test_a_rung_that_the_ladder_of_the_option_lacks_is_not_recalled(tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    memory.remember("model", "script", rungs("dynamo")[0])
    assert memory.recall("model", "script") is None


def test_the_folder_is_made_when_something_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    memory = RungMemory(folder)
    assert memory.recall("model", "script") is None
    assert not folder.exists()
    memory.remember("model", "script", rungs("script")[0])
    assert memory.recall("model", "script") == rungs("script")[0]


def test_the_folder_can_be_given_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    RungMemory().remember("model", "script", rungs("script")[0])
    assert RungMemory(tmp_path).recall("model", "script") == rungs("script")[0]


# --- what is broken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"3",
        b"[]",
        b'"rung"',
        b"{}",
        b'{"rung": null}',
        b'{"rung": 3}',
        b'{"rung": ["dynamo/"]}',
        b'{"rung": ""}',
        b'{"rung": "/"}',
        b'{"rung": "tensorrt/"}',
        b'{"rung": "DYNAMO/"}',
        b'{"rung": "dynamo"}',
        b'{"rung": "dynamo/, "}',
    ],
)
def test_a_broken_or_foreign_file_is_as_good_as_none(content: bytes, tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    (tmp_path / "model-auto.json").write_bytes(content)
    assert memory.recall("model", "auto") is None
    memory.remember("model", "auto", rungs("auto")[0])
    assert memory.recall("model", "auto") == rungs("auto")[0]


def test_a_file_of_endless_nesting_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "model-auto.json").write_text("[" * 100_000)
    assert RungMemory(tmp_path).recall("model", "auto") is None


def test_a_rung_with_a_patch_that_there_is_not_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "model-auto.json").write_text('{"rung": "dynamo/patch of another version"}')
    assert RungMemory(tmp_path).recall("model", "auto") is None


def test_a_half_written_file_is_as_good_as_none(tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    memory.remember("model", "script", rungs("script")[0])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert memory.recall("model", "script") is None


def test_more_than_was_written_does_not_harm(tmp_path: Path) -> None:
    memory, (rung,) = RungMemory(tmp_path), rungs("script")
    (tmp_path / "model-script.json").write_text(json.dumps({"rung": rung.key, "since": "2.13"}))
    assert memory.recall("model", "script") == rung


def test_a_folder_in_the_place_of_the_file_is_no_error(tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    (tmp_path / "model-script.json").mkdir()
    assert memory.recall("model", "script") is None
    memory.remember("model", "script", rungs("script")[0])
    assert memory.recall("model", "script") is None


@pytest.mark.parametrize("below", ["", "rungs"])
def test_a_folder_that_cannot_be_written_is_no_error(below: str, tmp_path: Path) -> None:
    # A file in its place: permissions would not stop the superuser.
    (tmp_path / "cache").write_text("no folder")
    memory = RungMemory(tmp_path / "cache" / below)
    memory.remember("model", "script", rungs("script")[0])
    assert memory.recall("model", "script") is None
    assert (tmp_path / "cache").read_text() == "no folder"


def test_an_option_that_there_is_not_recalls_nothing(tmp_path: Path) -> None:
    memory = RungMemory(tmp_path)
    (tmp_path / "model-of another version.json").write_text('{"rung": "dynamo/"}')
    assert memory.recall("model", "of another version") is None


# --- kinds of models --------------------------------------------------------------------------


def test_the_same_classes_at_other_sizes_are_one_kind() -> None:
    assert model_key(Encoder(4)) == model_key(Encoder(8))
    assert model_key(nn.Linear(2, 3)) == model_key(nn.Linear(3, 2, bias=False))


def test_trained_weights_and_the_mode_do_not_make_another_kind() -> None:
    module = Encoder(4)
    before = model_key(module)
    with torch.no_grad():
        module.layers[0].weight.zero_()
    assert model_key(module.eval()) == before


@pytest.mark.parametrize(
    "other",
    [
        Decoder(4),
        nn.Sequential(Encoder(4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Identity(),
    ],
    ids=["class", "wrapped", "parts", "nothing"],
)
def test_other_classes_are_another_kind(other: nn.Module) -> None:
    assert model_key(other) != model_key(Encoder(4))


def test_another_order_number_or_name_of_parts_is_another_kind() -> None:
    stacks = [
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU()),
        nn.Sequential(nn.Linear(2, 2), nn.GELU()),
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()}),
    ]
    assert len({model_key(stack) for stack in stacks}) == len(stacks)


def test_a_key_can_be_the_name_of_a_file() -> None:
    key = model_key(Encoder(4))
    assert key.isalnum()
    assert 16 <= len(key) <= 64
