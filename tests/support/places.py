"""Where things are in the repository, for tests."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
