import pytest
import torch

pytest.register_assert_rewrite("tests.e2e.helpers")

from tests.e2e.helpers import forks, make_model  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A looped model that takes hundredths of a second a step."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def forked(tiny):
    with forks(tiny) as running:
        yield running
