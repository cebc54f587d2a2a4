"""The scripts of a page: those of its tables, and those that draw its charts.

Charts need the extra `report` (altair and vl-convert-python). The page has every figure as a picture too; the script
takes its place once it has drawn. Data is embedded once, as JSON that cannot end its own script.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from analysis.report.charts.chart import Chart
from qlora_lab.runs.files import write_atomic
from qlora_lab.wheels import default_cache_dir

INSTALL = "pip install 'qlora_lab[report]'"


def missing_packages() -> list[str]:
    """Return the packages of the extra that are not installed."""
    modules = {"altair": "altair", "vl_convert": "vl-convert-python"}
    return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]


def javascript() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, kept in the cache: bundling takes seconds."""
    version = importlib.metadata.version("vl-convert-python")
    file = default_cache_dir() / "report" / f"vega-{version}.js"
    if not file.exists():
        import vl_convert

        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    # nothing in a script may look like its end, or like the comment in which an end does not count
    return file.read_text(encoding="utf-8").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def scripts(charts: Mapping[str, Chart]) -> str:
    """Return the script elements that draw `charts`, each in the page's element of its name."""
    told = json.dumps(
        {name: chart.specification | {"datasets": chart.datasets} for name, chart in charts.items()},
        separators=(",", ":"),
        allow_nan=False,
    )
    told = told.replace("<", "\\u003c")  # so that nothing in it can end its script
    return (
        f'<script type="application/json" id="report-data">{told}</script>\n'
        f"<script>{javascript()}</script>\n<script>{own_script('charts.js')}</script>\n"
    )


def own_script(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
