"""The law, runtime and command-line tests under other releases of transformers than the installed one.

    python tests/releases.py lowest constrained newest          # what `make test-releases` does
    python tests/releases.py 5.22.2 --pytest "-k llama"

A release is a version, or one of three names: `lowest` is the least that pyproject.toml asks for,
`constrained` is the one in constraints.txt, `newest` is the newest on the package index that pyproject.toml
admits. Each is installed without its requirements into `<venv>/releases/<version>`, a folder that goes
first on the path. Everything else is shared, torch included.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SUITES = [
    "tests/laws",
    "tests/runtime",
    "tests/serving",
    "tests/test_cli.py",
    "tests/test_cli_input.py",
    "tests/test_bad_commands.py",
    "tests/test_private_apis.py",
]


def named(name: str) -> str:
    """The version that a name stands for; a version stands for itself."""
    if name == "constrained":
        return found(r"^transformers==(\S+)", ROOT / "constraints.txt")
    admitted = found(r'"transformers(>=[^"]+)"', ROOT / "pyproject.toml")
    if name == "lowest":
        return admitted.removeprefix(">=").split(",")[0] + ".0"
    if name == "newest":
        listed = re.search(r"Available versions: (.*)", pip("index", "versions", "transformers").stdout)
        if listed is None:
            sys.exit("pip could not list the releases of transformers; check the package index.")
        return max(SpecifierSet(admitted).filter(listed[1].split(", ")), key=Version)
    return name


def found(pattern: str, file: Path) -> str:
    match = re.search(pattern, file.read_text(), re.MULTILINE)
    assert match, f"{file.name} names no release of transformers"
    return match[1]


def tested() -> tuple[str, ...]:
    from farspan.runtime.hf.releases import TESTED

    return TESTED


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def overlay(release: str) -> Path:
    """The folder that holds this release alone, filled on first use."""
    folder = Path(sys.prefix) / "releases" / release
    if not (folder / ".complete").exists():
        done = pip(
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            str(folder),
            f"transformers=={release}",
        )
        if done.returncode:
            sys.exit(f"pip could not install transformers {release}: {done.stderr.strip().splitlines()[-1]}")
        (folder / ".complete").touch()
    return folder


def run(release: str, extra: list[str]) -> bool:
    path = os.pathsep.join(filter(None, [str(overlay(release)), os.environ.get("PYTHONPATH", "")]))
    print(f"\n=== transformers {release} ===", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *SUITES, *extra]
    return (
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode == 0
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="+", metavar="RELEASE")
    parser.add_argument("--done", action="append", default=[], metavar="RELEASE", help="skip: tested already")
    parser.add_argument(
        "--tested-only", action="store_true", help="skip, with a warning, what no table names"
    )
    parser.add_argument("--pytest", default="", help="more arguments for pytest, in one string")
    args = parser.parse_args()
    done = {named(name) for name in args.done}
    failed = []
    for name in args.releases:
        release = named(name)
        if release in done:
            print(f"transformers {release} ({name}) is tested already.")
        elif args.tested_only and ".".join(release.split(".")[:2]) not in tested():
            print(
                f"WARNING: farspan was not tested on transformers {release} ({name}), but on "
                f"{', '.join(tested())}: run `make test-releases`, mend what fails, then name it in "
                "runtime/hf/releases.py."
            )
        elif not run(release, shlex.split(args.pytest)):
            failed.append(release)
        done.add(release)
    if failed:
        sys.exit(f"Tests failed under transformers {', '.join(failed)}.")


if __name__ == "__main__":
    main()
