"""lmms-eval with checkpoints of this repository: registers the model `qwen2_vl_dct` and hands over to lmms-eval.

    python -m benchmarks.quality.lmms_eval_model --model qwen2_vl_dct --tasks gqa,pope,docvqa_val \
        --model_args pretrained=Qwen2-VL-2B-Instruct-x4,max_pixels=1003520 --batch_size 8 --output_path results

All flags are lmms-eval's (written against 0.7.3). `pretrained` may be any Qwen2-VL directory: of pixels, of DCT tokens,
or the stock form of the latter. Videos are sampled as its files say, where no argument says other. Media are read as in
training (media_encoder.py). lmms-eval's own `qwen2_vl` turns images into JPEGs of quality 85 first, which would blur
the detail that is to be measured. Tasks hand over images decoded; a large JPEG is thus scaled down from its whole size,
where training with DCT tokens has libjpeg decode less of it. See docs/real_models.md.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from dct_qwen2vl.checkpoints.inspection import note_on_all_cells, note_on_saved_again, notes_on_bounds
from dct_qwen2vl.checkpoints.video_sampling import saved_sampling
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.common.settings import check_ranges, from_words
from dct_qwen2vl.common.video_sampling import PREFIX, VideoSampling

NAME = "qwen2_vl_dct"
MAX_NEW_TOKENS = 128  # where a task says nothing
MAX_FRAMES = 64  # read from a video where neither --model_args nor the model say it


class Qwen2VLWithDCT(lmms):
    """A Qwen2-VL directory, answered greedily by answering.Answerer.

    min_pixels, max_pixels: of an image or frame. None: the checkpoint's.
    more: video_fps, video_min_frames and so on, the fields of `VideoSampling`. None: the checkpoint's. Raises UserError
        for others.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        known = {"max_batch_size", *(PREFIX + each.name for each in fields(VideoSampling))}
        unknown = {key for key, value in more.items() if value is not None} - known
        if unknown:
            raise UserError(f"--model_args: {NAME} has no {', '.join(sorted(unknown))}")
        saved = saved_sampling(Path(pretrained))
        sampling = from_words(VideoSampling, more, PREFIX, **{"max_frames": MAX_FRAMES, **saved})
        check_ranges(sampling, PREFIX)
        self.accelerator = Accelerator()  # chooses the GPU of this process
        self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        from dct_qwen2vl.evaluation.answering import Answerer

        low, high = (int(value) if value else None for value in (min_pixels, max_pixels))
        for note in notes_on_bounds(Path(pretrained), low, high):
            print(f"Note: {note}")
        notes = (note_on_all_cells(Path(pretrained)), note_on_saved_again(Path(pretrained))) if self._rank == 0 else ()
        for note in filter(None, notes):
            print(f"Note: {note}")
        bounds = {name: value for name, value in (("min_pixels", low), ("max_pixels", high)) if value}
        self.answerer = Answerer(Path(pretrained), MAX_NEW_TOKENS, sampling, **bounds)
        self.batch_size = int(batch_size)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        said = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as progress:
            for batch in batches(requests, self.batch_size):
                settings = batch[0].args[1]
                self.answerer.max_new_tokens = settings.get("max_new_tokens", MAX_NEW_TOKENS)
                answers = self.answerer.answer([self._question(request) for request in batch])
                said += [cut_at(answer, settings.get("until")) for answer in answers]
                progress.update(len(batch))
        return said

    def _question(self, request: Instance):
        from dct_qwen2vl.evaluation.questions import Question

        context, _, doc_to_visual, doc_id, task, split = request.args
        media = [self._read(visual) for visual in flat(doc_to_visual(self.task_dict[task][split][doc_id]))]
        pieces = [piece for kind, _ in media for piece in ("", kind)]
        text = context.replace("<image>", "").strip()
        return Question(str(doc_id), 0, task, (*pieces, text), "", tuple(media))

    def _read(self, visual):
        """A PIL image, or the path of an image or video -> its kind and its frames as training reads them."""
        from dct_qwen2vl.data.images import IMAGE_EXTENSIONS

        if not isinstance(visual, (str, Path)):
            return "image", self.answerer.media.read("image", visual)
        path = Path(visual)
        kind = "image" if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS else "video"
        return kind, self.answerer.media.read(kind, path.read_bytes())

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError(f"{NAME} generates answers: choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError(f"{NAME} answers in one round")


def flat(visuals: Any) -> list:
    """What `doc_to_visual` gives: nothing, one, a list, or a list in a list."""
    if visuals is None:
        return []
    if not isinstance(visuals, list):
        return [visuals]
    return [visual for part in visuals for visual in flat(part)]


def batches(requests: list[Instance], size: int) -> Iterator[list[Instance]]:
    """Neighbours of one task and one length of answers."""
    batch: list[Instance] = []
    for request in requests:
        same = batch and (request.args[1], request.args[4]) == (batch[0].args[1], batch[0].args[4])
        if batch and (len(batch) == size or not same):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def cut_at(answer: str, until: str | list[str] | None) -> str:
    """An answer up to the first of the words that end it."""
    for end in [until] if isinstance(until, str) else until or []:
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = "benchmarks.quality.lmms_eval_model.Qwen2VLWithDCT"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, simple_class_path=path))
    cli_evaluate()


if __name__ == "__main__":
    main()
