"""Reading a configuration file: YAML → plain data, with the place where each key stands, and errors that name it.

Knows nothing of what the keys mean: that is ``config.py``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlhf_ray.errors import ConfigError

Key = tuple[str | int, ...]
Places = dict[Key, str]
"""Key → where it was written: ``run.yaml:12`` or ``--set``."""

OVERRIDE = "--set"
RECIPES = Path(__file__).parent / "recipes"

_TAG = "tag:yaml.org,2002:"
_CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


class _CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core rules: 1e-6 is a number; yes, on, 1:30 and 2026-01-31 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own interface)


for _name, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false|True|False", list("tfTF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def recipe_names() -> list[str]:
    """Names that ``recipe:NAME`` knows."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The packaged file behind ``recipe:NAME``, comments and all. Raises ``ConfigError`` for an unknown name."""
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; the recipes are {', '.join(recipe_names())}")
    return (RECIPES / f"{name}.yaml").read_text("utf-8")


def read_config_file(path: str) -> tuple[dict[str, Any], Places]:
    """The file's keys and values, and where each stands. Raises ``ConfigError`` when it is not one mapping in YAML."""
    places: Places = {}
    data = _parse(_read_text(path), path, places, ())
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys with values, such as name: demo; it holds {show(data)}")
    return data or {}, places


def apply_override(data: dict[str, Any], override: str, places: Places) -> None:
    """Set ``a.b=value`` (the value is YAML) in ``data``, and note in ``places`` that it came from there."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{OVERRIDE} {override} must have the form key=value, such as learner.lr=1e-6")
    section = data
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
            places.setdefault(tuple(keys[:depth]), OVERRIDE)
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"{OVERRIDE} {override} cannot apply: {'.'.join(keys[:depth])} is a value, not a section")
    path = tuple(keys)
    for replaced in [key for key in places if key[: len(path)] == path]:
        del places[replaced]
    places[path] = OVERRIDE
    section[keys[-1]] = _parse(text, OVERRIDE, places, path)


def dotted(path: Key) -> str:
    """``("ppo", "steps")`` → ``ppo.steps``."""
    return ".".join(str(part) for part in path)


def show(value: Any) -> str:
    """A value as an error message quotes it: short, and as it would stand in the file."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def config_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every settable key below ``section``, dotted, with its field; the sections themselves are left out.

    What the kinds of a list's entries have in common comes once, under the first kind.
    """
    for name, field in section.model_fields.items():
        inner, kinds = _section_of(field), _kinds_of(field)
        if inner is not None:
            yield from config_keys(inner, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        common: set[str] = set()
        for entry in kinds.values():
            yield from ((f"{prefix}{name}.N.{key}", f) for key, f in config_keys(entry) if key not in common)
            common |= entry.model_fields.keys() - {"kind"}


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _named_section(field: FieldInfo) -> type[BaseModel] | None:
    """Of a section whose keys are names that a person gives: the section behind each."""
    values = typing.get_args(field.annotation)[1:] if typing.get_origin(field.annotation) is dict else ()
    return next((section for section in values if issubclass(section, BaseModel)), None)


def _kinds_of(field: FieldInfo) -> Mapping[str, type[BaseModel]]:
    """Of a list of sections that ``kind`` tells apart: kind → section; {} for any other field."""
    if typing.get_origin(field.annotation) is not tuple:
        return {}
    entry, *facts = typing.get_args(typing.get_args(field.annotation)[0]) or (None,)
    if not any(isinstance(fact, FieldInfo) and fact.discriminator == "kind" for fact in facts):
        return {}
    sections: tuple[type[BaseModel], ...] = typing.get_args(entry)
    return {typing.get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def _resolve(location: Key, model: type[BaseModel]) -> tuple[Key, type[BaseModel]]:
    """A place as pydantic tells it → the key as a person writes it, and the section that the key is of.

    Behind the number of a list's entry pydantic puts the entry's kind, which nobody writes there.
    """
    path: Key = ()
    section = model
    inner: type[BaseModel] | None = None
    named: type[BaseModel] | None = None
    kinds: Mapping[str, type[BaseModel]] = {}
    for part in location:
        if part in kinds:
            inner, kinds = kinds[str(part)], {}
            continue
        path += (part,)
        if named is not None:
            inner, named = named, None
            continue
        section, inner = inner or section, None
        if field := section.model_fields.get(str(part)):
            inner, named, kinds = _section_of(field), _named_section(field), _kinds_of(field)
    return path, section


def problem_sentence(error: ErrorDetails, model: type[BaseModel], places: Places, source: str) -> str:
    """One of pydantic's findings as a sentence that a person can act on."""
    kind, context = error["type"], error.get("ctx", {})
    path, section = _resolve(tuple(error["loc"]), model)
    if kind.startswith("union_tag"):
        path += ("kind",)
    key = dotted(path)
    if kind in ("missing", "union_tag_not_found"):
        required = [(k, f) for k, f in config_keys(model) if f.is_required() and (k == key or k.startswith(f"{key}."))]
        return (
            "\n".join(f"{k} is missing from {source}: {(f.description or key).rstrip('.')}" for k, f in required)
            or f"{key} is missing from {source}"
        )
    if kind == "value_error":
        sentence = str(context["error"])
        return f"{sentence}{places_named(sentence, places)}"
    where = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), source)
    if kind == "extra_forbidden":
        return f"{key} ({where}) is not a key; {_nearest(path, section, model)}"
    value = context["tag"] if kind == "union_tag_invalid" else error["input"]
    return f"{key} ({where}) must be {_expected(kind, context, error['msg'])}, not {show(value)}"


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    bounds = {"greater_than": "above {gt:g}", "greater_than_equal": "at least {ge:g}", "less_than": "below {lt:g}"}
    bounds |= {"less_than_equal": "at most {le:g}", "literal_error": "one of {expected}"}
    bounds |= {"union_tag_invalid": "one of {expected_tags}"}
    if kind in bounds:
        return bounds[kind].format(**context)
    if kind == "string_pattern_mismatch":
        return "letters, digits, dots, dashes and underscores, beginning with a letter or digit"
    words = {"int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false"}
    words |= {"string": "text (in quotes, if it looks like a number)", "tuple": "a list"}
    words |= {"model": "a section of keys", "dict": "a section of keys"}
    return words.get(kind.split("_")[0], message.removeprefix("Input should be "))


