"""Which calls a module really gets."""

from __future__ import annotations

import logging
import weakref
from collections import UserDict
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import override

from onnxport.callbacks.session import ExportSession
from onnxport.config import ExportOptions
from onnxport.inputs import observe
from onnxport.inputs.observe import Observer, Recorder
from onnxport.tree import flatten


class Net(nn.Module):
    """Calls two layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)

    @override
    def forward(self, x: Any, *, scale: Any = None, extras: Any = None) -> torch.Tensor:
        x = x["image"] if isinstance(x, dict) else x
        hidden = self.second(self.first(x))
        return hidden if scale is None else hidden * scale


class Steps(nn.Module):
    """Its ``forward`` is never called; its steps call children."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Linear(4, 4)
        self.body = nn.Linear(4, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        self.more = nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(2, 1)])})
        self.loss = nn.CrossEntropyLoss()


class Failing(nn.Module):
    """Raises below a child."""

    def __init__(self, error: type[BaseException] = ValueError) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.error = error

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        raise self.error("the user's own error")


class Hostile(UserDict):
    """A mapping that cannot be read."""

    @override
    def items(self) -> Any:
        raise RuntimeError("not readable")


def watch(module: nn.Module, **options: Any) -> Observer:
    observer = Observer(module, **options)
    observer.start()
    return observer


def shapes(recorder: Recorder) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(tensor.shape) for _, tensor in flatten((example.args, example.kwargs))[1]]
        for example in recorder.examples
    ]


def hooks(module: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{kind}": len(found)
        for name, submodule in module.named_modules()
        for kind, found in vars(submodule).items()
        if "hooks" in kind
    }


# --- what is recorded -------------------------------------------------------------------------


def test_a_call_of_the_root_is_recorded_and_the_calls_inside_it_are_not() -> None:
    net = Net()
    observer = watch(net)
    x = torch.randn(5, 4)
    net(x)
    assert list(observer.recorders) == [""]
    (example,) = observer.recorders[""].examples
    assert torch.equal(example.args[0], x)
    assert example.kwargs == {}


def test_keyword_dict_none_and_constant_arguments_are_recorded_as_they_were_given() -> None:
    net = Net()
    observer = watch(net)
    image, mask = torch.randn(5, 4), torch.ones(5)
    net({"image": image}, scale=2.0, extras=[mask, None])
    (example,) = observer.recorders[""].examples
    assert torch.equal(example.args[0]["image"], image)
    assert list(example.kwargs) == ["scale", "extras"]
    assert example.kwargs["scale"] == 2.0
    assert torch.equal(example.kwargs["extras"][0], mask)
    assert example.kwargs["extras"][1] is None


def test_what_only_the_loss_sees_is_no_input_of_the_model() -> None:
    net = Net()
    observer = watch(net)
    batch = {"image": torch.randn(5, 4), "label": torch.tensor([0, 1, 0, 1, 1])}
    observer.begin_batch(batch)
    nn.functional.cross_entropy(net(batch["image"]), batch["label"])
    tensors = [
        tensor
        for recorder in observer.recorders.values()
        for example in recorder.examples
        for _, tensor in flatten((example.args, dict(example.kwargs)))[1]
    ]
    assert [tuple(tensor.shape) for tensor in tensors] == [(5, 4)]
    assert not any(tensor.dtype == torch.int64 for tensor in tensors)


def test_calls_are_kept_once_per_shape_and_at_most_four_in_all() -> None:
    net = Net()
    observer = watch(net)
    for rows in (5, 5, 3, 5, 3, 2, 1, 6, 7):
        net(torch.randn(rows, 4))
    assert shapes(observer.recorders[""]) == [[(5, 4)], [(3, 4)], [(2, 4)], [(1, 4)]]
    assert observer.recorders[""].full


def test_another_dtype_or_another_keyword_is_another_shape() -> None:
    recorder = Recorder()
    recorder.record((torch.zeros(2),), {}, set())
    recorder.record((torch.zeros(2, dtype=torch.int64),), {}, set())
    recorder.record((), {"x": torch.zeros(2)}, set())
    assert len(recorder.examples) == 3
    assert not recorder.full


def test_a_call_without_a_tensor_is_not_kept() -> None:
    recorder = Recorder()
    recorder.record((1, None), {"mode": "fast"}, set())
    assert recorder.examples == []


