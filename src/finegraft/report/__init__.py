"""The report of a run: one HTML file that needs nothing else."""

from finegraft.report.page import GraftedSite, RunReport, render_report

__all__ = ["GraftedSite", "RunReport", "render_report"]
