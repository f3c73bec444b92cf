"""Models to the Hugging Face hub: the files of a save and a model card, in one commit.

`load_any("owner/name", hub=True)` and `--model owner/name --hub` read them back.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import segmenter
from segmenter.classes import ClassSet, fitting_classes
from segmenter.errors import InputError, cause
from segmenter.model import Segmenter
from segmenter.text_files import read_text
from segmenter.weights.pretrained import contents, files_of, from_pretrained

CARD = "README.md"
TAGS = ["semantic-segmentation", "vision-transformer", "segmenter"]
_MAX_CARD = 1_000_000  # bytes
_HEADER = "---\n"


class HubError(InputError):
    """The hub cannot be used, or refused; the message says why and what to do."""


def push_to_hub(
    source: str | os.PathLike | Segmenter,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    message: str = "Upload a Segmenter model",
    dtype: torch.dtype | None = None,
    keep: Collection[str] = (),
    classes: str | os.PathLike | ClassSet | None = None,
) -> str:
    """Uploads a model as a repository that `load_any(repo_id, hub=True)` reads, in one commit.

    Uploaded are config.json, model.safetensors, classes.json if the model has one, and README.md, the model card:
    that of the folder, with the hub's header put before it if it has none, or else one that is made from the model,
    unless the repository has one already. Whatever else lies in the folder stays there.

    Args:
        source: a folder written by `save_pretrained`, or a model.
        repo_id: "owner/name" or "name"; made if it does not exist. private: whether it is made private; None: as the
            account's settings say.
        token: of the hub; None: that of `hf auth login`, or of the environment.
        license: the hub's name of one, such as "mit", for the card's header; None: it says nothing.
        message: of the commit. dtype, keep, classes: as of `save_pretrained`, of a model alone.
    Returns:
        URL of the commit.
    Raises:
        HubError: huggingface_hub is not installed, no network, no token, no permission, a repository that is public but
            should be private, or a licence for a card that has a header of its own. CheckpointError: the folder holds
            no save, or a damaged one. ValueError, ClassesError, ConfigError: as `save_pretrained`.
    """
    hub = _library()
    files: dict[str, Path | bytes]
    if isinstance(source, Segmenter):
        model, own_card = source, None
        files = dict(contents(source, dtype=dtype, keep=keep, classes=classes))
    else:
        if dtype is not None or keep or classes is not None:
            raise ValueError("dtype, keep and classes are for a model; the folder is uploaded as it is")
        model = from_pretrained(source, impl="eager")  # whoever loads it must not be the first to find it damaged
        files = dict(files_of(source))
        own_card = Path(source) / CARD if os.path.isfile(Path(source) / CARD) else None
    header = _header(hub, license)
    card = _with_header(own_card, header, license) if own_card else None
    api = hub.HfApi(token=token, library_name="segmenter", library_version=segmenter.__version__)
    with _errors_of_the_hub(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise HubError(f"{repo_id}: exists and is public; make it private first, or choose another name")
        if card is None and not api.file_exists(repo_id, CARD):
            card = header + model_card(model, repo_id, license, classes)
        if card is not None:
            files[CARD] = card.encode()
        added = [hub.CommitOperationAdd(name, _content(file)) for name, file in sorted(files.items())]
        return api.create_commit(repo_id, added, commit_message=message).commit_url


def model_card(
    model: Segmenter,
    repo_id: str,
    license: str | None = None,
    classes: str | os.PathLike | ClassSet | None = None,
) -> str:
    """A model card, without the hub's header: what the model is, how it is used, and its classes."""
    config, info = model.config, model.info
    height, width = config.image_size
    n_parameters = sum(p.numel() for p in model.parameters())
    rows = {
        "encoder": f"{config.backbone}: {config.n_layers} blocks of width {config.d_model}, patch {config.patch_size}",
        "decoder": config.decoder["name"],
        "classes": config.n_cls,
        "parameters": f"{n_parameters / 1e6:.1f} M",
        "position embedding": f"of {height} x {width} pixels",
        "windows": f"{info.window_size} pixels, stride {info.window_stride}",
        "weights": f"{info.weights}; {info.source}",
        "licence": license or "not stated",
    }
    table = "\n".join(f"| {name} | {_in_a_cell(value)} |" for name, value in rows.items())
    found = classes if isinstance(classes, ClassSet) else fitting_classes(classes or info.classes, model.n_cls)
    listed = f"\n## Classes\n{', '.join(map(_in_a_cell, found.names))}\n" if found else ""
    return f"""# {repo_id.split("/")[-1]}

Semantic segmentation by [Segmenter](https://arxiv.org/abs/2105.05633) (Strudel et al., ICCV 2021).

| | |
|---|---|
{table}

## Use
```python
from segmenter import load_any

model = load_any("{repo_id}", hub=True)
labels = model.segment("photo.jpg")  # (H, W) class ids, at the photo's own size
```
{listed}"""


def _in_a_cell(value: object) -> str:
    """Text that breaks no table and no line."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(f"the hub needs huggingface_hub: pip install 'segmenter-triton[hub]' ({error})") from error
    return huggingface_hub


def _header(hub: Any, license: str | None) -> str:
    """The YAML that the hub reads at the top of a model card."""
    data = hub.ModelCardData(
        library_name="segmenter", pipeline_tag="image-segmentation", tags=list(TAGS), license=license
    )
    return f"{_HEADER}{data.to_yaml()}\n{_HEADER}\n"


def _with_header(path: Path, header: str, license: str | None) -> str:
    """The card in a file; one that has a header of its own as it is."""
    text = read_text(path, HubError, _MAX_CARD)
    if not text.startswith(_HEADER):
        return header + text
    if license is not None:
        raise HubError(f"{path}: has a header of its own; say the licence there, and not as an argument")
    return text


def _content(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)


@contextmanager
def _errors_of_the_hub(repo_id: str) -> Iterator[None]:
    """Turns what the library raises, of many types, into a HubError that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = ""
        if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
            advice = "; log in with `hf auth login`, or give a token that may write"
        elif status == 403:
            advice = "; the token or its account may not write there"
        raise HubError(f"{repo_id}: the hub refused ({cause(error)}){advice}") from error
