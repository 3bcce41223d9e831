"""Python runs this file at its start where this folder is on PYTHONPATH: it notes how long a process imports.

Writes IMPORT_TRACE/PID.json at the end of the process: when it began, its rank, and the imports that no other import
was waiting for. Seconds since 1970. benchmarks/speed/start_up.py reads them.
"""

import atexit
import builtins
import json
import os
import time
from pathlib import Path

SHORTEST = 0.02  # seconds of an import that is noted


def trace(folder: Path) -> None:
    """Times the outermost imports of this process."""
    begun, plain, imports, owner = time.time(), builtins.__import__, [], os.getpid()
    inside = False

    def timed(name, *arguments, **options):
        nonlocal inside
        if inside:
            return plain(name, *arguments, **options)
        inside, start = True, time.time()
        try:
            return plain(name, *arguments, **options)
        finally:
            inside = False
            if time.time() - start >= SHORTEST:
                imports.append([name, start, time.time()])

    def write() -> None:
        if os.getpid() == owner:  # not in a process that was forked
            found = {"begun": begun, "rank": os.environ.get("RANK"), "imports": imports}
            (folder / f"{owner}.json").write_text(json.dumps(found), encoding="utf-8")

    builtins.__import__ = timed
    atexit.register(write)


if "IMPORT_TRACE" in os.environ:
    trace(Path(os.environ["IMPORT_TRACE"]))
