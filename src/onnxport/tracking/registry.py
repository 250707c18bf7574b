"""The model registry: versions of proven models, and which of them has which alias.

``champion`` (the name can be chosen) is the version to serve, ``challenger`` the best one that
never was it, ``previous`` the one that was it before. An alias can only be set, not compared and
set, so whoever has moved it looks again, and corrects it where another training was faster and
better.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
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
from onnxport.tracking.versions import create_version, link_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from onnxport.config import MLflow
    from onnxport.report import TrackingRecord

__all__ = ["KEY", "Registry", "View", "register"]

KEY = f"{TAG_PREFIX}key"
"""Tag that tells models apart, and tells that a version was made of one."""

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
    view = registry.look()
    version = registry.version_of(tags[KEY], view)
    twin = _of_same_weights(tags[KEY], view) if version is None else None
    if version is None and twin is None:
        if options.policy == "best" and not registry.leads(logged, tags, view):
            return replace(record, registered_name=name)
        version, view = registry.add(logged, tags, view, options.min_delta)
    if version is not None:  # what a twin was made of is another logged model
        link_version(client, logged, name, version)
    stands_for = version or twin
    holds_alias = registry.settle(options.min_delta, view) == stands_for
    return replace(
        record,
        registered_name=name,
        version=stands_for,
        alias=options.alias if holds_alias else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the registry held at one moment.

    Args:
        versions: MLflow's, the newest :data:`NEWEST` of them.
        standings: Those of them that were proven.
        holders: Which version has which alias.
        pinned: A person has said who has the alias.
        added: The number of a version that was made as the one to get the alias; its tags say so.
    """

    versions: Sequence[Any] = ()
    standings: Sequence[Standing] = ()
    holders: Mapping[str, Standing] = field(default_factory=dict)
    pinned: bool = False
    added: int | None = None

    @property
    def whole(self) -> bool:
        """Whether all versions are in it."""
        return len(self.versions) < NEWEST


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

    def version_of(self, key: str, view: View) -> int | None:
        """Return the version that was made of a model before, the lowest of twins.

        Args:
            key: Of the model.
            view: What the registry holds.
        """
        found = [each for each in view.versions if each.tags.get(KEY) == key]
        if not found and not view.whole:
            found = list(self._versions(f" and tags.`{KEY}` = '{key}'"))
        return min((int(each.version) for each in found), default=None)

    def leads(self, logged: Any, tags: Mapping[str, str], view: View) -> bool:
        """Tell whether a model is better than all versions of its own run.

        Args:
            logged: MLflow's entity of the logged model.
            tags: What its version's tags would be.
            view: What the registry holds.
        """
        run_id, score = logged.source_run_id, read_score(tags)
        versions = [each for each in view.versions if each.run_id == run_id]
        if not view.whole:
            versions = list(self._versions(f" and run_id = '{run_id}'"))
        others = [read_score(version.tags) for version in versions]
        return is_better(score, None) and all(
            is_better(score, other) for other in others if not other.barred
        )

    def add(
        self, logged: Any, tags: Mapping[str, str], view: View, min_delta: float
    ) -> tuple[int, View]:
        """Make a version of a logged model.

        Args:
            logged: MLflow's entity of the logged model.
            tags: Tags of the version.
            view: What the registry holds.
            min_delta: By how much a metric must be better.

        Returns:
            Its number, and what the registry holds now.
        """
        # One request less for what will have the alias: its tags say so from the beginning.
        candidate = Standing(version=sys.maxsize, score=read_score(tags), promoted=_now())
        gets_it = self._candidate([*view.standings, candidate], view, min_delta) is candidate
        promoted = {self._promoted: str(candidate.promoted)} if gets_it else {}
        version = create_version(self._client, self._name, logged, {**tags, **promoted})
        added = replace(
            candidate, version=version, promoted=candidate.promoted if gets_it else None
        )
        standings = [*view.standings, added]
        return version, replace(view, standings=standings, added=version if gets_it else None)

    def settle(self, min_delta: float = 0.0, view: View | None = None) -> int | None:
        """Give the alias to the best version; return which one has it then.

        It stays where it is if a person has pinned it, or given it to a version that is none of
        ours.

        Args:
            min_delta: By how much a metric must be better.
            view: What the registry holds; default: it is asked.
        """
        view = view or self.look()
        champion = before = view.holders.get(self._alias)
        candidate = self._candidate(view.standings, view, min_delta)
        while candidate is not None:
            self._move(candidate.version, before, tagged=candidate.version == view.added)
            # Another training may have read the same champion, and be better, or have been faster.
            view = self.look()
            champion = view.holders.get(self._alias) or candidate
            better = _best_after(champion, view.standings, min_delta)
            if better is not None and champion.version == candidate.version:
                # It had the alias by mistake, for a moment.
                self._client.delete_model_version_tag(
                    self._name, str(champion.version), self._promoted
                )
            candidate = better
        if champion is None or champion.proven:
            self._name_challenger(champion, view)
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
            raise TrackingError(f"There is no version {version} of a model {self._name!r}.")
        champion = self.look().holders.get(self._alias)
        if pin:
            self._client.set_registered_model_tag(self._name, self._pinned, "true")
        self._client.delete_model_version_tag(self._name, str(version), self._rejected)
        if champion is None or champion.version != version:
            self._move(version, champion)
        if not pin:
            self._client.delete_registered_model_tag(self._name, self._pinned)
        view = self.look()
        self._name_challenger(view.holders.get(self._alias), view)
        return None if champion is None else champion.version

    def rollback(self) -> tuple[int, int]:
        """Give the alias back to the version that had it before, and never again to this one.

        A pin was for this one, and ends.

        Returns:
            Which version had it, and which has it now.

        Raises:
            TrackingError: If no version has it, or none had it before.
        """
        view = self.look()
        champion = view.holders.get(self._alias)
        if champion is None:
            raise TrackingError(f"No version of {self._name!r} is {self._alias!r}.")
        others = [each for each in view.standings if each.version != champion.version]
        before = predecessor_of(champion.version, others)
        if before is None:
            raise TrackingError(
                f"No other version of {self._name!r} was {self._alias!r} before version "
                f"{champion.version}. `onnxport promote {self._name} VERSION` takes any version."
            )
        self._client.set_model_version_tag(
            self._name, str(champion.version), self._rejected, "true"
        )
        if view.pinned:
            self._client.delete_registered_model_tag(self._name, self._pinned)
        self._set(self._alias, before.version)
        earlier = predecessor_of(before.version, others)
        if earlier is None or (earlier.promoted or 0) > (before.promoted or 0):
            self._drop(self._previous)
        else:
            self._set(self._previous, earlier.version)
        return champion.version, before.version

    # --- steps ------------------------------------------------------------------------------

    def _candidate(
        self, standings: Sequence[Standing], view: View, min_delta: float
    ) -> Standing | None:
        """Return which version is to get the alias; ``None``: it stays where it is."""
        champion = view.holders.get(self._alias)
        if view.pinned or (champion is not None and not champion.proven):
            return None
        return _best_after(champion, standings, min_delta)

    def _move(self, version: int, champion: Standing | None, *, tagged: bool = False) -> None:
        """Move the alias, last of all: whoever is interrupted before will do it again."""
        tag = self._client.set_model_version_tag
        if not tagged:
            _insist(lambda: tag(self._name, str(version), self._promoted, str(_now())))
        if champion is not None:
            self._set(self._previous, champion.version)
        self._set(self._alias, version)

    def _name_challenger(self, champion: Standing | None, view: View) -> None:
        best, holder = challenger_of(champion, view.standings), view.holders.get(self._challenger)
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

    def _standing(self, version: Any) -> Standing:
        promoted = version.tags.get(self._promoted, "")
        return Standing(
            version=int(version.version),
            score=read_score(version.tags),
            rejected=version.tags.get(self._rejected) == "true",
            promoted=int(promoted) if promoted.isdigit() else None,
            proven=version.tags.get(f"{TAG_PREFIX}validated") == "true",
        )

    def look(self) -> View:
        """Return what the registry holds.

        Raises:
            MlflowException: If it cannot be asked.
        """
        from mlflow.exceptions import MlflowException

        try:
            model = self._client.get_registered_model(self._name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return View()
            raise
        versions = self._versions()
        standings = [each for each in map(self._standing, versions) if each.proven]
        known = {each.version: each for each in standings}
        holders = {}
        for alias in (self._alias, self._challenger):
            number = int(model.aliases.get(alias, 0))
            if number:
                # One that is none of ours, or older than all that were looked at.
                holders[alias] = known.get(number) or self._standing(
                    self._client.get_model_version(self._name, str(number))
                )
        return View(
            versions=versions,
            standings=standings,
            holders=holders,
            pinned=model.tags.get(self._pinned) == "true",
        )

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


def _of_same_weights(key: str, view: View) -> int | None:
    """Return the version of the same weights of the same step: ``last.ckpt`` is no other model."""
    what = _what(key)
    found = [int(each.version) for each in view.versions if _what(each.tags.get(KEY, "")) == what]
    return min(found, default=None) if what else None


def _what(key: str) -> tuple[str, ...]:
    """Return run, step and weights of a key, without the place; nothing of what is none."""
    *what, _ = key.split(":")
    return tuple(what) if len(what) == 3 else ()  # noqa: PLR2004


def _best_after(
    champion: Standing | None, standings: Sequence[Standing], min_delta: float
) -> Standing | None:
    """Return the best of the versions that deserve the alias more than the one that has it."""
    if champion is None:
        return best_of(each for each in standings if is_better(each.score, None))
    return best_of(each for each in standings if outranks(each, champion, min_delta))


def _now() -> int:
    """Return milliseconds since 1970."""
    return int(time.time() * 1000)


def _quoted(name: str) -> str:
    return name.replace("'", "''")
