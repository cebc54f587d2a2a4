"""What all charts share: their look, and how their data is written."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

CONTAINER = 100  # any width: the page's script sets it to what there is
CURRENT = "currentColor"  # the page's ink, in the light and in the dark
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": CURRENT,
        "titleColor": CURRENT,
        "domainColor": CURRENT,
        "tickColor": CURRENT,
        "gridColor": CURRENT,
        "gridOpacity": 0.15,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": CURRENT,
        "titleColor": CURRENT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 280,
        "orient": "top",
        "columns": 2,
    },
    "text": {"color": CURRENT},
    "rule": {"color": CURRENT},
}


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification, and the data that it names."""

    specification: dict[str, Any]
    datasets: dict[str, list[dict[str, Any]]]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows for JSON: numbers with the digits that can be seen, and null for what is missing."""
    return [{str(name): _seen(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _seen(value: Any) -> Any:
    if value is None or pd.isna(value):
        return None
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}")
    return int(value) if isinstance(value, np.integer) else value
