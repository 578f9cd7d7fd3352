"""Structured output: which tokens keep the text inside a JSON schema, regular expression, choice or Lark grammar.

`GrammarCompiler` (one per engine) compiles a request's `StructuredOutput` in a thread, with bounds on size and time;
each child then owns a `GrammarState`, which gives one token bitmask per row of a step and advances with the tokens put
out. The work is llguidance's (Earley parsing over a lexer of regex derivatives); this module adds what a server needs:

* The end-of-sequence tokens are allowed exactly where the text so far is complete, and afterwards nothing else is.
* Special tokens never stand for text: a string "<think>" in a schema is spelled with ordinary tokens. Only a Lark
  grammar that names one outside a string, as in `start: <think> TEXT`, gets it.
* Where the next text is forced, only its canonical tokenisation is allowed: the model sees what it was trained on.
* A regex matches the whole text, with or without ^ and $. Its digit class means 0 to 9; other classes are Unicode's.
* JSON is compact (no free whitespace) unless the request says otherwise: weak models spend their budget on blanks.

Legend: W = ceil(V / 32) words of a token bitmask; bit i % 32 of word i // 32 belongs to token i.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from numpy.typing import NDArray

from tilery.engine.messages import StructuredKind, StructuredOutput

MAX_SPEC_BYTES = 64 * 1024
COMPILE_SECONDS = 5.0
"""From submission to the compiled grammar, waiting for a free compiler thread included."""
COMPILE_THREADS = 2
CACHED_GRAMMARS = 256
COMPILE_STACK_BYTES = 256 * 1024 * 1024
"""llguidance recurses over a grammar's definitions, up to 7 kB of stack a level, and running out ends the process. A
spec of MAX_SPEC_BYTES holds at most about 8,000 levels (60 MB). Only touched pages of a stack cost memory."""

Mask = NDArray[np.int32]
"""[W] words, read-only."""

_NAMES = {
    StructuredKind.JSON_SCHEMA: "JSON schema",
    StructuredKind.JSON_OBJECT: "JSON object",
    StructuredKind.REGEX: "regex",
    StructuredKind.CHOICE: "choice",
    StructuredKind.GRAMMAR: "grammar",
}


class GrammarError(ValueError):
    """The request's grammar cannot be used, or its text left the grammar; the message is fit for the client."""


# ---- compiling ---------------------------------------------------------------------------------------------------


