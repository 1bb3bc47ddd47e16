"""Uploads a converted folder to the Hugging Face Hub."""

from pathlib import Path

from trainer.convert.errors import ConversionError


def check_repository_name(name: str) -> None:
    """Refuse a name that the Hub would refuse, before anything is converted.

    Raises:
        ConversionError: the name is not OWNER/MODEL or MODEL.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not declared

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(f"push_to_hub ({name}) must be a name such as OWNER/MODEL: {error}") from error


def push_to_hub(folder: Path, repository: str, *, token: str | None, public: bool, step: int) -> str:
    """Create the repository if it is missing, private unless `public`, and upload `folder`; returns its address.

    Without `token`, huggingface_hub takes HF_TOKEN or the one that `hf auth login` has stored. An existing repository
    stays as public as it is.

    Raises:
        ConversionError: the Hub cannot be reached or refuses; `folder` is as it was.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        created = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=f"Weights after {step:,} updates")
    except Exception as error:
        # huggingface_hub's own are OSErrors and ValueErrors; those of its HTTP client, whose package has changed its
        # name (httpx, httpx2), and of its upload library are not.
        if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith(("httpx", "hf_xet")):
            raise
        raise _not_pushed(folder, repository, error) from error
    return str(created)


def _not_pushed(folder: Path, repository: str, error: Exception) -> ConversionError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConversionError(
        f"push_to_hub ({repository}): {reason} The folder {folder} is complete; upload it with "
        f"`hf upload {repository} {folder}` once this is mended (a token with write access: --hub_token, HF_TOKEN or "
        "`hf auth login`)."
    )
