"""Objects that hold tensors: taken apart, put together again, and never changed."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import defaultdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

from onnxport.tree import (
    Constant,
    Leaf,
    constants,
    flatten,
    map_tensors,
    rebuild,
    same_structure,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Point(NamedTuple):
    x: Any
    y: Any = None


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any = "right"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


class Layer:
    """One layer of a cache; empty before its first update."""

    def __init__(self, keys: Any = None, values: Any = None) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None

    def update(self, keys: torch.Tensor) -> None:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.is_initialized = True


class Cache:
    """Holds layers in a list, as transformers' caches do."""

    def __init__(self, layers: list[Any], offloading: bool = False) -> None:
        self.layers, self.offloading = layers, offloading

    def __len__(self) -> int:
        return len(self.layers)


class Data:
    """Delegates attributes to a store, copies it with itself and is known to it, as PyG's is."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__["_store"] = Store(self, attributes)

    def __getattr__(self, name: str) -> Any:
        if "_store" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._store, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._store, name, value)

    def __copy__(self) -> Data:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        copied.__dict__["_store"] = Store(copied, dict(self._store.mapping))
        return copied


class Store:
    def __init__(self, parent: Data, mapping: dict[str, Any]) -> None:
        self.__dict__["mapping"] = mapping
        self.__dict__["parent"] = weakref.ref(parent)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["mapping"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["mapping"][name] = value


# --- random objects ---------------------------------------------------------------------------

TENSORS = st.builds(torch.zeros, st.lists(st.integers(0, 2), max_size=2))
CONSTANTS = st.sampled_from([None, True, 3, 2.5, "text", {1, 2}, torch.float16, torch.Size([2])])


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    layers = st.builds(Layer, children, children)
    return st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
        st.builds(Point, children, children),
        st.builds(Pair, children, children),
        st.builds(Frozen, children),
        st.builds(Cache, st.lists(layers, max_size=3)),
        st.builds(Data, x=children, edge_index=TENSORS),
        st.builds(SimpleNamespace, first=children, second=children),
        st.dictionaries(st.sampled_from("abc"), children).map(lambda d: defaultdict(list, d)),
    )


TREES = st.recursive(TENSORS | CONSTANTS, containers, max_leaves=8)


def snapshot(tree: Any) -> Any:
    """Everything that a tree is, by identity of the tensors and of other leaves."""
    if isinstance(tree, dict):
        return type(tree), [(key, snapshot(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        return type(tree), [snapshot(value) for value in tree]
    if isinstance(tree, Frozen):
        return Frozen, snapshot(tree.value)
    if isinstance(tree, (Pair, Cache, Layer, Data, Store, SimpleNamespace)):
        held = {key: value for key, value in vars(tree).items() if key != "parent"}
        return type(tree), snapshot(held)
    return id(tree)


@given(TREES)
def test_rebuilding_with_the_same_tensors_gives_an_equal_object(tree: Any) -> None:
    spec, found = flatten(tree)
    assert snapshot(rebuild(spec, [tensor for _, tensor in found])) == snapshot(tree)


@given(TREES)
def test_rebuilding_with_other_tensors_never_changes_the_original(tree: Any) -> None:
    before = snapshot(tree)
    values = [tensor.clone() for _, tensor in flatten(tree)[1]]
    changed = map_tensors(tree, lambda tensor: tensor + 1)
    assert snapshot(tree) == before
    for (_, tensor), value in zip(flatten(tree)[1], values, strict=True):
        assert torch.equal(tensor, value)
    assert all(bool((tensor == 1).all()) for _, tensor in flatten(changed)[1])


@given(TREES)
def test_a_rebuilt_object_has_the_same_structure_again(tree: Any) -> None:
    spec, found = flatten(tree)
    again, found_again = flatten(map_tensors(tree, torch.clone))
    assert same_structure(spec, again)
    assert [path for path, _ in found] == [path for path, _ in found_again]


@given(TREES, TREES)
def test_tensors_and_constants_have_paths_of_their_own(first: Any, second: Any) -> None:
    spec, found = flatten((first, second))
    paths = [path for path, _ in found]
    assert len(set(paths)) == len(paths)
    assert not set(paths) & set(constants(spec))


# --- kinds of objects -------------------------------------------------------------------------


def test_a_cache_is_rebuilt_with_its_layers_and_the_original_keeps_its_own() -> None:
    cache = Cache([Layer(torch.zeros(1, 2), torch.zeros(1, 2)) for _ in range(2)], offloading=True)
    layers = list(cache.layers)
    rebuilt = map_tensors(cache, lambda tensor: tensor + 1)
    assert type(rebuilt) is Cache
    assert len(rebuilt) == 2
    assert rebuilt.offloading
    assert all(layer.is_initialized for layer in rebuilt.layers)
    for layer in rebuilt.layers:
        layer.update(torch.ones(1, 2))
    rebuilt.layers.append(Layer())
    assert cache.layers == layers
    assert all(layer.keys.tolist() == [[0.0, 0.0]] for layer in cache.layers)


def test_paths_into_a_cache_name_its_attributes() -> None:
    cache = Cache([Layer(torch.zeros(1), torch.zeros(2))])
    assert [path for path, _ in flatten({"cache": cache})[1]] == [
        ("cache", "layers", 0, "keys"),
        ("cache", "layers", 0, "values"),
    ]


def test_a_graph_is_rebuilt_and_the_original_keeps_its_tensors() -> None:
    x, edges = torch.zeros(3, 2), torch.zeros(2, 4, dtype=torch.int64)
    data = Data(x=x, edge_index=edges, name="graph", y=None)
    rebuilt = map_tensors(data, lambda tensor: tensor + 1)
    assert type(rebuilt) is Data
    assert rebuilt.x.tolist() == [[1.0, 1.0]] * 3
    assert (rebuilt.name, rebuilt.y) == ("graph", None)
    rebuilt.x = None
    assert data.x is x
    assert data.edge_index is edges
    assert data._store.parent() is data


def test_a_named_tuple_and_a_dataclass_inside_of_an_object_are_rebuilt() -> None:
    batch = SimpleNamespace(point=Point(torch.zeros(1), "kept"), pair=Pair(torch.zeros(1)), n=3)
    rebuilt = map_tensors(batch, lambda tensor: tensor + 1)
    assert isinstance(rebuilt.point, Point)
    assert isinstance(rebuilt.pair, Pair)
    assert (rebuilt.point.y, rebuilt.pair.right, rebuilt.n) == ("kept", "right", 3)
    assert [rebuilt.point.x.item(), rebuilt.pair.left.item()] == [1.0, 1.0]
    assert batch.point.x.item() == 0


def test_a_distribution_is_rebuilt_around_other_tensors() -> None:
    plain = Independent(Normal(torch.zeros(2, 3), torch.ones(2, 3)), 1)
    rebuilt = map_tensors(plain, lambda tensor: tensor + 1)
    assert rebuilt.mean.tolist() == [[1.0] * 3] * 2
    assert rebuilt.event_shape == plain.event_shape
    assert plain.mean.sum() == 0


def test_packed_sequences_are_rebuilt() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    rebuilt = map_tensors(packed, torch.clone)
    assert type(rebuilt) is type(packed)
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(rebuilt)
    assert padded.shape == (3, 2, 2)
    assert lengths.tolist() == [3, 1]


def test_results_of_transformers_are_rebuilt_by_attribute_and_by_key() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(
        last_hidden_state=torch.zeros(1), hidden_states=(torch.zeros(2), torch.zeros(2))
    )
    rebuilt = map_tensors(output, lambda tensor: tensor + 1)
    assert type(rebuilt) is type(output)
    assert list(rebuilt) == ["last_hidden_state", "hidden_states"]
    assert rebuilt.last_hidden_state is rebuilt["last_hidden_state"]
    assert rebuilt.attentions is None
    assert [tensor.sum().item() for _, tensor in flatten(rebuilt)[1]] == [1.0, 2.0, 2.0]
    assert output.last_hidden_state.item() == 0


def test_caches_of_transformers_are_rebuilt() -> None:
    caches = pytest.importorskip("transformers.cache_utils")
    cache = caches.DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    rebuilt = map_tensors(cache, lambda tensor: tensor + 1)
    rebuilt.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
    assert (rebuilt.get_seq_length(), cache.get_seq_length()) == (4, 3)
    assert rebuilt.layers[0].keys.min() == 1
    assert cache.layers[0].keys.max() == 0


# --- what is left as it is --------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        Cache([]),
        SimpleNamespace(a=1),
        Pair,
        torch.zeros,
        torch,
        object(),
        {1, 2},
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_holds_no_tensor_or_is_a_module_stays_the_same_object(value: Any) -> None:
    spec, found = flatten(value)
    assert found == []
    assert spec == Constant(value)
    assert rebuild(spec, []) is value


def test_a_mapping_with_a_default_keeps_its_kind_and_makes_no_entries() -> None:
    rebuilt = map_tensors(defaultdict(list, x=torch.zeros(1), n=2), lambda tensor: tensor + 1)
    assert type(rebuilt) is defaultdict
    assert rebuilt["n"] == 2
    with pytest.raises(KeyError):
        _ = rebuilt["missing"]


def test_tensors_in_a_single_object_are_leaves() -> None:
    spec, _ = flatten(SimpleNamespace(x=torch.zeros(1), n=2))
    assert spec.children == (Leaf(),)  # type: ignore[union-attr]


def test_one_structure_rebuilds_many_objects_that_share_nothing() -> None:
    spec, _ = flatten(Cache([Layer(torch.zeros(1), torch.zeros(1))]))
    first, second = (rebuild(spec, [torch.full((1,), n)] * 2) for n in (1.0, 2.0))
    first.layers[0].update(torch.zeros(1))
    assert second.layers[0].keys.tolist() == [2.0]
    assert first.layers is not second.layers


def test_a_copy_of_a_structure_rebuilds_the_same() -> None:
    spec, found = flatten({"graph": Data(x=torch.zeros(2), name="graph")})
    rebuilt = rebuild(copy.deepcopy(spec), [tensor for _, tensor in found])
    assert rebuilt["graph"].name == "graph"
    assert rebuilt["graph"].x is found[0][1]


def leaves(tree: Any) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor in flatten(tree)[1])


def test_a_tensor_that_stands_twice_in_an_object_may_become_two() -> None:
    shared = torch.zeros(1)
    rebuilt = rebuild(
        flatten(SimpleNamespace(a=shared, b=shared))[0], [torch.zeros(1), torch.ones(1)]
    )
    assert [tensor.item() for tensor in leaves(rebuilt)] == [0.0, 1.0]


# --- known gaps -------------------------------------------------------------------------------


def test_an_object_that_knows_itself_is_no_error() -> None:
    node = SimpleNamespace(x=torch.zeros(1))
    node.root = node
    flatten(node)


def test_what_a_dataclass_sets_beside_its_fields_is_kept() -> None:
    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor

        def __post_init__(self) -> None:
            self.rows = len(self.x)

    assert map_tensors(Batch(torch.zeros(3)), torch.clone).rows == 3


class Named(list):
    """A list with an attribute of its own."""

    name = ""


def test_what_a_list_has_beside_its_entries_is_kept() -> None:
    batch = Named([torch.zeros(3)])
    batch.name = "train"
    assert map_tensors(batch, torch.clone).name == "train"


def test_an_empty_cache_is_as_empty_in_each_call() -> None:
    spec, _ = flatten((Cache([Layer()]), torch.zeros(1)))
    first, x = rebuild(spec, [torch.zeros(1)], fresh=True)
    first.layers[0].update(x)
    second, _ = rebuild(spec, [torch.zeros(1)], fresh=True)
    assert second.layers[0].keys is None


def test_tensors_of_a_dataclass_with_slots_inside_of_an_object_are_found() -> None:
    paths = [path for path, _ in flatten(SimpleNamespace(part=Frozen(torch.zeros(1))))[1]]
    assert paths == [("part", "value")]
