"""Where text comes from: files, a TFDS data source, or the Python standard library. Nothing is ever downloaded.

Every source is a list of documents as bytes, in an order that depends on nothing but the source.
"""

from __future__ import annotations

import os
import platform
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gt_jax.errors import Refused, refuse_all
from gt_jax.files import refuse_address, refuse_once
from gt_jax.text.encodings import plain
from gt_jax.text.token_folder import MANIFEST, begun, is_token_folder, read_manifest, sha256_of

EMBEDDED_LIMIT = 10_000_000
# Tests repeat themselves, the others are not the library itself; `config-*` and `_sysconfigdata*` describe one machine.
_NOT_LIBRARY = re.compile(r"site-packages|dist-packages|tests?|idlelib|lib2to3|__pycache__|config-.*|_sysconfigdata.*")
END = b"<|endoftext|>"
_DOCUMENT_END = re.compile(rb"^<\|endoftext\|>[ \t]*(?:\r?\n|\Z)", re.MULTILINE)


def standard_library() -> tuple[str, list[bytes]]:
    """The name and the sources of Python's standard library, one document a file, sorted by path.

    At most `EMBEDDED_LIMIT` bytes: the first file that would pass it ends the list. Raises `Refused` where Python is
    installed without sources.
    """
    name = f"the standard library of Python {platform.python_version()}"
    root = sysconfig.get_path("stdlib")
    documents, size = [], 0
    for path in sorted(_sources(root)):
        document = Path(root, path).read_bytes()
        size += len(document)
        if size > EMBEDDED_LIMIT:
            break
        if document:
            documents.append(document)
    if not documents:
        raise Refused(f"{name} has no .py files under {root}; name a text file instead")
    return name, documents


def _sources(root: str) -> list[str]:
    """Paths of the library's .py files, relative and with forward slashes, so that they sort alike on any system."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _NOT_LIBRARY.fullmatch(name)]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files
                  if name.endswith(".py") and not _NOT_LIBRARY.fullmatch(name)]
    return found


def text_files(paths: Sequence[str]) -> tuple[str, list[bytes], str]:
    """The name and the documents of text files, and words about how they were read, to stand after a summary.

    A document is a file, or several are where lines `<|endoftext|>` divide it. Files are UTF-8, gzip, or UTF-16 with
    its mark; other bytes will do, but not those of a file that is known to be no text (gt_jax/text/encodings.py).
    Raises `Refused` that lists every file that is missing, unreadable, empty or no text.
    """
    documents: list[bytes] = []
    problems, told = [], []
    for path in paths:
        try:
            found, words = documents_of(path)
        except Refused as error:
            problems.append(str(error))
            continue
        documents += found
        told += words
    refuse_all(problems, "the text cannot be used:")
    name = f"text file {paths[0]!r}" if len(paths) == 1 else f"{len(paths)} text files ({paths[0]!r} and others)"
    return name, documents, "".join(f"; {line}" for line in told)


def documents_of(path: str) -> tuple[list[bytes], list[str]]:
    """The documents of one text file, and how it was read; raises `Refused` as `text_files` does."""
    try:
        refuse_once(path)
        if os.path.isdir(path):
            raise ValueError(f"Is a directory, without tokens of `gt_jax prepare` in it ({MANIFEST})")
        if os.path.basename(path) == MANIFEST and is_token_folder(os.path.dirname(path) or "."):
            raise ValueError("it tells of a folder of tokens; name the folder")
        content, read_as = plain(Path(path).read_bytes())
        found = [part for part in _DOCUMENT_END.split(content) if part]
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null byte, or what is no text
        raise Refused(f"text file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}{begun(path)}"
                      ) from error  # fmt: skip
    if not found:
        raise Refused(f"text file {path!r} is empty (0 bytes of text)")
    told = [f"{path} read as {', '.join(read_as)}"] * bool(read_as)
    if inside := sum(document.count(END) for document in found):
        told.append(f"{END.decode()} {inside} times within lines of {path}, where it is text: on a line by "
                    "itself it ends a document")  # fmt: skip
    return found, told


def file_hashes(paths: Sequence[str]) -> list[dict[str, Any]]:
    """{"path", "sha256"} of each file's bytes; of a folder of tokens that of its tokens as it is noted there, and as
    "of" those of its files. Raises `Refused` for one that cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        if is_token_folder(path):
            manifest = read_manifest(path)
            of = [file.sha256 for file in manifest.files]
            found.append({"path": path, "sha256": manifest.sha256.tokens, "of": of})
            continue
        try:
            refuse_once(path)
            found.append({"path": path, "sha256": sha256_of(Path(path))})
        except (OSError, ValueError) as error:
            raise Refused(f"text file {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return found


def tfds_text(dataset: str, data_dir: str | None) -> tuple[str, list[bytes]]:
    """The name and the documents of split `train` of a prepared TFDS dataset, for example `tiny_shakespeare`.

    `data_dir` None is TFDS' own default. The files are read through array_record, without TensorFlow; a dataset that
    is not on this machine is refused, never fetched. Raises `Refused` naming what was looked for.
    """
    refuse_address(data_dir or "")
    # Imported here: most runs read no TFDS dataset, and the import takes a third of a second.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    place = f"under {data_dir!r}" if data_dir else "in the default TFDS folder"
    name = f"TFDS dataset {dataset!r}"
    try:
        # Unlike tfds.data_source(name), this reads the folder alone and asks no server about the dataset.
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
        examples: Sequence[Any] = builder.as_data_source(split="train")
    except tfds.core.DatasetNotFoundError as error:
        raise Refused(f"{name} is not {place}; nothing is downloaded here: make it of text files with `python -m "
                      f"gt_jax prepare {dataset} FILE …`, also where that was interrupted, or fetch it with "
                      f"tfds.builder({dataset!r}, file_format='array_record').download_and_prepare()") from error
    except (NotImplementedError, ValueError, OSError) as error:  # the first: files of no random access, e.g. tfrecord
        raise Refused(f"{name} {place} cannot be read as a data source; it needs a split 'train' in "
                      f"file_format='array_record': {_first_line(error)}") from error
    feature = _text_feature(name, dict(builder.info.features), tfds.features.Text)
    documents = [document for document in (_as_bytes(example[feature]) for example in examples) if document]
    if not documents:
        raise Refused(f"{name} has no text in feature {feature!r} of its {len(examples)} examples")
    return name, documents


def _text_feature(name: str, features: Mapping[str, Any], text_type: type) -> str:
    """`text` if it is there, else the only feature of type Text."""
    found = [key for key, feature in features.items() if isinstance(feature, text_type)]
    if "text" in found or len(found) == 1:
        return "text" if "text" in found else found[0]
    raise Refused(f"{name} has no feature 'text' and {len(found)} others of type Text; "
                  f"its features are {', '.join(sorted(features))}")


def _as_bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
