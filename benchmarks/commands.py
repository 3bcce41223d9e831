"""Commands of a study or of a list of measurements: each with a log file and a time, and nothing is left of it."""

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
MARK = "BENCHMARK_COMMAND"  # in the environment: torchrun's processes and loaders inherit it, in whatever session
PATIENCE = 10  # seconds from SIGTERM to SIGKILL


class Command:
    """A command that runs, in the repository's folder.

    words: Program and arguments.
    log: Gets the command and what it says.
    environment: Variables on top of the caller's.
    """

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            settings = [f"{name}={value}" for name, value in environment.items()]
            print("$", *settings, *words, file=file, flush=True)
            self.process = subprocess.Popen(
                words, cwd=REPOSITORY, env={**os.environ, **environment, MARK: self.mark}, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, None where the time was over. Either way none of its processes is left.

        seconds: At most. None: as long as it takes.
        """
        try:
            return self.process.wait(None if seconds is None else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """Ends all its processes: what a program that is cut off has started may run on and hold a GPU's memory."""
        deadline = time.monotonic() + PATIENCE
        wanted = signal.SIGTERM
        while processes := self._processes():
            for process in processes:
                try:
                    process.send_signal(wanted)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=1)
            if time.monotonic() > deadline:
                wanted = signal.SIGKILL
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def end_by_signals() -> None:
    """SIGTERM ends this program as Ctrl-C does, and so its commands. A shell's background program takes both, too."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
