"""Text to tokens to packed batches: deterministic, resumable in no time, with a held-out part.

- The stream is a function of (seed, row number): documents are cut into pieces, the pieces of an epoch are permuted
  and laid end to end, the result is cut into rows, the rows are permuted within windows. A position is one integer.
- No token of the training text is dropped: a row that an epoch does not fill goes on with the next epoch.
- A document that continues in another row keeps its target across the cut; no target crosses a document's end or
  reaches from one part of the text into another (gt_jax/text/split.py).

A text of files is held in memory, two bytes a token, four where the vocabulary is larger than 65,536; one of token
folders (gt_jax/text/token_folder.py) is mapped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, Integer, UInt

from gt_jax.configs.data import BYTES, ENDLESS, TEXT, WITHOUT_SPLIT, DataConfig
from gt_jax.errors import Refused, refuse_all
from gt_jax.text import sources
from gt_jax.text.round_trip import lost
from gt_jax.text.split import Ends, Spans, content_keys, split_documents
from gt_jax.text.token_folder import JoinedTokens, content_of, is_token_folder, read_folders
from gt_jax.text.tokenizers import Tokenizer, encode_all, laid_out, open_tokenizer

Batch = dict[str, Int32[np.ndarray, "b t"]]
Row = dict[str, Int32[np.ndarray, " t"]]
Pieces = Int64[np.ndarray, "pieces"]


@runtime_checkable
class Sliced(Protocol):
    """What gives the tokens from one place to another of a span."""

    def __getitem__(self, place: slice, /) -> Integer[np.ndarray, " n"]: ...


# A piece is what the first shuffle moves. Whole files of 100 KB would fill hundreds of rows in succession; pieces of
# one row would lose the beginning of every context. Eight rows keep most of it, and the second shuffle, of rows within
# a window, parts those that came from one piece: with two rows a batch they would otherwise be four successive steps.
# A window of many batches, since a batch that were a whole window would hold all eight rows of each of its pieces.
_PIECE_ROWS = 8
_WINDOW_ROWS = 1024
_WINDOW_BATCHES = 16
_HELD_OUT_SEED = 0  # an order of its own, so that the first batches are a fair sample whatever the run's seed


def _pieces(spans: Spans, longest: int) -> tuple[Pieces, Pieces, Pieces]:
    """Where the pieces start and stop, and where their spans stop; the pieces of a span are even."""
    firsts, lasts = np.asarray(spans, np.int64).T
    counts = -(-(lasts - firsts) // longest)
    span = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its span
    first, length, count = firsts[span], (lasts - firsts)[span], counts[span]
    return first + length * number // count, first + length * (number + 1) // count, lasts[span]


class PackedRows:
    """Random access to rows of `row` tokens: row i holds tokens [i * row, (i + 1) * row) of the epochs laid end to end.

    `endless` repeats with a new order each epoch and permutes rows within windows of `window` rows, at most an epoch;
    otherwise one epoch, rows in order, the last one padded. A row is {tokens, targets, segment_ids}, int32 [row]:
    targets are -1 where no next token of the same document (and the same part) exists, segments count from 1 within a
    row, 0 is padding.
    """

    def __init__(
        self, tokens: Sliced, spans: Spans, row: int, seed: int, endless: bool,
        window: int = _WINDOW_ROWS,
    ) -> None:  # fmt: skip
        self._tokens, self._row, self._seed, self._endless = tokens, row, seed, endless
        self._starts, self._stops, self._span_stops = _pieces(spans, _PIECE_ROWS * row)
        self._total = int((self._stops - self._starts).sum())
        self._window = min(window, max(1, self._total // row)) if endless else 1
        self._epoch = functools.lru_cache(maxsize=4)(self._new_epoch)  # a window reaches over three epochs at most
        self._window_order = functools.lru_cache(maxsize=2)(functools.partial(self._permutation, self._window, 1))

    def __len__(self) -> int:
        return ENDLESS if self._endless else math.ceil(self._total / self._row)

    def __getitem__(self, index: int) -> Row:
        packed = {"tokens": np.zeros(self._row, np.int32), "targets": np.full(self._row, -1, np.int32),
                  "segment_ids": np.zeros(self._row, np.int32)}
        window, place = divmod(int(index), self._window)
        position = (window * self._window + int(self._window_order(window)[place])) * self._row
        filled = segment = 0
        while filled < self._row:
            epoch, offset = divmod(position + filled, self._total)
            if epoch and not self._endless:
                break
            start, stop, span_stop = self._find(epoch, offset)
            stop = min(stop, start + self._row - filled)
            here = slice(filled, filled + stop - start)
            segment += 1
            packed["tokens"][here] = self._tokens[start:stop]
            packed["segment_ids"][here] = segment
            known = min(stop, span_stop - 1)  # the last token of a span has no next one
            packed["targets"][filled:filled + known - start] = self._tokens[start + 1:known + 1]
            filled = here.stop
        return packed

    def _find(self, epoch: int, offset: int) -> tuple[int, int, int]:
        """Where token `offset` of the epoch is in the flat array, where its piece stops and where its span stops."""
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        piece = order[place]
        stop = int(self._stops[piece])
        return stop - (int(ends[place]) - offset), stop, int(self._span_stops[piece])

    def _new_epoch(self, epoch: int) -> tuple[Pieces, Pieces]:
        """The order of the pieces in this epoch, and where in the epoch each ends."""
        order = self._permutation(len(self._starts), 0, epoch)
        return order, np.cumsum((self._stops - self._starts)[order])

    def _permutation(self, length: int, purpose: int, number: int) -> Int64[np.ndarray, " length"]:
        """A permutation that is a function of (seed, purpose, number).

        Sorted raw Philox bits: numpy promises that these never change, which it does not of Generator.permutation.
        grain's own shuffle takes 2.4 ms an index below a hundred rows, since it walks a 16-bit cipher.
        """
        key = np.array([self._seed, 2 * number + purpose], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable").astype(np.int64)


@runtime_checkable
class RandomRows(Protocol):
    """Rows by their number, as many as `len` says."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class TrainStream:
    """An endless iterator of batches: {tokens, targets, segment_ids}, each int32 [batch_size, sequence_length].

    `state()` is small and goes through JSON; after `restore(state)` come the batches that followed it, bit for bit.
    """

    def __init__(
        self, rows: RandomRows, config: DataConfig, identity: Mapping[str, Any],
        files: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
    ) -> None:  # fmt: skip
        """`files` are {"path", "sha256"} of what was read: a position keeps them, to say which file was changed."""
        # Imported here: half a second that a command which reads no training text should not pay.
        import grain

        self._identity, self._files = identity, functools.cache(files)
        batches = grain.MapDataset.source(rows).batch(config.batch_size)
        # A row takes tens of microseconds: threads would only take the cores from the training step.
        self._iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        files = [dict(file) for file in self._files()]
        return {"batches": int(self._iterator.get_state()["next_index"]), **self._identity,
                **({"files": files} if files else {})}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that `state` was taken at; raises `Refused` if it is of another text or shape."""
        saved = {**WITHOUT_SPLIT, **state}
        wrong = [f"{key} is {value!r} here and {saved.get(key)!r} in the saved position"
                 for key, value in self._identity.items() if saved.get(key) != value]
        if saved.get("content") != self._identity["content"]:
            wrong += _changed(saved.get("files") or (), self._files())
        batches = state.get("batches")
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 0:
            wrong.append(f"batches is {batches!r}; it must be the number of batches already read")
        refuse_all(wrong, "the saved position in the data does not fit this text:")
        self._iterator.set_state({"next_index": batches})


def _changed(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which files of a text are not among those that were read before: by what they hold, wherever they lie."""
    known, here = ({file["sha256"] for file in files} for files in (before, now))
    changed = [f"file {file['path']} is not one that was read before (SHA-256 {file['sha256'][:12]})"
               for file in now if before and file["sha256"] not in known]
    return changed + [f"file {file['path']} was read before, SHA-256 {file['sha256'][:12]}, and is not here as it was"
                      for file in before if file["sha256"] not in here]


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens, with its training, held-out and tuning parts as spans; `open_text` makes it.

    `ends` is where each document ends in the tokens, `characters` the length of the text in bytes; `told` is what the
    summary adds about how it was read, `content` its hash where that was noted before.
    """

    config: DataConfig
    source: str
    tokens: UInt[np.ndarray, " n"] | JoinedTokens
    ends: Ends
    tokenizer: Tokenizer
    characters: int
    training_spans: Spans
    held_out_spans: Spans
    tuning_spans: Spans
    told: str = ""
    content: str | None = None

    @property
    def documents(self) -> int:
        """How many."""
        return len(self.ends)

    def train(self, state: Mapping[str, Any] | None = None) -> TrainStream:
        """The training batches from the beginning, or from where `state` was taken."""
        stream = TrainStream(
            self.training_rows(), self.config, identity(self.config, self.content_hash()), self.files)
        if state is not None:
            stream.restore(state)
        return stream

    def training_rows(self) -> PackedRows:
        """The rows of the training part, endless."""
        config = self.config
        window = max(_WINDOW_ROWS, 0 if config.split == "fill" else _WINDOW_BATCHES * config.batch_size)
        return PackedRows(self.tokens, self.training_spans, config.sequence_length, config.seed, True, window)

    @property
    def parts(self) -> dict[str, Text]:
        """Itself: what `gt_jax.text.data.Data` has several of."""
        return {TEXT: self}

    def held_out(self, batches: int | None = None) -> list[Batch]:
        """The held-out batches, at most `batches` of them: the same whatever the seed, the last one padded.

        Fewer rows than there are lie evenly over the whole part: the first ones would be those of a few documents.
        """
        return self._batches("held-out", self.held_out_spans, batches)

    def held_out_by_part(self, batches: int | None = None) -> dict[str, list[Batch]]:
        """The same under the name of the only part."""
        return {TEXT: self.held_out(batches)}

    def tuning(self, batches: int | None = None) -> list[Batch]:
        """The batches of the tuning part, likewise: what is chosen by them is not chosen by the held-out part."""
        if not self.config.tuning:
            raise Refused("this text has no tuning part; give its DataConfig a share, for example tuning=0.02")
        return self._batches("tuning", self.tuning_spans, batches)

    def _batches(self, part: str, spans: Spans, batches: int | None) -> list[Batch]:
        if batches is not None and batches < 1:
            raise Refused(f"{part} batches is {batches}; it must be at least 1")
        return spread_batches(self.tokens, spans, self.config, batches)

    def content_hash(self) -> str:
        """SHA-256 of the documents' tokens, in hexadecimal digits."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        if self.content is not None:
            return self.content
        tokens = np.asarray(self.tokens)
        return hashlib.sha256(tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()

    def position_after(self, positions: Iterable[Any]) -> dict[str, Any] | None:
        """`position_after` of what a position in this text is a position in."""
        return position_after(identity(self.config, self.content_hash()), positions)

    def files(self) -> list[dict[str, Any]]:
        """{"path", "sha256"} of every text file; empty where the text is no file."""
        return self._files

    @functools.cached_property
    def _files(self) -> list[dict[str, Any]]:
        return sources.file_hashes(self.config.text)

    def summary(self) -> str:
        """One line: where the text is from, documents, bytes, held-out bytes, the share for tuning if there is one."""
        held, tuning = (int(np.diff(spans).sum()) for spans in (self.held_out_spans, self.tuning_spans))
        share = f"({100 * held / len(self.tokens):.1f} %) held out"
        share += f", {100 * tuning / len(self.tokens):.1f} % for tuning" if tuning else ""
        words = f"{self.source}: {self.documents} document{'s' * (self.documents != 1)}, {_bytes(self.characters)}, "
        if self.config.tokenizer == BYTES:
            return f"{words}{_bytes(held)} {share}{self.told}"
        return f"{words}{len(self.tokens):,} tokens of {self.config.tokenizer}, {held:,} {share}{self.told}"


def open_text(config: DataConfig) -> Text:
    """Read, tokenize and split the text that `config` names; raises `Refused` for one that cannot be used.

    Of a text of token folders nothing is read but where its documents end.
    """
    if any(map(is_token_folder, config.text)):
        return _open_tokens(config)
    told = ""
    if config.tfds is not None:
        source, documents = sources.tfds_text(config.tfds, config.tfds_dir)
    elif config.text:
        source, documents, told = sources.text_files(config.text)
    else:
        source, documents = sources.standard_library()
    tokenizer = open_tokenizer(config.tokenizer)
    encoded = encode_all(tokenizer, config.tokenizer, documents)
    tokens, ends = laid_out(encoded, tokenizer)
    characters = sum(map(len, documents))
    _refuse_short(source, int(ends[-1]), characters, config)
    split = split_documents(ends, content_keys(documents), config)
    told += lost(tokenizer, documents, encoded)
    return Text(config, source, tokens, ends, tokenizer, characters, *split, told)


def _open_tokens(config: DataConfig) -> Text:
    folders = read_folders(config.text, config.tokenizer)
    firsts = np.cumsum([0, *(one.manifest.tokens for one in folders[:-1])])
    ends = np.concatenate([one.ends + first for one, first in zip(folders, firsts.tolist(), strict=True)])
    keys = np.concatenate([one.keys for one in folders]).astype(np.uint64)
    tokens = folders[0].tokens if len(folders) == 1 else JoinedTokens([one.tokens for one in folders])
    characters = sum(one.manifest.bytes for one in folders)
    source = f"tokens in {config.text[0]!r}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
    _refuse_short(source, len(tokens), characters, config)
    told = "".join(one.manifest.told for one in folders)
    return Text(config, source, tokens, ends, open_tokenizer(config.tokenizer), characters,
                *split_documents(ends, keys, config), told, content_of(folders))  # fmt: skip


def _refuse_short(source: str, tokens: int, characters: int, config: DataConfig) -> None:
    """Raise `Refused` where there is not a row for each part."""
    parts = ("training", "held-out", "tuning") if config.tuning else ("training", "held-out")
    if tokens < len(parts) * config.sequence_length:
        raise Refused(f"{source} is too short: {tokens} tokens ({characters} bytes); "
                      f"{' and '.join(f'one {part} row' for part in parts)} of sequence_length "
                      f"{config.sequence_length} need {len(parts) * config.sequence_length}. Give a longer text or a "
                      "shorter sequence")


def identity(config: DataConfig, content_hash: str) -> dict[str, Any]:
    """What a position in the training data is a position in."""
    return {"content": content_hash, "seed": config.seed, "held_out": config.held_out,
            "sequence_length": config.sequence_length, "batch_size": config.batch_size, "split": config.split,
            "tuning": config.tuning}


def position_after(own: Mapping[str, Any], positions: Iterable[Any]) -> dict[str, Any] | None:
    """The first of the `positions`, as `TrainStream.state` gave them, that is one in the data of identity `own`: this
    text, this split and rows of this length in this order; None without any. Rows count: at another batch size the next
    whole batch follows. Raises `Refused` where that one does not say how far it is.
    """
    alike = {**own, "batch_size": None}
    for place in positions:
        known = {**WITHOUT_SPLIT, **place} if isinstance(place, Mapping) else {}
        if {**{key: known.get(key) for key in own}, "batch_size": None} != alike:
            continue
        read, size = known.get("batches"), known.get("batch_size")
        if not (isinstance(read, int) and isinstance(size, int) and min(read, size) >= 0):
            raise Refused(f"the saved position in this text is not one: batches is {read!r}, batch_size {size!r}; "
                          "both must be numbers. Its checkpoint's metadata are damaged")  # fmt: skip
        return {**own, "batches": math.ceil(read * size / own["batch_size"])}
    return None


def held_out_batches(config: DataConfig, batches: int | None = None) -> list[Batch]:
    """`open_text(config).held_out(batches)`."""
    return open_text(config).held_out(batches)


def spread_batches(
    tokens: Sliced, spans: Spans, config: DataConfig, batches: int | None
) -> list[Batch]:
    """At most `batches` batches of the rows of these spans: of N rows row i of n is row floor(i N / n); None is all."""
    size = config.batch_size
    rows = PackedRows(tokens, spans, config.sequence_length, _HELD_OUT_SEED, endless=False)
    count = len(rows) if batches is None else min(batches * size, len(rows))
    chosen = (np.arange(count) * len(rows) // count).tolist()
    return stacked([rows[row] for row in chosen], size)


def stacked(rows: Sequence[Row], size: int) -> list[Batch]:
    """Rows of the same keys stacked to batches of [size, t]; rows that the last one lacks are padding."""
    empty = {key: np.full_like(value, -1 if key == "targets" else 0) for key, value in rows[0].items()} if rows else {}
    return [{key: np.stack([row[key] for row in (*here, *[empty] * (size - len(here)))]) for key in empty}
            for here in (rows[first:first + size] for first in range(0, len(rows), size))]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} bytes"
