"""Look for known vulnerabilities in an image: `make scan`.

Usage: python docker/scan.py IMAGE

Python packages are asked for in the vulnerability database of the package index, by
pip-audit. Of the distribution's packages, those count for which its archive, security
updates included, has a newer version: apt in the image says so.
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

from sbom import bill_of_materials

UPGRADES = "apt-get update --quiet=2 --error-on=any && apt-get --simulate --quiet=2 upgrade"
#: Installed by us, and in no index.
OURS = "spikeless"


def updates_of(simulated: str) -> list[str]:
    """Of what apt says that an upgrade would do: each package that it would replace."""
    return re.findall(r"^Inst (\S+ .*)", simulated, re.MULTILINE)


def pins_of(bill: dict[str, Any]) -> list[str]:
    """What pip-audit is asked about: each Python package that an index may know."""
    found = (one for one in bill["components"] if one["bom-ref"].startswith("pkg:pypi/"))
    return [f"{one['name']}=={one['version']}" for one in found if one["name"] != OURS]


def outdated(image: str) -> list[str]:
    """The distribution's packages for which there is an update."""
    command = ["docker", "run", "--rm", "--user=0:0", "--entrypoint=sh", image, "-c", UPGRADES]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"scan: apt in {image} cannot reach its archive, see above")
    return updates_of(done.stdout)


def audit(image: str) -> bool:
    """Whether pip-audit knows all Python packages, and nothing against them."""
    pins = pins_of(bill_of_materials(image))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{pin}\n" for pin in pins)
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "--disable-pip"]
        return subprocess.run([*command, "--requirement", file.name], check=False).returncode == 0


def main(image: str) -> None:
    """Print findings; exits with 1 where there are any."""
    updates = outdated(image)
    for line in updates:
        print(f"update: {line}")
    print(f"{len(updates)} packages of the distribution have an update")
    if not audit(image) or updates:
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
