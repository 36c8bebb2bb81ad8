"""Arguments, and which part of the command they go to."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from c2c_kernels._version import __version__
from c2c_kernels.cli.errors import CommandError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 where it failed, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            from c2c_kernels.cli import info

            return info.run(options.json)
        from c2c_kernels.cli import demo

        return demo.run(options)
    except CommandError as error:
        print(f"c2c-kernels: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of standard output has left; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("c2c-kernels: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="c2c-kernels", description="One language model uses what another has read, through its key/value cache."
    )
    parser.add_argument("--version", action="version", version=f"c2c-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")

    info = commands.add_parser("info", help="backends and why one is missing, instruction set, threads, versions")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    demo = commands.add_parser(
        "demo",
        help="a model answers questions about a document that only another one has read",
        description="A sharer reads a document; a receiver that never sees the text answers questions about it through "
        "the sharer's cache. Side by side: no context, the text in the prompt, the cache.",
        epilog="One sharer reads every document. Several sharers read one document each, or one document in parts. A "
        "sharer must have the receiver's architecture.",
    )
    model = "Hugging Face id, model folder or .gguf file"
    demo.add_argument(
        "--document", action="append", metavar="FILE", help="what a sharer reads; repeatable, one for each sharer"
    )
    demo.add_argument("--question", action="append", metavar="TEXT", help="what the receiver is asked (repeatable)")
    demo.add_argument("--receiver", metavar="MODEL", help=f"{model}; default SmolLM2-135M-Instruct")
    demo.add_argument(
        "--sharer", action="append", metavar="MODEL", help=f"{model} (repeatable); default: the receiver's"
    )
    demo.add_argument("--plot", metavar="FILE.png", help="draw where the attention went")
    demo.add_argument("--max-new-tokens", type=_positive, default=40, metavar="N", help="length of an answer (40)")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches")
    demo.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    demo.add_argument("--backend", metavar="NAME", help="kernels to use (default: the fastest that runs here)")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, got {text!r}")
    return number
