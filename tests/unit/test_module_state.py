"""A borrowed module comes back as it was; a copy is a copy."""

from __future__ import annotations

import random
import threading
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

from onnxport.exporter.module_state import (
    borrowed,
    copy_module,
    evaluate,
    load_weights,
    preserved_globals,
    run_borrowed,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Net(nn.Module):
    """Has what training can change: BatchNorm, dropout, tied weights, a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("nothing", None)
        self.last = "untouched"
        self.removed = "still there"

    @override
    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        self.last = x
        self.added = x
        vars(self).pop("removed", None)
        return self.drop(self.norm(self.outer(self.inner(x)))) * scale


class Locked(Net):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.again = self.inner


class Strict(nn.Module):
    """Overrides ``train``, as people do to keep a backbone frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.modes: list[bool] = []

    @override
    def train(self, mode: bool = True) -> Strict:
        self.modes.append(mode)
        return super().train(mode)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class LazyMask(nn.Module):
    """Makes a buffer and a layer when it is first called."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(x.shape[-1]))
            self.layer = nn.Identity()
        return self.layer(x * self.mask)


def streams() -> tuple[Any, ...]:
    """The state of every random number stream."""
    numpy = np.random.get_state()  # noqa: NPY002 - the global stream is what users draw from
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


def draw() -> None:
    """Use every random number stream."""
    random.random()  # noqa: S311
    np.random.rand()  # noqa: NPY002
    torch.rand(1)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that training can notice."""
    return {
        "streams": streams(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "training": [submodule.training for submodule in module.modules()],
        "attributes": [
            {name: id(value) for name, value in vars(submodule).items()}
            for submodule in module.modules()
        ],
        "tensors": {
            name: (id(tensor), tensor.requires_grad, tensor.tolist())
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        },
        "gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
    }


def training_net(kind: type[Net] = Net) -> Net:
    """A net in the middle of training: BatchNorm frozen, gradients accumulated."""
    net = kind()
    net.norm.eval()
    net(torch.randn(3, 4)).sum().backward()
    net.last, net.removed = "untouched", "still there"
    del net.added
    return net


def addresses(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}


def copied_run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return copy_module(net)(x)


# --- borrowing --------------------------------------------------------------------------------


def test_while_borrowed_every_submodule_is_in_eval_mode_and_exportable_conditions_hold() -> None:
    net = training_net()
    with torch.autocast("cpu", dtype=torch.bfloat16), borrowed(net) as module:
        assert module is net
        assert not any(submodule.training for submodule in net.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.mha.get_fastpath_enabled()


def test_the_training_flag_of_each_submodule_comes_back() -> None:
    net = training_net()
    with borrowed(net):
        pass
    assert net.training
    assert net.drop.training
    assert not net.norm.training


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_comes_back_also_when_the_body_raises(
    error: type[BaseException] | None,
) -> None:
    net = training_net()
    before = snapshot(net)
    expected = nullcontext() if error is None else pytest.raises(error, match="in the middle")
    with expected, borrowed(net):
        draw()
        net.last, net.added, net.drop.p = "rebound", "added", 0.9
        net.norm.training = True
        del net.removed
        torch.set_grad_enabled(True)
        torch.backends.mha.set_fastpath_enabled(True)
        if error is not None:
            raise error("in the middle")
    assert snapshot(net) == before


@pytest.mark.parametrize(
    "surrounding",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_mode_around_it_comes_back(surrounding: Callable[[], Any]) -> None:
    net = training_net()
    with surrounding():
        before = snapshot(net)
        with borrowed(net):
            draw()
            assert not torch.is_inference_mode_enabled()
        assert snapshot(net) == before


def test_a_fast_path_that_was_off_stays_off() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with borrowed(nn.Identity()):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_the_users_own_train_method_is_not_called() -> None:
    net = Strict()
    with borrowed(net):
        net(torch.zeros(1, 2))
    assert net.modes == []
    assert net.training


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.norm.train(),
        lambda net: setattr(net, "last", "rebound"),
        lambda net: net.calls.add_(1),
        lambda net: net.inner.weight.grad.add_(1),
        lambda net: net.register_buffer("more", torch.zeros(1)),
        lambda _: draw(),
    ],
    ids=["flag", "attribute", "buffer", "gradient", "new buffer", "random numbers"],
)
def test_the_snapshot_of_these_tests_notices_a_change(change: Callable[[Net], Any]) -> None:
    net = training_net()
    before = snapshot(net)
    change(net)
    assert snapshot(net) != before


def test_random_number_streams_are_put_back_also_after_an_error() -> None:
    before = streams()
    with preserved_globals():
        draw()
    assert streams() == before
    expected = pytest.raises(ValueError, match="in the middle")
    with expected, preserved_globals():
        draw()
        raise ValueError("in the middle")
    assert streams() == before


# --- running a borrowed module ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_borrowed_run_leaves_no_trace(kind: type[Net]) -> None:
    net = training_net(kind)
    x = torch.randn(5, 4)
    before = snapshot(net)
    run_borrowed(net, net.state_dict(), (x,), {"scale": 2.0})
    assert snapshot(net) == before


def test_a_submodule_under_two_names_keeps_its_own_parameters() -> None:
    net = nn.Module()
    net.encoder = nn.Linear(2, 2)
    net.body = nn.Sequential(net.encoder, nn.ReLU())
    net.forward = net.body.forward  # type: ignore[method-assign]
    before = snapshot(net)
    run_borrowed(net, net.state_dict(), (torch.ones(1, 2),), {})
    assert isinstance(net.encoder.weight, nn.Parameter)
    assert snapshot(net) == before


def test_a_borrowed_run_that_fails_leaves_no_trace() -> None:
    net = training_net()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_borrowed(net, net.state_dict(), (torch.ones(5, 3),), {})
    assert snapshot(net) == before


def test_a_borrowed_run_computes_what_a_copy_with_these_weights_computes() -> None:
    net, other = training_net(), training_net()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.5)
    x = torch.randn(5, 4)
    got = run_borrowed(net, other.state_dict(), (x,), {"scale": 2.0})
    assert not got.requires_grad
    assert torch.equal(got, other.eval()(x, scale=2.0))
    assert not torch.allclose(got, run_borrowed(net, net.state_dict(), (x,), {"scale": 2.0}))


def test_weights_that_are_not_given_are_the_modules_own() -> None:
    net = training_net()
    x = torch.randn(5, 4)
    own = run_borrowed(net, {}, (x,), {})
    assert torch.equal(own, run_borrowed(net, net.state_dict(), (x,), {}))
    shifted = run_borrowed(net, {"outer.bias": net.outer.bias + 1}, (x,), {})
    assert not torch.allclose(own, shifted)


def test_given_weights_are_brought_to_the_modules_dtype() -> None:
    net = nn.Linear(2, 2)
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    assert run_borrowed(net, state, (torch.ones(1, 2),), {}).dtype is torch.float32


def test_the_given_weights_are_not_written_to() -> None:
    net = training_net()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = {name: tensor.tolist() for name, tensor in state.items()}
    run_borrowed(net, state, (torch.randn(5, 4),), {})
    assert {name: tensor.tolist() for name, tensor in state.items()} == before


def test_a_layer_that_renormalises_its_weights_in_forward_keeps_them() -> None:
    net = nn.Embedding(4, 3, max_norm=0.1)
    before = snapshot(net)
    run_borrowed(net, net.state_dict(), (torch.arange(4),), {})
    assert snapshot(net) == before


class Stateful(nn.Module):
    """Changes in forward what is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.calls: list[int] = []
        self.seen = {"shapes": {0}, "last": deque([1], maxlen=2)}
        self.mean = torch.zeros(4)
        self.array = np.zeros(2)
        self.numpy = np.random.default_rng(0)
        self.old_numpy = np.random.RandomState(0)
        self.python = random.Random(0)  # noqa: S311
        self.torch = torch.Generator().manual_seed(0)
        self.hidden = [nn.BatchNorm1d(4)]
        self.made = self.body(torch.ones(1, 4))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        self.seen["shapes"].add(len(x))
        self.seen["last"].append(len(x))
        self.mean += x.detach().mean(0)
        self.array += 1
        self.numpy.random(), self.old_numpy.random_sample(), self.python.random()
        torch.rand(1, generator=self.torch)
        self.hidden[0].train()(x)
        self.made = self.body(x)
        return self.made

    def state(self) -> list[Any]:
        return [
            self.calls.copy(),
            self.seen["shapes"].copy(),
            list(self.seen["last"]),
            self.mean.tolist(),
            self.array.tolist(),
            self.numpy.bit_generator.state,
            self.old_numpy.get_state()[2],
            self.python.getstate(),
            self.torch.get_state().tolist(),
            self.hidden[0].running_mean.tolist(),
            id(self.made),
        ]


class StatefulLocked(Stateful):
    """The same, with a lock beside it and one inside of an object with state."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.tracker = Tracker()

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.tracker.count += 1
            self.tracker.items.append(1)
            return super().forward(x)

    @override
    def state(self) -> list[Any]:
        return [*super().state(), self.tracker.count, self.tracker.items.copy()]


class Tracker:
    """Holds state, a lock and a way back to itself."""

    __slots__ = ("count", "items", "lock", "me")

    def __init__(self) -> None:
        self.count, self.items, self.lock, self.me = 0, [1], threading.Lock(), [self]


@pytest.mark.parametrize("kind", [Stateful, StatefulLocked])
@pytest.mark.parametrize("how", ["borrowed", "copied"])
def test_state_that_is_neither_parameter_nor_buffer_is_not_touched(
    kind: type[Stateful], how: str
) -> None:
    net = kind()
    x = torch.randn(5, 4)
    net(x)
    before = net.state()
    if how == "borrowed":
        run_borrowed(net, net.state_dict(), (x,), {})
    else:
        copy_module(net)(x)
    assert net.state() == before
    net(x[:3])
    after = net.state()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] * len(before)


