"""From what a user calls a model to its directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from kinetoscope.core.config import settings
from kinetoscope.core.errors import ModelLoadError
from kinetoscope.core.files import path_exists
from kinetoscope.core.spec import nearest
from kinetoscope.loading.directory import INDEX, ModelDir, find_layout
from kinetoscope.loading.not_models import describe_file, describe_folder
from kinetoscope.reference import embedded_models

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CONFIGS = ["*.json", "*/*.json"]
HUB_FILES = [*HUB_CONFIGS, "*/*.safetensors", "*/*.model", "*/*.txt"]
"""What a run needs of a hub repository."""


def resolve_model(name_or_path: str | Path, published: Iterable[str] = ()) -> ModelDir:
    """The directory of a model.

    Args:
        name_or_path: an embedded name, the path of a directory in diffusers layout, or a hub id "organisation/name", in
            this order of precedence. A hub model is downloaded, unless the hub's cache has it.
        published: hub ids of models that are known to run; an error names the nearest of them.

    Raises:
        ModelLoadError: there is no such model, or its directory has no `model_index.json`.
    """
    embedded = embedded_models()
    name = str(name_or_path)
    path = Path(name).expanduser()
    if isinstance(name_or_path, str) and name in embedded:
        return _checked(embedded[name], name)
    if path_exists(path):
        return _checked(path, str(path.resolve()))
    if HUB_ID.fullmatch(name):
        return _checked(_download(name, [*embedded, *published]), name)
    near = nearest(name, [*embedded, *published])
    hint = f"; did you mean {near!r}?" if near else "."
    raise ModelLoadError(
        f"no model {name!r}{hint} Give an embedded name ({', '.join(embedded) or 'none in this build'}), "
        "the path of a directory in diffusers layout, or a hub id 'organisation/name'"
    )


def _checked(path: Path, name: str) -> ModelDir:
    if not path.is_dir():
        raise ModelLoadError(describe_file(path))
    if not (path / INDEX).is_file() and find_layout(path) is None:
        raise ModelLoadError(describe_folder(path))
    return ModelDir(path, name)


def _download(repository: str, known: list[str]) -> Path:
    """The files of a hub model, its configurations first: they tell whether its weights can be used."""
    from huggingface_hub import errors, snapshot_download

    offline = settings().offline
    near = None if repository in known else nearest(repository, known)
    hint = f"; did you mean {near!r}?" if near else "."
    try:
        path = Path(snapshot_download(repository, allow_patterns=HUB_CONFIGS, local_files_only=offline))
        if not (path / INDEX).is_file() and find_layout(path) is None:
            raise ModelLoadError(
                f"hub model {repository!r} has no {INDEX}, so it is not in diffusers layout{hint} Its "
                "weights were not downloaded"
            )
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=offline))
    except ModelLoadError:
        raise
    except errors.GatedRepoError as error:
        raise ModelLoadError(
            f"hub model {repository!r} asks you to accept its terms: do so on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"the hub has no model {repository!r}, or it is private (`hf auth login`){hint} "
            f"There is no local directory of that name either. Embedded: {', '.join(embedded_models())}"
        ) from error
    except Exception as error:  # which network errors there are depends on the hub client's HTTP library
        why = "KINETOSCOPE_OFFLINE is set" if offline else f"the hub did not answer ({type(error).__name__})"
        raise ModelLoadError(
            f"there is no local directory {repository!r}, the hub's cache holds no model of that name, and {why}{hint} "
            f"Embedded models need no network: {', '.join(embedded_models())}"
        ) from error
