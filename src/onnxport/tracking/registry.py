"""The model registry: versions of proven models, and which of them has which alias.

``champion`` (the name can be chosen) is the version to serve, ``challenger`` the best one that
never was it, ``previous`` the one that was it before. An alias can only be set, not compared and
set, so whoever has moved it looks again, and corrects it where another training was faster and
better.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import replace
from random import SystemRandom
from typing import TYPE_CHECKING, Any

from onnxport.errors import TrackingError
from onnxport.tracking.promotion import (
    TAG_PREFIX,
    Standing,
    best_of,
    challenger_of,
    is_better,
    outranks,
    predecessor_of,
    read_score,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from onnxport.config import MLflow
    from onnxport.report import TrackingRecord

__all__ = ["Registry", "already_there_is_fine", "has_version", "register"]

TRIES = 5
"""How often something is written where others write it, too."""
PAUSE_S = 0.05
"""How long the first pause between two tries is at most, in seconds; each is twice as long."""
NEWEST = 200
"""How many versions are looked at, the newest first."""
_random = SystemRandom().random
"""Not the generator of the process: training may use that."""


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
    registry = Registry(client, name, options.alias)
    version = _existing_version(client, name, tags[f"{TAG_PREFIX}key"])
    if version is None and options.policy == "best" and not registry.leads(logged, tags):
        return replace(record, registered_name=name)
    if version is None:
        version = _create_version(client, name, logged, tags)
    _link_version(client, logged.model_id, name, version)
    holds_alias = registry.settle(options.min_delta) == version
    return replace(
        record,
        registered_name=name,
        version=version,
        alias=options.alias if holds_alias else None,
    )


class Registry:
    """The versions of one registered model.

    Args:
        client: MLflow's client.
        name: Of the registered model.
        alias: The alias of the version to serve. The names of the others and of the tags follow it,
            so that several aliases can be kept apart.
    """

    def __init__(self, client: Any, name: str, alias: str = "champion") -> None:
        self._client = client
        self._name = name
        self._alias = alias
        prefix = "" if alias == "champion" else f"{alias}-"
        self._challenger, self._previous = f"{prefix}challenger", f"{prefix}previous"
        self._promoted = f"{TAG_PREFIX}promoted.{alias}"
        self._rejected = f"{TAG_PREFIX}rejected.{alias}"
        self._pinned = f"{TAG_PREFIX}pinned.{alias}"

    # --- what training does -----------------------------------------------------------------

    def leads(self, logged: Any, tags: Mapping[str, str]) -> bool:
        """Tell whether a model is better than all versions of its own run.

        Args:
            logged: MLflow's entity of the logged model.
            tags: What its version's tags would be.
        """
        score = read_score(tags)
        versions = self._versions(f" and run_id = '{logged.source_run_id}'")
        return is_better(score, None) and all(
            is_better(score, read_score(version.tags)) for version in versions
        )

    def settle(self, min_delta: float = 0.0) -> int | None:
        """Give the alias to the best version; return which one has it then.

        It stays where it is if a person has pinned it, or given it to a version that is none of
        ours.

        Args:
            min_delta: By how much a metric must be better.
        """
        standings, holders, pinned = self._look()
        champion = before = holders.get(self._alias)
        if pinned or (champion is not None and not champion.proven):
            return None if champion is None else champion.version
        candidate = _best_after(champion, standings, min_delta)
        while candidate is not None:
            self._move(candidate.version, before)
            # Another training may have read the same champion, and be better, or have been faster.
            standings, holders, _ = self._look()
            champion = holders.get(self._alias) or candidate
            better = _best_after(champion, standings, min_delta)
            if better is not None and champion.version == candidate.version:
                # It had the alias by mistake, for a moment.
                self._client.delete_model_version_tag(
                    self._name, str(champion.version), self._promoted
                )
            candidate = better
        self._name_challenger(champion, holders.get(self._challenger), standings)
        return None if champion is None else champion.version

    # --- what people do ---------------------------------------------------------------------

    def promote(self, version: int, *, pin: bool) -> int | None:
        """Give the alias to a version because a person says so.

        Args:
            version: Any version.
            pin: No training may move the alias from then on.

        Returns:
            The version that had it.

        Raises:
            TrackingError: If there is no such version.
        """
        if not self._exists(version):
            raise TrackingError(f"{self._name!r} has no version {version}.")
        champion = self._look()[1].get(self._alias)
        if pin:
            self._client.set_registered_model_tag(self._name, self._pinned, "true")
        self._client.delete_model_version_tag(self._name, str(version), self._rejected)
        if champion is None or champion.version != version:
            self._move(version, champion)
        if not pin:
            self._client.delete_registered_model_tag(self._name, self._pinned)
        standings, holders, _ = self._look()
        self._name_challenger(holders.get(self._alias), holders.get(self._challenger), standings)
        return None if champion is None else champion.version

    def rollback(self) -> tuple[int, int]:
        """Give the alias back to the version that had it before, and never again to this one.

        Returns:
            Which version had it, and which has it now.

        Raises:
            TrackingError: If no version has it, or none had it before.
        """
        standings, holders, _ = self._look()
        champion = holders.get(self._alias)
        if champion is None:
            raise TrackingError(f"No version of {self._name!r} is {self._alias!r}.")
        others = [each for each in standings if each.version != champion.version]
        before = predecessor_of(champion.version, others)
        if before is None:
            raise TrackingError(
                f"No other version of {self._name!r} was {self._alias!r} before version "
                f"{champion.version}. `onnxport promote {self._name} VERSION` takes any version."
            )
        self._client.set_model_version_tag(
            self._name, str(champion.version), self._rejected, "true"
        )
        self._set(self._alias, before.version)
        earlier = predecessor_of(before.version, others)
        if earlier is None or (earlier.promoted or 0) > (before.promoted or 0):
            self._drop(self._previous)
        else:
            self._set(self._previous, earlier.version)
        return champion.version, before.version

    # --- steps ------------------------------------------------------------------------------

    def _move(self, version: int, champion: Standing | None) -> None:
        """Move the alias, last of all: whoever is interrupted before will do it again."""
        now = str(int(time.time() * 1000))
        tag = self._client.set_model_version_tag
        _insist(lambda: tag(self._name, str(version), self._promoted, now))
        if champion is not None:
            self._set(self._previous, champion.version)
        self._set(self._alias, version)

    def _name_challenger(
        self, champion: Standing | None, holder: Standing | None, standings: Sequence[Standing]
    ) -> None:
        best = challenger_of(champion, standings)
        if best is None and holder is not None:
            self._drop(self._challenger)
        elif best is not None and (holder is None or holder.version != best.version):
            self._set(self._challenger, best.version)

    def _set(self, alias: str, version: int) -> None:
        set_alias = self._client.set_registered_model_alias
        _insist(lambda: set_alias(self._name, alias, str(version)))

    def _drop(self, alias: str) -> None:
        self._client.delete_registered_model_alias(self._name, alias)

    # --- what the server says ---------------------------------------------------------------

    def _versions(self, condition: str = "") -> Sequence[Any]:
        found: Sequence[Any] = self._client.search_model_versions(
            f"name = '{_quoted(self._name)}'{condition}",
            max_results=NEWEST,
            order_by=["version_number DESC"],
        )
        return found

    def _standings(self) -> list[Standing]:
        """Return what is known of the versions that were proven."""
        found = (self._standing(version) for version in self._versions())
        return [each for each in found if each.proven]

    def _standing(self, version: Any) -> Standing:
        promoted = version.tags.get(self._promoted, "")
        return Standing(
            version=int(version.version),
            score=read_score(version.tags),
            rejected=version.tags.get(self._rejected) == "true",
            promoted=int(promoted) if promoted.isdigit() else None,
            proven=version.tags.get(f"{TAG_PREFIX}validated") == "true",
        )

    def _look(self) -> tuple[list[Standing], dict[str, Standing], bool]:
        """Return the proven versions, which version has which alias, and whether that is pinned.

        Raises:
            MlflowException: If it cannot be asked.
        """
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(self._name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return [], {}, False
            raise
        standings = self._standings()
        known = {each.version: each for each in standings}
        holders = {}
        for alias in (self._alias, self._challenger):
            number = int(model.aliases.get(alias, 0))
            if number:
                # One that is none of ours, or older than all that were looked at.
                holders[alias] = known.get(number) or self._standing(
                    self._client.get_model_version(self._name, str(number))
                )
        return standings, holders, bool(model.tags.get(self._pinned) == "true")

    def _exists(self, version: int) -> bool:
        """Tell whether there is a version.

        Raises:
            MlflowException: If it cannot be asked.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_model_version(self._name, str(version))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True


def _insist(call: Callable[[], object]) -> None:
    """Try again: two who write the same thing for the first time get in each other's way.

    Raises:
        MlflowException: If it cannot be written.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(TRIES)):
        try:
            call()
        except MlflowException as error:
            if not left or error.error_code not in {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE"}:
                raise
            time.sleep(PAUSE_S * 2 ** (TRIES - left) * _random())
        else:
            return


def _best_after(
    champion: Standing | None, standings: Sequence[Standing], min_delta: float
) -> Standing | None:
    """Return the best of the versions that deserve the alias more than the one that has it."""
    if champion is None:
        return best_of(each for each in standings if is_better(each.score, None))
    return best_of(each for each in standings if outranks(each, champion, min_delta))


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


def _existing_version(client: Any, name: str, key: str) -> int | None:
    found = client.search_model_versions(
        f"name = '{_quoted(name)}' and tags.`{TAG_PREFIX}key` = '{key}'"
    )
    return min((int(version.version) for version in found), default=None)


def _create_version(client: Any, name: str, logged: Any, tags: dict[str, str]) -> int:
    """Make a version; the registered model, too, if it is the first one.

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
