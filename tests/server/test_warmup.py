"""The warmup file of a trained model, built from the samples in the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trained_models import spikeless


def test_boston(boston_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(boston_run / "saved_model", tmp_path / "model")
    samples = (
        "--samples",
        "warmup/boston/samples.jsonl",
        "--batch-sizes",
        "1,8,32",
        "--name",
        "boston",
    )
    for arguments in (samples, ("--batch-sizes", "1,8")):  # from samples, and from the signatures alone
        done = spikeless("warmup", "build", model, *arguments)
        assert done.returncode == 0, done.stderr
        done = spikeless("warmup", "verify", model, "--json")
        assert done.returncode == 0, done.stderr
        firsts = json.loads(done.stdout)["first_requests"]
        assert {(first["kind"], *first["signatures"]) for first in firsts} == {
            ("Predict", "serving_default"),
            ("Classify", "classify"),
            ("Regress", "regress"),
        }
