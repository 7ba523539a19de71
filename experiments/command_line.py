"""The parser of commands that take no settings of Hydra's: what is wrong is said in one sentence."""

import argparse
from typing import NoReturn

from experiments.settings import SettingsError


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise.

        Args:
            message: What is wrong.

        Raises:
            SettingsError: Always.
        """
        raise SettingsError(f"{message}; `{self.prog} --help` tells more.")


def positive(text: str) -> int:
    """A whole number of at least 1.

    Args:
        text: As it was given.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: If it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)
