"""What a projected cache is worth: loss and answers in five arms, on text that the fit never saw.

Arms, the same tokens scored in each:

    alone        the receiver without the text
    text         the receiver has read the text itself
    projected    the sharer has read it; the receiver reads its projected cache
    mismatched   the projected cache of another text
    noise        random keys and values, of the projected ones' mean and deviation per layer, head and dimension
"""

from c2c_kernels.evaluate.arms import ARMS, Reader
from c2c_kernels.evaluate.asking import ask
from c2c_kernels.evaluate.bootstrap import Interval
from c2c_kernels.evaluate.pieces import Piece, cut, first_piece
from c2c_kernels.evaluate.results import AnswerResult, Evaluation, LossResult
from c2c_kernels.evaluate.scoring import score
from c2c_kernels.evaluate.unseen import check_unseen

__all__ = [
    "ARMS",
    "AnswerResult",
    "Evaluation",
    "Interval",
    "LossResult",
    "Piece",
    "Reader",
    "ask",
    "check_unseen",
    "cut",
    "first_piece",
    "score",
]
