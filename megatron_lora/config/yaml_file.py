"""YAML files as plain Python data, with nothing guessed.

Scalars follow the core schema of YAML 1.2: `1e-4` is a float, `no`, `1:30` and `2_000` are strings,
`010` is ten. A key that is given twice in a mapping is an error that names its line. Anchors and
aliases work; every use is a copy of its own, so that an override of one never changes another.
There is no merge key; `defaults:` has its purpose.

    tree = read_yaml("configs/quickstart.yaml")
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_lora.errors import UserError, one_line

STRING = "tag:yaml.org,2002:str"
SCALARS = {
    "tag:yaml.org,2002:null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "tag:yaml.org,2002:bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"^(?:[-+]?[0-9]{1,300}|0o[0-7]{1,30}|0x[0-9a-fA-F]{1,30})$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


MAX_NODES = 1_000_000  # values in one document, with aliases written in full


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 (null, bool, int, float; all else is a string)."""

    yaml_implicit_resolvers = {None: list(SCALARS.items())}


class StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, quoting what StrictLoader would not read back as a string."""

    yaml_implicit_resolvers = {None: list(SCALARS.items())}

    def ignore_aliases(self, data) -> bool:
        """Write every value in full: a reader of a config should not have to look up `*id001`."""
        return True


def read_yaml(path: str | Path) -> object:
    """Read one YAML file as dicts, lists and scalars; UserError names the file and line of what is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a YAML config") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the path of a YAML config inside it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the config as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> object:
    """Parse one YAML document; errors begin with `source`."""
    try:
        loader = StrictLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = one_line(", ".join(filter(None, (error.context, error.problem))))
        raise UserError(f"{source}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: not valid YAML: the character {error.character!r} is not allowed") from None
    except RecursionError:
        raise UserError(f"{source}: nests too deeply; a config has four levels") from None
    return None if root is None else _construct(root, source, (), itertools.count(1))


def dump_yaml(tree: object) -> str:
    """Write plain data as YAML that read_yaml reads back as the same data, keys in the given order."""
    return yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, width=140, allow_unicode=True)


def _construct(node: yaml.Node, source: str, parents: tuple[int, ...], counter: Iterator[int]) -> object:
    """Turn a node into data, a new copy for each alias; `parents` holds the ids of the nodes around it, `counter` counts nodes."""
    where = f"{source}:{node.start_mark.line + 1}"
    if next(counter) > MAX_NODES:
        raise UserError(f"{where}: the aliases make more than {MAX_NODES:,} values; write the values in full")
    if id(node) in parents:
        raise UserError(f"{where}: an alias that contains itself; write the value in full")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where)
    parents = (*parents, id(node))
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise UserError(f"{where}: the tag {node.tag} is not supported; write plain YAML without tags")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, source, parents, counter) for item in node.value]
    mapping = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{source}:{line}: a key must be plain text")
        if key_node.value in mapping:
            raise UserError(f"{source}:{line}: the key {key_node.value!r} is given twice in one mapping; remove one of the two")
        mapping[key_node.value] = _construct(value_node, source, parents, counter)
    return mapping


def _scalar(node: yaml.ScalarNode, where: str) -> object:
    """Turn a scalar node into None, bool, int, float or str."""
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    if node.tag != STRING and not (node.tag in SCALARS and SCALARS[node.tag].match(text)):
        raise UserError(f"{where}: {text!r} with the tag {node.tag} is not supported; write plain YAML without tags")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
