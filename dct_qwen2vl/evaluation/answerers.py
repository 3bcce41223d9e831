"""A model, or a copy of it on each of several GPUs, that answers all questions of a round."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.common.workers import WorkerPool
from dct_qwen2vl.evaluation.answering import Answerer, Reader, answer_batch, cut_batches
from dct_qwen2vl.evaluation.questions import Question, blinded

if TYPE_CHECKING:
    from dct_qwen2vl.data.videos import VideoSampling

Task = tuple[list[Question], bool]  # a batch, and whether its media are made grey

REMEDY = "with fewer --processes the same command continues"

_answerer: Answerer | None = None  # in a worker process


class Answerers:
    """As a context manager: the processes end with it.

    processes: That answer side by side, each with a copy of the model, on a GPU of its own if there are GPUs. 1: the
        calling process answers.
    model_dir: As in `Answerer`, and so are `max_new_tokens`, `sampling` and `settings`.

    reader: What questions are read with.

    Raises CheckpointError.
    """

    def __init__(
        self,
        processes: int,
        model_dir: Path,
        max_new_tokens: int,
        sampling: "VideoSampling | None" = None,
        **settings: Any,
    ) -> None:
        model = (model_dir, max_new_tokens, sampling)
        self.alone = processes == 1
        self.reader = (Answerer if self.alone else Reader)(*model, **settings)
        workers = 0 if self.alone else processes
        self.pool = WorkerPool(workers, True, partial(load, processes, model, settings), REMEDY)

    def __enter__(self) -> "Answerers":
        self.pool.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.__exit__(*error)

    def answer_all(
        self, questions: list[Question], batch_size: int, update: Callable[[int], object] = lambda count: None
    ) -> tuple[list[str], list[str]]:
        """Answers to all questions, seeing and blind, in the order of `questions`. They do not depend on the processes.

        questions: To be asked. Batches hold questions of similar length, so there is little padding.
        batch_size: Questions that are answered at once.
        update: Called after each batch with the number of its questions.

        Raises UserError.
        """
        lengths = [len(question.text) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].media), lengths[i]))
        batches = list(cut_batches(order, lengths, batch_size))
        places = [(chosen, blind) for blind in (False, True) for chosen in batches]
        tasks = (([questions[i] for i in chosen], blind) for chosen, blind in places)
        found = [""] * len(questions), [""] * len(questions)
        for (chosen, blind), said in zip(places, self._answers(tasks, update), strict=True):
            for i, prediction in zip(chosen, said, strict=True):
                found[blind][i] = prediction
        return found

    def _answers(self, tasks: Iterable[Task], update: Callable[[int], object]) -> Iterator[list[str]]:
        """The answers to each task, in order."""
        if self.alone:
            return (answer_task(self.reader, task, update) for task in tasks)
        return self.pool.map(answer_in_worker, tasks, update)


def load(processes: int, model: tuple[Any, ...], settings: dict[str, Any], number: int) -> None:
    """Loads the model in a worker process, on the GPU of its number.

    processes: How many there are. Without a GPU, they share the CPU's threads.
    model: Arguments of `Answerer`.
    settings: Its keyword arguments.
    number: Of the worker.
    """
    global _answerer
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _answerer = Answerer(*model, **settings)


def answer_in_worker(task: Task, count: Callable[[int], object]) -> list[str]:
    return answer_task(_answerer, task, count)


def answer_task(answerer: Answerer, task: Task, update: Callable[[int], object]) -> list[str]:
    batch, blind = task
    answers = answer_batch(answerer.answer, [blinded(question) for question in batch] if blind else batch)
    update(len(batch))
    return answers
