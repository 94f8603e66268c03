"""Formats of weights."""

from __future__ import annotations

from typing import Any


class BaseWeightSchema:
    @staticmethod
    def from_config(config: dict[str, Any]) -> dict[str, Any]:
        assert config["quant_method"] == "humming"
        return config
