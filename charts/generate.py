"""Writes what of the charts is made from something else: ``python charts/generate.py``.

The READMEs' tables come from the comments in ``values.yaml``, the dashboard from the table below, the
CustomResourceDefinition of ``TrainingRun`` from the operator's models and the run file's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from steadyhelm_operator.crd import crd

CLUSTER = Path(__file__).parent / "steadyhelm-cluster"
OPERATOR = Path(__file__).parent / "steadyhelm-operator"
MARK = "<!-- values: made by charts/generate.py from the comments in values.yaml -->"

PANELS = (
    ("Reward", "short", ("steadyhelm_reward_mean", "steadyhelm_reward_choice", "steadyhelm_reward_format")),
    ("Held-out accuracy", "percentunit", ("steadyhelm_eval_accuracy_ratio", "steadyhelm_eval_both_orders_ratio")),
    ("Seconds of an iteration, by phase", "s", ("steadyhelm_phase_seconds",)),
    ("Time in which nothing computes", "percentunit", ("steadyhelm_overhead_share_ratio",)),
    ("Tokens a second", "short", ("steadyhelm_rollout_tokens_per_s", "steadyhelm_learner_tokens_per_s")),
    ("Staleness", "short", ("steadyhelm_staleness_mean", "steadyhelm_staleness_max")),
    ("Gradient norm", "short", ("steadyhelm_learner_grad_norm",)),
    ("Entropy and KL", "short", ("steadyhelm_learner_entropy_nats", "steadyhelm_learner_kl_nats")),
    ("Engine against trainer", "short", ("steadyhelm_learner_logprob_gap_mean_nats",)),
    (
        "Tokens thrown away",
        "percentunit",
        ("steadyhelm_learner_filter_low_ratio", "steadyhelm_learner_clip_fraction_ratio"),
    ),
    ("Completions", "short", ("steadyhelm_rollout_length_mean_tokens", "steadyhelm_rollout_length_max_tokens")),
    (
        "Cut, and scored",
        "percentunit",
        ("steadyhelm_rollout_truncated_rate_ratio", "steadyhelm_reward_valid_rate_ratio"),
    ),
    ("Prompts, by how they ended", "short", ("steadyhelm_outcomes_prompts",)),
    ("Restarts and replays", "short", ("steadyhelm_run_restarts_total", "steadyhelm_run_replayed_iterations_total")),
    ("Bytes of a policy version", "bytes", ("steadyhelm_weights_bytes",)),
    (
        "Weights: seconds of a sync, and of an engine's pause",
        "s",
        ("steadyhelm_weights_sync_seconds", "steadyhelm_weights_pause_seconds"),
    ),
    ("Engines wanted and serving", "short", ("steadyhelm_scaling_desired", "steadyhelm_scaling_serving")),
    (
        "Learner's wait, and how full engines are",
        "percentunit",
        ("steadyhelm_learner_wait_share_ratio", "steadyhelm_scaling_saturation_ratio"),
    ),
    ("Shards at once for each engine", "short", ("steadyhelm_scaling_queue",)),
)
"""Title, unit and metrics of each panel."""
WIDTH, HEIGHT, COLUMNS = 8, 7, 3
BY = {"steadyhelm_phase_seconds": "phase", "steadyhelm_outcomes_prompts": "outcome"}
"""The label that tells a metric's lines apart, besides the run."""


def dashboard() -> str:
    """The Grafana dashboard of runs."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels = [
        {
            "id": number + 1,
            "title": title,
            "type": "timeseries",
            "datasource": source,
            "gridPos": {"x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [_target(metric, chr(ord("A") + place)) for place, metric in enumerate(metrics)],
        }
        for number, (title, unit, metrics) in enumerate(PANELS)
    ]
    variables = [
        {"name": "source", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "type": "query",
            "datasource": source,
            "query": "label_values(steadyhelm_reward_mean, run)",
            "includeAll": True,
            "multi": True,
            "refresh": 2,
        },
    ]
    made = {
        "title": "Steadyhelm runs",
        "uid": "steadyhelm-runs",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }
    return json.dumps(made, indent=1) + "\n"


def _target(metric: str, name: str) -> dict[str, str]:
    what = "{{" + BY[metric] + "}}" if metric in BY else metric.removeprefix("steadyhelm_")
    return {"refId": name, "expr": metric + '{run=~"$run"}', "legendFormat": "{{run}} " + what}


def documented(text: str) -> Iterator[tuple[str, str]]:
    """Each value that has a comment of its own in a values file's ``text``: its path and what it means."""
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("# -- ") or (comment and bare.startswith("# ")):
            comment.append(bare.removeprefix("# ").removeprefix("-- "))
            continue
        key = re.match(r"( *)([A-Za-z0-9]+):", line)
        if key:
            path = [*path[: len(key[1]) // 2], key[2]]
            if comment:
                yield ".".join(path), " ".join(comment)
        comment = []


def values_table(chart: Path) -> str:
    """A row for each of the chart's values: path, default, meaning."""
    text = (chart / "values.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    rows = [f"| `{path}` | `{json.dumps(at(values, path))}` | {meaning} |" for path, meaning in documented(text)]
    return "\n".join([MARK, "", "| value | default | meaning |", "|---|---|---|", *rows]) + "\n"


def at(values: dict[str, Any], path: str) -> Any:
    """What stands at the dotted ``path``."""
    found: Any = values
    for name in path.split("."):
        found = found[name]
    return found


def readme(chart: Path) -> str:
    """The chart's README, all but the table as it stands."""
    return (chart / "README.md").read_text(encoding="utf-8").partition(MARK)[0] + values_table(chart)


def definition() -> str:
    """The CustomResourceDefinition, which the chart installs as it is."""
    notice = "# Made by charts/generate.py from operators/steadyhelm_operator/api.py and the run file's models.\n"
    return notice + yaml.safe_dump(crd(), sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)


FILES = {
    CLUSTER / "files" / "dashboard.json": dashboard,
    CLUSTER / "README.md": lambda: readme(CLUSTER),
    OPERATOR / "README.md": lambda: readme(OPERATOR),
    OPERATOR / "files" / "trainingruns.yaml": definition,
}
"""Each file that is made, and what makes it."""

if __name__ == "__main__":
    for file, make in FILES.items():
        file.write_text(make(), encoding="utf-8")
