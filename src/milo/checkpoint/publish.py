"""Publishing a compressed folder on a model hub.

`upload_folder` does the work: it resumes, skips what the hub has, and splits large folders into several commits by
itself (the separate `upload_large_folder` of huggingface_hub 1.x is gone in 2.x). `config.json`, without which no
loader starts, goes last and alone, so that a repository too is either absent or whole.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from milo.checkpoint.compressed import CompressedCheckpoint
from milo.checkpoint.source import INDEX
from milo.errors import HubError

_LAST = "config.json"
# Base of what the HTTP library raises where there is no connection: httpx under huggingface_hub 1.x, httpx2 under 2.x.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def publish(folder: str | Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a compressed folder.

    Args:
        folder: local path.
        repo: `owner/name`; made if it does not exist. Shards of an earlier upload that are not in `folder` are removed.
        private: make a new repository private; an existing one stays as it is.
        endpoint: URL of the hub, huggingface.co by default.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the folder is unfinished, damaged or not ours.
        HubError: no token, no permission, or no connection.
    """
    checkpoint = CompressedCheckpoint(folder)
    hub = HfApi(endpoint=endpoint, library_name="milo-moe")
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        message = f"Upload {checkpoint.plan.recipe} with MiLo"
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=checkpoint.folder,
            ignore_patterns=[_LAST],
            delete_patterns=["*.safetensors", INDEX],
            commit_message=message,
        )
        hub.upload_file(
            path_or_fileobj=checkpoint.folder / _LAST,
            path_in_repo=_LAST,
            repo_id=address.repo_id,
            commit_message=message,
        )
    except HFValidationError as error:
        raise HubError(f"{repo} is no repository name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"no token for {hub.endpoint}: run `hf auth login` or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise HubError(_explain(error, repo, hub.endpoint)) from error
    except (_HTTP_ERROR, OSError) as error:
        raise HubError(f"cannot reach {hub.endpoint}: {error}") from error
    return str(address)


def _explain(error: HfHubHTTPError, repo: str, endpoint: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"{endpoint} wants a token to write {repo}: run `hf auth login`, or set HF_TOKEN to one that may write"
    if status == 403:
        return f"the token may not write {repo} on {endpoint}: take one with write permission, or another owner"
    return f"{endpoint} refused the upload to {repo}: {error}"
