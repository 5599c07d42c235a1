#!/usr/bin/env python3
"""What the checksums of files cost `pipeline sql`: the same queries over a copy of a run and over another
whose manifest lists no CRC-32, in turn. Prints the ratio of the fastest and of the median times.

    python3 benches/checksums.py PIPELINE_PROGRAM RUN_FOLDER QUERY...
"""

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 25


def without_crc(value):
    if isinstance(value, dict):
        return {key: without_crc(inner) for key, inner in value.items() if key != "crc32"}
    if isinstance(value, list):
        return [without_crc(inner) for inner in value]
    return value


def unchecked(run: Path, to: Path) -> Path:
    """A copy of the run whose files are not compared with checksums."""
    shutil.copytree(run, to)
    manifest = json.loads((to / "manifest.json").read_text())
    del manifest["checksum"]
    rest = json.dumps(without_crc(manifest), indent=2, ensure_ascii=False)[2:]
    checksum = hashlib.sha256(rest.encode()).hexdigest()
    (to / "manifest.json").write_text(f'{{\n  "checksum": "{checksum}",\n{rest}')
    for other in to.glob("manifest.*"):
        if other.name != "manifest.json":
            other.unlink()
    return to


def main() -> None:
    program, run, *queries = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        checked_run = shutil.copytree(run, Path(folder) / "checked")
        plain = unchecked(Path(run), Path(folder) / "plain")
        for query in queries:
            took = {checked_run: [], plain: []}
            for _ in range(ROUNDS):
                for one, times in took.items():
                    begun = time.perf_counter()
                    command = [program, "sql", one, query, "--format", "csv"]
                    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                    times.append(time.perf_counter() - begun)
            checked, unchecked_times = took.values()
            fastest = min(checked) / min(unchecked_times)
            median = statistics.median(checked) / statistics.median(unchecked_times)
            print(f"{fastest:.3f} fastest, {median:.3f} median: {query}")


main()
