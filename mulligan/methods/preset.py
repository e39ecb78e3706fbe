"""A method that has a name on the command line, and its settings, read from its function's signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mulligan.errors import UserError, nearest
from mulligan.method import Method
from mulligan.schedule import Schedule
from mulligan.userfile import load_from_file

_METHOD = "method"  # the parameter that takes another method, as dsrl's does


@dataclass(frozen=True, slots=True)
class Preset:
    """A named method.

    Attributes:
        defaults: settings whose default differs from the function's own.
        run: settings of the run (``optimizer.updates_per_batch``) that it brings, unless the user names them.
    """

    name: str
    build: Callable[..., Method | Schedule]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0].partition(" Settings as for")[0]

    @property
    def paper(self) -> str:
        """The arXiv number that its module's docstring names first; "" where there is none."""
        found = re.search(r"arXiv (\d{4}\.\d{5})", inspect.getmodule(self.build).__doc__ or "")
        return found[1] if found else ""

    @property
    def takes_method(self) -> bool:
        """Whether it is made from another method."""
        return _METHOD in inspect.signature(self.build).parameters

    def settings(self) -> type[BaseModel]:
        """Its settings as a pydantic model, made from the function's own signature."""
        hints = get_type_hints(self.build, include_extras=True)
        fields: dict[str, Any] = {name: (hints.get(name, Any), default) for name, default in self._fields().items()}
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        return create_model(f"{self.name} settings", __config__=config, **fields)

    def without(self, key: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Complete settings with one of them at its default; None where it has that value or no default."""
        default = self._fields()[key]
        return None if default is ... or default == settings[key] else {**settings, key: default}

    def _fields(self) -> dict[str, Any]:
        """Its settings' defaults; ``...`` for one that has to be given."""
        return {
            name: self.defaults.get(name, ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(self.build).parameters.items()
            if name != _METHOD
        }

    def resolve(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with every default filled in.

        Raises:
            UserError: an unknown setting or a wrong type; names the nearest valid one.
        """
        model = self.settings()
        for key in settings:
            if key not in model.model_fields:
                raise UserError(f"method.{key}: {self.name} has no such setting{nearest(key, model.model_fields)}")
        try:
            return model.model_validate(dict(settings)).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if first["type"] == "missing":
                raise UserError(f"method.{where}: {self.name} has no default for it") from None
            raise UserError(f"method.{where}: {first['msg']} (got {first['input']!r})") from None


def with_published(
    name: str,
    build: Callable[..., Method | Schedule],
    published: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> tuple[Preset, Preset]:
    """A method as we set it and as its paper and release do. Learning rate and batch size belong to the model that was
    trained, so no preset brings them; the docstrings quote them where they are known."""
    return Preset(name, build), Preset(f"{name}-published", build, published or {}, run or {})


def from_file(text: str) -> Preset:
    """A method from a user's own file, ``./mine.py:my_method``; the file is run as Python.

    Raises:
        UserError: no such file or function, or the file fails.
    """
    found = load_from_file("method.name", text)
    if isinstance(found, Method | Schedule):
        return Preset(text, _always(found))
    if not callable(found):
        raise UserError(f"method.name: '{text}' is neither a method nor a function that makes one")
    return Preset(text, cast(Callable[..., Method | Schedule], found))


def _always(made: Method | Schedule) -> Callable[[], Method | Schedule]:
    return lambda: made
