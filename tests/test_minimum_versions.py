"""The oldest versions that setup.cfg allows are those that `make test-minimum` tests."""

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pairs(lines: str, operator: str) -> dict[str, str]:
    """Version of each requirement, from lines such as ``numpy >= 2.0``."""
    found = [
        line.split(operator)
        for line in lines.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return {name.strip(): version.strip() for name, version in found}


def test_the_minimums_of_setup_cfg_are_those_that_are_tested():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    declared = pairs(settings["options"]["install_requires"], ">=")
    tested = pairs((ROOT / "tests" / "minimum-versions.txt").read_text(), "==")
    assert len(declared) > 20
    assert tested == declared
