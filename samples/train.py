"""Make the sample model that ships with Arrondi, from nothing but a CPython installation.

This file owns every step between the standard library's own documentation and the files in
``src/arrondi/sample/``: gathering and cleaning the text, the train / held-out split, the tokenizer, the small Llama,
and the numbers in ``card.json``.  Everything is seeded and ordered, so the same interpreter, library versions and
``--steps`` give the same corpus, the same tokenizer and (up to the arithmetic of the CPU) the same weights.

    python samples/train.py --steps 3800 --threads 1

The text is CPython's (Python Software Foundation License version 2); a source file that carries a licence of its own
is left out.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
WINDOW = 255
"""Tokens scored per window; with the start token in front, the model sees 256 positions."""
POSITIONS = 512
SEED = 20_240_229
LICENCE_FILE = "LICENSE-CPython.txt"

SKIPPED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "_bundled",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Tests and foreign packages, and directories whose docstrings are one sentence repeated a hundred times."""

FOREIGN_LICENCE = re.compile(
    r"permission to use, copy|permission is hereby granted|redistribution and use|licensed under the apache|"
    r"distribute this software|without restriction",
    re.IGNORECASE,
)
NOTICE = re.compile(r"copyright|all rights reserved|licensed to psf", re.IGNORECASE)
HELD_OUT_SHARE = 0.05
HELD_OUT_CHARACTERS = 130_000
"""A floor on the held-out text: at four to five characters a token it is comfortably more than 24,000 tokens."""


@dataclass(frozen=True)
class Document:
    """One source module or one help topic: the unit that goes whole to training or whole to the held-out text."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


# --- Gathering the text ---------------------------------------------------------------------------------------------


def source_files(stdlib: Path) -> list[Path]:
    """Return the standard library's Python files in one fixed order, whatever order the file system lists them in."""
    found = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRECTORIES]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(stdlib).as_posix())


