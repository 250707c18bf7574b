"""Which logged model of a run is the last one, and which the best: tags that move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxport.tracking.promotion import TAG_PREFIX, is_better, read_score, score_of

if TYPE_CHECKING:
    from onnxport.tracking.base import Model

__all__ = ["mark"]

LAST, BEST, MARKED = f"{TAG_PREFIX}last", f"{TAG_PREFIX}best", f"{TAG_PREFIX}marked"


def mark(client: Any, logged: Any, run_id: str, model: Model) -> None:
    """Move the tags ``onnxport.last`` and ``onnxport.best`` to a model that deserves them.

    Args:
        client: MLflow's client.
        logged: MLflow's entity of the logged model, which is READY.
        run_id: The run.
        model: What it was made of.
    """
    score, step = score_of(model.origin, model.report.metric_parity), model.report.global_step or 0
    # One tag for both: one search.
    found = client.search_logged_models(
        [logged.experiment_id],
        filter_string=f"tags.`{MARKED}` = '{run_id}'",
    )
    others = [each for each in found if each.model_id != logged.model_id]
    gained = {}
    for tag in (LAST, BEST):
        holders = [each for each in others if each.tags.get(tag) == "true"]
        if tag == LAST:
            deserves = all(_step(holder) <= step for holder in holders)
        else:
            scores = [read_score(holder.tags) for holder in holders]
            deserves = is_better(score, None) and all(is_better(score, each) for each in scores)
        if deserves:
            gained[tag] = holders
    if gained:
        marks = dict.fromkeys(gained, "true") | {MARKED: run_id}
        client.set_logged_model_tags(logged.model_id, marks)
    for other in others:
        lost = [tag for tag, holders in gained.items() if other in holders]
        kept = {tag for tag in (LAST, BEST) if tag in other.tags} - set(lost)
        for tag in (*lost, *(() if kept else (MARKED,))):
            client.delete_logged_model_tag(other.model_id, tag)


def _step(logged: Any) -> int:
    step = logged.params.get("global_step", "0")
    return int(step) if step.isdigit() else 0
