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
from mulligan.tasks.jsonl import Jsonl

TASKS: dict[str, type[Task]] = {task.name: task for task in (Chain, Countdown, Boolean, Jsonl)}


def build_task(name: str, settings: Mapping[str, Any]) -> Task:
    """A task by name.

    Raises:
        UserError: an unknown name or setting, a wrong type, or data that cannot be read.
    """
    if name not in TASKS:
        raise UserError(f"task.name: '{name}' is unknown{nearest(name, TASKS)}")
    fields = TASKS[name].Settings.model_fields
    for key in settings:
        if key not in fields:
            raise UserError(f"task.{key}: {name} has no such setting{nearest(key, fields)}")
    try:
        return TASKS[name](TASKS[name].Settings.model_validate(dict(settings)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["task", *map(str, first["loc"])])
        raise UserError(f"{where}: {first['msg']}" + (f" (got {first['input']!r})" if first["loc"] else "")) from None
