"""The processes of a run: who started them, how they end together, what Ctrl-C does to them."""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from dct_qwen2vl.common.scripts import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for the processes that it starts
FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer")  # what gloo says of another process
CONTINUE = "run the same command again to continue from the newest checkpoint"
# What the C library, and PyTorch's writer of archives in its place, say of a full disk.
FULL = re.compile(r"No space left on device|Disk quota exceeded|inline_container.*(failed writing|unexpected pos)")
WORKER = re.compile(r"DataLoader worker \(pid[^)]*\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)")  # PyTorch
PR_SET_PDEATHSIG = 1  # prctl(2)
AGAIN = 0.05  # s until a signal whose exception was dropped is sent once more
INTERRUPTED = f"interrupted; {CONTINUE}"


class Interrupted(BaseException):
    """Ctrl-C. It is no KeyboardInterrupt: Lightning answers that with messages and an exit of its own."""


def forget_what_torchrun_has_not_set(environment: MutableMapping[str, str]) -> None:
    """Job schedulers and earlier shells leave torchrun's variables behind. They count only where torchrun has started
    this process."""
    if TORCHRUN not in environment:
        for name in FROM_TORCHRUN:
            environment.pop(name, None)


def end_with_launcher() -> None:
    """From now on the kernel sends this process SIGTERM as soon as torchrun has ended, also where kill -9 has ended it.
    Otherwise the process would go on, with its device and the run folder. Nothing happens if torchrun has not started
    it, or where there is no prctl(2)."""
    if TORCHRUN in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def without_lost_ends(show: Callable) -> Callable:
    """An excepthook that is silent on a thread that has lost its other end; else it is `show`.

    Ctrl-C reaches the loader processes as well. They may have ended before this process comes to its signal handler.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main or not issubclass(kind, EOFError | ConnectionError):
            show(kind, error, trace)

    return hook


def raise_again(show: Callable, lost: list[object]) -> Callable:
    """An unraisablehook, else `show`. Python drops what a signal's handler raises inside a callback, such as a weak
    reference's: then the signal is sent once more.

    show: The hook before.
    lost: Gets the Interrupted that was dropped.
    """

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            show(dropped)
            return
        lost.append(dropped.exc_value)
        main = threading.main_thread().ident
        threading.Timer(AGAIN, signal.pthread_kill, (main, signal.SIGINT)).start()

    return hook


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside the block the first Ctrl-C raises Interrupted in this process, and no later one does: torchrun passes on
    what the terminal has sent already. Processes that it forks leave their end to it. Gives a list that holds the
    signal once it has come, since what a library raises meanwhile may hide the exception."""
    seen: list[int] = []
    lost: list[object] = []
    owner = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() == owner and (lost or not seen):
            seen[:] = [number]
            lost.clear()
            sys.excepthook = lambda *error: None  # threads that lose their other end
            raise Interrupted

    sys.excepthook = without_lost_ends(sys.excepthook)
    sys.unraisablehook = raise_again(sys.unraisablehook, lost)
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield seen
    finally:
        if not seen:
            signal.signal(signal.SIGINT, before)


def let_others_begin() -> None:
    """The first process has passed all checks and holds the run folder."""
    if _has_others():
        _checks_store().set("passed", "yes")


def wait_for_first() -> None:
    """Until the first process lets the others begin. Where it refuses to, the launcher ends the ones that wait, so a
    refusal is told once. Raises UserError where the first process, on another node, has ended."""
    if not _has_others():
        return
    try:
        _checks_store().get("passed")
    except (RuntimeError, OSError) as error:  # of the store
        raise UserError("the first process of this run has ended, so this one ends as well") from error


def told_by_machine(trace: str) -> str | None:
    """A line for an end that the machine has made, None for any other: a full disk, a loader process that was ended.

    trace: The traceback, which may come from a loader process as text.
    """
    if FULL.search(trace) and "file </torch_" not in trace:  # PyTorch's, in shared memory
        return f"a disk is full, most likely that of the run's folder: make room, then {CONTINUE}"
    worker = WORKER.search(trace)
    how = (worker[1] or "by itself").strip() if worker else None
    if FULL.search(trace) or how == "Bus error":
        return f"the shared memory /dev/shm is full: raise it (docker run --shm-size 16g), then {CONTINUE}"
    if how == "Terminated":  # torchrun sends it to loader processes, too
        return f"ended by SIGTERM; {CONTINUE}"
    more = " (is the machine's memory full?)" if how == "Killed" else ""
    return f"a loader process has ended ({how}){more}; {CONTINUE}" if how else None


def _has_others() -> bool:
    return TORCHRUN in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _checks_store():
    import torch.distributed

    store, _, _ = next(torch.distributed.rendezvous("env://"))
    return torch.distributed.PrefixStore("checks", store)


def raise_in_all(error: UserError | None) -> None:
    """Collective. The first process's error, if any, is raised in every process, and told by the first alone. So none
    waits for the others, and none shows a traceback about one that has ended."""
    import torch.distributed

    together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if not together:
        if error:
            raise error
        return
    first = torch.distributed.get_rank() == 0
    messages = [None if error is None else str(error)]
    torch.distributed.broadcast_object_list(messages, src=0)
    if messages[0] is None:
        return
    if first:
        print(f"finetune_qwen2vl.py: {messages[0]}", file=sys.stderr, flush=True)
        error.told = True
    torch.distributed.barrier()  # torchrun ends all processes as soon as one has ended
    raise error if error else ToldElsewhere(messages[0])


class ToldElsewhere(UserError):
    """The first process has shown the message."""

    told = True
