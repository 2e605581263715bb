"""The four Grafana dashboards, as code: `python deploy/grafana/dashboards.py` writes `deploy/grafana/dashboards/*.json` anew.

Owns how they look; what they show is `boards`'. The JSON is committed and never edited.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from boards import adapters, fleet, serving, training
from grafana_foundation_sdk.builders import common, dashboard, stat, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableOption, VariableRefresh
from panels import Board, Choice, Panel

FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS, _THIRD, _HEIGHT = 24, 8, 8

BOARDS: dict[str, Callable[[], Board]] = {"fleet": fleet, "training": training, "serving": serving, "adapters": adapters}


def rendered(board: Board) -> str:
    """The dashboard as Grafana reads it."""
    made = dashboard.Dashboard(board.title).uid(board.uid).tags(["finery"]).refresh("30s").time("now-3h", "now")
    made = (
        made.readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for choice in board.choices:
        made = made.with_variable(_variable(choice))
    ids = itertools.count(1)
    for title, panels in board.rows.items():
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        width = _COLUMNS // len(panels) if len(panels) <= 4 else _THIRD
        for panel in panels:
            made = made.with_panel((_number if panel.is_number else _series)(panel, width).id(next(ids)))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _variable(choice: Choice) -> dashboard.QueryVariable:
    everything = VariableOption(selected=True, text="All", value="$__all")
    made = dashboard.QueryVariable(choice.name).datasource(_SOURCE).query(f"label_values({choice.metric}, {choice.label})")
    return made.include_all(True).all_value(".+").multi(True).current(everything).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _series(panel: Panel, width: int) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    made = timeseries.Panel().title(panel.title).description(panel.text).datasource(_SOURCE).unit(panel.unit).min(0).legend(legend)
    made = made.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)).fill_opacity(8).span(width).height(_HEIGHT)
    for target in _targets(panel):
        made = made.with_target(target)
    return made


def _number(panel: Panel, width: int) -> stat.Panel:
    made = stat.Panel().title(panel.title).description(panel.text).datasource(_SOURCE).unit(panel.unit).graph_mode(BigValueGraphMode.AREA)
    made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).span(width).height(_HEIGHT // 2)
    for target in _targets(panel):
        made = made.with_target(target)
    return made


def _targets(panel: Panel) -> list[Dataquery]:
    named = zip("ABCDEFGH", panel.queries.items(), strict=False)
    return [Dataquery().datasource(_SOURCE).expr(expr).legend_format(legend).ref_id(letter) for letter, (legend, expr) in named]


def main() -> int:
    """Command line; answers the exit status."""
    parser = argparse.ArgumentParser(description="Writes Grafana's dashboards.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to; the default is the committed folder")
    out: Path = parser.parse_args().out
    for name, make in BOARDS.items():
        (out / f"{name}.json").write_text(rendered(make()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
