"""Known vulnerabilities among the pinned versions, asked of the advisory service; what could not be asked is said.

    python benchmarks/audit.py [constraints.txt]

Exit code 1 for a known vulnerability, and for pip-audit failing for another reason than the network; 0 otherwise, with
one line that says how many packages were looked up. A mirror that answers "unknown" to everything audits nothing.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 120
UNREACHABLE = (
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "Failed to resolve",
    "ProxyError",
    "SSLError",
    "HTTPError",
)


def main(path: Path) -> int:
    words = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(path),
        "--no-deps",
        "--disable-pip",
    ]
    words += ["--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"audit: skipped, the advisory service gave no answer in {SECONDS} s")
        return 0
    return verdict(done.returncode, done.stdout, done.stderr)


def verdict(code: int, out: str, err: str) -> int:
    """Say in one line (one more for each vulnerability) what pip-audit found; return the exit code."""
    try:
        found: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError):
        last = (err.strip().splitlines() or [f"pip-audit ended with {code} and said nothing"])[-1]
        if any(word in err for word in UNREACHABLE):
            print(f"audit: skipped, the advisory service cannot be reached ({last[:120]})")
            return 0
        print(f"audit: failed: {last[:300]}")
        return 1
    known = [one for one in found if "skip_reason" not in one]
    bad = [(one, vulnerability) for one in known for vulnerability in one["vulns"]]
    for one, v in bad:
        mend = ", ".join(v.get("fix_versions", ())) or "none yet"
        print(f"audit: {one['name']} {one['version']}: {v['id']} (mended in: {mend})")
    if not known:
        print(
            f"audit: skipped, the service knows none of the {len(found)} packages (a mirror without advisories)"
        )
    else:
        print(
            f"audit: {len(known)} of {len(found)} packages looked up, {len(bad)} known vulnerabilities"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "constraints.txt")))
