"""Arguments, and which part of the command they go to."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from c2c_kernels._version import __version__
from c2c_kernels.cli import corpus, evaluate, fuser_convert, inspect, known_pairs, questions, train, tune
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.fit_arguments import add_fit_arguments

_MOST_THREADS = 1024
# Commands that bring their own arguments.
_COMMANDS: dict[str, Any] = {
    "corpus": corpus,
    "questions": questions,
    "train": train,
    "evaluate": evaluate,
    "inspect": inspect,
    "convert": fuser_convert,
    "tune": tune,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 where it failed, 2 for wrong arguments."""
    try:
        _tolerate(sys.stdout, sys.stderr)
        options = _parser().parse_args(arguments)
        if options.command == "info":
            from c2c_kernels.cli import info

            return info.run(options.json)
        if options.command == "bench":
            from c2c_kernels.cli import bench

            return bench.run(options)
        if options.command in _COMMANDS:
            return _COMMANDS[options.command].run(options)
        if options.command == "fit":
            from c2c_kernels.cli import fit

            return fit.run(options)
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


def _tolerate(*streams: TextIO) -> None:
    """Lets the streams write a question mark for what their encoding lacks, rather than raise."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="c2c-kernels", description="One language model uses what another has read, through its key/value cache."
    )
    parser.add_argument("--version", action="version", version=f"c2c-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="backends and why one is missing, instruction set, threads, versions")
    info.add_argument("--json", action="store_true", help="print one JSON object")

    demo = commands.add_parser(
        "demo",
        help="a model answers questions about a document that only another one has read",
        description="A sharer reads a document; a receiver that never sees the text answers questions about it through "
        "the sharer's cache. Side by side: no context, the text in the prompt, the cache.",
        epilog="One sharer reads every document. Several sharers read one document each, or one document in parts. A "
        "sharer must have the receiver's architecture, or a projector between the two: --pair, --swap.",
    )
    model = "Hugging Face id, model folder or .gguf file"
    demo.add_argument(
        "--document",
        action="append",
        type=_given,
        metavar="FILE",
        help="what a sharer reads; repeatable, one for each sharer",
    )
    demo.add_argument(
        "--question", action="append", type=_text, metavar="TEXT", help="what the receiver is asked (repeatable)"
    )
    demo.add_argument("--receiver", type=_given, metavar="MODEL", help=f"{model}; default SmolLM2-135M-Instruct")
    demo.add_argument(
        "--sharer", action="append", type=_given, metavar="MODEL", help=f"{model} (repeatable); default: the receiver's"
    )
    pair = demo.add_argument_group("models that share nothing, through a projected cache")
    pair.add_argument(
        "--pair",
        choices=known_pairs.PAIRS,
        help="the first model reads, the second answers: without context, from the text, from the projected cache, "
        "from that of another text",
    )
    pair.add_argument(
        "--swap",
        action="store_true",
        help="both ways at once: two models have read different documents, each answers from the other's",
    )
    pair.add_argument(
        "--projector",
        action="append",
        type=_given,
        metavar="FILE",
        help="what `c2c-kernels fit` wrote (default: the pair's own); twice with --swap: there and back",
    )
    demo.add_argument("--plot", type=_given, metavar="FILE.png", help="draw where the attention went")
    demo.add_argument("--max-new-tokens", type=_positive, default=40, metavar="N", help="length of an answer (40)")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches")
    demo.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    demo.add_argument(
        "--backend", type=_given, metavar="NAME", help="kernels to use (default: the fastest that runs here)"
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object")

    fit = commands.add_parser(
        "fit",
        help="make the projector that a sharer of another kind needs",
        description="Two models read the same texts; ridge regression gives the maps from the sharer's keys and values "
        "to the receiver's. An interrupted run goes on where it was: give the same command again.",
    )
    add_fit_arguments(fit, _positive, _threads)

    bench = commands.add_parser(
        "bench",
        help="speed of the kernels beside PyTorch's, and against what the machine can do",
        description="Measures the machine, then every line of the table: time, the fraction of the shortest time that "
        "bandwidth and multiply-adds allow, and how many times ours the alternatives take. A result that does not "
        "match the reference is not timed. The page is bench/README.md.",
    )
    bench.add_argument("--quick", action="store_true", help="a short list of shapes, under two minutes")
    bench.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out flex_attention and torch.compile, which are compiled for every shape for some 20 s",
    )
    bench.add_argument("--filter", default="", metavar="TEXT", help="only lines whose name has all these words")
    bench.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="of caches (repeatable)"
    )
    bench.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (default: cpu)")
    bench.add_argument("--explain", action="store_true", help='the cost model of strategy="auto" beside measured times')
    bench.add_argument("--end-to-end", action="store_true", help="generate beside SDPA; needs the extra [demo]")
    bench.add_argument("--json", type=_given, metavar="FILE", help="write everything measured")
    bench.add_argument("--plot", type=_given, metavar="FILE.png", help="draw the lines under the machine's roofs")
    bench.add_argument(
        "--markdown", type=_given, metavar="FILE", help="write the tables, between the marks that the file has"
    )
    for module in _COMMANDS.values():
        module.add_parser(commands)
    return parser


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"text in the terminal's encoding is wanted, got {text!r}") from None
    return _given(text)


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is wanted, got {text!r}")
    return number


def _threads(text: str) -> int:
    number = _whole(text)
    if not 1 <= number <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to {_MOST_THREADS} is wanted, got {text!r}")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return 0
