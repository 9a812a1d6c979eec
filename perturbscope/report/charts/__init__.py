"""Charts of the report as inline SVG, drawn without a library, with colours from the page's style sheet."""

from perturbscope.report.charts.cells import cell_map
from perturbscope.report.charts.frame import NARROW, WIDE, Frame
from perturbscope.report.charts.heatmap import heat_map
from perturbscope.report.charts.quantiles import qq_chart
from perturbscope.report.charts.scatter import DegPoint, Point, deg_chart, effect_chart

__all__ = [
    "NARROW",
    "WIDE",
    "DegPoint",
    "Frame",
    "Point",
    "cell_map",
    "deg_chart",
    "effect_chart",
    "heat_map",
    "qq_chart",
]
