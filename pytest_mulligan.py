"""Gives pytest the suite's plugin where a session names the suite: ``pytest --pyargs mulligan.conformance``.

This stands outside of the package because pytest imports it in every session of an environment: there it must cost
nothing, and the package imports torch. A session that does not name the suite sees neither option nor fixture.
"""

from __future__ import annotations

import pytest

SUITES = ("mulligan.conformance", "mulligan/conformance")


def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """The last moment for an option; a conftest.py beside the tests would be read too late."""
    if any(suite in argument for argument in args for suite in SUITES):
        early_config.pluginmanager.import_plugin("mulligan.conformance.plugin")
