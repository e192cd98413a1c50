"""Weights by their name on the Hugging Face hub: ``hf://ORG/NAME[@REVISION][/FILE]``.

Importing this module makes Detectron2's ``PathManager`` know such paths. Cache, tokens, offline
mode and progress are those of huggingface_hub and its environment variables.
"""

import re
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..errors import UserError

PREFIX = "hf://"
_NAME = re.compile(
    rf"{PREFIX}(?P<model>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?"
)
# What is wanted of a model without a named file, the first that it has.
_PATTERNS = (
    (
        "config.json",
        "preprocessor_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
    ),
    (
        "config.json",
        "preprocessor_config.json",
        "pytorch_model*.bin",
        "pytorch_model.bin.index.json",
    ),
)


class HubHandler(PathHandler):
    """Fetches a model's folder, safetensors preferred, or one file of it."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Path of the folder, or of the file, in huggingface_hub's cache.

        Raises:
            UserError: the name is no name of a model, there is no such model, revision or file, or
                the hub cannot be reached and the cache does not have it.
        """
        match = _NAME.fullmatch(path)
        if match is None:
            raise UserError(f"{path} is no model on the hub; give hf://ORG/NAME[@REVISION][/FILE].")
        try:
            import huggingface_hub
            from huggingface_hub.errors import (
                EntryNotFoundError,
                GatedRepoError,
                LocalEntryNotFoundError,
                RepositoryNotFoundError,
                RevisionNotFoundError,
            )
        except ImportError:
            raise UserError(
                f"{path}: models are fetched with huggingface_hub; pip install huggingface_hub."
            ) from None
        model, revision, file = match["model"], match["revision"], match["file"]
        try:
            if file:
                return huggingface_hub.hf_hub_download(
                    model, file, revision=revision, force_download=force
                )
            for patterns in _PATTERNS:
                folder = huggingface_hub.snapshot_download(
                    model,
                    allow_patterns=list(patterns),
                    revision=revision,
                    force_download=force,
                )
                if any(found for p in patterns[2:] for found in Path(folder).glob(p)):
                    return folder
        except GatedRepoError:
            reason = (
                f"access to {model} has to be asked for on its page, and needs a token (HF_TOKEN)"
            )
        except RepositoryNotFoundError:
            reason = f"there is no public model {model}; a private one needs a token (HF_TOKEN)"
        except RevisionNotFoundError:
            reason = f"{model} has no revision {revision!r}"
        except LocalEntryNotFoundError:
            reason = (
                "it is not in the cache, and the hub cannot be reached; check the connection, "
                "HF_HUB_OFFLINE and HF_ENDPOINT"
            )
        except EntryNotFoundError:
            reason = f"{model} has no file {file!r}"
        except (OSError, ValueError) as error:  # what huggingface_hub's HTTP errors are
            reason = str(error).strip().splitlines()[0]
        else:
            reason = f"{model} has no model.safetensors and no pytorch_model.bin; name a /FILE"
        raise UserError(f"{path} cannot be fetched: {reason}.")


PathManager.register_handler(HubHandler(), allow_override=True)
