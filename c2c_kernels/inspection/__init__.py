"""Where a receiver's attention went while it wrote an answer: by layer, head, sharer token and answer token."""

from c2c_kernels.inspection.look import Look, look
from c2c_kernels.inspection.page import write_page
from c2c_kernels.inspection.picture import draw

__all__ = ["Look", "draw", "look", "write_page"]
