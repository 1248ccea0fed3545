"""Video files and contact sheets."""

from kinetoscope.media.sheet import contact_sheet
from kinetoscope.media.video import check_output, read_metadata, read_video, write_video

__all__ = ["check_output", "contact_sheet", "read_metadata", "read_video", "write_video"]
