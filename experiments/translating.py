"""What the translations of other people's command lines share."""

import shlex
import sys
from collections.abc import Sequence

from experiments.settings import SettingsError


def split_command(line: str, script: str) -> tuple[list[str], list[str]]:
    """A command line as it was typed, before and after the script that it calls.

    Args:
        line: The line; a backslash may continue it.
        script: The script is the first word whose last part is this, with or without an ending.

    Returns:
        The words of the launcher, and those that the script is given.

    Raises:
        SettingsError: If the line can't be read, or does not call the script.
    """
    try:
        words = shlex.split(line.replace("\\\n", " "))
    except ValueError as error:
        raise SettingsError(f"the command line can't be read: {error}") from error
    names = {script, f"{script}.py"}
    # A path, or a module.
    for place, word in enumerate(words):
        file = word.rsplit("/", 1)[-1]
        if file in names or word.rsplit(".", 1)[-1] in names:
            return words[:place], words[place + 1 :]
    raise SettingsError(f"the command line does not call {script}: give all of it, in quotes.")


def processes_of(launch: Sequence[str]) -> int:
    """How many processes of a node torchrun was told to start; 1 without it.

    Args:
        launch: The words of the command line before the script.

    Returns:
        The number.

    Raises:
        SettingsError: If it is none.
    """
    for word, following in zip(launch, [*launch[1:], ""], strict=True):
        name, _, value = word.replace("_", "-").partition("=")
        if name == "--nproc-per-node":
            text = value or following
            if not text.isdigit():
                raise SettingsError(f"--nproc-per-node {text} must be a number.")
            return int(text)
    return 1


def show(command: str, notes: Sequence[str]) -> None:
    """Print our command, and to the standard error what differs.

    Args:
        command: Ours.
        notes: A line each.
    """
    for note in notes:
        print(f"# {note}", file=sys.stderr)
    print(command)
