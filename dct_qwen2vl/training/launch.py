"""torchrun for qwen_launch.sh. It takes torchrun's arguments; where processes end early, it ends in a line, not in a
traceback of its own: what went wrong, they have said themselves.

    python -m dct_qwen2vl.training.launch --standalone --nproc-per-node 8 finetune_qwen2vl.py ...
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from pathlib import Path

from dct_qwen2vl.common.scripts import INTERRUPTED_CODE
from dct_qwen2vl.training.config import parse_arguments
from dct_qwen2vl.training.processes import CONTINUE, INTERRUPTED

PROGRAM = "qwen_launch.sh"
SCRIPT = "finetune_qwen2vl.py"
SETTING = re.compile(r"^([A-Z_]+)=\$\{\1:-", re.MULTILINE)  # in qwen_launch.sh
# Names of the flags and of other trainers, in place of the settings.
OTHER_NAMES = {
    "BATCH_SIZE": "MBS or GBS",
    "MICRO_BATCH_SIZE": "MBS",
    "GLOBAL_BATCH_SIZE": "GBS",
    "LEARNING_RATE": "LR",
    "DATA_DIR": "DATASET_DIR",
    "MODEL_PATH": "MODEL_DIR",
    "SEQ_LEN": "SEQ_LENGTH",
    "TENSOR_PARALLEL": "TP",
    "PIPELINE_PARALLEL": "PP",
    "NUM_GPUS": "NUM_PROC_PER_NODE",
    "EPOCHS": "MAX_STEPS",
    "NUM_EPOCHS": "MAX_STEPS",
    "SKIP": "SKIP_DB",
}
ALIKE = 0.88  # of difflib: MAX_STEP and MAX_STEPS have 0.94, INPUT_DIR and OUTPUT_DIR 0.74


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    for note in notes_on_names(os.environ):
        print(f"Note: {note}", flush=True)
    exports = False
    if SCRIPT in argv:  # a flag that there is not, or --help, is answered once
        exports = parse_arguments(argv[argv.index(SCRIPT) + 1 :], program=SCRIPT).export is not None
    try:
        return launch(argv, exports)
    except KeyboardInterrupt:  # before there are processes
        tell(INTERRUPTED)
        return INTERRUPTED_CODE


def notes_on_names(environment: Mapping[str, str]) -> list[str]:
    """A line for each environment variable that is no setting of qwen_launch.sh but is called nearly as one that is
    not set. Such a variable changes nothing."""
    settings = SETTING.findall((Path(__file__).parents[2] / PROGRAM).read_text(encoding="utf-8"))
    notes = []
    for name in sorted(environment.keys() - set(settings)):
        meant = OTHER_NAMES.get(name) or next((each for each in settings if alike(name, each)), None)
        if meant and not environment.keys() & set(meant.split(" or ")):
            notes.append(
                f"{name}={environment[name]} changes nothing, {PROGRAM} has no such setting: is {meant} meant?"
            )
    return notes


def alike(name: str, setting: str) -> bool:
    """Whether one may be a slip of the pen for the other. Short names differ too little."""
    one, other = (each.upper().replace("_", "") for each in (name, setting))
    return one == other or (min(len(one), len(other)) > 4 and SequenceMatcher(None, one, other).ratio() >= ALIKE)


def launch(argv: list[str], exports: bool = False) -> int:
    """Runs all processes of this node. Returns 0, or the exit status of the first that failed, as a shell has it.

    exports: One process of the first node does the work and waits for no other node.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    keep_quiet()
    arguments = run.parse_args(argv)
    if exports:
        if arguments.node_rank:
            print("Note: the first node (NODE_RANK=0) exports, this one does nothing", flush=True)
            return 0
        arguments.standalone, arguments.nnodes, arguments.nproc_per_node = True, "1", "1"
    try:
        run.run(arguments)
    except SignalException as error:
        return tell_signal(error.sigval)
    except ChildFailedError as error:
        return tell_failure(error.failures.values())
    return 0


def keep_quiet() -> None:
    """torchrun's own messages about what it ends are left out, unless LOGLEVEL asks for them."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def tell_signal(number: int) -> int:
    """The end by Ctrl-C, or by a signal of a job scheduler."""
    if number == signal.SIGINT:
        tell(INTERRUPTED)
    else:
        tell(f"ended by {signal.Signals(number).name}; {CONTINUE}")
    return 128 + number


def tell_failure(failures: Iterable) -> int:
    """A process that ended by itself has said why; one that was ended could not.

    failures: torchrun's ProcessFailure of each process.
    """
    first = min(failures, key=lambda failure: failure.timestamp)
    if first.exitcode >= 0:
        return first.exitcode
    name = signal.Signals(-first.exitcode).name
    why = " (is the machine's memory full?)" if name == "SIGKILL" else ""
    tell(f"process {first.local_rank} (pid {first.pid}) was ended by {name}{why}; {CONTINUE}")
    return 128 - first.exitcode


def tell(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
