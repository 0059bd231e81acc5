"""Print an image's bill of materials (CycloneDX): packages of Debian and of Python.

Where TensorFlow Serving is in it, that is listed, too.

Usage: python docker/sbom.py IMAGE      any image of the bundle: `make sbom`

The image only lists what is in it, without a network; the rest is done here.
"""

import json
import subprocess
import sys
from urllib.parse import quote

# One a line: kind, name, version, architecture. The distribution comes first.
LISTING = r"""
. /etc/os-release
printf 'release\t%s\t%s\t\n' "$ID" "$VERSION_CODENAME"
dpkg-query --show --showformat='deb\t${Package}\t${Version}\t${Architecture}\n'
find / -xdev -path '*-packages/*.dist-info/METADATA' -not -path '/usr/share/*' 2> /dev/null |
    while read -r file; do
        awk -F ': ' '{ sub(/\r$/, "") } /^$/ { exit }
            $1 == "Name" { name = $2 } $1 == "Version" { version = $2 }
            END { print "pypi\t" name "\t" version "\t" }' "$file"
    done
tensorflow_model_server --version 2> /dev/null |
    sed -n 's/^TensorFlow ModelServer: \([0-9][0-9.]*\).*/server\ttensorflow-serving\t\1\t/p'
"""


def component(line, release):
    """A package by its package URL."""
    kind, name, version, architecture = line.split("\t")
    form = {
        "deb": "pkg:deb/{release[1]}/{name}@{version}?arch={architecture}&distro={release[2]}",
        "pypi": "pkg:pypi/{name}@{version}",
        "server": "pkg:github/tensorflow/serving@{version}",
    }[kind]
    if kind == "pypi":
        name = name.lower().replace("_", "-")
    purl = form.format(name=name, version=quote(version, safe=""), architecture=architecture, release=release)
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def document(image, listing):
    """What the listing of an image says, as a CycloneDX document."""
    first, *lines = listing.rstrip("\n").split("\n")
    release = first.split("\t")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image, "bom-ref": image}},
        "components": sorted((component(line, release) for line in lines), key=lambda one: one["purl"]),
    }


def bill_of_materials(image):
    """What is in an image."""
    command = ["docker", "run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", LISTING]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"sbom: {image} cannot be listed, see above")
    return document(image, done.stdout)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(bill_of_materials(sys.argv[1]), indent=1))
