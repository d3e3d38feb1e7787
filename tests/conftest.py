"""Settings of all tests: one thread, since the models are tiny and threads that wait for each other cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the mark `real_shapes` take gigabytes and minutes each; they run where -m names them."""
    if "real_shapes" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("real_shapes"):
            item.add_marker(pytest.mark.skip(reason="opt in with -m real_shapes"))
