"""Skips what needs a GPU where there is none, and begins with the longest tests."""

import shutil

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every run of a test draws the same."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The results of a very small tier; copy them before changing anything."""
    from small_results import make  # most tests do without what it imports

    return make(tmp_path_factory.mktemp("results") / "smoke")


@pytest.fixture
def results(made, tmp_path):
    """A copy of the results of a very small tier, to change."""
    return shutil.copytree(made, tmp_path / "smoke")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_workflow.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
