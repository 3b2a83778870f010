"""Skips what needs a GPU where there is none, and begins with the longest tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every run of a test draws the same."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_workflow.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
