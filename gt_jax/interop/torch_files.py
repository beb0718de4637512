"""`.pt` files: read by PyTorch with `weights_only`, so that nothing in them runs, and mapped, so that little is held.

PyTorch is an optional extra; this is the only file that imports it.
"""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gt_jax.errors import Refused, refuse_all
from gt_jax.interop.tensor_files import Info, TensorFile, Unreadable

STATE = "model_state_dict"
_STEPS = ("step", "global_step")
_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64,
    "bool": np.bool_, "uint8": np.uint8, "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
}.items()}  # fmt: skip
_BROKEN = (RuntimeError, OSError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError)
_HELD = 256 * 2**20  # bytes read before the file is mapped anew, which gives the pages back


class TorchFile(TensorFile):
    """One file of `torch.save`, open for reading; raises `Unreadable`, and `Refused` for what is no state dict."""

    config = None
    lineage = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torch = _torch(path)
        self._read = 0
        found = self._load()
        self._state: Mapping[str, Any] | None = _state_dict(path, found)
        key = next((key for key in _STEPS if found.get(key) is not None and key not in self._state), None)
        self.step = None if key is None else _whole(found[key])
        if key is not None and self.step is None:
            self.notes = (f"{path.name}: {key!r} is {_shown(found[key])}, no whole number from 0 on; --step says one",)
        self.tensors = {name: self._info(tensor) for name, tensor in self._state.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only, mapped from the file."""
        info = self.tensors[name]
        if self._state is None:
            self._state = _state_dict(self.path, self._load())
        tensor = self._state[name].detach()
        if info.dtype == ml_dtypes.bfloat16:  # numpy does not know it, so the bits go over as integers
            value = tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            value = tensor.numpy()
        self._read += value.nbytes
        if self._read > _HELD:
            self._state, self._read = None, 0
        value.flags.writeable = False
        return value

    def _load(self) -> dict[str, Any]:
        if not zipfile.is_zipfile(self.path):
            raise Unreadable(f"{self.path} is truncated, or no archive of torch.save (older formats than that of "
                             "PyTorch 1.6 are not read; save it again)")
        try:
            found = self._torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = named[1] if named else _first_line(error)
            raise Refused(f"{self.path} holds code or objects that are no tensors ({what}); nothing of it was run. "
                          f"Save the state dict alone, torch.save({{{STATE!r}: model.state_dict()}}, path)") from error
        except _BROKEN as error:
            raise Unreadable(f"{self.path} cannot be read: {_first_line(error)}") from error
        if not isinstance(found, dict):
            raise Refused(f"{self.path} holds a {type(found).__name__}; a state dict is read, alone or as {STATE!r}")
        return found

    def _info(self, tensor: Any) -> Info:
        return Info(tuple(tensor.shape), _DTYPES[_dtype_name(tensor)])


def _whole(value: Any) -> int | None:
    """A step, however it was stored: an int, a whole float, or a tensor or number of NumPy that holds one of them."""
    if getattr(value, "shape", ()) not in ((), (1,)) or isinstance(value, bool):
        return None
    number = value.item() if hasattr(value, "item") else value
    whole = isinstance(number, (int, float)) and not isinstance(number, bool) and number == number // 1 and number >= 0
    return int(number) if whole else None


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if getattr(value, "shape", ()) else repr(value)[:60]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _torch(path: Path) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise Refused(f"{path} is read by PyTorch, which is not installed; pip install 'gt-jax[torch]', or give "
                      ".safetensors files") from error


def _state_dict(path: Path, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors by name; raises `Refused` that lists everything that is not a plain tensor."""
    state = next((found[key] for key in (STATE, "state_dict", "model") if _holds_tensors(found.get(key))),
                 found.get(STATE, found))
    if not _holds_tensors(state):
        keys = ", ".join(map(repr, list(found)[:8])) or "nothing"
        raise Refused(f"{path} holds no state dict: there is neither {STATE!r} nor a tensor at its top ({keys})")
    refuse_all([f"{name!r} is {problem}" for name, value in state.items() if (problem := _problem(name, value))],
               f"{path} holds more than plain tensors in its state dict:")
    return state


def _holds_tensors(state: Any) -> bool:
    return isinstance(state, Mapping) and any(hasattr(value, "numpy") for value in state.values())


def _problem(name: Any, value: Any) -> str | None:
    """Why an entry of a state dict is no plain tensor."""
    if not isinstance(name, str):
        return "no name"
    if not hasattr(value, "numpy"):
        return f"a {type(value).__name__}, no tensor"
    if str(value.layout) != "torch.strided" or value.device.type != "cpu" or value.is_quantized:
        return f"a tensor of layout {value.layout} on {value.device}; only dense ones are read"
    if _dtype_name(value) not in _DTYPES:
        return f"a tensor of dtype {value.dtype}; known are {', '.join(_DTYPES)}"
    return None


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
