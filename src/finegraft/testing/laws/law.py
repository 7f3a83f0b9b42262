"""What a law is."""

from __future__ import annotations

from collections.abc import Callable

from finegraft.errors import NotMergeable
from finegraft.testing.case import Case, Trial, says


class Law:
    """A statement that holds for every case it applies to.

    Attributes:
        name: the statement in short.
        applies: whether a case can break it.
        slow: whether holding a case against it takes long.
    """

    def __init__(self, check: Callable[[Case], None], applies: Callable[[Case], bool], *, slow: bool = False) -> None:
        self._check, self.applies, self.slow = check, applies, slow
        self.name, self.__doc__ = check.__name__, check.__doc__

    def __call__(self, case: Case) -> None:
        """Hold a case against the law.

        Raises:
            AssertionError: the case breaks it.
        """
        self._check(case)

    def __repr__(self) -> str:
        return self.name


def law(check: Callable[[Case], None]) -> Law:
    """Decorator that makes a function of a case a law that applies to every case."""
    return Law(check, lambda case: True)


def slow_law(check: Callable[[Case], None]) -> Law:
    """The same for one that takes long, so that few cases are tried."""
    return Law(check, lambda case: True, slow=True)


def law_where(applies: Callable[[Case], bool], *, slow: bool = False) -> Callable[[Callable[[Case], None]], Law]:
    """Decorator that makes a function of a case a law that applies to some cases."""
    return lambda check: Law(check, applies, slow=slow)


def mergeable(case: Case) -> bool:
    """Whether weights can express every change of a case."""
    return case.mergeable


def merges(trial: Trial) -> bool:
    """Merge; only a layer that has no place for a bias may refuse."""
    try:
        trial.graft.merge()
    except NotMergeable as error:
        says(error, "cannot hold the bias")
        return False
    return True
