"""Experiment trackers through accelerate: Weights & Biases and TensorBoard. `metrics.jsonl` is written regardless."""

import contextlib
import importlib.util
import io
import os
import socket
import sys
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.run.engine import Engine

PROJECT_NAME = "speech-pretraining"
_REACH_TIMEOUT_SECONDS = 3.0


def check_tracker(report_to: str) -> None:
    """Raise `UserError` when the package of the tracker is not installed."""
    package = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(report_to)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(
            f"report_to ({report_to}) needs the package {package}; run `pip install {package}` or set --report_to none."
        )


def start_tracker(engine: Engine, report_to: str, run_folder: Path, settings: dict[str, Any], resumed: bool) -> None:
    """Open the tracker on the main rank; W&B works offline, in the run folder, where its server cannot be reached."""
    if report_to == "none" or not engine.is_main:
        return
    options: dict[str, dict[str, Any]] = {}
    if report_to == "wandb":
        options["wandb"] = {
            "dir": str(run_folder),
            "name": run_folder.name,
            "id": _wandb_run_id(run_folder, resumed),
            "resume": "allow",
        }
        if "WANDB_MODE" not in os.environ and not wandb_reachable():
            # as an argument: the environment was read when wandb was imported
            options["wandb"]["mode"] = "offline"
            print(f"wandb: no server or no login; logging offline below {run_folder / 'wandb'}", file=sys.stderr)
    hyper_parameters = {name: value for name, value in settings.items() if isinstance(value, int | float | str | bool)}
    engine.accelerator.init_trackers(PROJECT_NAME, config=hyper_parameters, init_kwargs=options)


def track(engine: Engine, line: dict[str, Any]) -> None:
    """Send the numbers of one line of metrics, named `split/metric`, to the tracker, if there is one."""
    if not engine.is_main:
        return
    values = {
        f"{line['split']}/{name}": value
        for name, value in line.items()
        if name not in ("step", "split") and value is not None
    }
    engine.accelerator.log(values, step=line["step"])


def _wandb_run_id(run_folder: Path, resumed: bool) -> str:
    """The id of this run folder's W&B run, kept in a file so that a resumed run continues its curves."""
    path = run_folder / "wandb_run_id"
    if resumed and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    path.write_text(run_id, encoding="utf-8")
    return run_id


def wandb_has_login() -> bool:
    """Whether W&B has a key for its server."""
    import wandb

    # wandb 0.31 calls this deprecated; what it names instead, wandb.login, keeps the key that it finds for the process,
    # raises for one of a wrong length, and older ones would ask at a prompt
    with contextlib.redirect_stderr(io.StringIO()):
        return bool(wandb.api.api_key)


def wandb_reachable() -> bool:
    """Whether a login exists and the server answers; wandb itself would ask at a prompt or retry for minutes."""
    import wandb

    url = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)
    if not wandb_has_login():
        return False
    if url.scheme in urllib.request.getproxies():
        return True  # a direct connection would say nothing about the way through the proxy
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_REACH_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True
