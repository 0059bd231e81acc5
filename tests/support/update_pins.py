"""Write requirements.txt and requirements-oldest.txt: ``make update-pins``.

In: pyproject.toml, with all its extras and groups. Out: the newest versions that work
together, on each supported Python and platform. uv finds them; its long markers are
replaced by the shortest ones that hold for the same Pythons and platforms. No address
of a package index gets into the files.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
#: Each supported Python and machine, as the variables of markers.
PLATFORMS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "extra": "",
    }
    for python in PYTHONS
    for machine in MACHINES
]
HEADER = "# Written by `make update-pins`; every package is here: pip install --no-deps -r\n"
#: The files, and what each of them holds back.
FILES: dict[str, list[str]] = {
    "requirements.txt": [],
    "requirements-oldest.txt": ["tensorflow<2.21", "tensorflow-serving-api<2.21", "tf_keras<2.21"],
}


def applies(requirement: Requirement, platform: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(platform)


def _markers() -> list[str]:
    """Markers that say on which platforms a pin applies, shortest first."""
    names = [f"python_version < '{python}'" for python in PYTHONS[1:]]
    names += [f"python_version >= '{python}'" for python in PYTHONS[1:]]
    names += [f"python_version == '{python}'" for python in PYTHONS[1:-1]]
    names += ["python_version >= '3.11' and python_version < '3.13'"]
    machines = [f"platform_machine == '{machine}'" for machine in MACHINES]
    return ["", *names, *machines, *(f"{name} and {machine}" for name in names for machine in machines)]


def _pin(requirement: Requirement) -> str | None:
    """The line with the shortest marker; None where no supported platform needs it."""
    wanted = [applies(requirement, platform) for platform in PLATFORMS]
    if not any(wanted):
        return None
    for marker in _markers():
        line = f"{requirement.name}{requirement.specifier}{'; ' * bool(marker)}{marker}"
        if [applies(Requirement(line), platform) for platform in PLATFORMS] == wanted:
            return line
    raise SystemExit(f"no short marker says where this holds: {requirement}")


def update(name: str, constraints: list[str]) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--upgrade",
            f"--python-version={PYTHONS[0]}",
        ),
        *("--all-extras", "--group=dev", "--no-header", "--no-annotate"),
        *("--no-emit-index-url", "--no-emit-find-links", "--constraints=-", "pyproject.toml"),
    ]
    found = subprocess.run(
        command, cwd=ROOT, input="\n".join(constraints), stdout=subprocess.PIPE, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(found.returncode)
    lines = [line for line in found.stdout.splitlines() if line and not line.startswith("#")]
    pins = [pin for line in lines if (pin := _pin(Requirement(line)))]
    (ROOT / name).write_text(HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{name}: {len(pins)} pins")


def main() -> None:
    for name, constraints in FILES.items():
        update(name, constraints)


if __name__ == "__main__":
    main()
