"""Methods of somebody's object that tell what they do, until nobody listens any more."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Seams"]


class Seams:
    """Takes the place of methods of one object.

    Args:
        owner: The object, which has attributes of its own.

    Example:
        >>> class Trainer:
        ...     def save(self, path):
        ...         return f"saved {path}"
        >>> trainer = Trainer()
        >>> seams = Seams(trainer)
        >>> seams.wrap("save", after=lambda result, path: print("heard:", result))
        >>> trainer.save("a"), seams.let_go(), trainer.save("b")
        heard: saved a
        ('saved a', None, 'saved b')
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._wrapped: dict[str, tuple[Any, Any, dict[str, Any]]] = {}

    def wrap(
        self,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        """Listen to a method from now on.

        Args:
            name: Of the method.
            before: Called first, with its arguments.
            after: Called with its result and its arguments. What either raises is raised.
        """
        method = getattr(self._owner, name)
        told = {"before": before, "after": after}

        @wraps(method)
        def both(*args: Any, **kwargs: Any) -> Any:
            tell = told.get("before")
            if tell is not None:
                tell(*args, **kwargs)
            result = method(*args, **kwargs)
            tell = told.get("after")
            if tell is not None:
                tell(result, *args, **kwargs)
            return result

        self._wrapped[name] = both, vars(self._owner).get(name), told
        setattr(self._owner, name, both)

    def let_go(self) -> None:
        """Listen no more, and hold nobody; what others have wrapped meanwhile stays theirs."""
        for name, (both, own, told) in self._wrapped.items():
            told.clear()
            if vars(self._owner).get(name) is not both:
                continue
            if own is None:
                delattr(self._owner, name)
            else:
                setattr(self._owner, name, own)
        self._wrapped.clear()
