"""A model and its answers: questions become the tokens that training makes of the same media."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dct_qwen2vl.common.imports import collecting_nothing
from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.evaluation.questions import Question

if TYPE_CHECKING:
    import torch

    from dct_qwen2vl.data.media_encoder import Encoded
    from dct_qwen2vl.data.videos import VideoSampling


MEDIA_INPUTS = {  # of the model, by kind: tokens and grids
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
KEPT_INPUTS = {"image": "image_kept", "video": "video_kept"}  # with skipping: which cells have tokens


CPU_MEMORY_FULL = "DefaultCPUAllocator: can't allocate memory"  # in the message of a RuntimeError without a class
MOST_PAIRS = 32 * 4096**2  # of characters in a batch's text: the attention mask has a value for each pair of tokens

PAD = re.compile(r"<\|(image|video)_pad\|>")  # what the chat template writes for a medium


class Reader:
    """What a model reads with: tokenizer, chat template, image processor. Media are encoded as in training.

    model_dir: Hugging Face directory.
    max_new_tokens: Longest answer, tokens.
    sampling: Frames that are read of a video.
    settings: min_pixels, max_pixels and skip_db in place of the checkpoint's. skip_db=None reads all cells.

    Raises CheckpointError.
    """

    def __init__(
        self, model_dir: Path, max_new_tokens: int, sampling: "VideoSampling | None" = None, **settings: Any
    ) -> None:
        with collecting_nothing():
            from dct_qwen2vl.checkpoints.hf_folder import load_processor
            from dct_qwen2vl.data.media_encoder import MediaEncoder
            from dct_qwen2vl.data.text_tokens import TextTokens

        self.processor = load_processor(model_dir, **settings)
        self.text_tokens = TextTokens(self.processor.tokenizer)
        self.media = MediaEncoder(self.processor.image_processor, sampling)
        self.max_new_tokens = max_new_tokens

    def count_longer(self, texts: list[str]) -> int:
        """How many texts have more tokens than the longest answer."""
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return sum(len(each) > self.max_new_tokens for each in ids)


class Answerer(Reader):
    """A model that stock transformers loads, on the current GPU if there is one.

    model_dir: As in `Reader`, and so are `max_new_tokens`, `sampling` and `settings`.
    dtype: Of the weights. None: bfloat16 on a GPU, float32 on a CPU.

    Raises CheckpointError, and UserError if the GPU's memory is full.
    """

    def __init__(
        self,
        model_dir: Path,
        max_new_tokens: int,
        sampling: "VideoSampling | None" = None,
        dtype: "torch.dtype | None" = None,
        **settings: Any,
    ) -> None:
        with collecting_nothing():
            import torch
            from transformers import AutoModelForImageTextToText

            from dct_qwen2vl.data.vision_attention import attend_each_step_alone

            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
            model = AutoModelForImageTextToText.from_pretrained(model_dir, torch_dtype=dtype)  # imports its class
        super().__init__(model_dir, max_new_tokens, sampling, **settings)
        attend_each_step_alone(model.visual)
        try:
            self.model = model.to(device).eval()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of GPU {torch.cuda.current_device()} is full before the model is there: end what else "
                "uses it, or name other GPUs in CUDA_VISIBLE_DEVICES"
            ) from error

    def become(self, other: Path, sampling: "VideoSampling | None" = None, **settings: Any) -> None:
        """From now on this is another form of the same model: its patch embedding, and what it reads with.

        other: Hugging Face directory. Of its weights only the patch embedding is read, and no others need be there.
        sampling: As in `Reader`, and so are `settings`.

        Raises CheckpointError.
        """
        import torch
        from transformers import AutoConfig

        from dct_qwen2vl.checkpoints.conversion import patch_embedding
        from dct_qwen2vl.checkpoints.source import opened

        super().__init__(other, self.max_new_tokens, sampling, **settings)
        tower = self.model.visual
        with opened(other, complete=False) as source:
            weight, config = patch_embedding(source), AutoConfig.from_pretrained(source.folder)
        with torch.device("meta"):
            embedding = type(tower)._from_config(config.vision_config).patch_embed
        embedding.proj.weight = torch.nn.Parameter(weight.to(tower.device, tower.dtype, copy=True))
        tower.patch_embed = embedding

    def answer(self, questions: list[Question]) -> list[str]:
        """Greedy answers to a batch of questions."""
        return [self.text_tokens.decode(ids) for ids in self.generate(self.model_inputs(questions)).tolist()]

    def generate(self, inputs: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """What `model_inputs` gives -> the greedy answers, int64 [B, new]."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        options |= dict.fromkeys(("temperature", "top_p", "top_k"))
        if self.media.skip_db is not None:
            return self._generate_skipping(inputs, options)
        output = self.model.generate(**inputs, **self.time_inputs(inputs), **options)
        return output[:, inputs["input_ids"].shape[1] :]

    def _generate_skipping(self, inputs: dict[str, "torch.Tensor"], options: dict[str, Any]) -> "torch.Tensor":
        """New tokens, int64 [B, new], where some cells have no token. generate() gives these alone for embeddings."""
        import torch

        from dct_qwen2vl.data.kept_cells import given_positions
        from dct_qwen2vl.data.media_embedding import embed_media

        positions = inputs.pop("position_ids")
        with torch.no_grad(), given_positions(self.model, positions):
            return self.model.generate(**embed_media(self.model, inputs), **options)

    def time_inputs(self, inputs: dict[str, "torch.Tensor"]) -> dict[str, list[float]]:
        """Seconds between the time steps of each video, as training counts them; {} where the model has no such input
        or there is no video."""
        if self.model.config.model_type != "qwen2_5_vl" or "video_grid_thw" not in inputs:
            return {}
        seconds = self.processor.image_processor.temporal_patch_size / self.media.sampling.fps
        return {"second_per_grid_ts": [seconds] * len(inputs["video_grid_thw"])}

    def model_inputs(self, questions: list[Question]) -> dict[str, "torch.Tensor"]:
        """What the model reads of a batch. L: tokens of its longest question; N, K, M: as in media_encoder.py.

        input_ids, attention_mask: int64 [B, L], padded on the left.
        pixel_values, pixel_values_videos: float32 [N, K] of all images, of all videos; left out where there are none.
        image_grid_thw, video_grid_thw: int64 [M, 3], likewise.
        With skipping also image_kept, video_kept: bool [cells of all of them]; and position_ids: int64 [3, B, L].
        """
        from dct_qwen2vl.data.media_encoder import stack_kept, stack_media

        texts, media, masks = [], [], []
        for question in questions:
            encoded = [(kind, *self.media.encode(kind, frames)) for kind, frames in question.media]
            if self.media.skip_db is not None:
                encoded, kept = self.media.skip(encoded)
                masks += kept
            texts.append(self._expand(self._prompt(question), encoded))
            media += encoded
        inputs = dict(self.processor.tokenizer(texts, padding=True, return_tensors="pt"))
        for kind, names in MEDIA_INPUTS.items():
            if any(part[0] == kind for part in media):
                inputs.update(zip(names, stack_media(kind, media)))
                if masks:
                    inputs[KEPT_INPUTS[kind]] = stack_kept(kind, media, masks)
        if self.media.skip_db is not None:
            inputs["position_ids"] = self._positions(inputs, [kind for kind, *_ in media], masks)
        return inputs

    def _positions(
        self, inputs: dict[str, "torch.Tensor"], kinds: list[str], masks: list["torch.Tensor"]
    ) -> "torch.Tensor":
        """M-RoPE positions int64 [3, B, L]. kinds, masks: of all media in order; a mask is bool [t, r, c]."""
        import numpy as np
        import torch

        from dct_qwen2vl.data.kept_cells import find_positions
        from dct_qwen2vl.data.positions import KeptRun

        pads = {self.model.config.image_token_id, self.model.config.video_token_id}
        steps = {"image": 1.0, "video": self._time_step()}
        media = iter([KeptRun(tuple(mask.shape), mask.numpy(), steps[kind]) for kind, mask in zip(kinds, masks)])
        sequences = zip(inputs["input_ids"].numpy(), inputs["attention_mask"].bool().numpy())
        return torch.from_numpy(np.stack([find_positions(ids, mask, pads, media) for ids, mask in sequences], axis=1))

    def _time_step(self) -> float:
        """Of a video's positions, as training has it."""
        from dct_qwen2vl.checkpoints.inspection import time_step

        temporal = self.processor.image_processor.temporal_patch_size
        return time_step(self.model.config.to_dict(), temporal, self.media.sampling.fps)

    def _expand(self, prompt: str, media: list["Encoded"]) -> str:
        """A prompt with as many pads for each medium as the language model has tokens of it. Raises UserError."""
        places, kinds = PAD.findall(prompt), [kind for kind, _, _ in media]
        if places != kinds:
            raise UserError(
                f"a prompt has places for {places}, its question has {kinds}: does its text contain a pad token?"
            )
        merge = self.media.image_processor.merge_size
        counts = iter([len(tokens) // merge**2 for _, tokens, _ in media])
        return PAD.sub(lambda pad: pad[0] * next(counts), prompt)

    def _prompt(self, question: Question) -> str:
        content = [
            {"type": piece} if number % 2 else {"type": "text", "text": piece}
            for number, piece in enumerate(question.pieces)
            if piece
        ]
        messages = [{"role": "user", "content": content}]
        if question.system is not None:
            messages.insert(0, {"role": "system", "content": question.system})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def cut_batches(order: list[int], lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Cuts `order` into batches. Long questions come in smaller ones: all are padded to the longest.

    order: Numbers of the questions.
    lengths: Characters of each question's text.
    batch_size: Questions of a batch, at most.
    """
    batch: list[int] = []
    for number in order:
        longest = max(lengths[i] for i in [*batch, number])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest**2 > MOST_PAIRS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def answer_batch(answer: Callable[[list[Question]], list[str]], batch: list[Question]) -> list[str]:
    """Answers to a batch, half of it at a time where the memory is full, as of one very long question among others.

    answer: As `Answerer.answer`.
    batch: At least one question.

    Raises UserError if the memory is full at a single question.
    """
    import torch

    try:
        return answer(batch)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or CPU_MEMORY_FULL in str(error)):
            raise
        if len(batch) == 1:
            raise UserError(
                f"the memory is full at one question, of {batch[0].key}: take its entry out of the data, or lower "
                "--video-total-pixels if it has videos"
            ) from error
    # Outside of the except clause: its error keeps the tensors of the failed pass.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return answer_batch(answer, batch[:half]) + answer_batch(answer, batch[half:])
