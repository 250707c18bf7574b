"""Calls as values: structure and tensors apart, and together again."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnxport.tree import Constant, Example, Leaf, Node, Spec, flatten, map_tensors, rebuild


class Point(NamedTuple):
    x: Any
    y: Any = None


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Output(OrderedDict):
    """A mapping whose fields are keywords, as transformers' results are."""

    logits: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Stack(list):
    """A list of one's own."""


class Couple(tuple):
    """A tuple of one's own, without names."""

    __slots__ = ()


CONSTANTS = (None, True, 3, 2.5, float("nan"), "text", b"raw", {1, 2}, torch.Size([2]), object())
KEYS = st.one_of(st.text(max_size=3), st.integers(), st.booleans())
TENSORS = st.builds(torch.zeros, st.lists(st.integers(0, 2), max_size=2))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(KEYS, children, max_size=3)
    sequences = st.lists(children, max_size=3)
    return st.one_of(
        sequences,
        sequences.map(tuple),
        sequences.map(Stack),
        mappings,
        mappings.map(OrderedDict),
        mappings.map(UserDict),
        st.builds(Point, children, children),
        st.builds(Pair, children, children),
        st.builds(Frozen, children),
    )


TREES = st.recursive(TENSORS | st.sampled_from(CONSTANTS), containers, max_leaves=10)


def same(a: Any, b: Any) -> bool:
    """Equal structure, with the very same leaves."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    return a is b


def follow(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        named = isinstance(tree, Point) or dataclasses.is_dataclass(tree)
        tree = getattr(tree, key) if named else tree[key]
    return tree


def count_leaves(spec: Spec) -> int:
    if isinstance(spec, Node):
        return sum(count_leaves(child) for child in spec.children)
    return int(isinstance(spec, Leaf))


@given(TREES)
def test_rebuilding_what_was_flattened_gives_the_same_tree(tree: Any) -> None:
    spec, found = flatten(tree)
    assert same(rebuild(spec, [tensor for _, tensor in found]), tree)


@given(TREES)
def test_each_path_leads_to_its_tensor(tree: Any) -> None:
    spec, found = flatten(tree)
    assert len(found) == count_leaves(spec)
    assert len({path for path, _ in found}) == len(found)
    assert all(follow(tree, path) is tensor for path, tensor in found)


@given(TREES)
def test_mapping_touches_every_tensor_and_nothing_of_the_original(tree: Any) -> None:
    before = flatten(tree)[1]
    mapped = map_tensors(tree, lambda tensor: tensor + 1)
    assert all(bool((tensor == 1).all()) for _, tensor in flatten(mapped)[1])
    assert flatten(mapped)[0] == flatten(tree)[0]
    after = flatten(tree)[1]
    assert [path for path, _ in before] == [path for path, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))


def test_the_comparison_of_these_tests_notices_a_lost_name_and_another_type() -> None:
    tensor = torch.zeros(1)
    assert same({"a": (tensor, 1)}, {"a": (tensor, 1)})
    assert not same({"a": tensor}, {"b": tensor})
    assert not same(Point(tensor), (tensor, None))
    assert not same([tensor], [tensor.clone()])


def test_tensors_come_in_tree_order_with_the_keys_that_lead_to_them() -> None:
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    tree = {"pair": Pair(first, 7), "rest": [Point(None, second), "text"], "last": third}
    _, found = flatten(tree)
    assert [path for path, _ in found] == [("pair", "left"), ("rest", 0, "y"), ("last",)]
    assert [tensor for _, tensor in found] == [first, second, third]


def test_a_tensor_that_stands_twice_is_found_twice() -> None:
    tensor = torch.zeros(1)
    assert [path for path, _ in flatten((tensor, [tensor]))[1]] == [(0,), (1, 0)]


def test_a_size_and_a_dataclass_type_are_constants() -> None:
    assert flatten(torch.Size([1, 2]))[0] == Constant(torch.Size([1, 2]))
    assert flatten(Pair)[0] == Constant(Pair)


def test_a_field_that_was_never_set_is_left_out() -> None:
    @dataclasses.dataclass
    class Batch:
        image: torch.Tensor
        cache: Any = dataclasses.field(init=False)

    batch = Batch(torch.zeros(1))
    rebuilt = map_tensors(batch, lambda tensor: tensor + 1)
    assert rebuilt.image.item() == 1
    assert not hasattr(rebuilt, "cache")


def test_a_mapping_that_is_a_dataclass_is_rebuilt_through_its_fields() -> None:
    tree = Output(logits=torch.zeros(1))
    rebuilt = map_tensors(tree, lambda tensor: tensor + 1)
    assert type(rebuilt) is Output
    assert rebuilt.logits is rebuilt["logits"]
    assert rebuilt["logits"].item() == 1
    assert list(rebuilt) == ["logits"]


def test_a_mapping_with_a_default_is_rebuilt_with_its_items() -> None:
    tree = defaultdict(list, image=torch.zeros(1))
    rebuilt = map_tensors(tree, lambda tensor: tensor + 1)
    assert isinstance(rebuilt, dict)
    assert {key: value.item() for key, value in rebuilt.items()} == {"image": 1.0}


def test_a_tuple_type_without_names_is_rebuilt() -> None:
    rebuilt = map_tensors(Couple((torch.zeros(1), 2)), lambda tensor: tensor + 1)
    assert type(rebuilt) is Couple
    assert [float(rebuilt[0]), rebuilt[1]] == [1.0, 2]


def test_a_named_result_of_torch_is_rebuilt() -> None:
    tree = torch.tensor([[1.0, 2.0]]).max(1)
    rebuilt = map_tensors(tree, lambda tensor: tensor + 1)
    assert type(rebuilt) is type(tree)
    assert [rebuilt.values.item(), rebuilt.indices.item()] == [3.0, 2]


def test_an_example_reads_each_way_to_write_a_call() -> None:
    tensor = torch.zeros(1)
    assert Example.of(tensor).args == (tensor,)
    assert Example.of((tensor, 1)).args == (tensor, 1)
    assert Example.of([tensor, 1]).args == (tensor, 1)
    assert Example.of({"x": tensor}) == Example((), {"x": tensor})
    example = Example((tensor,), {"scale": 2.0})
    assert Example.of(example) is example


def test_a_named_tuple_is_one_argument_and_not_several() -> None:
    point = Point(torch.zeros(1), torch.zeros(1))
    assert Example.of(point).args == (point,)


def test_a_mapping_of_keywords_is_copied() -> None:
    given_kwargs = {"x": 1}
    example = Example.of(given_kwargs)
    given_kwargs["y"] = 2
    assert example.kwargs == {"x": 1}


def test_an_example_cannot_be_changed() -> None:
    example = Example()
    with pytest.raises(dataclasses.FrozenInstanceError, match="args"):
        example.args = (1,)  # type: ignore[misc]
