"""Videos and pictures in and out, and contact sheets."""

from kinetoscope.media.clips import Clip, load_clip, load_frames
from kinetoscope.media.pictures import Array, Picture, fit_picture, load_picture
from kinetoscope.media.sheet import contact_sheet
from kinetoscope.media.video import VideoWriter, check_output, read_metadata, read_video, write_video

__all__ = [
    "Array",
    "Clip",
    "Picture",
    "VideoWriter",
    "check_output",
    "contact_sheet",
    "fit_picture",
    "load_clip",
    "load_frames",
    "load_picture",
    "read_metadata",
    "read_video",
    "write_video",
]
