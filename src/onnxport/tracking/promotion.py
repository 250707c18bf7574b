"""Which version deserves which alias: pure comparisons of what its tags say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from onnxport.report import MetricParity, Provenance

__all__ = [
    "TAG_PREFIX",
    "Score",
    "Standing",
    "best_of",
    "challenger_of",
    "is_better",
    "outranks",
    "predecessor_of",
    "read_score",
    "score_of",
    "score_tags",
]

TAG_PREFIX = "onnxport."
_BARRED = f"{TAG_PREFIX}metric.barred"
_LONGEST_VALUE = 5000
"""Characters of a tag: MLflow takes 8,000. Source: ``mlflow.utils.validation``, 3.17."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a version is judged by.

    Args:
        metric: Name of the monitored metric; ``""``: none, the newest model is the best.
        mode: ``"min"`` or ``"max"``.
        value: The metric's value; not finite when it is unknown.
        barred: Why it deserves no alias, whatever its metric: the module's own validation does not
            speak for the model. ``""``: nothing is known against it.
    """

    metric: str = ""
    mode: str = "min"
    value: float = math.nan
    barred: str = ""


def score_of(origin: Provenance, parity: MetricParity | None = None) -> Score:
    """Return the score of a model.

    Args:
        origin: Of its checkpoint.
        parity: The module's own validation with it, if that was run.
    """
    barred = "" if parity is None or parity.ok else parity.reason
    if origin.monitor is None:
        return Score(barred=barred)
    value = origin.metrics.get(origin.monitor, math.nan)
    return Score(metric=origin.monitor, mode=origin.mode, value=value, barred=barred)


def score_tags(score: Score) -> dict[str, str]:
    """Write a score as tags."""
    barred = {_BARRED: score.barred[:_LONGEST_VALUE]} if score.barred else {}
    return barred | {
        f"{TAG_PREFIX}metric.name": score.metric,
        f"{TAG_PREFIX}metric.mode": score.mode,
        f"{TAG_PREFIX}metric.value": repr(score.value),
    }


def read_score(tags: Mapping[str, str]) -> Score:
    """Read a score from tags; without them nothing is known."""
    try:
        value = float(tags.get(f"{TAG_PREFIX}metric.value", "nan"))
    except ValueError:
        value = math.nan
    return Score(
        metric=tags.get(f"{TAG_PREFIX}metric.name", ""),
        mode=tags.get(f"{TAG_PREFIX}metric.mode", "min"),
        value=value,
        barred=tags.get(_BARRED, ""),
    )


def is_better(candidate: Score, champion: Score | None, min_delta: float = 0.0) -> bool:
    """Tell whether a candidate may take the alias.

    Args:
        candidate: Score of a proven model.
        champion: Score of the version that has the alias; ``None``: nobody has it.
        min_delta: By how much it must be better, in units of the metric.

    Returns:
        Never if it is barred. With a metric: its value is finite and better than the champion's in
        the same metric and mode. Without: the champion has no metric either, so the newer one wins.

    Example:
        >>> better = Score(metric="acc", mode="max", value=0.9)
        >>> worse = Score(metric="acc", mode="max", value=0.8)
        >>> is_better(better, worse), is_better(worse, better)
        (True, False)
    """
    if not candidate.metric and not candidate.barred:
        return champion is None or not champion.metric
    if candidate.barred or not math.isfinite(candidate.value):
        return False
    if champion is None:
        return True
    if (candidate.metric, candidate.mode) != (champion.metric, champion.mode):
        return False  # not comparable: a person decides
    if not math.isfinite(champion.value):
        return True
    gain = candidate.value - champion.value
    return (gain if candidate.mode == "max" else -gain) > min_delta


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What is known of a version that may get the alias.

    Args:
        version: Its number.
        score: What it is judged by.
        rejected: A person has taken the alias from it.
        promoted: When it got the alias last, in milliseconds since 1970; ``None``: never.
        proven: It is one of ours; a person may have registered others.
    """

    version: int
    score: Score
    rejected: bool = False
    promoted: int | None = None
    proven: bool = True


def outranks(one: Standing, other: Standing, min_delta: float = 0.0) -> bool:
    """Tell whether a version is better than another; without metrics the newer one is.

    Args:
        one: A version.
        other: Another one.
        min_delta: By how much it must be better, in units of the metric.
    """
    if one.score.barred:
        return False
    if one.score.metric or other.score.metric:
        return is_better(one.score, other.score, min_delta)
    return one.version > other.version


def best_of(standings: Iterable[Standing], min_delta: float = 0.0) -> Standing | None:
    """Return the version that no other one outranks; the oldest, where several are as good.

    Args:
        standings: Versions that can be compared.
        min_delta: By how much a later one must be better.
    """
    best: Standing | None = None
    for each in sorted(standings, key=lambda one: one.version):
        if (
            not each.rejected
            and not each.score.barred
            and (best is None or outranks(each, best, min_delta))
        ):
            best = each
    return best


def challenger_of(champion: Standing | None, standings: Iterable[Standing]) -> Standing | None:
    """Return the best version that never got the alias, if it can be compared with the champion."""
    if champion is None:
        return None
    rules = (champion.score.metric, champion.score.mode)
    return best_of(
        each
        for each in standings
        if each.version != champion.version
        and each.promoted is None
        and (each.score.metric, each.score.mode) == rules
        and (not each.score.metric or math.isfinite(each.score.value))
    )


def predecessor_of(champion: int, standings: Iterable[Standing]) -> Standing | None:
    """Return the version that had the alias last, before this one and not rejected since."""
    had = [s for s in standings if s.promoted is not None and not s.rejected]
    return max(
        (each for each in had if each.version != champion),
        key=lambda each: (each.promoted or 0, each.version),
        default=None,
    )
