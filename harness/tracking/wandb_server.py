"""What a W&B server already has of a run. Nothing here changes anything on it.

W&B's own servers give a run's history by the public interface (`scan_history`). Others that speak the protocol
(openwandb) do not know that query, but serve the history as the file they were sent.
"""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import math
import netrc
import os
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse

from harness.errors import EXIT_FAILED, HarnessError
from harness.tracking.base import Record
from harness.tracking.rows import row_number, values_of

REQUEST_TIMEOUT_SECONDS = 20
_HISTORY_FILE = "wandb-history.jsonl"
_OWN_FIELDS = ("_step", "_runtime")


def base_url() -> str:
    """`$WANDB_BASE_URL`, else the server of `wandb login --host`, else W&B's own service."""
    return (os.environ.get("WANDB_BASE_URL") or _url_of_login() or "https://api.wandb.ai").rstrip("/")


def _url_of_login() -> str | None:
    """What `wandb login --host` has noted in the client's settings file."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings")
    except (OSError, ValueError, configparser.Error):
        return None
    return settings.get("default", "base_url", fallback=None)


def api_key() -> str | None:
    """The key for that server: of `$WANDB_API_KEY`, else of netrc, where `wandb login` writes it."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        keys, address = netrc.netrc(), urlparse(base_url())
    except (OSError, ValueError, netrc.NetrcParseError):
        return None
    found = keys.authenticators(address.netloc) or keys.authenticators(address.hostname or "")
    return found[2] if found else None


def entity_for(named: str | None = None) -> str:
    """The user or team that runs go to: the named one, `$WANDB_ENTITY` or that of the key, which is tried in any case.

    Raises:
        HarnessError: no key, a refused key, or no answer.
    """
    if api_key() is None:
        raise HarnessError(
            "there is no W&B API key", hint="Set WANDB_API_KEY, or run `wandb login`; nothing was uploaded."
        )
    query = json.dumps({"query": "query Viewer { viewer { entity } }"}).encode()
    try:
        viewer = json.loads(_ask("/graphql", query))["data"]["viewer"]
        return named or os.environ.get("WANDB_ENTITY") or str(viewer["entity"])
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _refused() from None
        raise _no_answer(f"answers {error.code} {error.reason}") from None
    except OSError as error:
        raise _no_answer(f"does not answer ({getattr(error, 'reason', error)})") from None
    except (ValueError, KeyError):
        raise _no_answer("is no W&B server") from None
    except TypeError:  # nobody is logged in by this key
        raise _refused() from None


def _refused() -> HarnessError:
    return HarnessError(
        "the W&B server refuses the API key",
        where=base_url(),
        hint="Set WANDB_API_KEY to a key of this server (WANDB_BASE_URL says which), or run `wandb login --relogin`.",
    )


def _no_answer(what: str) -> HarnessError:
    return HarnessError(
        f"the W&B server {what}",
        where=base_url(),
        hint="Run it again where the server can be reached; metrics.jsonl keeps everything until then.",
        exit_code=EXIT_FAILED,
    )


def answers(*, within_seconds: float) -> bool:
    """Whether the server says anything at all, whatever it says."""
    try:
        urllib.request.urlopen(base_url(), timeout=within_seconds).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the client may know certificates that Python does not
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def read_history(entity: str, project: str, run_id: str) -> list[dict[str, Any]] | None:
    """The rows that the server has of a run, in its order; None where it does not let them be read.

    Raises:
        OSError: it does not answer.
    """
    path = "/files/" + "/".join(quote(part, safe="") for part in (entity, project, run_id, _HISTORY_FILE))
    try:
        text = _ask(path).decode()
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # any other says no more than that there is no such file: the key was asked for before
            raise
    except ValueError:
        pass
    return _scan(f"{entity}/{project}/{run_id}")


def _scan(path: str) -> list[dict[str, Any]] | None:
    import wandb

    try:
        return list(wandb.Api(timeout=REQUEST_TIMEOUT_SECONDS).run(path).scan_history())
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError):  # no such run, or no such query
        return None


def _ask(path: str, data: bytes | None = None) -> bytes:
    """A GET, or with data a POST. Raises OSError (of it HTTPError)."""
    token = base64.b64encode(f"api:{api_key() or ''}".encode()).decode()
    headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json", "User-Agent": "harness"}
    request = urllib.request.Request(base_url() + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_SECONDS) as answer:
            return bytes(answer.read())
    except http.client.HTTPException as error:  # no address, or something there that does not speak HTTP
        raise urllib.error.URLError(f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Difference:
    """How a server's history differs from metrics.jsonl.

    Attributes:
        missing: records behind the server's last row; they can be uploaded.
        wrong: what uploading cannot mend, in words.
    """

    missing: tuple[Record, ...]
    wrong: tuple[str, ...] = ()


def compare(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> Difference:
    """What the server lacks or has otherwise. Values must be equal but for times, which a resumed run makes anew."""
    wanted = {row_number(record): record for record in records}
    numbers = [int(row["_step"]) for row in rows if "_step" in row]
    last = max(numbers, default=-1)
    missing = tuple(record for number, record in wanted.items() if number > last)
    there = set(numbers)
    lost = [n for n in wanted if n <= last and n not in there]
    strange = [n for n in numbers if n not in wanted]
    doubled = [n for n, times in Counter(numbers).items() if times > 1]
    unequal = [int(r["_step"]) for r in rows if r.get("_step") in wanted and not _equal(wanted[int(r["_step"])], r)]
    found = {
        "lacks": (lost, "of the records in metrics.jsonl before its last one"),
        "has": (strange, "rows that metrics.jsonl has not"),
        "repeats": (doubled, "rows"),
        "has other values in": (unequal, "rows"),
    }
    wrong = [f"it {verb} {len(which)} {what}" for verb, (which, what) in found.items() if which]
    return Difference(missing, tuple(wrong))


def _equal(record: Record, row: Mapping[str, Any]) -> bool:
    mine, its = _comparable(values_of(record)), _comparable(row)
    return mine.keys() == its.keys() and all(_same(mine[key], its[key]) for key in mine)


def _comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without W&B's own fields and without measured times."""
    return {
        key: value
        for key, value in row.items()
        if value is not None and key not in (*_OWN_FIELDS, "_timestamp") and not key.startswith(("perf/", "system/"))
    }


def _same(mine: float, its: Any) -> bool:
    try:
        its = float(its)  # also of "NaN" and "Infinity"
    except (TypeError, ValueError):
        return False
    return its == mine or (math.isnan(its) and math.isnan(mine))
