"""The methods by name. Each is a function from its own settings to a composition of parts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mulligan.errors import UserError, nearest
from mulligan.method import Method
from mulligan.methods.cispo import cispo
from mulligan.methods.dapo import dapo
from mulligan.methods.dr_grpo import dr_grpo
from mulligan.methods.grpo import grpo
from mulligan.methods.gspo import gspo
from mulligan.methods.maxrl import maxrl
from mulligan.methods.reinforce import reinforce
from mulligan.methods.reinforce_pp import reinforce_pp
from mulligan.methods.rloo import rloo
from mulligan.schedule import Schedule, constant


@dataclass(frozen=True, slots=True)
class Preset:
    """A method that has a name on the command line."""

    name: str
    build: Callable[..., Method | Schedule]

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.build) or "").splitlines()[0]

    @property
    def paper(self) -> str:
        """The arXiv number that its module's docstring names first; "" where there is none."""
        found = re.search(r"arXiv (\d{4}\.\d{5})", inspect.getmodule(self.build).__doc__ or "")
        return found[1] if found else ""

    def settings(self) -> type[BaseModel]:
        """Its settings as a pydantic model, made from the function's own signature."""
        hints = get_type_hints(self.build, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(self.build).parameters.items()
        }
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        return create_model(f"{self.name} settings", __config__=config, **fields)


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("grpo", grpo),
        Preset("dr-grpo", dr_grpo),
        Preset("dapo", dapo),
        Preset("gspo", gspo),
        Preset("cispo", cispo),
        Preset("rloo", rloo),
        Preset("reinforce", reinforce),
        Preset("reinforce++", reinforce_pp),
        Preset("maxrl", maxrl),
    )
}


def build_schedule(name: str, settings: Mapping[str, Any]) -> tuple[Schedule, dict[str, Any]]:
    """A method by name with its settings, and those settings with every default filled in.

    Raises:
        UserError: an unknown name or setting, or a wrong type; the message names the nearest valid one.
    """
    if name not in PRESETS:
        raise UserError(f"method.name: '{name}' is unknown{nearest(name, PRESETS)}")
    model = PRESETS[name].settings()
    for key in settings:
        if key not in model.model_fields:
            raise UserError(f"method.{key}: {name} has no such setting{nearest(key, model.model_fields)}")
    try:
        resolved = model.model_validate(dict(settings)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"method.{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None
    built = PRESETS[name].build(**resolved)
    return (built if isinstance(built, Schedule) else constant(built)), resolved