def test_the_batch_itself_is_not_kept_alive() -> None:
    net = Net()
    observer = watch(net)
    x = torch.randn(5, 4)
    observer.begin_batch({"image": x})
    net(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    assert len(observer.recorders[""].examples) == 1


def test_what_is_recorded_is_a_copy_without_gradients() -> None:
    net = Net()
    observer = watch(net)
    x = torch.ones(5, 4, requires_grad=True)
    net(x)
    with torch.no_grad():
        x.zero_()
    (kept,) = observer.recorders[""].examples[0].args
    assert bool((kept == 1).all())
    assert not kept.requires_grad
    assert kept.grad_fn is None


def test_a_call_larger_than_the_limit_is_cut_to_its_first_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observe, "MAX_BYTES", 100)
    recorder = Recorder()
    x, mask, table, scale = torch.randn(40, 4), torch.ones(40), torch.ones(3, 4), torch.tensor(2.0)
    recorder.record((x, mask, table, scale), {}, set())
    kept = recorder.examples[0].args
    assert shapes(recorder) == [[(16, 4), (16,), (3, 4), ()]]
    assert torch.equal(kept[0], x[:16])


def test_a_call_below_the_limit_is_kept_whole() -> None:
    recorder = Recorder()
    recorder.record((torch.randn(40, 4),), {}, set())
    assert shapes(recorder) == [[(40, 4)]]


def test_tensors_of_inference_mode_come_out_usable() -> None:
    net = Net()
    observer = watch(net)
    with torch.inference_mode():
        net(torch.randn(5, 4))
    (kept,) = observer.recorders[""].examples[0].args
    assert not kept.is_inference()
    nn.functional.linear(kept, net.first.weight).sum().backward()
    assert net.first.weight.grad is not None


def test_the_input_is_recorded_before_the_users_own_hooks_change_it() -> None:
    net = Net()
    net.register_forward_pre_hook(lambda _, args: (args[0] * 100,))
    observer = watch(net)
    net(torch.ones(5, 4))
    assert observer.recorders[""].examples[0].args[0].max() == 1


def test_nothing_is_recorded_before_the_start() -> None:
    net = Net()
    observer = Observer(net)
    net(torch.randn(5, 4))
    assert not observer.active
    assert observer.recorders == {}
    assert observer.choose() is None


# --- what is chosen ---------------------------------------------------------------------------


def test_the_root_is_chosen_if_its_forward_was_ever_called() -> None:
    net = Net()
    observer = watch(net)
    batch = torch.randn(5, 4)
    observer.begin_batch(batch)
    net.first(batch)
    net(batch)
    assert observer.choose() == ""


def test_a_child_is_chosen_if_only_it_was_called() -> None:
    net = Steps()
    observer = watch(net)
    net.body(torch.randn(5, 4))
    assert observer.choose() == "body"


def test_a_child_that_gets_the_batch_goes_before_one_that_was_called_earlier() -> None:
    net = Steps()
    observer = watch(net)
    batch = [torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])]
    observer.begin_batch(batch)
    net.prompt(torch.ones(1, 4))
    net.loss(net.body(batch[0][:, :]), batch[1])
    assert list(observer.recorders) == ["prompt", "body", "loss"]
    assert observer.choose() == "body"


def test_without_data_of_the_batch_the_child_that_was_called_first_is_chosen() -> None:
    net = Steps()
    observer = watch(net)
    observer.begin_batch(torch.randn(5, 4))
    net.body(net.prompt(torch.randn(5, 4)))
    assert observer.choose() == "prompt"


def test_children_of_lists_and_dicts_of_modules_are_watched_by_their_full_names() -> None:
    net = Steps()
    observer = watch(net)
    net.more["inner"][0](net.heads[1](torch.randn(5, 3)))
    assert list(observer.recorders) == ["heads.1", "more.inner.0"]
    assert observer.choose() == "heads.1"
    assert net.get_submodule("heads.1") is net.heads[1]


def test_only_the_named_targets_are_watched() -> None:
    net = Net()
    observer = watch(net, targets=("second",))
    net(torch.randn(5, 4))
    assert shapes(observer.recorders["second"]) == [[(5, 3)]]
    assert observer.choose() == "second"


def test_a_target_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute `third`"):
        Observer(Net(), targets=("third",))