def test_the_parts_of_what_cannot_be_copied_keep_their_relations() -> None:
    net = StatefulLocked()
    clone = copy_module(net)
    assert clone.tracker is not net.tracker
    assert clone.tracker.me[0] is clone.tracker
    assert clone.tracker.lock is net.tracker.lock


class Pipe:
    """Closes what it holds when it is no longer needed."""

    def __init__(self) -> None:
        self.lock, self.open = threading.Lock(), [True]

    def __del__(self) -> None:
        getattr(self, "open", []).clear()


def test_the_end_of_a_copy_closes_nothing_that_training_uses() -> None:
    net = nn.Linear(2, 2)
    net.pipe = Pipe()
    run_borrowed(net, {}, (torch.ones(1, 2),), {})
    copy_module(net)
    assert net.pipe.open == [True]


@pytest.mark.parametrize("how", [lambda net, x: run_borrowed(net, {}, (x,), {}), copied_run])
def test_an_iterator_that_training_draws_from_is_not_drawn_from(how: Any) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = (number for number in range(9))

        @override
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + next(self.values)

    net = Drawing()
    with pytest.raises(RuntimeError, match="forward uses a generator, which belongs to the train"):
        how(net, torch.ones(1))
    assert next(net.values) == 0


class Trained(nn.Module):
    """Knows its trainer, as a LightningModule does, and logs in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self._trainer: Any = SimpleNamespace(epoch=3, logged=[])
        self.watchers = [self._trainer]

    def log(self, name: str, value: Any) -> None:
        self._trainer.logged.append(name)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log("mean", x.mean())
        return self.body(x)


class TrainedLocked(Trained):
    """The same, and cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Trained, TrainedLocked])
