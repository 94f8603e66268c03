"""Options of the tests that need a GPU machine."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compressed", default=None, help="folder with compressed mixtral-29m and deepseek-29m, instead of making them"
    )
