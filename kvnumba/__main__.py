"""``python -m kvnumba``: info, memory, demo, quality and bench."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path

import kvnumba
from kvnumba.backends.registry import BACKENDS
from kvnumba.commands import bench, demo, info, memory, quality
from kvnumba.commands.shapes import SHAPES
from kvnumba.models.checkpoint import BUNDLED_MODEL


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m kvnumba", description=kvnumba.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="backends, threads, processor features and versions")
    command.set_defaults(run=lambda args: info.run())

    command = commands.add_parser("memory", help="how a model's cache grows, in each format")
    command.add_argument("--preset", choices=SHAPES, default="llama-3-8b")
    command.add_argument("--layers", type=int, help="instead of the preset's")
    command.add_argument("--kv-heads", type=int, help="instead of the preset's")
    command.add_argument("--head-dim", type=int, help="instead of the preset's")
    command.add_argument("--batch", type=int, default=1)
    _add_formats(command)
    command.set_defaults(
        run=lambda args: memory.run(args.preset, args.layers, args.kv_heads, args.head_dim, args.batch)
    )

    command = commands.add_parser(
        "demo", help="a small language model reads a file, from a cache in each format"
    )
    command.add_argument(
        "--prompt", type=Path, metavar="FILE", help="default: a module of the standard library"
    )
    command.add_argument(
        "--bytes", type=int, default=4000, help="how much of it is read (default: %(default)s)"
    )
    command.add_argument(
        "--model", type=Path, metavar="FOLDER", default=BUNDLED_MODEL, help="a byte-level checkpoint"
    )
    command.add_argument("--new", type=int, default=200, help="bytes to write (default: %(default)s)")
    _add_formats(command)
    _add_backend_and_plot(command)
    command.set_defaults(
        run=lambda args: demo.run(args.model, args.prompt, args.bytes, args.new, args.backend, args.plot)
    )

    command = commands.add_parser("quality", help="what the formats of a cache cost a model")
    command.add_argument(
        "--model", type=Path, metavar="FOLDER", default=BUNDLED_MODEL, help="default: the bundled one"
    )
    command.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="token ids where tokens are not bytes: .npy, or integers with white space between them "
        "(default: a module of the standard library)",
    )
    command.add_argument(
        "--bytes", type=int, default=4000, help="how many of its tokens are read (default: %(default)s)"
    )
    calibrations = command.add_mutually_exclusive_group()
    calibrations.add_argument("--calibration", type=Path, metavar="FILE", help="default: the model's own")
    calibrations.add_argument(
        "--calibrate-on", type=Path, metavar="FILE", help="a text, as --text, on which one is measured"
    )
    _add_backend_and_plot(command)
    command.set_defaults(
        run=lambda args: quality.run(
            args.model,
            args.text,
            args.bytes,
            args.calibration,
            args.calibrate_on,
            args.backend,
            args.plot,
        )
    )

    command = commands.add_parser("bench", help="how fast this machine attends, in a minute")
    _add_formats(command)
    _add_backend_and_plot(command)
    command.set_defaults(run=lambda args: bench.run(args.backend, args.plot))

    args = parser.parse_args(argv)
    try:
        if getattr(args, "formats", None) is not None:
            runpy.run_path(str(args.formats))
        args.run(args)
    except (OSError, ValueError, kvnumba.BackendUnavailable, kvnumba.CacheFull) as error:
        parser.exit(2, f"kvnumba {args.command}: {error}\n")


def _add_formats(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--formats", type=Path, metavar="FILE.py", help="Python that registers formats of your own, shown too"
    )


def _add_backend_and_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", choices=[*BACKENDS, "auto"], help="default: KVNUMBA_BACKEND, or auto")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table too")


if __name__ == "__main__":
    main()