def test_runs_that_training_does_not_know_of_log_nothing(kind: type[Trained]) -> None:
    net = kind()
    x = torch.ones(1, 2)
    assert torch.equal(run_borrowed(net, {}, (x,), {}), copy_module(net)(x))
    assert net._trainer.logged == []
    net(x)
    assert net._trainer.logged == ["mean"]


@pytest.mark.parametrize("kind", [Trained, TrainedLocked])
def test_a_borrowed_module_has_its_trainer_and_a_copy_has_none(kind: type[Trained]) -> None:
    net = kind()
    with borrowed(net):
        assert net._trainer.epoch == net.watchers[0].epoch == 3
    clone = copy_module(net)
    assert clone._trainer is None
    with pytest.raises(RuntimeError, match="uses a SimpleNamespace, which belongs to the training"):
        clone.watchers[0].epoch  # noqa: B018


def test_a_module_that_reaches_another_by_itself_sees_the_given_weights() -> None:
    net = nn.Module()
    net.inner = nn.Linear(2, 2)
    net.weights = [net.inner.weight]
    inner = net.inner
    net.forward = lambda x: x @ net.weights[0] + inner(x)  # type: ignore[method-assign]
    state = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    assert run_borrowed(net, state, (torch.ones(1, 2),), {}).tolist() == [[0.0, 0.0]]


