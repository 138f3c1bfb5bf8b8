"""Training text and tokenizer of the demo model.

The text is what a CPython installation carries: the Language Reference topics of `pydoc_data` and
the docstrings and longer comment blocks of the standard library. Source files are parsed, never
imported, so the result depends on the Python version alone.
"""

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
BOS, EOS, USER, ASSISTANT = "<|begin_of_text|>", "<|end_of_text|>", "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT)

MIN_DOCSTRING_CHARS = 80
MIN_COMMENT_CHARS = 200
PIECE_CHARS = 3000
HELDOUT_SHARE = 0.025
CHAT_EVERY = 6
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "pydoc_data"}
)


@dataclass(frozen=True)
class Entry:
    """One named text; `name` is empty where a question about it would make no sense."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training documents and held-out text, cut from the same shuffled pieces."""

    sha256: str
    train: tuple[tuple[Entry, ...], ...]
    heldout: str

    def train_texts(self) -> list[str]:
        """Join the entries of each training piece."""
        return [join(piece) for piece in self.train]

    def chats(self) -> list[tuple[str, str]]:
        """Pick every sixth named training entry as a (question, answer) pair."""
        named = [entry for piece in self.train for entry in piece if entry.name]
        return [(f"Explain {entry.name}.", entry.text) for entry in named[::CHAT_EVERY]]


def join(entries: Iterable[Entry]) -> str:
    """Join texts by blank lines."""
    return "\n\n".join(entry.text for entry in entries)


def read_topics(stdlib: Path) -> Iterator[Entry]:
    """Yield the Language Reference topics in the order of their names."""
    tree = ast.parse((stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    assign = next(node for node in tree.body if isinstance(node, ast.Assign))
    for name, text in sorted(ast.literal_eval(assign.value).items()):
        yield Entry(f"the topic {name}", text.strip())


def source_files(stdlib: Path) -> list[tuple[str, Path]]:
    """List (relative name, path) of the library's sources in a platform-independent order."""
    files = []
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).parts
        # config-3.11-* and _sysconfigdata_* are written by the build and differ by platform.
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        if not generated and SKIPPED_FOLDERS.isdisjoint(parts):
            files.append(("/".join(parts), path))
    return sorted(files)


def read_docstrings(tree: ast.AST, prefix: str) -> Iterator[Entry]:
    """Yield the docstrings below a module, class or function, depth first."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(tree)
        if docstring and len(docstring) > MIN_DOCSTRING_CHARS:
            yield Entry(prefix, docstring.strip())
    for child in ast.iter_child_nodes(tree):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from read_docstrings(child, f"{prefix}.{child.name}" if named else prefix)


def read_comments(source: str) -> Iterator[Entry]:
    """Yield the runs of whole-line comments that are long enough to be prose."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip())
            continue
        text = "\n".join(block).strip()
        if len(text) > MIN_COMMENT_CHARS:
            yield Entry("", text)
        block = []


def read_entries(stdlib: Path) -> list[Entry]:
    """Collect topics, docstrings and comments, each text once."""
    entries = list(read_topics(stdlib))
    for name, path in source_files(stdlib):
        source = path.read_text(encoding="utf-8")
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        entries += read_docstrings(ast.parse(source), module)
        entries += read_comments(source)
    unique: dict[str, Entry] = {}
    for entry in entries:
        unique.setdefault(entry.text, entry)
    return list(unique.values())


def cut(entry: Entry) -> Iterator[Entry]:
    """Cut a long entry at blank lines; parts have PIECE_CHARS or more, the first keeps the name."""
    name, part = entry.name, ""
    for paragraph in entry.text.split("\n\n"):
        part = f"{part}\n\n{paragraph}" if part else paragraph
        if len(part) >= PIECE_CHARS:
            yield Entry(name, part)
            name, part = "", ""
    if part:
        yield Entry(name, part)


def group(entries: Iterable[Entry]) -> list[tuple[Entry, ...]]:
    """Gather neighbouring entries into pieces of at least PIECE_CHARS."""
    pieces: list[tuple[Entry, ...]] = []
    piece: list[Entry] = []
    for entry in entries:
        for part in cut(entry):
            piece.append(part)
            if sum(len(each.text) for each in piece) >= PIECE_CHARS:
                pieces.append(tuple(piece))
                piece = []
    return [*pieces, tuple(piece)] if piece else pieces


def build_corpus(seed: int) -> Corpus:
    """Read the running Python's library and split it into training and held-out pieces."""
    entries = read_entries(Path(sysconfig.get_path("stdlib")))
    sha256 = hashlib.sha256(join(entries).encode()).hexdigest()
    pieces = group(entries)
    random.Random(seed).shuffle(pieces)
    held = round(len(pieces) * HELDOUT_SHARE)
    heldout = "\n\n".join(join(piece) for piece in pieces[:held]) + "\n"
    return Corpus(sha256, tuple(pieces[held:]), heldout)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE; special tokens get the first ids.

    There is no post-processor: whoever wants a leading BOS inserts it, as the training does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_stream(corpus: Corpus, tokenizer: Tokenizer, seed: int) -> list[int]:
    """Encode all training documents, BOS and EOS around each, into one list of token ids."""
    documents = [f"{BOS}{text}{EOS}" for text in corpus.train_texts()]
    documents += [f"{BOS}{USER}{ask}{ASSISTANT}{tell}{EOS}" for ask, tell in corpus.chats()]
    random.Random(seed).shuffle(documents)
    return [token for each in tokenizer.encode_batch(documents) for token in each.ids]
