"""Speed and memory. What qwen_launch.sh sets for the device's memory is set here, before PyTorch is imported."""

import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
