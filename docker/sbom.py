"""Print an image's bill of materials (CycloneDX): packages of Debian and of Python.

Where TensorFlow Serving is in it, that is listed, too.

Usage: python docker/sbom.py IMAGE      any image of the bundle: `make sbom`

The image only lists what is in it, without a network; the rest is done here.
"""

import json
import subprocess
import sys
from urllib.parse import quote

# One a line, the distribution first: kind, name, version. Of its packages also the
# architecture, the source package and that one's version.
LISTING = r"""
. /etc/os-release
printf 'release\t%s\t%s\n' "$ID" "$VERSION_ID"
fields='${Package}\t${Version}\t${Architecture}\t${source:Package}\t${source:Version}'
dpkg-query --show --showformat="deb\t$fields\n"
find / -xdev -path '*-packages/*.dist-info/METADATA' -not -path '/usr/share/*' 2> /dev/null |
    while read -r file; do
        awk -F ': ' '{ sub(/\r$/, "") } /^$/ { exit }
            $1 == "Name" { name = $2 } $1 == "Version" { version = $2 }
            END { print "pypi\t" name "\t" version }' "$file"
    done
tensorflow_model_server --version 2> /dev/null |
    sed -n 's/^TensorFlow ModelServer: \([0-9][0-9.]*\).*/server\ttensorflow-serving\t\1/p'
"""


def component(line, release):
    """A package by its package URL."""
    kind, name, version, *debian = line.split("\t")
    purl = {"deb": f"pkg:deb/{release['name']}/", "pypi": "pkg:pypi/", "server": "pkg:github/tensorflow/"}[
        kind
    ]
    if kind == "pypi":
        name = name.lower().replace("_", "-")
    purl += f"{'serving' if kind == 'server' else name}@{quote(version, safe='')}"
    if kind == "deb":
        architecture, source, source_version = debian
        purl += f"?arch={architecture}&distro={release['name']}-{release['version']}"
        # Vulnerabilities of Debian are told by source package.
        if (source, source_version) != (name, version):
            purl += f"&upstream={quote(f'{source}@{source_version}', safe='')}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


def document(image, listing):
    """What the listing of an image says, as a CycloneDX document."""
    first, *lines = listing.rstrip("\n").split("\n")
    _, name, version = first.split("\t")
    # Scanners take the vulnerabilities of this one's packages, and without it of none.
    release = {"type": "operating-system", "name": name, "version": version, "bom-ref": f"{name}-{version}"}
    packages = sorted((component(line, release) for line in lines), key=lambda one: one["purl"])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image, "bom-ref": image}},
        "components": [release, *packages],
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
