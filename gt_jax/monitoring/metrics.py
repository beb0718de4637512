"""What a run says about itself: JSON lines always, a bar on a terminal, plain lines in a pipe, pictures and tables.

- One JSON object a line, flushed, so that a killed run leaves every line but perhaps the last one whole.
- Wall-clock values have keys that begin with `time_`; without them the lines of a resumed run equal those of an
  uninterrupted one.
- JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and
  `read_metrics` gives the numbers back.
- A terminal that has gone, or a pipe that was closed, ends no run: nothing more is shown there.
- A listener (TensorBoard) and a watch (alerts) hear of the same records.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import numbers
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, runtime_checkable

import numpy as np

from gt_jax.errors import Refused
from gt_jax.files import parse_json, write_atomically

__all__ = ["Recorder", "format_value", "read_metrics", "seconds_of", "table", "to_json", "truncate_after"]

Stream = TextIO | io.TextIOBase
EARLIER_NAMES = {"expected_k": "mean_weight", "executed": "passes_run"}
"""What metrics of earlier runs call what has another name now."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?\s?(%|[a-zA-Z]{0,3})")


@runtime_checkable
class Listener(Protocol):
    """Another place that records go to, for example TensorBoard."""

    def log(self, record: Mapping[str, Any]) -> None:
        """One record, numbers as numbers."""

    def close(self) -> None:
        """No more will come."""


class Recorder:
    """Writes the metrics of a run to `path` and shows them on `stream` (stderr); a context manager.

    On a terminal a bar with rate and time left, otherwise a line every `every` steps; `show=False` shows nothing (the
    other processes of a run on many machines). `resume_step` s keeps the lines of `path` up to step s and removes the
    later ones and a half-written last one; -1 removes all. Raises `Refused` where `path` has lines and `resume_step`
    is None, or where a line before the last one cannot be read.

    `watch` hears of every line, the kept ones too, and says what is to be shown of the new ones; `also` hears of the
    new ones and is closed with the recorder; `utilisation` of (tokens a second, values) is written as `time_mfu`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, total_steps: int | None = None,
                 resume_step: int | None = None, tokens_per_step: int | None = None, every: int = 10,
                 show: bool = True, stream: Stream | None = None, clock: Callable[[], float] = time.monotonic,
                 watch: Callable[[Mapping[str, Any]], Sequence[str]] | None = None, also: Listener | None = None,
                 utilisation: Callable[[float, Mapping[str, Any]], float | None] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._resume_step = resume_step
        self._every, self._total = every, total_steps
        self._tokens_per_step, self._clock, self._start = tokens_per_step, clock, clock()
        self._step = max(0, resume_step or 0)
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._file: TextIO | None = None
        self._begun = False
        stream = sys.stderr if stream is None else stream
        self._stream = stream if show else None
        self._on_terminal = show and stream is not None and stream.isatty()
        self._bar: Any = None
        self._watch, self._also, self._utilisation = watch, also, utilisation

    def __enter__(self) -> Recorder:
        kept = self._resume_step or 0
        if self._path is not None:
            if self._resume_step is not None:
                kept = truncate_after(self._path, self._resume_step)
                if self._watch is not None and self._path.exists():
                    for record in read_metrics(self._path):
                        self._watch(record)
            elif self._path.exists() and self._path.stat().st_size:
                raise Refused(f"{self._path} has metrics of another run; resume that one or give another place")
            self._file = open(self._path, "a", encoding="utf-8")
        if self._on_terminal:
            self._bar = _progress_bar(self._stream, self._total, self._step)
        if kept < (self._resume_step or 0):
            self.message(f"{self._path} ends at step {kept}, the checkpoint is of step {self._resume_step}: the lines "
                         "between were lost, and the run goes on without them")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._gone():
            if self._bar is not None:
                self._bar.close()
        self._bar = None
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()  # on a full disk it fails once more
        finally:
            if self._also is not None:
                self._also.close()

    def log(self, step: int, **values: Any) -> None:
        """One line: `step`, `values` (scalars, small arrays or strings; jax or numpy), and the time since the start."""
        now = self._clock()
        self._recent.append((now, step))
        line = {"step": step, **{key: to_json(value) for key, value in values.items()},
                "time_elapsed": round(now - self._start, 3)}
        if not self._begun:  # of a run that is resumed the clock starts anew here
            line["time_begun"] = 0.0
            self._begun = True
        rate = self._steps_per_second()
        if rate and self._tokens_per_step:
            line["time_tokens_per_second"] = round(rate * self._tokens_per_step, 1)
            share = None if self._utilisation is None else self._utilisation(rate * self._tokens_per_step, values)
            if share is not None:
                line["time_mfu"] = float(f"{share:.4g}")
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        with self._gone():
            self._show(step, values, line)
        self._step = step
        record = _numbers(line)
        if self._also is not None:
            self._also.log(record)
        for text in () if self._watch is None else self._watch(record):
            self.message(text)

    def sync(self) -> None:
        """Have what was logged on the disk, where a power cut leaves it; called before a checkpoint of its step."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def message(self, text: str) -> None:
        """A line for the reader, above the bar; it does not go into the JSON lines."""
        with self._gone():
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            elif self._stream is not None:
                print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        """What is shown here is lost where nobody can see it any more; the run and its metrics are not."""
        try:
            yield
        except OSError:
            self._stream = self._bar = None

    def _steps_per_second(self) -> float | None:
        """Over the last lines alone, so that the compilation of the first step is soon forgotten."""
        (first, first_step), (last, last_step) = self._recent[0], self._recent[-1]
        return (last_step - first_step) / (last - first) if last > first and last_step > first_step else None

    def _show(self, step: int, values: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        rate = self._steps_per_second()
        shown = [f"{key} {format_value(value)}" for key, value in values.items()
                 if np.ndim(value) == 0 and not key.startswith("time_")]
        if rate and self._tokens_per_step:
            shown.append(f"{_thousands(rate * self._tokens_per_step)} tokens/s")
        if "time_mfu" in line:
            shown.append(f"{100 * line['time_mfu']:.1f} % MFU")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        due = step // self._every > self._step // self._every or step == self._total or len(self._recent) == 1
        due = due or "held_out_loss" in values  # it has the step of the training line before it
        if self._stream is not None and due:
            if rate and self._total and step < self._total:
                shown.append(f"{_duration((self._total - step) / rate)} left")
            place = f"step {step}" + (f"/{self._total}" if self._total else "")
            print("  ".join([place, *shown]), file=self._stream, flush=True)


def _progress_bar(stream: Stream | None, total: int | None, initial: int) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):
        """tqdm without its monitor thread, which a bar that is updated at every step does not need."""

        monitor_interval = 0

    return Bar(total=total, initial=initial, file=stream, unit="step", dynamic_ncols=True, leave=True)


