"""A report of a scored screen: one self-contained HTML page, with its tables and figures as files.

The page opens offline, in light and dark mode and on a phone. Imports analysis, cells, scoring and tasks.trained_on.
"""

from perturbscope.report.build import build_report
from perturbscope.report.contents import Absent, Pairs, Report
from perturbscope.report.files import write_figures, write_tables
from perturbscope.report.page import render_report, write_report

__all__ = [
    "Absent",
    "Pairs",
    "Report",
    "build_report",
    "render_report",
    "write_figures",
    "write_report",
    "write_tables",
]