def _nearest(path: Key, section: type[BaseModel], model: type[BaseModel]) -> str:
    """What an unknown key was probably meant to be: a sibling, else a key of that name elsewhere, else the choices."""
    name, prefix = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    siblings = list(section.model_fields)
    by_leaf = {key.rpartition(".")[2]: key for key, _ in config_keys(model)}
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"did you mean {prefix}{close[0]}"
    if close := difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.8):
        return f"did you mean {by_leaf[close[0]]}"
    return f"the keys {'of ' + prefix.rstrip('.') if prefix else 'at the top'} are {', '.join(siblings)}"


def places_named(sentence: str, places: Places) -> str:
    """Where the keys that a sentence names stand, as a parenthesis; empty when all are defaults."""
    named = re.findall(r"[a-z_]+(?:\.(?:[a-z_]+|\d+))*(?= =)", sentence)
    keys = [tuple(int(part) if part.isdigit() else part for part in key.split(".")) for key in named]
    found = dict.fromkeys(places[key] for key in keys if key in places)
    return f" ({', '.join(found)})" if found else ""


def _read_text(path: str) -> str:
    if path.startswith("recipe:"):
        return recipe_text(path.removeprefix("recipe:"))
    try:
        return Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        recipes = ", ".join(f"recipe:{name}" for name in recipe_names())
        raise ConfigError(
            f"the configuration file {path} cannot be read ({error.strerror}); give a YAML file, or one of {recipes}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not UTF-8 text") from error


def _parse(text: str, source: str, places: Places, path: Key) -> Any:
    """YAML → dicts, lists and scalars. ``path`` is where the text belongs; its keys are noted in ``places``."""
    reader = _Reader(source, places)
    try:
        data = reader.plain(yaml.compose(text, Loader=_CoreLoader), path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None and source != OVERRIDE else source
        raise ConfigError(f"{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply, or an alias in it refers to itself") from error
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return data


class _Reader:
    """Turns YAML nodes into plain data; collects a sentence for each key given twice and each value that is none."""

    def __init__(self, source: str, places: Places) -> None:
        self.source = source
        self.places = places
        self.problems: list[str] = []

    def plain(self, node: yaml.Node | None, path: Key) -> Any:
        if node is None:
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return {key: self.plain(value, (*path, key)) for key, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.plain(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _pairs(self, node: yaml.MappingNode, path: Key) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, str] = {}
        for key_node, value in node.value:
            key, place = str(key_node.value), self._place(key_node)
            if key in seen:
                self.problems.append(f"{dotted((*path, key))} is given twice, at {seen[key]} and {place}")
            seen[key] = self.places[*path, key] = place
            yield key, value

    def _scalar(self, node: yaml.Node, path: Key) -> Any:
        try:
            value = _CONVERT[node.tag.removeprefix(_TAG)](node.value)
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            written = f"the tag {node.tag}" if node.tag.removeprefix(_TAG) not in _CONVERT else show(node.value)
            key = dotted(path) or "the file"
            self.problems.append(f"{key} ({self._place(node)}) is no number, text, list or section: {written}")
        return value

    def _place(self, node: yaml.Node) -> str:
        return self.source if self.source == OVERRIDE else f"{self.source}:{node.start_mark.line + 1}"