def read_source(path: Path) -> str:
    """Read a Python file in the encoding it declares; a file Python itself could not read counts as empty."""
    try:
        with tokenize.open(path) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def parse(source: str) -> ast.Module:
    """Parse without importing, and without passing on what the compiler thinks of old escape sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield ``(line, text)`` for every docstring, cleaned of the indentation its code imposed."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, inspect.cleandoc(text)


def comment_blocks(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield ``(line, text)`` for every run of two or more comment-only lines; long comments are mostly prose.

    A ``#`` inside a multi-line string is not a comment, hence the look at the tree.
    """
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno and node.end_lineno > node.lineno:
            inside.update(range(node.lineno, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(re.sub(r"^#+:? ?", "", stripped).rstrip("#").rstrip())
            continue
        if len(block) > 1:
            yield number - len(block), inspect.cleandoc("\n".join(block))
        block = []


def help_topics(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(topic, text)`` from the language reference that ``help()`` reads, taken as a literal, not imported."""
    tree = parse(read_source(stdlib / "pydoc_data" / "topics.py"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


def is_prose(paragraph: str) -> bool:
    """Tell text from doctests, grammar, tables, commented-out code and notices about who owns the file."""
    if re.search(r"^\s*>>>", paragraph, re.MULTILINE) or "::=" in paragraph or NOTICE.search(paragraph):
        return False
    if re.search(r"[-=+*~^_.]{6,}|\|.*\|", paragraph):
        return False
    words = re.findall(r"[A-Za-z]{2,}", paragraph)
    letters = sum(map(str.isalpha, paragraph))
    solid = sum(not character.isspace() for character in paragraph)
    return len(words) >= 3 and letters >= 0.72 * solid and len(words) * 12 >= solid


def paragraphs_of(text: str) -> list[str]:
    """Split at blank lines, expand tabs and drop what is not prose; indentation stays, it carries structure."""
    lines = "\n".join(line.rstrip() for line in text.expandtabs().splitlines())
    return [part for part in (piece.strip("\n") for piece in re.split(r"\n{2,}", lines)) if is_prose(part)]


def module_text(source: str) -> list[str]:
    """Return one module's docstrings and comment blocks, in the order they stand in the file."""
    tree = parse(source)
    passages = [*docstrings(tree), *comment_blocks(source, tree)]
    return [paragraph for _, text in sorted(passages) for paragraph in paragraphs_of(text)]


def fingerprint(paragraph: str) -> str:
    """Return what two paragraphs share when a reader would call them the same."""
    return " ".join(paragraph.lower().split())


def gather(stdlib: Path | None = None) -> list[Document]:
    """Return the corpus: every document in a fixed order, and every paragraph once in all of it.

    De-duplicating over the whole corpus, before the split, is what keeps held-out paragraphs out of the training text.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    raw: list[tuple[str, list[str]]] = []
    for path in source_files(root):
        source = read_source(path)
        if not FOREIGN_LICENCE.search(source):
            raw.append((path.relative_to(root).as_posix(), module_text(source)))
    raw += [(f"topic:{topic}", paragraphs_of(text)) for topic, text in help_topics(root)]
    seen: set[str] = set()
    corpus = []
    for name, paragraphs in raw:
        fresh = []
        for paragraph in paragraphs:
            mark = fingerprint(paragraph)
            if mark not in seen:
                seen.add(mark)
                fresh.append(paragraph)
        if fresh:
            corpus.append(Document(name, tuple(fresh)))
    return corpus


def split(corpus: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return ``(train, held_out)``, whole documents, chosen by a hash of their names.

    A hash does not follow the alphabet, so the held-out text is a mixture, and it does not move when a document
    elsewhere is edited.  Documents over a tenth of the quota stay in training, or one topic would be the held-out text.
    """
    quota = max(HELD_OUT_CHARACTERS, int(HELD_OUT_SHARE * sum(len(document.text) for document in corpus)))
    chosen: set[str] = set()
    total = 0
    for document in sorted(corpus, key=lambda item: hashlib.sha256(item.name.encode()).hexdigest()):
        if total >= quota:
            break
        if len(document.text) <= quota // 10:
            chosen.add(document.name)
            total += len(document.text)
    train = [document for document in corpus if document.name not in chosen]
    return train, [document for document in corpus if document.name in chosen]


# --- The tokenizer --------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE learnt on the training text only; bytes mean that no text is out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of ``text`` and nothing else (the length warning is for callers who run the model on it)."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# --- The measure ----------------------------------------------------------------------------------------------------


def windows_of(tokens: list[int], start: int) -> torch.Tensor:
    """Cut ``tokens`` into whole, non-overlapping windows, each after a start token; a shorter tail is left out."""
    count = len(tokens) // WINDOW
    body = torch.tensor(tokens[: count * WINDOW], dtype=torch.long).view(count, WINDOW)
    return torch.cat([torch.full((count, 1), start, dtype=torch.long), body], dim=1)


def perplexity(model: torch.nn.Module, windows: torch.Tensor, batch: int = 8) -> float:
    """Return exp of the mean cross entropy of every token but the start tokens."""
    total = 0.0
    with torch.inference_mode():
        for chunk in windows.split(batch):
            logits = model(input_ids=chunk).logits[:, :-1].float()
            target = chunk[:, 1:].reshape(-1)
            total += torch.nn.functional.cross_entropy(
                logits.reshape(target.numel(), -1), target, reduction="sum"
            ).item()
    return math.exp(total / (windows.shape[0] * WINDOW))


def unigram_perplexity(train: np.ndarray, windows: torch.Tensor) -> float:
    """Return what token frequencies alone give on the same tokens; add-one smoothing, so nothing is infinite."""
    counts = np.bincount(train, minlength=VOCABULARY).astype(np.float64) + 1.0
    surprise = -np.log(counts / counts.sum())
    return math.exp(surprise[windows[:, 1:].numpy()].mean())


# --- The model ------------------------------------------------------------------------------------------------------


def build_model(start: int) -> LlamaForCausalLM:
    """Return the untrained Llama.  Every linear layer's widths are multiples of 128, so any group size divides them."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def optimizer_for(model: torch.nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: pulling a norm's gain towards zero regularises nothing."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8)


def rate_factor(progress: float) -> float:
    """Return the share of the peak rate at ``progress`` in 0..1: a short linear warm-up, then half a cosine to 2 %."""
    if progress < 0.04:
        return max(progress, 1e-3) / 0.04
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (progress - 0.04) / 0.96))


class Batches:
    """Windows of the training stream, each epoch cut at a fresh offset and shuffled.

    Moving the offset shows every token at every position over the epochs, which on a corpus this small is the cheapest
    guard against learning windows by heart.  Every window begins with the start token, as the measured ones do.
    """

    def __init__(self, stream: np.ndarray, start: int, batch: int, span: int, seed: int) -> None:
        self.stream, self.start, self.batch, self.span = torch.from_numpy(stream), start, batch, span
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []

    def __next__(self) -> torch.Tensor:
        if len(self.order) < self.batch:
            offset = int(torch.randint(self.span, (), generator=self.generator))
            starts = range(offset, len(self.stream) - self.span, self.span)
            self.order = [starts[i] for i in torch.randperm(len(starts), generator=self.generator).tolist()]
        taken, self.order = self.order[: self.batch], self.order[self.batch :]
        rows = torch.stack([self.stream[begin : begin + self.span] for begin in taken])
        return torch.cat([torch.full((len(taken), 1), self.start, dtype=torch.long), rows], dim=1)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Take one step and return its loss; bf16 products where the CPU has them, float32 weights and sums everywhere."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train_model(
    model: LlamaForCausalLM, stream: np.ndarray, windows: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """Train in place, leave the best weights seen on the held-out windows in the model, and return what was done.

    One step in four takes half as many windows of twice the length, so that positions past 256 are not left untrained.
    """
    start = model.config.bos_token_id
    short = Batches(stream, start, options.batch, WINDOW + 1, SEED)
    long = Batches(stream, start, max(options.batch // 2, 1), POSITIONS - 1, SEED + 1)
    optimizer = optimizer_for(model, options.rate, options.decay)
    begun, step, seen, progress, running, evaluations = time.monotonic(), 0, 0, 0.0, 0.0, 0
    best, best_step, weights = math.inf, 0, {}
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_factor(progress)
        batch = next(long if step % 4 == 3 else short)
        loss = train_step(model, optimizer, batch)
        step, seen = step + 1, seen + batch[:, 1:].numel()
        running = loss if step == 1 else 0.98 * running + 0.02 * loss
        elapsed = time.monotonic() - begun
        progress = step / options.steps if options.steps else elapsed / (60.0 * options.minutes)
        if int(12 * progress) > evaluations:
            evaluations = int(12 * progress)
            model.eval()
            value = perplexity(model, windows)
            if value < best:
                best, best_step = value, step
                weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            print(
                f"step {step:6d}  {elapsed:6.0f} s  {seen / elapsed:6.0f} tokens/s  "
                f"loss {running:.3f}  held-out {value:.2f}",
                flush=True,
            )
    model.load_state_dict(weights)
    return {
        "steps": step,
        "kept_step": best_step,
        "kept_because": "the lowest of about twelve held-out perplexities measured while training",
        "tokens_seen": seen,
        "seconds": round(time.monotonic() - begun),
        "threads": options.threads,
        "batch": f"{options.batch} windows of {WINDOW + 1} tokens; every fourth step half as many of {POSITIONS - 1}",
        "optimizer": f"AdamW, peak rate {options.rate}, warm-up and cosine, weight decay {options.decay}",
        "seed": SEED,
    }


# --- Writing and measuring the files --------------------------------------------------------------------------------


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: str) -> None:
    """Write everything but the card; bf16 weights, with the tied embedding stored once."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8", newline="\n")


def measure(folder: Path, stream: np.ndarray) -> dict[str, Any]:
    """Return the numbers of the files as a user meets them: reloaded, and the text encoded by the saved tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = encode(tokenizer, (folder / "heldout.txt").read_text(encoding="utf-8"))
    windows = windows_of(tokens, tokenizer.bos_token_id)
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        values[dtype] = perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), windows)
    return {
        "perplexity": round(values[torch.float32], 4),
        "perplexity_bf16_arithmetic": round(values[torch.bfloat16], 4),
        "unigram_perplexity": round(unigram_perplexity(stream, windows), 4),
        "heldout_tokens": len(tokens),
        "heldout_windows": windows.shape[0],
        "protocol": (
            f"The whole of heldout.txt encoded without special tokens, cut into non-overlapping windows of {WINDOW} "
            "tokens (a shorter tail is left out), the start token before each, mean cross entropy of all "
            f"{WINDOW} tokens. 'perplexity' is the saved bf16 weights reloaded and computed with in float32; the "
            "unigram model has add-one smoothed frequencies of the training tokens."
        ),
    }


def complete(folder: Path, prompt: str, length: int = 60) -> str:
    """Return a sampled continuation, to see with one's own eyes that the saved model writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(SEED)
    ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, prompt)]])
    settings = {"max_new_tokens": length, "do_sample": True, "temperature": 0.7, "top_k": 40, "pad_token_id": 0}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def write_licence(folder: Path) -> None:
    """Put CPython's licence beside its text, as that licence asks; some packagings of Python leave the file out."""
    installed = Path(sysconfig.get_path("stdlib"), "LICENSE.txt")
    if installed.is_file():
        text = installed.read_text(encoding="utf-8")
    else:
        text = (
            f"{sys.copyright}\n\nPython Software Foundation License Version 2: https://docs.python.org/3/license.html\n"
        )
    (folder / LICENCE_FILE).write_text(text, encoding="utf-8", newline="\n")