def test_a_borrowed_run_of_a_submodule_takes_its_part_of_the_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    before = snapshot(net)
    got = run_borrowed(net, state, (torch.ones(1, 2),), {}, target="1")
    assert got.tolist() == [[0.0, 0.0]]
    assert snapshot(net) == before


# --- compiled modules -------------------------------------------------------------------------


def compiled_in(way: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    if way == "wrapper":
        net[0] = torch.compile(net[0], backend="eager")
    elif way == "nested wrapper":
        net[0] = nn.Sequential(torch.compile(net[0], backend="eager"))
    elif way == "compile()":
        net[0].compile(backend="eager")
    elif way == "forward":
        net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    return net


COMPILED = ["wrapper", "nested wrapper", "compile()", "forward"]


@pytest.mark.parametrize("way", COMPILED)
def test_a_copy_of_what_is_compiled_is_plain_and_takes_the_checkpoint(way: str) -> None:
    net = compiled_in(way)
    x = torch.randn(3, 2)
    state = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    clone = copy_module(net)
    assert load_weights(clone, state) == ()
    assert not any("_orig_mod" in name for name in clone.state_dict())
    assert type(clone[0]) is (nn.Sequential if way == "nested wrapper" else nn.Linear)
    assert torch.equal(clone(x), run_borrowed(net, state, (x,), {}))
    assert not torch.equal(clone(x), net(x))


@pytest.mark.parametrize("way", COMPILED)
def test_a_borrowed_run_compiles_nothing(way: str) -> None:
    net = compiled_in(way)
    net(torch.randn(3, 2))
    frames = torch._dynamo.utils.counters["frames"]["total"]
    run_borrowed(net, net.state_dict(), (torch.randn(5, 2),), {})
    assert torch._dynamo.utils.counters["frames"]["total"] == frames


def test_a_compiled_function_under_another_name_belongs_to_the_copy() -> None:
    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 2)
            self.fast = torch.compile(self.slow, backend="eager")
            self.double = torch.compile(torch.neg, backend="eager")

        def slow(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

        @override
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fast(x)

    net = Fast()
    clone = copy_module(net)
    load_weights(clone, {name: torch.zeros_like(t) for name, t in net.state_dict().items()})
    assert clone(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]
    assert net(torch.ones(1, 2)).tolist() != [[0.0, 0.0]]


def test_what_forward_registers_when_first_called_does_not_stay() -> None:
    net = LazyMask()
    run_borrowed(net, {}, (torch.ones(2, 3),), {})
    assert list(net.state_dict()) == []
    assert list(net.children()) == []


# --- copying ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_has_the_same_weights_and_shares_none(kind: type[Net]) -> None:
    net = training_net(kind)
    clone = copy_module(net)
    assert type(clone) is kind
    assert clone.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in _pairs(clone, net))
    assert not addresses(clone) & addresses(net)


@pytest.mark.parametrize("kind", [Net, Locked])
def test_what_is_done_to_a_copy_does_not_reach_the_original(kind: type[Net]) -> None:
    net = training_net(kind)
    x = torch.randn(2, 4).double()
    before = snapshot(net)
    clone = copy_module(net)
    with torch.no_grad():
        for tensor in clone.state_dict().values():
            tensor.add_(1)
    evaluate(clone).double()
    clone(x)
    clone.inner = nn.Identity()
    clone.register_buffer("more", torch.zeros(1), persistent=False)
    assert snapshot(net) == before


