"""A model and its answers: questions become the tokens that training makes of the same media."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dct_qwen2vl.common.scripts import UserError
from dct_qwen2vl.evaluation.questions import Question, blinded

if TYPE_CHECKING:
    import torch

    from dct_qwen2vl.data.media import VideoSampling
    from dct_qwen2vl.data.media_encoder import Encoded


MEDIA_INPUTS = {  # of the model, by kind: tokens and grids
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


PAD = re.compile(r"<\|(image|video)_pad\|>")  # what the chat template writes for a medium


class Answerer:
    """A model, loaded by stock transformers, its tokenizer and its chat template; media are encoded as in training.

    sampling: frames that are read of a video. pixel_bounds: min_pixels, max_pixels in place of the checkpoint's. Raises
    CheckpointError.
    """

    def __init__(
        self, model_dir: Path, max_new_tokens: int, sampling: "VideoSampling | None" = None, **pixel_bounds: int
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        from dct_qwen2vl.checkpoints.hf_folder import load_processor
        from dct_qwen2vl.data.media_encoder import MediaEncoder
        from dct_qwen2vl.data.text_tokens import TextTokens

        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, torch_dtype=dtype).to(device).eval()
        self.processor = load_processor(model_dir, **pixel_bounds)
        self.text_tokens = TextTokens(self.processor.tokenizer)
        self.media = MediaEncoder(self.processor.image_processor, sampling)
        self.max_new_tokens = max_new_tokens

    def answer(self, questions: list[Question]) -> list[str]:
        """Greedy answers to a batch of questions."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in self.model_inputs(questions).items()}
        output = self.model.generate(
            **inputs,
            **self.time_inputs(inputs),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self.text_tokens.decode(ids) for ids in answers]

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
        """
        from dct_qwen2vl.data.media_encoder import stack_media

        texts, media = [], []
        for question in questions:
            encoded = [(kind, *self.media.encode(kind, frames)) for kind, frames in question.media]
            texts.append(self._expand(self._prompt(question), encoded))
            media += encoded
        inputs = dict(self.processor.tokenizer(texts, padding=True, return_tensors="pt"))
        for kind, names in MEDIA_INPUTS.items():
            if any(part[0] == kind for part in media):
                inputs.update(zip(names, stack_media(kind, media)))
        return inputs

    def _expand(self, prompt: str, media: list["Encoded"]) -> str:
        """A prompt with as many pads for each medium as the language model has tokens of it. Raises UserError."""
        places, kinds = PAD.findall(prompt), [kind for kind, _, _ in media]
        if places != kinds:
            raise UserError(f"a prompt has places for {places}, its question has {kinds}: does its text spell a pad?")
        merge = self.media.image_processor.merge_size
        counts = iter([t * h * w // merge**2 for _, _, (t, h, w) in media])
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


def answer_all(
    answerer: Answerer,
    questions: list[Question],
    batch_size: int,
    blind: bool,
    update: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Predictions in the order of `questions`; batches hold questions of like length, so little is padded.

    update: is called after each batch with the number of its questions.
    """
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].media), len(questions[i].text)))
    predictions = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [blinded(questions[i]) if blind else questions[i] for i in chosen]
        for i, prediction in zip(chosen, answerer.answer(batch), strict=True):
            predictions[i] = prediction
        update(len(batch))
    return predictions