class GrammarCompiler:
    """Compiles structured-output specs for one tokenizer; safe to call from any thread.

    Takes a byte-level BPE (or other) tokenizer.json as text, the number of logits of the model, which may exceed the
    tokenizer's, and the tokens that end a sequence. Raises `ValueError` if the tokenizer cannot be read or has more
    tokens than `vocab_size`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        timeout: float = COMPILE_SECONDS,
    ) -> None:
        if not eos_token_ids:
            raise ValueError("Structured output needs at least one end-of-sequence token; eos_token_ids is empty.")
        renamed, self._special, size = _hide_special_tokens(tokenizer_json)
        if size > vocab_size:
            raise ValueError(f"The tokenizer has {size} tokens, but the model only {vocab_size} logits.")
        self._tokenizer = LLTokenizer(renamed, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        self._limits = LLParserLimits(verbose_errors=False)
        self._eos = frozenset(eos_token_ids)
        self._eos_words = _words(vocab_size, sorted(self._eos))
        self._known_words = _words(vocab_size, range(size)) | self._eos_words
        self._text_words = self._known_words & ~_words(vocab_size, list(self._special.values())) | self._eos_words
        self._timeout = timeout
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(COMPILE_THREADS)
        self._cache: OrderedDict[tuple[StructuredKind, str, bool], Future[Grammar]] = OrderedDict()

    def compile(self, structured: StructuredOutput) -> Grammar:
        """`submit` and wait. Raises `GrammarError`."""
        return self.submit(structured).result()

    def submit(self, structured: StructuredOutput) -> Future[Grammar]:
        """Compile in the background; the future holds a `Grammar` or a `GrammarError` within `timeout` seconds.

        The last CACHED_GRAMMARS good specs are kept, and equal specs on their way share one compilation.
        """
        key = (structured.kind, structured.spec, structured.compact)
        with self._lock:
            future = self._cache.get(key)
            if future is not None:
                self._cache.move_to_end(key)
                return future
            future = self._cache[key] = Future()
            future.set_running_or_notify_cancel()
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)

        def supervise() -> None:
            try:
                grammar = self._build_in_time(structured)
            except Exception as error:
                with self._lock:
                    if self._cache.get(key) is future:
                        del self._cache[key]
                future.set_exception(error)
            else:
                future.set_result(grammar)

        threading.Thread(target=supervise, name="grammar", daemon=True).start()
        return future

    def _build_in_time(self, structured: StructuredOutput) -> Grammar:
        """Build in a further thread, since only a thread of one's own can be walked away from; its slot stays taken."""
        start = time.monotonic()
        if not self._slots.acquire(timeout=self._timeout):
            raise GrammarError("The grammar compiler is busy with other requests; try again later.")
        built: Future[Grammar] = Future()

        def build() -> None:
            try:
                built.set_result(self._build(structured))
            except Exception as error:
                built.set_exception(error)
            finally:
                self._slots.release()

        try:
            _start_with_stack(build)
        except BaseException:
            self._slots.release()
            raise
        try:
            return built.result(max(0.0, start + self._timeout - time.monotonic()))
        except TimeoutError:
            name = _NAMES[structured.kind]
            raise GrammarError(f"The {name} took longer than {self._timeout:g} s to compile; simplify it.") from None

    def _build(self, structured: StructuredOutput) -> Grammar:
        kind = structured.kind
        size = len(structured.spec.encode("utf-8", "surrogatepass"))
        if size > MAX_SPEC_BYTES:
            raise GrammarError(f"The {_NAMES[kind]} has {size} bytes; at most {MAX_SPEC_BYTES} are accepted.")
        try:
            source = self._source(structured)
        except RecursionError:
            raise GrammarError(f"The {_NAMES[kind]} is nested too deeply.") from None
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(f"The {_NAMES[kind]} cannot be used: {_reason(kind, matcher.get_error())}")
        usable = self._known_words if kind is StructuredKind.GRAMMAR else self._text_words
        grammar = Grammar(matcher, self._eos, self._eos_words, usable)
        if not grammar.start().mask().any():  # also builds the lexer, so that the first step does not pay for it
            raise GrammarError(f"The {_NAMES[kind]} matches no text that this model's tokens can spell.")
        return grammar

    def _source(self, structured: StructuredOutput) -> str:
        """The spec as a grammar in llguidance's form."""
        kind, spec = structured.kind, structured.spec
        if kind is StructuredKind.JSON_OBJECT:
            return _json_source({"type": "object"}, structured.compact)
        if kind is StructuredKind.JSON_SCHEMA:
            schema = _parse(kind, spec)
            if schema is False:
                raise GrammarError("The JSON schema `false` matches nothing.")
            if not isinstance(schema, dict) and schema is not True:
                raise GrammarError(f"The JSON schema must be an object, got {type(schema).__name__}.")
            return _json_source({} if schema is True else spec, structured.compact)
        if kind is StructuredKind.CHOICE:
            choices = _parse(kind, spec)
            if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
                raise GrammarError('The choice must be a JSON array of strings, such as ["yes", "no"].')
            if not choices:
                raise GrammarError("The choice has no alternatives; give at least one.")
            return LLMatcher.grammar_from_regex("|".join(_literal(choice) for choice in dict.fromkeys(choices)))
        if not spec.strip():
            raise GrammarError(f"The {_NAMES[kind]} is empty.")
        if kind is StructuredKind.REGEX:
            return LLMatcher.grammar_from_regex(regex_to_lark(spec, use_ascii="d"))
        return LLMatcher.grammar_from_lark(self._name_special_tokens(spec))

    def _name_special_tokens(self, lark: str) -> str:
        """`<think>` outside strings, regexes and comments -> `<[5]>`, since names are hidden from the tokenizer."""

        def replace(match: re.Match[str]) -> str:
            token = self._special.get(match[0])
            return match[0] if token is None else f"<[{token}]>"

        return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|<[^<>\s"]+>', replace, lark)


def _hide_special_tokens(tokenizer_json: str) -> tuple[str, dict[str, int], int]:
    """Give added tokens unspeakable names.

    Returns the new tokenizer.json, the true names with their ids, and the number of tokens. llguidance tokenises forced
    text with this file, and would otherwise write the text "<think>" as the special token.
    """
    try:
        data = json.loads(tokenizer_json)
        special = {token["content"]: int(token["id"]) for token in data["added_tokens"]}
        vocab = data["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer.json cannot be read: {type(error).__name__}: {error}.") from None
    hidden = {name: f"\ufdd0{token}\ufdd1" for name, token in special.items()}  # noncharacters of Unicode
    for token in data["added_tokens"]:
        token["content"] = hidden[token["content"]]
        token["special"] = True
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {hidden.get(piece, piece): index for piece, index in vocab.items()}
        highest = max([*vocab.values(), *special.values()], default=-1)
    else:  # unigram: a list of [piece, score]
        data["model"]["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
        highest = max([len(vocab) - 1, *special.values()])
    if data["model"].get("merges"):  # of ordinary text into an added token, or on from one
        merges = data["model"]["merges"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        data["model"]["merges"] = [[a, b] for a, b in pairs if hidden.keys().isdisjoint((a, b, a + b))]
    if data["model"].get("unk_token") in hidden:
        data["model"]["unk_token"] = hidden[data["model"]["unk_token"]]
    data["post_processor"] = data["padding"] = data["truncation"] = None
    return json.dumps(data), special, highest + 1


def _start_with_stack(target: Callable[[], None]) -> None:
    """Start a daemon thread with COMPILE_STACK_BYTES of stack; the size can only be set for the process."""
    with _STACK_SIZE_LOCK:
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            threading.Thread(target=target, name="grammar-build", daemon=True).start()
        finally:
            threading.stack_size(before)


_STACK_SIZE_LOCK = threading.Lock()


def _parse(kind: StructuredKind, spec: str) -> object:
    try:
        return json.loads(spec)
    except RecursionError:
        raise
    except ValueError as error:
        raise GrammarError(f"The {_NAMES[kind]} is not valid JSON: {error}.") from None


def _json_source(schema: str | dict[str, object], compact: bool) -> str:
    """Whitespace is a default only: a schema with its own "x-guidance" options keeps them."""
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": not compact})
    except ValueError as error:
        raise GrammarError(f"The JSON schema cannot be used: {error}.") from None


def _literal(text: str) -> str:
    """A regex that matches exactly `text`."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GrammarError("The choice holds half of a surrogate pair, which is no text.")
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) or "(?:)"


def _reason(kind: StructuredKind, error: str) -> str:
    """llguidance's message, without its internals."""
    if error.startswith("panic"):
        return "it is too complex."
    in_regex = re.search(r"^error: (.*)$", error, re.MULTILINE)
    if in_regex and kind in (StructuredKind.REGEX, StructuredKind.JSON_SCHEMA):
        return f"{in_regex[1]}."
    text = " ".join(error.replace("<non-verbose/>", "").split("; following special tokens")[0].split())
    if text.startswith("Unimplemented keys"):
        text += '; remove them, or add "x-guidance": {"lenient": true} to have them ignored'
    return f"{text[:400]}."


def _words(vocab_size: int, token_ids: Sequence[int]) -> Mask:
    """Bitmask with the given tokens set."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


# ---- following a text --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled spec; shared by all requests that have it."""

    matcher: LLMatcher
    """At the start of the text; only ever copied."""
    eos: frozenset[int]
    eos_words: Mask
    usable_words: Mask
    """Tokens that may be allowed at all."""

    def start(self) -> GrammarState:
        """The state of a child that has put out nothing yet."""
        return GrammarState(self)


class GrammarState:
    """Where one child's text stands in its grammar. Not safe for use from two threads at once.

    Every method may raise `GrammarError` when the text runs into llguidance's limits on work per step; the request is
    then beyond help.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._tokens: list[int] = []  # what the matcher has consumed, EOS left out
        self._ended = False  # an EOS was put out
        self._mask: Mask | None = None

    @property
    def finished(self) -> bool:
        """Nothing but an end-of-sequence token is allowed."""
        return self._ended or not (self.mask() & ~self._grammar.eos_words).any()

    def mask(self) -> Mask:
        """The tokens allowed next."""
        if self._mask is None:
            self._mask = self._compute_mask(self._ended)
        return self._mask

    def accepts(self, token_id: int) -> bool:
        return _has(self.mask(), token_id)

    def consume(self, token_ids: Sequence[int]) -> None:
        """Advance over tokens that were put out. Raises `GrammarError` at the first one that does not fit.

        After an end-of-sequence token only more of them fit (a request with ignore_eos goes on producing them).
        """
        for token in token_ids:
            if not self._step(token, self._ended):
                number = len(self._tokens)
                raise GrammarError(f"Token {token} does not fit the grammar after {number} tokens.")
            self._mask = None
            if token in self._grammar.eos:
                self._ended = True
            else:
                self._tokens.append(token)

    def masks_for_drafts(self, drafts: Sequence[int]) -> list[Mask]:
        """One mask per row of a verification: row i assumes that drafts[:i] are accepted. The state stays as it is.

        The list has len(drafts) + 1 masks, or fewer: the row of the first draft that the grammar rules out is the last,
        since that draft cannot be sampled there and no row behind it can count. Leave those rows out or ignore them.
        """
        masks = [self.mask()]
        ended = self._ended
        steps = 0
        try:
            for draft in drafts:
                if not _has(masks[-1], draft) or not self._step(draft, ended):
                    break
                ended = ended or draft in self._grammar.eos
                steps += not ended
                masks.append(self._compute_mask(ended))
        except GrammarError:
            pass  # a limit hit on a draft's way is no fault of the text so far
        finally:
            if self._matcher.is_error():
                self._matcher = self._grammar.matcher.deep_copy()
                self._matcher.try_consume_tokens(self._tokens)
            elif steps:
                self._matcher.rollback(steps)
        return masks

    def _step(self, token: int, ended: bool) -> bool:
        """Advance the matcher by one token; EOS is not shown to it, so that it can always be rolled back."""
        if token in self._grammar.eos:
            return ended or self._matcher.is_accepting()
        return not ended and self._matcher.try_consume_tokens([token]) == 1

    def _compute_mask(self, ended: bool) -> Mask:
        words = self._grammar.eos_words.copy()
        if not ended:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                reason = _reason(StructuredKind.GRAMMAR, self._matcher.get_error())
                raise GrammarError(f"The text cannot be followed any further in its grammar: {reason}")
            words &= self._grammar.usable_words & ~self._grammar.eos_words
            if self._matcher.is_accepting():
                words |= self._grammar.eos_words
        words.setflags(write=False)
        return words


def _has(mask_W: Mask, token: int) -> bool:
    return 0 <= token < mask_W.size * 32 and bool(int(mask_W[token >> 5]) >> (token & 31) & 1)
