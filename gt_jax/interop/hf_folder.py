"""A folder as transformers writes it: config.json, safetensors with or without an index, tokenizer, what lies beside.

- Names of a text model inside a multimodal one are known without `language_model.`; the vision tower and the layers
  for multi-token prediction are left out and listed.
- A family may have its tensors in more than one arrangement: `variants` says which this is.
- Nothing in the folder is run, and nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gt_jax.checkpoints.folders import StrPath
from gt_jax.configs.model import ModelConfig
from gt_jax.configs.tokenizer_file import NAMES
from gt_jax.errors import Refused
from gt_jax.files import read_json
from gt_jax.interop.families.registry import recognised
from gt_jax.interop.shards import SAFETENSORS, TensorLocation, open_files
from gt_jax.interop.tensor_files import Info, same_bytes

CONFIG = "config.json"
BESIDE = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "chat_template.jinja", "chat_template.json")  # small texts that travel with a model and are given back
_LIMIT = 2**22  # bytes of one of them
_LANGUAGE = "model.language_model."
_LEFT_OUT = re.compile(r"(?:model\.)?(?:visual|vision_tower|mtp)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_hf_folder(path: StrPath) -> bool:
    """Whether a path is a folder whose config.json says a `model_type`; raises `Refused` for one that is no JSON."""
    file = Path(path) / CONFIG
    if not file.exists():
        return False
    try:
        data = read_json(file)
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read: {error}; mend it, or move it away if the tensors are not of "
                      "transformers") from error
    return isinstance(data, Mapping) and ("model_type" in data or "architectures" in data)


class HFFolder:
    """A folder that is open for reading: its family, our config of it, and its tensors by their known names."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(os.path.abspath(path))
        self.data = self._config()
        self.family, text = recognised(self.data, self.path / CONFIG)
        files, self.problems = open_files([self.path], (SAFETENSORS,))  # others lie beside them: training_args.bin
        self.files = files
        self.places: dict[str, TensorLocation] = {}
        self.left_out: list[str] = []
        for file in files:
            for name in file.tensors:
                self._note(TensorLocation(file, name))
        self.variants = self.family.variants({name: place.info.shape for name, place in self.places.items()})
        try:
            config = self.family.config(text)
        except Refused as error:
            raise Refused(f"{self.path / CONFIG} says a model that cannot be represented:\n{error}") from error
        dtype = "bfloat16" if self._all_matrices_bfloat16() else "float32"
        self.config: ModelConfig = config.replace(param_dtype=dtype, compute_dtype=dtype)
        self._tied_head()

    @property
    def tensors(self) -> dict[str, Info]:
        """Shape and dtype by name."""
        return {name: place.info for name, place in self.places.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, mapped from its file."""
        return self.places[name].read()

    def tokenizer(self) -> str:
        """The tokenizer's file in the folder; raises `Refused` where there is none."""
        for name in NAMES:
            if (self.path / name).is_file():
                return str(self.path / name)
        slow = ("vocab.json", "merges.txt", "tokenizer_config.json")
        others = [name for name in slow if (self.path / name).is_file()]
        hint = f"; {' and '.join(others)} alone are not read, save the fast tokenizer too" if others else ""
        raise Refused(f"{self.path} has no tokenizer ({' or '.join(NAMES)}){hint}; put it there, or name one with "
                      "--tokenizer")

    def beside(self) -> dict[str, str]:
        """The small texts that lie beside the shards, by name; raises `Refused` for what is no text."""
        made = {}
        for name in BESIDE:
            file = self.path / name
            if not file.is_file():
                continue
            if file.stat().st_size > _LIMIT:
                raise Refused(f"{file} has {file.stat().st_size} bytes; at most {_LIMIT} are carried along, move it "
                              "away if it is not needed")
            try:
                made[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise Refused(f"{file} is no UTF-8 text: {error}") from error
        return made

    def _config(self) -> dict[str, Any]:
        try:
            data = read_json(self.path / CONFIG, once=True)
        except (OSError, ValueError) as error:
            raise Refused(f"{self.path / CONFIG} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise Refused(f"{self.path / CONFIG} is no JSON object")
        return data

    def _note(self, place: TensorLocation) -> None:
        name = place.name
        if _LEFT_OUT.match(name):
            self.left_out.append(name)
            return
        name = name.replace(_LANGUAGE, "model.", 1) if name.startswith(_LANGUAGE) else name
        if (before := self.places.get(name)) is not None:
            self.problems.append(f"{name} is there twice, as {before} and as {place}")
        self.places[name] = place

    def _all_matrices_bfloat16(self) -> bool:
        dtypes = {str(info.dtype) for info in self.tensors.values() if len(info.shape) == 2}
        return dtypes == {"bfloat16"}

    def _tied_head(self) -> None:
        """A head beside tied embeddings must be the same tensor; then it is left out."""
        if not self.config.embedding.tied or HEAD not in self.places:
            return
        place, table = self.places.pop(HEAD), self.places.get(EMBEDDING)
        if table is not None and place.info == table.info and same_bytes(place.read(), table.read()):
            self.left_out.append(f"{HEAD} (the same as {EMBEDDING})")
        else:
            self.problems.append(f"tie_word_embeddings is true, but {place} differs from {EMBEDDING}")


def counted(names: list[str]) -> str:
    """Names that were left out, in words: how many of each beginning."""
    found = Counter(re.match(r"(?:model\.)?\w+", name)[0] + ".*" if "(" not in name else name  # type: ignore[index]
                    for name in names)
    return ", ".join(f"{name} ({count} tensors)" if count > 1 else name for name, count in sorted(found.items()))
