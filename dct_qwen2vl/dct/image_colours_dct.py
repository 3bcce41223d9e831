"""Any PIL image -> 8-bit RGB. Needs Pillow and numpy only.

The file is saved beside converted checkpoints, with image_processing_dct.py.
"""

import numpy as np
from PIL import Image


def pil_to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency on white, 16-bit grey scaled to 8 (of which Pillow's own convert takes no notice)."""
    if image.mode.startswith("I"):  # "I;16", and "I" as older files are read
        grey = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
