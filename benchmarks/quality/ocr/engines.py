"""OCR engines that know nothing of DCT: PP-OCRv4 through RapidOCR, and Tesseract. Both read single lines."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality.ocr.pages import missing
from dct_qwen2vl.common.scripts import UserError

LINE_HEIGHT = 48  # px to which lines are enlarged; PP-OCRv4's own height, and near the best of Tesseract
FORM_FEED = "\f"  # stands between the texts of Tesseract's images; some versions end the last one with it, too
Reader = Callable[[list[np.ndarray]], list[str]]  # lines, uint8 [48, W, 3] each -> their texts


def enlarged(line: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [48, W, 3] with the same proportions."""
    height, width = line.shape[:2]
    size = (max(1, round(width * LINE_HEIGHT / height)), LINE_HEIGHT)
    return np.asarray(Image.fromarray(line).resize(size, Image.Resampling.LANCZOS))


def pp_ocr(threads: int) -> Reader:
    """PP-OCRv4's recogniser; its detector is not asked, as the places of the lines are known.

    Raises UserError if RapidOCR is missing.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ModuleNotFoundError as error:
        raise UserError(missing(error.name or "rapidocr_onnxruntime")) from error
    engine = RapidOCR(intra_op_num_threads=threads)

    def read(lines: list[np.ndarray]) -> list[str]:
        bgr = [line[..., ::-1].copy() for line in lines]
        return [text for text, _ in engine.text_rec(bgr)[0]]

    return read


def tesseract(threads: int) -> Reader:
    """Tesseract's LSTM for English, one line an image. Raises UserError if it is missing."""
    program = shutil.which("tesseract")
    if program is None:
        raise UserError("tesseract is not installed: apt-get install tesseract-ocr tesseract-ocr-eng")
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(threads)}

    def read(lines: list[np.ndarray]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            names = [f"{folder}/{number}.png" for number in range(len(lines))]
            for name, line in zip(names, lines):
                Image.fromarray(line).save(name, compress_level=1)
            listed = Path(folder, "lines.txt")
            listed.write_text("\n".join(names) + "\n", encoding="utf-8")
            command = [program, str(listed), "stdout", "-l", "eng", "--psm", "7", "--oem", "1", "--dpi", "300"]
            run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return pages_of(run, len(lines))

    return read


def pages_of(run: subprocess.CompletedProcess, count: int) -> list[str]:
    """The text of each of `count` images. Raises UserError if Tesseract did not read them all."""
    texts = run.stdout.split(FORM_FEED)
    if len(texts) == count + 1 and not texts[-1].strip():
        texts.pop()
    if run.returncode or len(texts) != count:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"tesseract read {len(texts)} of {count} lines: {last}")
    return texts


ENGINES = {"pp-ocrv4": pp_ocr, "tesseract": tesseract}
