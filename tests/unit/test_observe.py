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
from onnxport.inputs import record
from onnxport.inputs.observe import Observer, is_compiled
from onnxport.inputs.record import Recorder, small_copy
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


class Own(nn.Linear):
    """A layer that torch does not know, which is what it compiles."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


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


def test_three_calls_of_a_shape_are_kept_and_eight_in_all() -> None:
    net = Net()
    observer = watch(net)
    for rows in (5, 5, 5, 5, 3, 2, 3, 2, 1, 1, 6, 7):
        net(torch.randn(rows, 4))
    assert shapes(observer.recorders[""]) == [[(n, 4)] for n in (5, 5, 5, 3, 2, 1, 6, 7)]
    assert observer.recorders[""].full
    first, second = (example.args[0] for example in observer.recorders[""].examples[:2])
    assert not torch.equal(first, second)


def test_a_flag_makes_another_shape_and_a_number_does_not() -> None:
    recorder = Recorder()
    for number in range(4):
        recorder.record((torch.zeros(2), True), {"step": number}, set())
    recorder.record((torch.zeros(2), False), {"step": 9}, set())
    kept = [(example.args[1], example.kwargs["step"]) for example in recorder.examples]
    assert kept == [(True, 0), (True, 1), (True, 2), (False, 9)]


def test_an_argument_that_only_some_calls_have_is_kept() -> None:
    recorder = Recorder()
    for _ in range(4):
        recorder.record((torch.zeros(2),), {}, set())
    recorder.record((torch.zeros(2),), {"mask": torch.ones(2)}, set())
    recorder.record((torch.zeros(2),), {"mask": None}, set())
    assert [list(example.kwargs) for example in recorder.examples] == [
        [],
        [],
        [],
        ["mask"],
        ["mask"],
    ]


def test_what_autocast_gives_to_forward_is_recorded_as_it_is() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    net = Mixed()
    observer = watch(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net.second(net.first(torch.randn(5, 4)))
    kept = {name: found.examples[0].args[0].dtype for name, found in observer.recorders.items()}
    assert kept == {"first": torch.float32, "second": torch.bfloat16}


def test_hooks_are_gone_when_enough_was_seen() -> None:
    net = Net()
    before = hooks(net)
    observer = watch(net)
    for rows in range(1, 9):
        observer.begin_batch(None)
        net(torch.randn(rows, 4))
    assert hooks(net) != before
    observer.begin_batch(None)
    assert hooks(net) == before
    assert not observer.active


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


def test_a_large_call_is_cut_to_its_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_BYTES", 100)
    recorder = Recorder()
    x, mask, scale = torch.randn(40, 4), torch.ones(40), torch.tensor(2.0)
    recorder.record((x, mask, scale), {}, set())
    kept = recorder.examples[0].args
    assert shapes(recorder) == [[(24, 4), (24,), ()]]
    assert torch.equal(kept[0], x[:24])


def test_sizes_that_vary_still_vary_when_all_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_BYTES", 100)
    recorder = Recorder()
    for rows in (40, 50, 40, 60, 70, 80, 90, 100):
        recorder.record((torch.randn(rows, 4),), {}, set())
    kept = [shape[0] for (shape,) in shapes(recorder)]
    assert kept == [24, 23, 24, 22, 21, 20, 19, 18]


def test_a_call_with_rows_of_several_kinds_is_cut_only_when_it_is_huge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = (torch.randn(40, 4), torch.ones(3, 4))
    monkeypatch.setattr(record, "MAX_BYTES", 100)
    whole, cut = Recorder(), Recorder()
    whole.record(call, {}, set())
    monkeypatch.setattr(record, "HUGE_BYTES", 100)
    for _ in range(2):
        cut.record(call, {}, set())
    assert shapes(whole) == [[(40, 4), (3, 4)]]
    assert shapes(cut) == [[(24, 4), (3, 4)]]


def test_a_small_copy_of_a_batch_shares_nothing() -> None:
    batch = {"image": torch.zeros(2, 3), "name": "a"}
    copied = small_copy(batch)
    copied["image"] += 1
    assert not batch["image"].any()
    assert copied["name"] == "a"


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


# --- compiled modules -------------------------------------------------------------------------


def compiled(module: nn.Module, way: str) -> nn.Module:
    if way == "compile()":
        module.compile(backend="eager", fullgraph=True)
    else:
        function = torch.compile(module.forward, backend="eager", fullgraph=True)
        module.forward = function  # type: ignore[method-assign]
    return module


def test_the_marks_of_compilation_are_told() -> None:
    assert not is_compiled(Net())
    assert not is_compiled(torch.jit.trace(nn.Linear(4, 3), torch.ones(1, 4)))
    assert is_compiled(compiled(Net(), "compile()"))
    assert is_compiled(compiled(Net(), "forward"))
    assert is_compiled(torch.compile(Net(), backend="eager"))


@pytest.mark.parametrize("way", ["compile()", "forward"])
def test_a_compiled_module_gets_no_hooks_at_all(way: str) -> None:
    net = compiled(Net(), way)
    before = hooks(net)
    observer = watch(net)
    assert observer.active
    assert observer.needs_rehearsal
    assert hooks(net) == before


@pytest.mark.parametrize("way", ["compile()", "forward"])
def test_of_a_module_with_compiled_parts_only_the_root_gets_hooks(way: str) -> None:
    net = Net()
    net.first = compiled(Own(), way)
    observer = watch(net)
    net(torch.randn(5, 4))
    assert list(observer.recorders) == [""]
    assert not observer.needs_rehearsal
    assert not net.second._forward_hooks


@pytest.mark.parametrize("fullgraph", [False, True])
def test_hooks_that_are_compiled_all_the_same_do_nothing_and_do_not_come_back(
    fullgraph: bool,
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    net, copy = Net(), Net()
    before = hooks(net)
    observer = watch(net)
    x = torch.randn(5, 4)
    function = net.__call__
    step = torch.compile(lambda x: function(x), backend="eager", fullgraph=fullgraph)  # noqa: PLW0108
    assert torch.equal(step(x), net.second(net.first(x)))
    assert "" not in observer.recorders
    observer.begin_batch(x)
    assert hooks(net) == before
    assert observer.needs_rehearsal
    step(x)
    graphs = counters["unique_graphs"]
    for _ in range(9):
        observer.stop()
        observer.start()
        observer.begin_batch(x)
        step(x)
    assert counters["unique_graphs"] == graphs
    observer.rehearse(copy, x, lambda: copy(x))
    assert observer.choose() == ""


def test_what_is_compiled_after_the_start_loses_its_hooks_before_the_first_step() -> None:
    net = Net()
    observer = watch(net)
    compiled(net.first, "compile()")
    observer.begin_batch(torch.randn(5, 4))
    assert not net.first._forward_hooks
    assert net._forward_hooks
    assert observer.needs_rehearsal


def test_a_rehearsal_is_left_when_the_root_is_called_and_leaves_no_hooks() -> None:
    net, copy = compiled(Net(), "forward"), Net()
    ran = []
    copy.first.register_forward_hook(lambda *_: ran.append(1))
    before = hooks(copy)
    observer = watch(net)
    batch = torch.randn(5, 4)
    observer.rehearse(copy, batch, lambda: copy(batch, scale=2.0))
    (example,) = observer.recorders[""].examples
    assert torch.equal(example.args[0], batch)
    assert example.kwargs == {"scale": 2.0}
    assert observer.recorders[""].touched_batch
    assert (ran, hooks(copy)) == ([], before)
    assert not observer.needs_rehearsal


@pytest.mark.parametrize("hurry", [False, True])
def test_a_rehearsal_in_a_hurry_is_left_when_a_child_got_the_batch(hurry: bool) -> None:
    net, copy = Steps(), Steps()
    compiled(net.body, "forward")
    observer = watch(net)
    batch = [torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])]
    reached = []

    def step() -> None:
        copy.prompt(torch.ones(1, 4))
        logits = copy.body(batch[0])
        reached.append(copy.loss(logits, batch[1]))
        raise ValueError("the user's own error")

    observer.rehearse(copy, batch, step, hurry=hurry)
    assert observer.choose() == "body"
    assert len(reached) == (not hurry)


def test_a_rehearsal_ends_when_each_target_was_called() -> None:
    net, copy = Net(), Net()
    net.first = torch.compile(net.first, backend="eager")
    observer = watch(net, targets=("first._orig_mod",))
    batch = torch.randn(5, 4)
    observer.rehearse(copy, batch, lambda: copy(batch))
    assert observer.choose() == "first._orig_mod"
    assert shapes(observer.recorders["first._orig_mod"]) == [[(5, 4)]]


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
