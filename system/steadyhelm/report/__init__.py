"""The run report: one self-contained page with curves, trajectories, and the same prompts before and after.

``gather`` reads a run's store, ``render_report`` makes the page, ``metrics_jsonl`` the
numbers; between them stand plain records.
"""

from steadyhelm.report.gather import gather, read_metrics
from steadyhelm.report.page import render_report
from steadyhelm.report.records import Comparison, Evaluation, ReportData, Sample, Token
from steadyhelm.store import ObjectStore
from steadyhelm.store.layout import RunLayout
from steadyhelm.store.log import LogView

__all__ = [
    "Comparison",
    "Evaluation",
    "ReportData",
    "Sample",
    "Token",
    "gather",
    "metrics_jsonl",
    "read_metrics",
    "render_report",
    "write_report",
]


def write_report(store: ObjectStore, run: str) -> str:
    """Puts the report of ``run``, and beside it ``metrics.jsonl``, into its store; returns the report's key.

    Raises ConfigError, StoreError.
    """
    key = f"{RunLayout(run).report}/report.html"
    store.put(f"{RunLayout(run).report}/metrics.jsonl", metrics_jsonl(store, run).encode())
    store.put(key, render_report(gather(store, run)).encode())
    return key


def metrics_jsonl(store: ObjectStore, run: str) -> str:
    """The run's metrics, a JSON object on a line for each iteration. Raises ConfigError where there is no such run."""
    LogView(store, run).run_record()
    return "".join(line.to_json() + "\n" for line in read_metrics(store, run))
