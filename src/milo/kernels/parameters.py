"""The kernels' parameter structures, field by field as `cuda/units.cuh` declares them (passed by value)."""

from __future__ import annotations

import ctypes

from milo.kernels.stacking import MAX_STACK


class Routing(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("ids", "expert_map")]
        + [(n, ctypes.c_int) for n in ("ids_are_64", "map_length", "pairs", "experts")]
    )  # fmt: skip


class Matrix(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("codes", "meta")]
        + [(n, ctypes.c_int) for n in ("ktiles", "groups", "meta_shift")]
    )  # fmt: skip


class Compensator(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("u_codes", "u_scales", "table", "t")]
        + [(n, ctypes.c_int) for n in ("t_stride", "t_splits", "stacked")]
        + [("ends", ctypes.c_int * MAX_STACK)]
    )  # fmt: skip


class Params(ctypes.Structure):
    """Everything one launch is told."""

    _fields_ = (
        [("routing", Routing), ("weights", Matrix), ("v", Matrix), ("compensator", Compensator)]
        + [(n, ctypes.c_void_p) for n in ("x", "out", "partial", "carry", "choice_weights", "bias", "counters",
                                          "others")]
        + [(n, ctypes.c_int) for n in ("tokens", "topk", "in_features", "row_tiles", "rows", "row_divisor", "quanta",
                                       "v_cost", "activation", "choice_weight_type", "add_items")]
    )  # fmt: skip
