"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mulligan.errors import UserError, nearest
from mulligan.tasks.base import Task
from mulligan.tasks.boolean import Boolean
from mulligan.tasks.chain import Chain
from mulligan.tasks.countdown import Countdown
from mulligan.tasks.dataset import Dataset, Gsm8k, Math
from mulligan.tasks.gym import Gym
from mulligan.tasks.jsonl import Jsonl
from mulligan.tasks.mixture import Mixture

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Chain, Countdown, Boolean, Jsonl, Dataset, Gsm8k, Math, Gym, Mixture)
}


def build_task(name: str, settings: Mapping[str, Any], *, key: str = "task") -> Task:
    """A task by name.

    Args:
        key: where the settings stand, for messages.

    Raises:
        UserError: an unknown name or setting, a wrong type, or data that cannot be read.
    """
    if name not in TASKS:
        raise UserError(f"{key}.name: '{name}' is unknown{nearest(name, TASKS)}")
    fields = TASKS[name].Settings.model_fields
    for setting in settings:
        if setting not in fields:
            raise UserError(f"{key}.{setting}: {name} has no such setting{nearest(setting, fields)}")
    try:
        return TASKS[name](TASKS[name].Settings.model_validate(dict(settings)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        if first["type"] == "missing":
            raise UserError(f"{where}: {name} has no default for it") from None
        told = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {told}" + (f" (got {first['input']!r})" if first["loc"] else "")) from None
