"""Where a model's nodes run, and what there is to say when that is not where it was asked for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from onnxport.errors import VerificationError
from onnxport.report import Placement
from onnxport.validation.session import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from onnxport.validation.session import PlacedNode

__all__ = ["elsewhere_text", "is_unused", "placement_of", "require_used"]


def placement_of(provider: str, nodes: Sequence[PlacedNode]) -> Placement | None:
    """Count nodes by where they run, most frequent operators first.

    Args:
        provider: What was asked for.
        nodes: The nodes; none where ONNX Runtime does not tell, or the graph computes nothing.
    """
    if not nodes:
        return None
    counts: dict[str, Counter[str]] = {}
    for node in nodes:
        counts.setdefault(node.provider, Counter())[node.operator] += 1
    return Placement(
        provider=provider,
        nodes={name: dict(counts[name].most_common()) for name in sorted(counts)},
    )


def is_unused(placement: Placement | None) -> bool:
    """Tell whether a provider has taken no node at all."""
    return placement is not None and placement.provider not in placement.nodes


def require_used(placement: Placement | None) -> None:
    """Refuse a provider that was asked for by name and has taken no node.

    Raises:
        VerificationError: With the operators, and where they run instead.
    """
    if placement is not None and is_unused(placement):
        raise VerificationError(
            f"{placement.provider} was asked for by name and runs none of the model's nodes. "
            f"They run on {_places(placement)}: {_counted(placement.elsewhere)}. Such a model "
            "gains nothing from that provider: ask for others in Verify(providers=)."
        )


def elsewhere_text(
    placement: Placement | None,
    nodes: Sequence[PlacedNode],
    of_sizes: Callable[[], Collection[str]],
) -> str:
    """Say which nodes run on another provider than the one asked for; ``""``: nothing to say.

    Args:
        placement: The counts.
        nodes: The nodes.
        of_sizes: Gives the names of nodes that compute nothing but sizes: where these alone run on
            the CPU, that is as it should be.
    """
    if placement is None or placement.provider == CPU or not placement.elsewhere:
        return ""
    if is_unused(placement):
        return (
            f"{placement.provider} runs here, but none of the model's nodes: it is proven on "
            f"{_places(placement)} alone."
        )
    sizes = of_sizes()
    others = [node for node in nodes if node.provider != placement.provider]
    matter = Counter(node.operator for node in others if node.name not in sizes)
    if not matter:
        return ""
    besides = len(others) - sum(matter.values())
    text = (
        f"{placement.provider} does not run {sum(matter.values())} of the model's {len(nodes)} "
        f"nodes; {_places(placement)} does: {_counted(dict(matter.most_common()))}."
    )
    return f"{text} So do {besides} that compute sizes, as is usual." if besides else text


def _places(placement: Placement) -> str:
    return ", ".join(name for name in placement.nodes if name != placement.provider)


def _counted(operators: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in operators.items())
