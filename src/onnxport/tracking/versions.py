"""Versions of logged models in a model registry: one for each, made at most once."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["already_there_is_fine", "create_version", "has_version", "link_version"]


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


def has_version(client: Any, logged: Any) -> bool:
    """Tell whether a version of any registered model is made of a logged model.

    Args:
        client: MLflow's client.
        logged: MLflow's entity of the logged model.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    if json.loads(logged.tags.get(MLFLOW_MODEL_VERSIONS, "[]")):
        return True
    # A version that was made without the tag: by a process that died, or by hand on a database.
    sources = {logged.artifact_location, f"models:/{logged.model_id}"}
    versions = client.search_model_versions(f"run_id = '{logged.source_run_id}'")
    return any(version.source in sources for version in versions)


def create_version(client: Any, name: str, logged: Any, tags: dict[str, str]) -> int:
    """Make a version; the registered model, too, if it is the first one.

    Args:
        client: MLflow's client.
        name: Of the registered model.
        logged: MLflow's entity of the logged model.
        tags: Tags of the version.

    Returns:
        The version's number.

    Raises:
        MlflowException: If the server refuses.
    """
    from mlflow.exceptions import MlflowException

    # The artifacts' own address, not models:/<id>: the latter is resolved through the process's
    # global tracking URI on a database store (mlflow 3.17).
    what = {
        "source": logged.artifact_location,
        "run_id": logged.source_run_id,
        "model_id": logged.model_id,
        "tags": tags,
        "await_creation_for": 0,
    }
    try:
        return int(client.create_model_version(name, **what).version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    with already_there_is_fine():
        client.create_registered_model(name)
    return int(client.create_model_version(name, **what).version)


def link_version(client: Any, logged: Any, name: str, version: int) -> None:
    """Show a version on its logged model: a server does so itself, a database does not.

    Args:
        client: MLflow's client.
        logged: MLflow's entity of the logged model.
        name: Of the registered model.
        version: The version's number.
    """
    if client.tracking_uri.startswith("http"):
        return

    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    tags = client.get_logged_model(logged.model_id).tags
    links = json.loads(tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if not any(link["name"] == name and int(link["version"]) == version for link in links):
        links.append({"name": name, "version": version})
        client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(links)})