def publish(staging: Path, out: Path) -> None:
    """Move the finished files over the old ones, one by one: whatever else lives in ``out`` stays."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):
        os.chmod(path, 0o644)
        os.replace(path, out / path.name)


def write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8", newline="\n")


def describe(train: list[Document], held_out: list[Document], stream: np.ndarray) -> dict[str, Any]:
    """Return the card's account of the corpus."""
    digest = hashlib.sha256("\n\n".join(document.text for document in [*train, *held_out]).encode()).hexdigest()
    return {
        "source": (
            "Docstrings and comments of the standard library's Python files and the topics of help(), from an "
            "installed CPython; tests, bundled packages and files with a licence of their own are left out."
        ),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "licence": f"Text from CPython, under the Python Software Foundation License Version 2; see {LICENCE_FILE}.",
        "copyright": " ".join(sys.copyright.split()),
        "changes": (
            "Docstrings and comment blocks were cut out of their source files, their common indentation and comment "
            "signs removed; paragraphs that are not prose, and repeated ones, were dropped."
        ),
        "train_documents": len(train),
        "heldout_documents": len(held_out),
        "train_characters": sum(len(document.text) for document in train),
        "heldout_characters": sum(len(document.text) for document in held_out),
        "train_tokens": len(stream),
        "sha256": digest,
        "heldout_sources": [document.name for document in held_out],
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "src" / "arrondi" / "sample"
    parser.add_argument("--out", type=Path, default=default, help="where the files go")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=0, help="train this many steps (repeatable)")
    length.add_argument("--minutes", type=float, default=20.0, help="train for about this long (not repeatable)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    train, held_out = split(gather())
    texts = [document.text for document in train]
    tokenizer = train_tokenizer(texts)
    start = tokenizer.bos_token_id
    stream = np.array([token for text in texts for token in [*encode(tokenizer, text), start]], dtype=np.int64)
    held_out_text = "\n\n".join(document.text for document in held_out) + "\n"
    windows = windows_of(encode(tokenizer, held_out_text), start)
    model = build_model(start)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(stream)} training tokens, {windows[:, 1:].numel()} held-out, {parameters} parameters", flush=True)
    training = train_model(model, stream, windows, options)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".sample-", dir=options.out.parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        save(staging, model, tokenizer, held_out_text)
        card = {"parameters": parameters, **measure(staging, stream)}
        card |= {"corpus": describe(train, held_out, stream), "training": training}
        write_card(staging, card)
        write_licence(staging)
        publish(staging, options.out)
    print(json.dumps(card, indent=2))
    print(complete(options.out, "Return a list of"))
    print(f"{sum(path.stat().st_size for path in options.out.iterdir())} bytes, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
