"""The run report: one self-contained page with curves, trajectories, and the same prompts before and after.

``gather`` reads a run's store, ``render_report`` makes the page; between them stand plain records.
"""

from steadyhelm.report.gather import gather, read_metrics
from steadyhelm.report.page import render_report
from steadyhelm.report.records import Comparison, Evaluation, ReportData, Sample, Token
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout

__all__ = [
    "Comparison",
    "Evaluation",
    "ReportData",
    "Sample",
    "Token",
    "gather",
    "read_metrics",
    "render_report",
    "write_report",
]


def write_report(store: ObjectStore, run: str) -> str:
    """Puts the report of ``run`` into its store and returns its key. Raises ConfigError, StoreError."""
    key = f"{RunLayout(run).report}/report.html"
    store.put(key, render_report(gather(store, run)).encode())
    return key
