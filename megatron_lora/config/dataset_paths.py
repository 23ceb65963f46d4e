"""The keys of a dataset, and what its `path` may be: files of records by their endings, patterns of files, ids of the hub."""

import dataclasses
import re
from collections.abc import Mapping

from megatron_lora.config.keys import build, key, required
from megatron_lora.config.rules import accepts, list_of, null_or, number, one_of, path_of, show, text
from megatron_lora.errors import UserError

PREFERENCE_TYPES = ("preference", "preference_chat")  # pairs of answers
LABELLED_TYPES = ("kto",)  # answers that are desirable or not
DATASET_TYPES = (
    *("messages", "sharegpt", "alpaca", "alpaca_chat", "prompt_completion", "text"),
    *(*PREFERENCE_TYPES, *LABELLED_TYPES, "lengths"),
)
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Records of one format: a file, several, or a data set of the hub."""

    path: str = required(dataset_path, "file of records or pattern (`*`, `?`, `**`), from the directory of the command; or a hub id")
    type: str = required(one_of(*DATASET_TYPES), "format of its records: [data.md](data.md)")
    name: str | None = key(None, null_or(text("the name of a hub data set's configuration")), "of a hub id: its configuration")
    split: str | None = key(None, null_or(text("the name of a split")), "of a hub id: its split (`train[:1000]`); null: `train`")
    sampling_weight: float = key(
        1.0,
        number("a sampling weight", 0, 1000, above=True),
        "how often an epoch takes each sample: 2 twice, 0.1 a tenth of them, drawn anew each epoch; 2.5 twice and half of them again",
    )


@accepts("a mapping of `path` and `type`")
def dataset(path: str, value: object) -> DatasetConfig:
    """Accept a mapping of DatasetConfig's keys."""
    config = build(DatasetConfig, path, value)
    check_hub_keys(path, config.path, {"name": config.name, "split": config.split})
    return config


@accepts("a list of {path, type}, or null")
def validation_datasets(path: str, value: object) -> tuple[DatasetConfig, ...]:
    """Accept datasets whose samples are taken once each; null is none."""
    found = () if value is None else list_of("{path, type}", dataset, empty=True)(path, value)
    for position, config in enumerate(found):
        if config.sampling_weight != 1:
            weight = f"{path}.{position}.sampling_weight: {config.sampling_weight:g}"
            raise UserError(f"{weight} is for training; an evaluation takes each sample once: remove it")
    return found
