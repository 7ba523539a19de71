"""``python -m experiments``: which command, with which words."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

# Subcommand: (module that has `run(words) -> exit status`, one line of help).
COMMANDS = {
    "train": ("experiments.train_command", "train a Llama-style model; settings by YAML"),
    "plan": ("experiments.plan", "memory, work and balance on many ranks, before running"),
    "demo": ("experiments.demo", "compare optimizers on a tiny model: table and plots"),
}
# What the extra `dev` brings.
_EXTRA = ("hydra", "omegaconf", "tqdm", "matplotlib", "sentencepiece")


def main(words: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        words: The command line after the program's name; None takes it from ``sys.argv``.

    Returns:
        Exit status: 0, 1 for a run that failed, 2 for a mistake in the command or its settings,
        128 + n for a run that signal n stopped (130 for Ctrl-C).
    """
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Distributed Shampoo with stacked blocks and fast batched inverse roots.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`python -m experiments COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    arguments = parser.parse_args(words[:1])
    if arguments.version:
        import dash_shampoo

        print(f"dash-shampoo {getattr(dash_shampoo, '__version__', 'unknown')}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    if arguments.command not in COMMANDS:
        return fail(f"unknown command {arguments.command!r}; one of {', '.join(COMMANDS)}.", 2)
    try:
        run: Callable[[list[str]], int] = importlib.import_module(
            COMMANDS[arguments.command][0]
        ).run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        return fail(f"the module {missing} is missing: pip install -e '.[dev]'", 2)
    return run(words[1:])


def fail(message: str, status: int) -> int:
    """Print an error message.

    Args:
        message: What is wrong and what to do.
        status: The exit status.

    Returns:
        The exit status.
    """
    print(f"experiments: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
