"""Names for people, the same in the page and in the plots."""

from __future__ import annotations

_ROLES = {
    "shared_expert": "shared experts",
    "dense_ffn": "dense FFN",
    "expert": "experts",
    "router": "routers",
    "embedding": "embeddings",
    "head": "output head",
    "norm": "norms",
}
_QUANTITIES = {"error": "relative error ‖W − Ŵ‖ / ‖W‖", "rank": "rank of the compensator"}


def role_name(role: str) -> str:
    """A role for people."""
    return _ROLES.get(role, role)


def quantity_name(quantity: str) -> str:
    """`error` or `rank` with its definition."""
    return _QUANTITIES[quantity]
