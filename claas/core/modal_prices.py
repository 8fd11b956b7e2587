"""What a second of a Modal GPU costs: the list prices of 2026, and the settings' own over them. CPU, memory and storage are not in it."""

from __future__ import annotations

import re

from claas.core.settings import Settings

LIST_PRICES = {
    "T4": 0.000164,
    "L4": 0.000222,
    "A10": 0.000306,
    "L40S": 0.000542,
    "A100": 0.000583,
    "A100-40GB": 0.000583,
    "A100-80GB": 0.000694,
    "RTX-PRO-6000": 0.000842,
    "H100": 0.001097,
    "H200": 0.001261,
    "B200": 0.001736,
}
"""Dollars a second."""
_GPU = re.compile(r"(?P<name>[^:!]+)!?(:(?P<count>[0-9]+))?")


def price_per_second(settings: Settings, gpu: str) -> float | None:
    """Dollars, for a GPU as `gpu=` of Modal names it, such as "H100", "H100!" or "A100-80GB:2". None: no price is known."""
    prices = {name.upper(): price for name, price in (LIST_PRICES | settings.modal_prices).items()}
    if gpu.upper() in prices:
        return prices[gpu.upper()]
    match = _GPU.fullmatch(gpu.upper())
    if match is None or match["name"] not in prices:
        return None
    return prices[match["name"]] * int(match["count"] or 1)
