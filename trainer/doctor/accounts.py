"""Logins: Weights & Biases and the Hugging Face Hub. No run needs them; without them it logs to files alone."""

import os
from collections.abc import Iterator

from trainer.doctor.findings import Finding, note


def accounts() -> Iterator[Finding]:
    """The state of both logins."""
    yield _wandb()
    yield _hub()


def _wandb() -> Finding:
    from trainer.run.trackers import wandb_has_login, wandb_reachable

    if mode := os.environ.get("WANDB_MODE"):
        return Finding("W&B", f"WANDB_MODE is {mode}")
    if not wandb_has_login():
        return note("W&B", "no login", "wandb login, before --report_to wandb; otherwise it logs offline")
    if not wandb_reachable():
        return note("W&B", "logged in, its server does not answer", "it logs offline; `wandb sync` uploads later")
    return Finding("W&B", "logged in, its server answers")


def _hub() -> Finding:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        return note("Hub", "no login", "hf auth login, before --push_to_hub and for private repositories")
    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "a token is there; HF_HUB_OFFLINE is set")
    try:
        return Finding("Hub", f"logged in as {HfApi().whoami()['name']}")
    except HfHubHTTPError as error:
        return note("Hub", f"it refuses the token: {str(error).splitlines()[0]}", "hf auth login")
    except Exception as error:  # the client's transport has errors of its own
        return note(
            "Hub", f"it does not answer: {type(error).__name__}", "models by Hub id must be in the cache already"
        )