def json_values(value: Any) -> Any:
    """JSON values all the way down; NaN and infinities as the strings that `float` reads back."""
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    return [json_values(item) for item in value] if isinstance(value, (list, tuple)) else to_json(value)


def to_json(value: Any) -> Any:
    """A scalar, array, list or string (jax or numpy) as what JSON can hold; NaN and infinities as strings."""
    if isinstance(value, (str, bool)) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim:
        return [to_json(item) for item in array]
    if array.dtype == bool:
        return bool(array)
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    number = float(array)  # also for bfloat16, which numpy does not count among its floating types
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every line of a metrics file as a dict, NaN and infinities as numbers; a half-written last line is left out.

    Values that had another name (`EARLIER_NAMES`) are given under the one they have now. Raises `Refused` that names
    the file and the line where an earlier line is not a JSON object with a step.
    """
    return [{EARLIER_NAMES.get(name, name): value for name, value in _numbers(record).items()}
            for record, _ in _read_lines(Path(path))]


def truncate_after(path: Path, step: int) -> int:
    """Remove the lines after `step` and a half-written last one; the file is replaced at once or not at all.

    Returns the last step that there still is a line of, 0 for none.
    """
    if not path.exists():
        return 0
    kept = [(record["step"], line) for record, line in _read_lines(path) if record["step"] <= step]
    write_atomically(path, "".join(line + "\n" for _, line in kept))
    return max((of for of, _ in kept), default=0)


def _read_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise Refused(f"metrics file {str(path)!r} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            whole = isinstance(record, dict) and isinstance(record.get("step"), int) and abs(record["step"]) < 2**63
        except ValueError:
            whole = False
        if whole:
            found.append((record, line.decode()))
        elif number < len(lines):  # only what follows the last newline can be half-written
            raise Refused(f"metrics file {str(path)!r}, line {number}: not a JSON object with a step: {line[:80]!r}")
    return found


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def measured(value: Any) -> np.ndarray:
    """Numbers of a record, float64; raises ValueError or TypeError for what is none. NumPy takes None for NaN."""
    if any(one is None for one in np.asarray(value, object).flat):
        raise ValueError("null is no number")
    try:
        return np.asarray(value, np.float64)
    except OverflowError as error:
        raise ValueError("no float is as large") from error


def seconds_of(lines: Sequence[dict[str, Any]]) -> float:
    """The time a run took, its clock starting anew at every resume: at a line with `time_begun`.

    Older files do not have it; there a resume is seen where the clock goes back.
    """
    total = before = 0.0
    for line in lines:
        if "time_elapsed" in line:
            now = line["time_elapsed"]
            total += now - (before if now >= before and "time_begun" not in line else 0.0)
            before = now
    return total


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Columns aligned by spaces, numbers to the right; None is shown as `-`. Raises ValueError for a ragged row."""
    for number, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(f"row {number} has {len(row)} cells, {len(headers)} headers are given")
    cells = [[format_value(cell) for cell in row] for row in rows]
    columns = [[header, *column] for header, column in zip(headers, zip(*cells, strict=True), strict=True)] \
        if cells else [[header] for header in headers]
    aligned = []
    for header, *body in columns:
        width = max(len(cell) for cell in [header, *body])
        right = bool(body) and all(cell == "-" or _NUMBER.fullmatch(cell) for cell in body)
        pad = str.rjust if right else str.ljust
        aligned.append([pad(header, width), "-" * width, *(pad(cell, width) for cell in body)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def format_value(value: Any) -> str:
    """One scalar for a reader: four significant digits, whole numbers whole."""
    if value is None or isinstance(value, (str, bool)):
        return "-" if value is None else str(value)
    plain = value if isinstance(value, numbers.Number) else np.asarray(value).item()
    return f"{plain:.4g}" if isinstance(plain, (float, np.floating)) else str(plain)


def _thousands(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
