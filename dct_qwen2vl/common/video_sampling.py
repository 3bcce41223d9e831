"""Which frames of a video are read: settings that data preparation, training and evaluation share."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dct_qwen2vl.common.settings import setting

PREFIX = "video_"  # of the settings' names in commands, as in --video-fps


@dataclass(frozen=True)
class VideoSampling:
    """What is read of a video, as in Qwen2-VL's own utilities (`qwen_vl_utils.vision_process`).

    fps: frames of a second. They are spread evenly over the video.
    min_frames, max_frames: bounds of their number. It is even where possible, and never more than the video has.
    total_pixels: most pixels of a video. Frames are counted in pairs, as a token holds two of them.
    """

    fps: float = setting("", 2.0, "frames read from each second of a video", over=0)
    min_frames: int = setting(
        "", 4, "least frames read from a video, if it has as many", at_least=1, not_over="max_frames"
    )
    max_frames: int = setting("", 768, "most frames read from a video", at_least=1)
    total_pixels: int = setting(
        "", 24_576 * 28 * 28, "most pixels of all frames of a video, two frames counted as one", at_least=1
    )

    @classmethod
    def of(cls, settings: Any) -> "VideoSampling":
        """settings: of a command. Its names have a prefix: `video_fps`, `video_min_frames` and so on."""
        return cls(**{each.name: getattr(settings, PREFIX + each.name) for each in fields(cls)})

    def count(self, total_frames: int, frames_per_second: float) -> int:
        """How many frames of a video are read. An even number, or 1.

        total_frames: Frames that the video has.
        frames_per_second: Its frame rate. 0: unknown, all frames are wanted.
        """
        wanted = total_frames / frames_per_second * self.fps if frames_per_second > 0 else total_frames
        least, most = math.ceil(self.min_frames / 2) * 2, self.max_frames // 2 * 2
        return max(1, int(min(max(wanted, least), most, total_frames)) // 2 * 2)

    def indices(self, total_frames: int, frames_per_second: float) -> np.ndarray:
        """Numbers of the frames to read from a video of constant frame rate, int64 [count], ascending.

        total_frames: Frames that the video has.
        frames_per_second: Its frame rate.
        """
        count = self.count(total_frames, frames_per_second)
        return np.linspace(0, total_frames - 1, count).round().astype(np.int64)

    def indices_at(self, seconds: np.ndarray, frames_per_second: float) -> np.ndarray:
        """Numbers of the frames to read from a video whose frames have times, int64 [count], ascending.

        seconds: float64 [total_frames], seconds. When each frame appears; strictly ascending.
        frames_per_second: What the file says. Used if the times agree with it.

        If no frame is off a constant rate by more than half an interval, this is `indices`. Otherwise frames are chosen
        by time: those on the screen at evenly spaced moments. A frame that stays long may then come several times.
        """
        total = len(seconds)
        if total < 3:
            return self.indices(total, frames_per_second)
        interval = (seconds[-1] - seconds[0]) / (total - 1)
        if np.abs(seconds - np.linspace(seconds[0], seconds[-1], total)).max() <= interval / 2:
            agrees = abs(frames_per_second * interval - 1) < 0.01
            return self.indices(total, frames_per_second if agrees else 1 / interval)
        duration = seconds[-1] - seconds[0] + float(np.median(np.diff(seconds)))
        moments = np.linspace(seconds[0], seconds[-1], self.count(total, total / duration))
        return np.searchsorted(seconds, moments, side="right") - 1

    def max_frame_pixels(self, frames: int, min_pixels: int, max_pixels: int) -> int:
        """Most pixels of one frame, within the budget for the whole video.

        frames: Frames that are read of the video.
        min_pixels: Least pixels of an image.
        max_pixels: Most pixels of an image.
        """
        return min(max_pixels, max(int(self.total_pixels / frames * 2), int(min_pixels * 1.05)))
