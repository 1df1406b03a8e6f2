"""Which worker runs which file: what mostly waits for others' clocks has a worker of its own.

Consul takes a minute and more to reap a service, Nomad as long to roll an update out: a worker that waits for them
leaves its core idle. So there is one worker more than cores, which is given those files and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

MOSTLY_WAITING = (
    "tests/contract/test_slow_clocks.py",
    "tests/e2e/test_nomad",
    "tests/faults/test_consul_and_relay_away.py",
    "tests/faults/test_consul_life.py",
    "tests/faults/test_crash_and_reaping.py",
)


class Lanes(LoadFileScheduling):  # type: ignore[misc]
    """As `--dist loadfile`, but one worker of several takes what waits and nothing else.

    The others take what waits only once there is nothing else left.
    """

    _waiter: WorkerController | None = None

    def schedule(self) -> None:
        """Hand the files out, at first and again when a worker joins in place of one that died."""
        if self.collection is None and len(self.nodes) > 1:
            self._waiter = self.nodes[-1]
        super().schedule()

    def _reschedule(self, node: WorkerController) -> None:
        if not node.shutting_down and self.workqueue and self._next(node) is None:
            node.shutdown()
            return
        super()._reschedule(node)

    def _assign_work_unit(self, node: WorkerController) -> None:
        file = self._next(node)
        if file is not None:
            self.workqueue.move_to_end(file, last=False)
            super()._assign_work_unit(node)

    def _next(self, node: WorkerController) -> Any:
        """Return the file that a worker is to have next, None when none is for it."""
        waiting = [file for file in self.workqueue if file.startswith(MOSTLY_WAITING)]
        others = [file for file in self.workqueue if not file.startswith(MOSTLY_WAITING)]
        if node is self._waiter:
            return waiting[0] if waiting else None
        return (others + waiting)[0] if others or waiting else None
