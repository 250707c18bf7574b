"""The model registry: one version per model, and the alias on the best of them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onnxport.tracking.promotion import TAG_PREFIX, is_better, read_score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnxport.config import MLflow
    from onnxport.report import TrackingRecord

__all__ = ["already_there_is_fine", "register"]


def register(
    client: Any,
    options: MLflow,
    record: TrackingRecord,
    logged: Any,
    tags: dict[str, str],
    *,
    last: bool,
) -> TrackingRecord:
    """Make a version of a logged model by the policy, and move the alias if it is better.

    Args:
        client: MLflow's client.
        options: Name, policy, alias and ``min_delta``.
        record: What the server holds so far.
        logged: MLflow's entity of the logged model.
        tags: Tags of the version, the score and the key among them.
        last: Whether this is the best model at the end of training.

    Returns:
        The record with name, version and alias.
    """
    name = options.register
    if name is None or (options.policy == "end" and not last):
        return record
    champion = _champion(client, name, options.alias)
    holder = None if champion is None else read_score(champion.tags)
    better = is_better(read_score(tags), holder, options.min_delta)
    version = _existing_version(client, name, tags[f"{TAG_PREFIX}key"])
    if version is None and not better and options.policy != "all":
        return replace(record, registered_name=name)
    if version is None:
        version = _create_version(client, name, logged, tags)
    _link_version(client, logged.model_id, name, version)
    holds_alias = champion is not None and int(champion.version) == version
    if better and not holds_alias:
        client.set_registered_model_alias(name, options.alias, str(version))
    alias = options.alias if better or holds_alias else None
    return replace(record, registered_name=name, version=version, alias=alias)


@contextmanager
def already_there_is_fine() -> Iterator[None]:
    """Let a repeated step pass: the store refuses the second one as a duplicate.

    Raises:
        MlflowException: Anything else.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = str(error).lower()
        if not any(word in text for word in ("unique", "duplicate", "already exists")):
            raise


def _champion(client: Any, name: str, alias: str) -> Any:
    """Return the version that has the alias, or ``None``.

    Raises:
        MlflowException: If it cannot be asked.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # A missing model is RESOURCE_DOES_NOT_EXIST, a missing alias INVALID_PARAMETER_VALUE.
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            return None
        raise


def _existing_version(client: Any, name: str, key: str) -> int | None:
    found = client.search_model_versions(
        f"name = '{_quoted(name)}' and tags.`{TAG_PREFIX}key` = '{key}'"
    )
    return min((int(version.version) for version in found), default=None)


def _create_version(client: Any, name: str, logged: Any, tags: dict[str, str]) -> int:
    with already_there_is_fine():
        client.create_registered_model(name)
    # The artifacts' own address, not models:/<id>: the latter is resolved through the process's
    # global tracking URI on a database store (mlflow 3.17).
    version = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        tags=tags,
        await_creation_for=0,
    )
    return int(version.version)


def _link_version(client: Any, model_id: str, name: str, version: int) -> None:
    """Show the version on the logged model: a server does so itself, a database does not."""
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    tags = client.get_logged_model(model_id).tags
    links = json.loads(tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if not any(link["name"] == name and int(link["version"]) == version for link in links):
        links.append({"name": name, "version": version})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(links)})


def _quoted(name: str) -> str:
    return name.replace("'", "''")
