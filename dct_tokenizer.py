"""DCT-coefficient tokens for Qwen2-VL: the names to use from Python, and a command line.

    python dct_tokenizer.py show FILE                                   draws what the tokens of a file keep
    python dct_tokenizer.py encode FILE --output tokens.safetensors
    python dct_tokenizer.py decode tokens.safetensors --output FILE     a .png or .mp4 file

A token of stock Qwen2-VL is a patch of 2 frames x 14 x 14 pixels. Here a token is the orthonormal DCT-II of a larger
block of pixels, of which K coefficients are kept in a fixed order. The map is linear, so a pretrained patch embedding
is carried over exactly: `fold_patch_embedding` turns its weight into one that reads coefficients.

    tokens, grid_thw = DCTTokenizer(DCTConfig.preset("x4")).encode(frames)     # uint8 [T, H, W, 3] -> float32 [N, K]
    frames = DCTTokenizer(DCTConfig.preset("x4")).decode(tokens, grid_thw)

Where it is done: dct_qwen2vl/dct/ (configuration_dct.py: the format; transform_dct.py: the transform; folding.py;
image_processing_dct.py: the processor that is saved with a checkpoint).
"""

import argparse
import importlib
import sys
from typing import Any

_ROOM = "dct_qwen2vl.dct."
_NAMES = {
    "PRESETS": "configuration_dct",
    "DCTConfig": "configuration_dct",
    "DCTTokenizer": "transform_dct",
    "DCTImageProcessor": "image_processing_dct",
    "fold_patch_embedding": "folding",
    "target_size": "image_sizes_dct",
}
_COMMANDS = {
    "show": "dct_qwen2vl.analysis.token_sheet",
    "encode": "dct_qwen2vl.analysis.token_files",
    "decode": "dct_qwen2vl.analysis.token_files",
}
__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for (PEP 562): `--help` needs no torch, and the format alone needs none either."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM + _NAMES[name]), name)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _COMMANDS:
        return importlib.import_module(_COMMANDS[argv[0]]).main(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=_COMMANDS, help="show draws what tokens keep, encode writes the tokens of a "
                        "file, decode turns tokens into an image or a video; each has a --help of its own")  # fmt: skip
    parser.parse_args(argv)
    return 2


if __name__ == "__main__":
    sys.exit(main())
