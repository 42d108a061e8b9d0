"""Which settings would be chosen on this machine now, where the user leaves them open: threads, and the type of weights in training."""

from __future__ import annotations

import importlib.util
from typing import Any

from edgepatch.cores import CoreWatch
from edgepatch.processes import run_apart

PROBE_DEADLINE_S = 120


def chosen_settings() -> dict[str, Any]:
    """``threads`` and ``training_dtype``, as JSON values: each with ``chosen`` and, in words, ``reason``."""
    watch = CoreWatch()
    threads = watch.choose()  # before the probe keeps a core busy
    return {
        "threads": {
            "chosen": threads.threads,
            "usable": threads.usable,
            "busy": threads.busy,
            "limit": threads.limit,
            "reason": str(threads),
        },
        "training_dtype": _training_dtype(),
    }


def _training_dtype() -> dict[str, Any]:
    """By matrix products of the shapes of training; the model itself decides when it is trained."""
    if importlib.util.find_spec("torch") is None:
        return {"chosen": None, "reason": "torch is not installed"}
    outcome = run_apart("edgepatch.training.products:measure", None, deadline_s=PROBE_DEADLINE_S)
    if outcome.value is None:
        return {"chosen": None, "reason": f"the trial {outcome.failure}"}
    timings = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in outcome.value["seconds"].items())
    return {
        **outcome.value,
        "reason": f"{outcome.value['chosen']} (a layer's products on the CPU: {timings}; `train` tries the model)",
    }