def test_redirected_calls_of_the_root_are_not_calls_of_its_forward() -> None:
    net = Net()
    redirected = [True]
    observer = watch(net, is_redirected=lambda _: redirected[0])
    net(torch.randn(5, 4))
    assert list(observer.recorders) == ["first", "second"]
    redirected[0] = False
    net(torch.randn(5, 4))
    assert list(observer.recorders) == ["first", "second", ""]
    assert observer.choose() == ""


# --- hooks and errors -------------------------------------------------------------------------


def test_all_hooks_are_gone_after_the_stop() -> None:
    net = Steps()
    before = hooks(net)
    observer = watch(net)
    assert observer.active
    assert hooks(net) != before
    observer.stop()
    assert not observer.active
    assert hooks(net) == before
    net.body(torch.randn(5, 4))
    assert observer.recorders == {}


def test_an_observer_that_was_stopped_in_the_middle_of_a_call_can_start_again() -> None:
    net = Net()
    observer = watch(net)
    handle = net.first.register_forward_hook(lambda *_: observer.stop())
    net(torch.randn(5, 4))
    handle.remove()
    observer.start()
    net(torch.randn(3, 4))
    assert shapes(observer.recorders[""]) == [[(5, 4)], [(3, 4)]]


def test_after_an_error_in_forward_the_next_call_is_an_outermost_one_again() -> None:
    net = Failing()
    observer = watch(net)
    with pytest.raises(ValueError, match="the user's own error"):
        net(torch.randn(5, 4))
    net.inner(torch.randn(3, 4))
    assert {name: shapes(found) for name, found in observer.recorders.items()} == {
        "": [[(5, 4)]],
        "inner": [[(3, 4)]],
    }


def test_after_an_interrupt_the_next_batch_starts_anew() -> None:
    net = Failing(KeyboardInterrupt)
    observer = watch(net)
    with pytest.raises(KeyboardInterrupt, match="the user's own error"):
        net(torch.randn(5, 4))
    observer.begin_batch(torch.randn(3, 4))
    net.inner(torch.randn(3, 4))
    assert shapes(observer.recorders["inner"]) == [[(3, 4)]]


def test_a_call_that_cannot_be_recorded_is_logged_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Sequential(nn.Identity())
    observer = watch(net)
    argument = Hostile(x=torch.zeros(1))
    with caplog.at_level(logging.WARNING, logger="onnxport"):
        assert net(argument) is argument
    assert "A call of 'forward' could not be recorded" in caplog.text
    assert observer.choose() is None


def cyclic() -> list[Any]:
    batch: list[Any] = [torch.zeros(1)]
    batch.append(batch)
    return batch


@pytest.mark.parametrize("batch", [Hostile(x=1), cyclic()], ids=["hostile mapping", "cycle"])
def test_a_batch_that_cannot_be_read_does_not_stop_training(batch: Any) -> None:
    net = Net()
    session = ExportSession(net, ExportOptions())
    session.begin_batch(batch)
    net(torch.randn(5, 4))
    session.finish()
    assert session.reports == []


@pytest.mark.parametrize("batch", [Hostile(x=1), cyclic()], ids=["hostile mapping", "cycle"])
def test_a_batch_that_cannot_be_read_is_not_taken_for_the_one_before(batch: Any) -> None:
    net = Steps()
    observer = watch(net)
    old = torch.randn(5, 4)
    observer.begin_batch(old)
    with suppress(RuntimeError):
        observer.begin_batch(batch)
    net.prompt(old)
    assert not observer.recorders["prompt"].touched_batch


def test_scripted_children_take_no_hooks_and_are_passed_over() -> None:
    net = nn.Module()
    net.scripted = torch.jit.trace(nn.Linear(4, 3), torch.ones(1, 4))
    net.body = nn.Linear(3, 2)
    observer = watch(net)
    net.body(net.scripted(torch.randn(5, 4)))
    assert observer.choose() == "body"


def test_the_address_of_the_last_batch_does_not_count_for_the_next_one() -> None:
    net = Steps()
    observer = watch(net)
    old = torch.randn(5, 4)
    observer.begin_batch(old)
    observer.begin_batch(torch.randn(5, 4))
    net.prompt(old)
    assert not observer.recorders["prompt"].touched_batch


def test_sparse_tensors_of_a_batch_are_recognised() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to_dense()

    net = nn.Module()
    net.sum = Sum()
    observer = watch(net)
    sparse = torch.eye(3).to_sparse()
    observer.begin_batch(sparse)
    net.sum(sparse)
    assert observer.recorders["sum"].touched_batch
