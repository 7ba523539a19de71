"""Public names are documented, and what a config's docstring says of its defaults is true."""

import dataclasses
import importlib
import inspect
import re
from dataclasses import dataclass

import pytest

import dash_shampoo
import dash_shampoo.eigenbasis
import dash_shampoo.inverse_root
import dash_shampoo.orthogonalization

OWN = "dash_shampoo."
ELSEWHERE = ("dash_shampoo.base",)


def public_objects() -> dict[str, object]:
    """Every class and function of ours under a public name; those of the base are the base's."""
    found = {}
    for module in (
        dash_shampoo,
        dash_shampoo.eigenbasis,
        dash_shampoo.inverse_root,
        dash_shampoo.orthogonalization,
    ):
        names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for name in names:
            value = getattr(module, name)
            origin = getattr(value, "__module__", "") or ""
            is_ours = origin.startswith(OWN) and not origin.startswith(ELSEWHERE)
            if is_ours and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{module.__name__}.{name}"] = value
    return found


def public_configs() -> dict[str, type]:
    return {
        name.split(".")[-1]: value
        for name, value in public_objects().items()
        if inspect.isclass(value)
        and (value.__module__ == "dash_shampoo.config" or name.endswith(("Config", "Scaling")))
    }


def attributes(docstring: str) -> dict[str, str]:
    """Name → text of every entry of the Attributes section."""
    text = inspect.cleandoc(docstring)
    section = re.search(r"(?ms)^Attributes:\n(.*?)(?=^\S|\Z)", text)
    entries: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else []:
        entry = re.match(r"    (\w+)(?: \([^:]*\))?: (.*)", line)
        if entry:
            name = entry[1]
            entries[name] = entry[2]
        elif name:
            entries[name] += " " + line.strip()
    return entries


def mistakes(config: type) -> list[str]:
    """What the docstring of a config class leaves out or gets wrong."""
    docstring = config.__dict__.get("__doc__") or ""
    entries = attributes(docstring)
    known = {field.name: field for field in dataclasses.fields(config)}
    wrong = [f"{name} is no field" for name in entries if name not in known]
    for name in config.__annotations__:
        if name not in entries:
            wrong.append(f"{name} is not documented")
    namespace = vars(dash_shampoo) | vars(importlib.import_module(config.__module__))
    for name, text in entries.items():
        stated = re.search(r"\(Default: (.*)\)\s*$", text)
        if name not in known:
            continue
        field = known[name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            continue
        if not stated:
            wrong.append(f"{name} does not end in its (Default: ...)")
        elif eval(stated[1], dict(namespace)) != default:
            wrong.append(f"{name} defaults to {default!r}, not {stated[1]}")
    return wrong


def test_discovery():
    assert {"dash_shampoo.DashShampoo", "dash_shampoo.inverse_root.inverse_root"} <= set(
        public_objects()
    )
    assert {"NewtonDBConfig", "ChebyshevConfig", "FrobeniusScaling", "SafetyConfig"} <= set(
        public_configs()
    )


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_public_object_has_a_docstring(name):
    value = public_objects()[name]
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own, f"{name} has no docstring"
    assert not own.startswith(f"{name.split('.')[-1]}("), f"{name} has only a generated docstring"


@pytest.mark.parametrize(
    "name",
    [n for n, v in sorted(public_objects().items()) if inspect.isfunction(v)],
)
def test_public_function_documents_its_arguments(name):
    function = public_objects()[name]
    docstring = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"(?m)^    \*{{0,2}}{argument}(?: \(.*\))?:", docstring), argument


@pytest.mark.parametrize("name", sorted(public_configs()))
def test_config_documents_its_fields_and_defaults(name):
    config = public_configs()[name]
    assert dataclasses.is_dataclass(config)
    assert mistakes(config) == []


@pytest.mark.parametrize("name", sorted(public_configs()))
def test_config_says_when_to_choose_it(name):
    config = public_configs()[name]
    words = " ".join((config.__doc__ or "").split())
    assert ("Abstract" if inspect.isabstract(config) else "Choose this") in words


def test_mistakes_are_found():
    @dataclass
    class Config:
        """A config.

        Attributes:
            right: As it is. (Default: "a")
            wrong (int): Not as it is, in
                two lines. (Default: 2)
            silent: Says nothing.
            unknown: Nowhere.

        Note:
            other: is no attribute. (Default: 1)
        """

        right: str = "a"
        wrong: int = 1
        silent: int = 1
        missing: int = 1

    assert mistakes(Config) == [
        "unknown is no field",
        "missing is not documented",
        "wrong defaults to 1, not 2",
        "silent does not end in its (Default: ...)",
    ]
