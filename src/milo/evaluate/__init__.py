"""Judging a model: perplexity on a text, divergence of a compressed model from its original, tasks."""

from __future__ import annotations

from milo.evaluate.divergence import Divergence, divergence
from milo.evaluate.perplexity import Perplexity, perplexity
from milo.evaluate.text import load_text, tokenize

__all__ = ["Divergence", "Perplexity", "divergence", "load_text", "perplexity", "tokenize"]
