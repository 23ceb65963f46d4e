"""Requests to a run: files that other processes leave in `requests/` of its directory, and that the run takes in their order.

    requests/<time>-<id>.json      {"id", "time", "verb", "names", "jobs", "values"}: written aside and renamed, so always complete
    requests/refused/              those that were not applied, with a "reason"

Names begin with the time, so that requests have an order. A file that is no request is refused like
a request that cannot be applied; a file whose name begins with a dot is one that is being written.

    write_request(output_dir, new_request("pause", names=["a"]))
    folder = RequestFolder(output_dir)                       # the run
    requests, lines = folder.take(log.ids)                   # lines: what was refused or removed, for the user
    folder.refuse(request, "a is done") or folder.remove(request)
"""

import dataclasses
import json
import re
import secrets
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import sync, write_atomically
from megatron_lora.output.events import utc_now

FOLDER, REFUSED = "requests", "refused"
VERBS = ("add", "pause", "resume", "cancel", "set")
ID = re.compile(r"[0-9a-f]{16}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MAX_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks of a run. `jobs` are complete job mappings, of add alone; `values` are those of set."""

    id: str
    time: str
    verb: str
    names: tuple[str, ...] = ()
    jobs: tuple[dict[str, Any], ...] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The request's file in `requests/`."""
        return f"{self.time.replace('-', '').replace(':', '')}-{self.id}.json"


def new_request(
    verb: str, names: Sequence[str] = (), jobs: Sequence[dict[str, Any]] = (), values: Mapping[str, Any] | None = None
) -> Request:
    """Make a request of this moment, with an id of its own."""
    return Request(id=secrets.token_hex(8), time=utc_now(), verb=verb, names=tuple(names), jobs=tuple(jobs), values=values or {})


def write_request(output_dir: Path, request: Request) -> None:
    """Leave a request to a run; UserError where its directory cannot be written."""
    folder, text = output_dir / FOLDER, json.dumps(dataclasses.asdict(request)) + "\n"
    try:
        folder.mkdir(exist_ok=True)
        try:
            write_atomically(folder / request.file_name, text)
        except FileNotFoundError:  # a run that starts has taken the unfinished file for one of a killed process
            write_atomically(folder / request.file_name, text)
        sync(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); a run is controlled by those who may write there") from None


class RequestFolder:
    """The requests to a run that it has not taken yet."""

    def __init__(self, output_dir: Path):
        """Name the folder; it need not exist."""
        self.path = output_dir / FOLDER
        self._said: set[str] = set()  # names of files that could not be moved away

    def look(self, applied: Collection[str]) -> tuple[list[Request], dict[Path, str], list[Path]]:
        """Return the requests in their order, the files that are none, with the reasons, and those whose id is in `applied`.

        Changes nothing.
        """
        good: dict[str, Request] = {}
        bad: dict[Path, str] = {}
        old = []
        for path in self._files():
            try:
                request = _read(path)
            except UserError as error:
                bad[path] = str(error)
                continue
            if request.id in applied:
                old.append(path)
            elif request.id in good:
                bad[path] = f"has the id of {good[request.id].file_name}"
            else:
                good[request.id] = request
        return list(good.values()), bad, old

    def take(self, applied: Collection[str]) -> tuple[list[Request], list[str]]:
        """Return the requests in their order; refuse what is none, remove what was applied, and say so in lines."""
        good, bad, old = self.look(applied)
        lines = [self._refuse(path, reason, None) for path, reason in bad.items()]
        for path in old:
            path.unlink(missing_ok=True)
            lines.append(f"{FOLDER}/{one_line(path.name, 80)}: was applied before; removed")
        return good, [line for line in lines if line]

    def refuse(self, request: Request, reason: str) -> str:
        """Move a request that cannot be applied to `refused/`, with the reason; return the line for the user."""
        return self._refuse(self.path / request.file_name, reason, request)

    def remove(self, request: Request) -> None:
        """Remove a request that was applied."""
        (self.path / request.file_name).unlink(missing_ok=True)

    def has_any(self) -> bool:
        """Whether anything lies there that was not taken."""
        return bool(self._files())

    def waits(self, request: Request) -> bool:
        """Whether the run has not taken a request yet."""
        return (self.path / request.file_name).exists()

    def reason_of(self, request: Request) -> str | None:
        """Return why a request was refused; None if it was not."""
        try:
            return json.loads((self.path / REFUSED / request.file_name).read_text(encoding="utf-8"))["reason"]
        except FileNotFoundError:
            return None

    def _files(self) -> list[Path]:
        """What lies in the folder, in the order of names, except `refused/` and files that are being written."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if not path.name.startswith(".") and path.name != REFUSED)

    def _refuse(self, path: Path, reason: str, request: Request | None) -> str:
        """Move a file to `refused/`: a request with its reason, anything else unchanged, the reason in a file beside it."""
        line = f"{FOLDER}/{one_line(ascii(path.name)[1:-1], 80)}: refused: {reason}"
        try:
            refused = self.path / REFUSED
            refused.mkdir(exist_ok=True)
            if request is not None:
                write_atomically(refused / path.name, json.dumps(dataclasses.asdict(request) | {"reason": reason}) + "\n")
                path.unlink(missing_ok=True)
            else:
                place = refused / path.name
                if place.exists():
                    place = refused / f"{path.name}.{secrets.token_hex(4)}"
                write_atomically(refused / f"{secrets.token_hex(8)}.reason.json", json.dumps({"file": place.name, "reason": reason}) + "\n")
                path.rename(place)
        except OSError as error:
            if path.name in self._said:
                return ""
            self._said.add(path.name)
            return f"{line}; it cannot be moved away ({error.strerror}), and is left out"
        return line


def _read(path: Path) -> Request:
    """Read a request; UserError says in one line why a file is none."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise UserError("is not a request: not a file, or far too large")
        request = _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise error if isinstance(error, UserError) else UserError(f"is not a request ({one_line(error, 120)})") from None
    if path.name != request.file_name:
        raise UserError(f"is not a request: it holds that of {one_line(request.file_name, 80)}")
    return request


def _from_json(fields: dict[str, Any]) -> Request:
    """Return what a file says; ValueError, TypeError or KeyError unless it has the form of a request."""
    if not (isinstance(fields["names"], list) and isinstance(fields["jobs"], list) and isinstance(fields["values"], dict)):
        raise TypeError("its names or jobs are no list, or its values no mapping")
    if not all(isinstance(name, str) for name in fields["names"]) or not all(isinstance(job, dict) for job in fields["jobs"]):
        raise TypeError("a name is no text, or a job no mapping")
    fields |= {"names": tuple(fields["names"]), "jobs": tuple(fields["jobs"])}
    request = Request(**fields)
    if not (ID.fullmatch(request.id) and TIME.fullmatch(request.time)):
        raise ValueError("its id or time is none")
    if request.verb not in VERBS:
        raise ValueError(f"its verb is {request.verb!r}, not one of {', '.join(VERBS)}")
    has = (bool(request.jobs), bool(request.names), bool(request.values))
    if has != (request.verb == "add", request.verb != "add", request.verb == "set"):
        raise ValueError(f"{request.verb} has not what it needs, or more than that")
    return request
