"""Compositions as the commands get them, without running one."""

from hydra import compose, initialize_config_dir

from experiments.settings import CONFIGS, register


def composed(words, command="train"):
    register()
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(command, list(words))


def options(group):
    """What a group can be set to."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
