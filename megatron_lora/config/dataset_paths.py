"""What a dataset's `path` and `type` may be: files of records by their endings, patterns of files, ids of the hub."""

import re
from collections.abc import Mapping

from megatron_lora.config.rules import accepts, path_of, show
from megatron_lora.errors import UserError

DATASET_TYPES = ("messages", "sharegpt", "alpaca", "alpaca_chat", "prompt_completion", "text", "lengths")
DATASET_FILES = (
    *(ending + compressed for ending in (".jsonl", ".json", ".csv") for compressed in ("", ".gz", ".zst")),
    ".parquet",
    ".arrow",
)
DATASET_FILES_IN_WORDS = ".json, .jsonl or .csv (.gz and .zst after these), .parquet or .arrow"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@accepts(f"the path of a file that ends in {DATASET_FILES_IN_WORDS}; a pattern of such files (`data/*.jsonl`); or a hub id (`owner/name`)")
def dataset_path(path: str, value: object) -> str:
    """Accept where records are: a file, a pattern of files, or a data set of the hub."""
    name = path_of("the path of a dataset")(path, value)
    if not name.endswith(DATASET_FILES) and not is_hub_id(name):
        raise UserError(
            f"{path}: {show(value)} is no kind of file that is read; use one that ends in {DATASET_FILES_IN_WORDS}, or a hub id"
        )
    return name


def is_hub_id(path: str) -> bool:
    """Whether a dataset's path is an id of the hub: owner/name, without the ending of a file of records."""
    return HUB_ID.fullmatch(path) is not None and not path.endswith(DATASET_FILES)


def check_hub_keys(where: str, path: str, keys: Mapping[str, object]) -> None:
    """Raise UserError for a key that is set and is for hub ids alone, beside the path of a file."""
    for name, value in keys.items():
        if value is not None and not is_hub_id(path):
            raise UserError(f"{where}.{name}: {show(value)} is for a hub id and {where}.path is a file; remove it")
