"""One self-contained HTML page from scores: opens offline, in light and dark, on a phone."""

from perturbscope.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
