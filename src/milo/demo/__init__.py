"""What `milo demo` needs: a text every Python carries, a small MoE trained on it, and a plot of the results."""

from __future__ import annotations

from milo.demo.corpus import stdlib_corpus
from milo.demo.plot import ResultRow, plot_results
from milo.demo.train import train_demo_model

__all__ = ["ResultRow", "plot_results", "stdlib_corpus", "train_demo_model"]
