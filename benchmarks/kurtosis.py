"""Kurtosis where there are no weights, so that the official rank rule can be followed at full size.

Mixtral-8x7B's is known from the file that the paper's official code ships: how often each rounded value occurs, not
where. Here it stands in a fixed random order.
"""

from __future__ import annotations

import numpy as np

from milo.checkpoint.inventory import Group
from milo.checkpoint.roles import LAYER_INDEX

# Rounded value: how many of 256 (w2) and of 512 (w1, w3); 10 stands for what is above 9.
MIXTRAL_W2 = {0: 8, 1: 133, 2: 64, 3: 35, 4: 4, 6: 1, 7: 1, 9: 2, 10: 8}
MIXTRAL_W13 = {0: 463, 1: 49}


def made_up_kurtosis(group: Group, seed: int = 0) -> list[float]:
    """Kurtosis of each matrix where there are no weights: Mixtral's own numbers in another order, else exponential."""
    leaf = group.name.rpartition(".")[2]
    if leaf not in ("w1", "w2", "w3"):
        return np.random.default_rng([seed, *group.name.encode()]).exponential(size=group.count).tolist()
    counts = MIXTRAL_W2 if leaf == "w2" else MIXTRAL_W13
    values = np.random.default_rng(seed).permutation(np.repeat(list(counts), list(counts.values())))
    layer = LAYER_INDEX.search(group.name)
    first = (int(layer[1]) if layer else 0) * group.count + (256 if leaf == "w3" else 0)
    return np.take(values, range(first, first + group.count), mode="wrap").astype(float).tolist()