@pytest.mark.parametrize("kind", [Net, Locked])
def test_tied_weights_of_a_copy_are_tied(kind: type[Net]) -> None:
    clone = copy_module(training_net(kind))
    assert clone.outer.weight is clone.inner.weight
    assert isinstance(clone.outer.weight, nn.Parameter)


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_wants_no_gradients_and_keeps_its_modes(kind: type[Net]) -> None:
    net = training_net(kind)
    clone = copy_module(net)
    assert not any(parameter.requires_grad for parameter in clone.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    modes = [module.training for module in clone.modules()]
    assert modes == [module.training for module in net.modules()]


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_computes_the_same(kind: type[Net]) -> None:
    net = training_net(kind)
    x = torch.randn(5, 4)
    assert torch.equal(evaluate(copy_module(net))(x), run_borrowed(net, {}, (x,), {}))


def test_a_module_that_stands_twice_in_what_cannot_be_copied_is_one_in_the_copy() -> None:
    net = Locked()
    clone = copy_module(net)
    assert clone.again is clone.inner
    assert clone.again is not net.inner
    assert clone.lock is net.lock
    assert clone.nothing is None


def test_a_module_that_keeps_a_computed_tensor_is_copied() -> None:
    net = nn.Linear(2, 2)
    net.doubled = net.weight * 2  # no leaf: deepcopy refuses it
    clone = copy_module(net)
    assert torch.equal(clone.weight, net.weight)
    assert not addresses(clone) & addresses(net)


def test_an_integer_parameter_of_what_cannot_be_copied_is_copied() -> None:
    net = nn.Module()
    net.lock = threading.Lock()
    net.levels = nn.Parameter(torch.tensor([1, 2], dtype=torch.int8), requires_grad=False)
    clone = copy_module(net)
    assert clone.levels.tolist() == [1, 2]
    assert clone.levels.dtype is torch.int8


@pytest.mark.parametrize("kind", [Net, Locked])
def test_hooks_put_on_a_copy_do_not_reach_the_original(kind: type[Net]) -> None:
    net = kind()
    clone = copy_module(net)
    clone.register_forward_hook(lambda *_: None)
    clone.inner.register_forward_pre_hook(lambda *_: None)
    assert not net._forward_hooks
    assert not net.inner._forward_pre_hooks


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_made_under_inference_mode_is_an_ordinary_module(kind: type[Net]) -> None:
    net = training_net(kind)
    state = training_net().state_dict()
    with torch.inference_mode():
        clone = copy_module(net)
        load_weights(clone, {name: tensor.clone() for name, tensor in state.items()})
    assert not any(tensor.is_inference() for tensor in clone.state_dict().values())
    evaluate(clone).requires_grad_(True)
    clone(torch.ones(2, 4)).sum().backward()


def test_copying_uses_no_random_numbers() -> None:
    class Drawing(nn.Module):
        def __deepcopy__(self, memo: Any) -> Drawing:
            draw()
            return Drawing()

    before = streams()
    copy_module(Drawing())
    assert streams() == before


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_of_a_compiled_module_is_the_plain_module(kind: type[Net]) -> None:
    net = kind()
    compiled = torch.compile(net, backend="eager")
    clone = copy_module(compiled)
    assert type(clone) is kind
    assert not addresses(clone) & addresses(net)


@pytest.mark.parametrize("kind", [Net, Locked])
def test_a_copy_of_a_module_that_compiled_itself_does_not_run_the_original(
    kind: type[Net],
) -> None:
    net = kind()
    net.compile(backend="eager")
    clone = copy_module(net)
    assert vars(clone).get("_compiled_call_impl") is None
    assert vars(net)["_compiled_call_impl"] is not None


def test_a_copy_does_not_keep_a_compiled_forward_of_the_original() -> None:
    net = Net()
    net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    clone = copy_module(net)
    assert "forward" not in vars(clone)
    assert "forward" in vars(net)


def test_evaluating_a_copy_reaches_each_submodule_without_its_train_method() -> None:
    net = Strict()
    assert evaluate(net) is net
    assert not any(module.training for module in net.modules())
    assert net.modes == []


# --- loading ----------------------------------------------------------------------------------


def test_a_whole_checkpoint_loads_without_a_word() -> None:
    source, target = training_net(), Net()
    assert load_weights(target, source.state_dict()) == ()
    assert all(torch.equal(a, b) for a, b in _pairs(target, source))


def test_weights_that_the_checkpoint_lacks_are_named_and_kept() -> None:
    source, target = training_net(), Net()
    state = source.state_dict()
    del state["norm.running_mean"], state["calls"]
    kept = target.norm.running_mean.clone()
    (warning,) = load_weights(target, state)
    assert "lacks 2 of the module's tensors, e.g. 'calls'" in warning
    assert torch.equal(target.norm.running_mean, kept)


def test_weights_that_have_no_place_are_refused() -> None:
    state = Net().state_dict() | {"head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 tensors .* no place in the module, e\.g\. 'head\.w"):
        load_weights(Net(), state)


def test_weights_of_another_shape_are_refused() -> None:
    state = Net().state_dict() | {"inner.bias": torch.zeros(5)}
    with pytest.raises(RuntimeError, match=r"size mismatch for inner\.bias"):
        load_weights(Net(), state)


def test_weights_that_would_be_rounded_are_refused() -> None:
    state = nn.Linear(2, 2).double().state_dict()
    with pytest.raises(ValueError, match="2 tensors of the checkpoint have no place"):
        load_weights(nn.Linear(2, 2), state)


def test_a_module_that_changes_weights_while_loading_is_noticed() -> None:
    net = nn.Linear(2, 2)

    def halve(_: Any, state: dict[str, Any], *__: Any) -> None:
        state["weight"] = state["weight"] / 2

    net.register_load_state_dict_pre_hook(halve)
    with pytest.raises(ValueError, match="'weight'"):
        load_weights(net, nn.Linear(2, 2).state_dict())


def test_a_module_that_ignores_its_checkpoint_is_loaded_all_the_same() -> None:
    class Deaf(nn.Linear):
        @override
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    source, target = nn.Linear(2, 2), Deaf(2, 2)
    load_weights(target, source.state_dict())
    assert torch.equal(target.weight, source.weight)


def test_weights_that_are_no_numbers_load_too() -> None:
    state = {"weight": torch.tensor([[float("nan"), -0.0]]), "bias": torch.tensor([float("inf")])}
    net = nn.Linear(2, 1)
    assert load_weights(net, state) == ()
    assert torch.equal(net.weight.view(torch.int32), state["weight"].view(torch.int32))


@pytest.mark.parametrize("keep", [True, False], ids=["whole", "without versions"])
def test_a_module_that_migrates_old_checkpoints_takes_one_of_its_own_version(keep: bool) -> None:
    class Versioned(nn.Linear):
        _version = 2

        @override
        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            if metadata.get("version", 1) < 2:
                state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    source, target = nn.Sequential(Versioned(2, 2)), nn.Sequential(Versioned(2, 2))
    state = source.state_dict()
    assert load_weights(target, state if keep else dict(state)) == ()
    assert torch.equal(target[0].weight, source[0].weight)


def test_entries_that_are_no_tensors_are_passed_over() -> None:
    class Counting(nn.Linear):
        @override
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

        @override
        def set_extra_state(self, state: Any) -> None:
            self.step = state["step"]

    net = Counting(2, 1)
    assert load_weights(net, Counting(2, 1).state_dict()) == ()
    assert net.step == 3


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class OwnNames(nn.Module):
    """Has attributes named like torch's lists of hooks, and one of a class of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.late_hooks = [torch.relu]
        self.named_hooks = {"twice": _twice}
        self.made = type("Made", (), {"__module__": None})()
        self.register_forward_hook(_twice)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late_hooks[0](self.net(x))
        return x if self.named_hooks["twice"] is _twice else x + 1


def _twice(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def test_attributes_of_the_user_that_are_named_like_hooks_stay() -> None:
    module, x = OwnNames(), torch.randn(4, 3)
    copied = copy_module(module, without=[_twice])
    assert torch.equal(copied(x) * 2, module(x))
    result = run_borrowed(module, module.state_dict(), (x,), {}, without=[_twice])
    assert torch.equal(result, copied(x))
