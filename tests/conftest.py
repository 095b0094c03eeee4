"""Settings for all tests: deterministic hypothesis examples, one thread, a fixed seed."""
import pathlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))           # this repository's files, not an installed copy
settings.register_profile("scalablevit", deadline=None, derandomize=True, max_examples=40, print_blob=False,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile("scalablevit")
torch.set_num_threads(1)                     # tensors are small: more threads only add overhead


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, as CI does")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
