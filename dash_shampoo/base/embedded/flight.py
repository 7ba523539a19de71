"""A gather of one parameter group that is under way while the next group computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Flight:
    """What is left to do once a gather has arrived, of at most one gather at a time.

    The distributors of an optimizer share one. During a step a group's update waits until the next group
    has computed its directions; every process does the same in the same order. Outside of a step nothing
    waits.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._land: Callable[[], None] | None = None

    def take_off(self, land: Callable[[], None]) -> None:
        """Leaves the rest of an update for later, within a step; else does it at once.

        Args:
            land: Waits for the gather, and updates the parameters.
        """
        if self._is_open:
            self._land = land
        else:
            land()

    def land(self) -> None:
        """Does what is left to do, before anything else is sent."""
        land, self._land = self._land, None
        if land is not None:
            land()

    @contextmanager
    def over_group(self, is_last: bool) -> Iterator[None]:
        """A group's part of a step, in which its gather may take off and the one before it lands.

        Args:
            is_last: Whether no group comes after it in the step.
        """
        self._is_open = not is_last
        try:
            yield
        except BaseException:
            # The group before has been sent by all processes; the error is this group's.
            with suppress(Exception):
                self.land()
            raise
        finally:
            self._is_open = False
        if is_last:
            self.land()
