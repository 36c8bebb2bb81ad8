"""What `c2c-kernels fit` takes; apart from the command, which needs torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from c2c_kernels.cli import known_pairs, texts

Number = Callable[[str], int]


def add_fit_arguments(parser: argparse.ArgumentParser, positive: Number, threads: Number) -> None:
    """The command's options; `positive` and `threads` are the types of whole numbers."""
    model = "Hugging Face id, model folder or .gguf file"
    parser.add_argument(
        "--pair",
        choices=known_pairs.PAIRS,
        help=f"make the projector of a known pair where the demo looks for it: its models, {known_pairs.CORPUS}, "
        f"{known_pairs.TOKENS} tokens; what else is given holds",
    )
    parser.add_argument("--sharer", metavar="MODEL", help=f"the model that reads; {model}")
    parser.add_argument("--receiver", metavar="MODEL", help=f"the model that answers; {model}")
    parser.add_argument(
        "--corpus",
        action="append",
        metavar="TEXTS",
        help=f"what to fit on (repeatable): {texts.HELP}",
    )
    parser.add_argument("--output", metavar="FILE.safetensors", help="the projector")
    parser.add_argument("--layers", type=positive, default=3, metavar="N", help="sharer layers that a layer reads (3)")
    parser.add_argument("--before", type=positive, metavar="N", help="read the N tokens before the aligned one as well")
    parser.add_argument("--rank", type=positive, metavar="N", help="rank of the maps (default: full)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="tokens to fit, in whole windows (default: all)")
    parser.add_argument(
        "--window",
        type=positive,
        default=480,
        metavar="N",
        help="tokens of a piece that both models read at once (480)",
    )
    parser.add_argument(
        "--segment",
        choices=("receiver", "sharer"),
        default="receiver",
        help="whose tokens the projected text consists of (receiver)",
    )
    parser.add_argument(
        "--storage", choices=("float32", "bfloat16", "int8"), default="int8", help="of matrices in the file (int8)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON object")
