"""All that a run remembers between steps besides weights and optimizer: one object, checkpointed whole."""

from __future__ import annotations

import copy
from typing import Any


class Memory:
    """The problem cursor and every adaptive state, by name; JSON throughout.

    What a step changes is only seen after :meth:`commit`; an interrupted step leaves nothing behind.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._kept: dict[str, Any] = dict(state) if state is not None else {"cursor": 0}
        self._pending: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._pending:
            # A copy, so that a rollback forgets what was changed in place, too.
            self._pending[name] = copy.deepcopy(self._kept[name])
        return self._pending[name]

    def __contains__(self, name: str) -> bool:
        return name in self._pending or name in self._kept

    def __setitem__(self, name: str, value: Any) -> None:
        self._pending[name] = value

    def get(self, name: str, default: Any) -> Any:
        """The state of this name, or the default when there is none yet."""
        return self[name] if name in self else default  # noqa: SIM401 - its fix is this method itself

    def next_index(self) -> int:
        """The training problem at the cursor, which moves on by one."""
        index = self["cursor"]
        self["cursor"] = index + 1
        return int(index)

    def commit(self) -> None:
        """Makes the step's changes last."""
        self._kept.update(self._pending)
        self._pending = {}

    def rollback(self) -> None:
        """Forgets the step's changes."""
        self._pending = {}

    def state(self) -> dict[str, Any]:
        """What was committed; JSON-able."""
        return dict(self._kept)
