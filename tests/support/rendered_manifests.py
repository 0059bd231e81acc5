"""The manifests in docker/kubernetes, rendered from the chart in docker/helm.

``python rendered_manifests.py`` writes them; a test compares. Helm itself renders, by
its library, of which there is a package for x86-64 only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from places import ROOT

CHART = ROOT / "docker" / "helm"
MANIFESTS = ROOT / "docker" / "kubernetes"
#: What is in the kustomization alone.
OWN = ("kustomization.yaml", "namespace.yaml")


def render(values: dict[str, Any] | None = None) -> dict[str, str]:
    """File name -> manifest; those that the values leave out are not there."""
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name="spikeless", namespace="spikeless")
    texts = {Path(name).name: text.strip() for name, text in rendered.items()}
    return {name: f"{text}\n" for name, text in sorted(texts.items()) if text}


def main() -> None:
    rendered = render()
    for file in MANIFESTS.glob("*.yaml"):
        if file.name not in {*OWN, *rendered}:
            file.unlink()
    for name, text in rendered.items():
        (MANIFESTS / name).write_text(text)
    print(*sorted(rendered), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
