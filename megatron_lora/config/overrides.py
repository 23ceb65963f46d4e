"""`key.path=value` on the command line: sets one value in a config's tree, before the config is checked.

tree = read_yaml("configs/quickstart.yaml")
apply_override(tree, "jobs.summarise.r=32")
"""

from megatron_lora.config.yaml_file import parse_yaml
from megatron_lora.errors import UserError, one_line


def apply_override(tree: object, override: str) -> None:
    """Set one `key.path=value` in `tree`, in place; jobs are named by index or by name; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r}: not an override; write key.path=value, for example defaults.learning_rate=1e-4")
    if not text.strip():
        raise UserError(f"{override!r}: has no value; write {path}=null for none")
    if not isinstance(tree, dict):
        raise UserError(f"{override!r}: the config is not a mapping of keys to values")
    value = parse_yaml(text, f"override {one_line(repr(override), 120)}")
    keys = _split_path(tree, path)
    if "" in keys:
        raise UserError(f"{override!r}: the key has an empty part; write key.path=value, for example defaults.learning_rate=1e-4")
    parent = tree
    for position, key in enumerate(keys[:-1]):
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = {}
        parent = parent[_index(parent, key, override, keys[:position])]
    parent[_index(parent, keys[-1], override, keys[:-1])] = value


def _split_path(tree: dict, path: str) -> list[str]:
    """Split `jobs.a.b.r` at dots, but not at those of a job's name."""
    head, _, rest = path.partition(".")
    jobs = tree.get("jobs")
    if head == "jobs" and rest and isinstance(jobs, list):
        names = [job["name"] for job in jobs if isinstance(job, dict) and isinstance(job.get("name"), str)]
        for name in sorted(names, key=len, reverse=True):
            if rest.startswith(name + ".") and not rest.split(".", 1)[0].isdigit():
                return ["jobs", name, *rest[len(name) + 1 :].split(".")]
    return path.split(".")


def _index(parent: object, key: str, override: str, path: list[str]) -> str | int:
    """Return how to index `parent`: the key of a mapping, or the position of a list's entry, which `key` gives by number or name."""
    where = ".".join(path)
    if isinstance(parent, dict):
        return key
    if not isinstance(parent, list):
        raise UserError(f"override {override!r}: {where} is {parent!r}, which has no keys")
    if key.isascii() and key.isdigit():
        if int(key) < len(parent):
            return int(key)
        raise UserError(f"override {override!r}: {where} has {len(parent)} entries, so the last is {where}.{len(parent) - 1}")
    names = [item.get("name") for item in parent if isinstance(item, dict)]
    if names.count(key) == 1:
        return [item.get("name") if isinstance(item, dict) else None for item in parent].index(key)
    known = ", ".join(str(name) for name in names if name) or f"0 to {len(parent) - 1}"
    raise UserError(f"override {override!r}: {where} has no entry {key!r}; there are {known}")
