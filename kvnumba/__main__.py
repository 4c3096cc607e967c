"""``python -m kvnumba``: info, memory, demo and bench."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvnumba
from kvnumba.backends.registry import BACKENDS, get_backend, unavailable_reason
from kvnumba.commands.memory import PRESETS, memory_growth_table
from kvnumba.models.checkpoint import BUNDLED_MODEL


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m kvnumba", description=kvnumba.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="backends, threads, processor features and versions")

    memory = commands.add_parser("memory", help="how a model's cache grows, in each format")
    memory.add_argument("--preset", choices=PRESETS, default="llama-3-8b")
    memory.add_argument("--layers", type=int, help="instead of the preset's")
    memory.add_argument("--kv-heads", type=int, help="instead of the preset's")
    memory.add_argument("--head-dim", type=int, help="instead of the preset's")
    memory.add_argument("--batch", type=int, default=1)

    demo = commands.add_parser(
        "demo", help="a small language model reads a file, from a cache in each format"
    )
    demo.add_argument("--prompt", type=Path, metavar="FILE", help="default: a module of the standard library")
    demo.add_argument("--bytes", type=int, default=4000, help="how much of it is read (default: %(default)s)")
    demo.add_argument(
        "--model", type=Path, metavar="FOLDER", default=BUNDLED_MODEL, help="a byte-level checkpoint"
    )
    demo.add_argument("--new", type=int, default=200, help="bytes to write (default: %(default)s)")
    demo.add_argument("--backend", choices=[*BACKENDS, "auto"], help="default: KVNUMBA_BACKEND, or auto")
    demo.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table too")

    bench = commands.add_parser("bench", help="how fast this machine attends, in a minute")
    bench.add_argument("--backend", choices=[*BACKENDS, "auto"], help="default: KVNUMBA_BACKEND, or auto")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table too")

    args = parser.parse_args(argv)
    try:
        if args.command == "info":
            info()
        elif args.command == "memory":
            preset = PRESETS[args.preset]
            layers, heads, dim = (
                default if given is None else given
                for given, default in (
                    (args.layers, preset.num_layers),
                    (args.kv_heads, preset.num_kv_heads),
                    (args.head_dim, preset.head_dim),
                )
            )
            print(memory_growth_table(layers, heads, dim, args.batch))
        elif args.command == "bench":
            from kvnumba.commands import bench as benchmark

            if args.plot:
                require_extra("bench", "matplotlib")
            benchmark.run(args.backend, args.plot)
        else:
            require_extra("demo", "tqdm", *(["matplotlib"] if args.plot else []))
            from kvnumba.commands import demo as demonstration

            demonstration.run(args.model, args.prompt, args.bytes, args.new, args.backend, args.plot)
    except (OSError, ValueError, kvnumba.BackendUnavailable, kvnumba.CacheFull) as error:
        parser.exit(2, f"kvnumba {args.command}: {error}\n")


def require_extra(extra: str, *modules: str) -> None:
    """Leave with one line that says what to install, unless the modules can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(f"kvnumba {extra} needs {module}: pip install 'kvnumba[{extra}]'")


def info() -> None:
    """Print what runs here, and why what does not run does not."""
    rows = [("kvnumba", f"{kvnumba.__version__}, {Path(kvnumba.__file__).parent}")]
    rows.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    for package in ("numpy", "numba", "llvmlite", "numba-cuda"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    for name in BACKENDS:
        reason = unavailable_reason(name)
        rows.append((f"backend {name}", f"no: {reason}" if reason else "yes"))
    try:
        rows.append(("chosen backend", get_backend().name))
    except (ValueError, kvnumba.BackendUnavailable) as error:
        rows.append(("chosen backend", f"none: {error}"))
    for name in ("cuda", "cpu"):
        if unavailable_reason(name) is None:
            rows += importlib.import_module(f"kvnumba.backends.{name}").describe()
    for name, value in rows:
        print(f"{name:<18} {value}")


if __name__ == "__main__":
    main()
