"""Print this image's bill of materials (CycloneDX): Debian and Python packages.

Usage: python - IMAGE < docker/sbom.py      in the image: `make sbom`
"""

import json
import platform
import subprocess
import sys
from importlib import metadata
from urllib.parse import quote


def component(kind, name, version, qualifiers=""):
    """A package by its package URL."""
    purl = f"pkg:{kind}/{name}@{quote(version, safe='')}{qualifiers}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


release = platform.freedesktop_os_release()
form = "${Package}\t${Version}\t?arch=${Architecture}&distro=" + release.get("VERSION_CODENAME", "") + "\n"
packages = subprocess.run(
    ["dpkg-query", "--show", f"--showformat={form}"], capture_output=True, text=True, check=True
).stdout
components = [component(f"deb/{release['ID']}", *line.split("\t")) for line in packages.splitlines()]
components += [
    component("pypi", found.metadata["Name"].lower().replace("_", "-"), found.version)
    for found in metadata.distributions()
]
bom = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "version": 1,
    "metadata": {"component": {"type": "container", "name": sys.argv[1], "bom-ref": sys.argv[1]}},
    "components": sorted(components, key=lambda one: one["purl"]),
}
json.dump(bom, sys.stdout, indent=1)
print()
