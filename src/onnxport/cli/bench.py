"""The command that measures how long a model takes."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any

from onnxport.cli.inputs import Inputs, facts_at
from onnxport.cli.output import emit, or_exit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from onnxport.report import Latency
    from onnxport.signature import TensorSpec

__all__ = ["bench"]


def bench(  # noqa: PLR0913 - options of a command
    model: Annotated[Path, "An ONNX model."],
    *,
    batch: list[int] | None = None,
    provider: list[str] | None = None,
    size: list[str] | None = None,
    checkpoint: Path | None = None,
    module: str = "",
    set: list[str] | None = None,  # noqa: A002 - the name of the option
    target: str = "",
    compiled: bool = False,
    trust_checkpoint: bool = False,
    seconds: float = 2.0,
    json: bool = False,
) -> None:
    """Measure how long a MODEL takes: p50, p95 and rows per second, for each --batch and provider.

    Providers take turns, after a warm-up. With --checkpoint and --module (see export), PyTorch
    takes its turn, too, and with --compiled what torch.compile makes of it. Symbolic sizes besides
    the batch are 16, or what --size sequence=128 says. Inputs are random.
    """
    import typer

    from onnxport.cli.load import read_settings

    def work() -> list[Latency]:
        sizes = read_settings(size or [])
        ways: dict[str, Any] = {}
        if checkpoint is not None:
            inputs = Inputs(module, None, None, "", set, trust=trust_checkpoint)
            ways = _torch_ways(inputs.loader()(checkpoint), target, compiled=compiled)
        return _measured(model, batch or [1, 8, 64], provider or [], sizes, seconds, ways)

    found = or_exit(work, as_json=json)
    if json:
        emit([asdict(each) for each in found])
        return
    typer.echo(f"{'provider':<26}{'batch':>7}{'p50 ms':>10}{'p95 ms':>10}{'rows/s':>12}{'runs':>7}")
    for each in found:
        p50, p95 = each.p50 * 1e3, each.p95 * 1e3
        row = f"{each.name:<26}{each.batch:>7}{p50:>10.3f}{p95:>10.3f}"
        typer.echo(f"{row}{each.throughput:>12,.0f}{each.runs:>7}")


def _measured(
    model: Path,
    batches: Sequence[int],
    providers: Sequence[str],
    sizes: dict[str, Any],
    seconds: float,
    others: dict[str, Callable[[dict[str, torch.Tensor]], object]],
) -> list[Latency]:
    from onnxport.errors import ConfigurationError
    from onnxport.validation.latency import latencies
    from onnxport.validation.providers import resolve_providers
    from onnxport.validation.session import Session, require_runtime

    require_runtime()
    facts = facts_at(model)
    names = {name for spec in facts.inputs for name in spec.dynamic_axes.values()}
    if unknown := set(sizes) - names:
        raise ConfigurationError(
            f"The model has no symbolic size {min(unknown)!r}; it has {sorted(names)!r}."
        )
    sessions = {name: Session(model, name) for name in resolve_providers(providers or "auto")}
    found: list[Latency] = []
    first = facts.inputs[0].dynamic_axes.get(0) if facts.inputs else None
    for rows in batches if first is not None else batches[:1]:
        known = {first: rows} | sizes
        feeds = [_random(spec, known) for spec in facts.inputs]
        inputs = [spec.name for spec in facts.inputs]
        named = dict(zip(inputs, feeds, strict=True))
        ways: dict[str, Callable[[], object]] = {
            name: partial(each.run, inputs, feeds) for name, each in sessions.items()
        }
        ways |= {name: partial(run, named) for name, run in others.items()}
        counted = rows if first is not None else 1
        found += latencies(ways, counted, budget_s=seconds)
    return found


def _torch_ways(
    module: nn.Module, target: str, *, compiled: bool
) -> dict[str, Callable[[dict[str, torch.Tensor]], object]]:
    """Return PyTorch's own ways of running what the model was made of."""
    import inspect as python

    import torch

    from onnxport.exporter.target import find_target

    found = find_target(module, target).eval()
    parameters = set(python.signature(found.forward).parameters)

    def way(run: Callable[..., object]) -> Callable[[dict[str, torch.Tensor]], object]:
        def once(feeds: dict[str, torch.Tensor]) -> object:
            from onnxport.errors import ConfigurationError

            try:
                with torch.inference_mode():
                    by_name = set(feeds) <= parameters
                    return run(**feeds) if by_name else run(*feeds.values())
            except Exception as error:
                raise ConfigurationError(
                    f"{type(found).__name__} does not run on the model's inputs "
                    f"({', '.join(feeds)}): {type(error).__name__}: {error}"
                ) from error

        return once

    ways = {"eager": way(found)}
    if compiled:
        ways["compiled"] = way(torch.compile(found))
    return ways


_FREE_SIZE = 16
"""Of a symbolic dimension that is not the batch, if nothing is said."""


def _random(spec: TensorSpec, sizes: dict[Any, Any]) -> torch.Tensor:
    import torch

    from onnxport.errors import ConfigurationError

    shape = [size if isinstance(size, int) else sizes.get(size, _FREE_SIZE) for size in spec.shape]
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"The input {spec.name!r} is of {spec.dtype}, which is no number.")
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)
