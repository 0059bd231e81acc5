"""What the shipped Grafana dashboard asks Prometheus."""

from __future__ import annotations

import json

from places import ROOT

DASHBOARD = ROOT / "docker" / "monitoring" / "grafana" / "dashboards" / "spikeless.json"


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return queries + [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
