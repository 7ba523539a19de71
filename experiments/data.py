"""``python -m experiments data``: token files with sidecars, from text or from Hugging Face."""

import argparse
import itertools
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.command_line import Parser
from experiments.corpus import (
    BYTE_VOCABULARY,
    TOKENIZERS,
    encode,
    encode_bytes,
    is_held_out,
    read_files,
    train_bpe,
)
from experiments.settings import SettingsError
from experiments.tokens import load_token_files, write_sidecar, write_tokens

_EPILOG = """\
examples:
  python -m experiments data text notes/ books/*.txt --out tokens/books
  python -m experiments data text src/ --tokenizer bpe --vocab 8000 --out tokens/src
  python -m experiments data hf wikitext --config wikitext-103-raw-v1 --out tokens/wikitext
  python -m experiments data hf ISTA-DASLab/C4-tokenized-llama2 --vocab 32000 --out tokens/c4
"""
_TOKENIZER_TEXTS = 20_000  # documents that a vocabulary is learned from


def main(words: Sequence[str]) -> int:
    """Carry out ``data``.

    Args:
        words: The command line after ``data``.

    Returns:
        Exit status, as of `experiments.main.main`.

    Raises:
        SettingsError: If a source can't be read or the result can't be written.
    """
    arguments = _parser().parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.source == "text":
            parts = _text(arguments)
        elif files := _token_files_of(arguments.name):
            parts = _download(arguments, files)
        else:
            parts = _documents(arguments)
    except (ValueError, OSError) as error:
        raise SettingsError(str(error)) from error
    data = load_token_files(*parts)
    print(
        f"{data.train.numel():,} + {data.validation.numel():,} tokens of a vocabulary of "
        f"{data.vocab_size:,}. Train with:\n  python -m experiments train data=token_files "
        + " ".join(
            shlex.quote(f"data.{k}={v}")
            for k, v in zip(("train", "validation"), parts, strict=True)
        )
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments data",
        description=__doc__.partition(": ")[2] if __doc__ else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="text|hf")
    text = sources.add_parser("text", help="files and folders of text")
    text.add_argument("files", nargs="+", help="text files, folders or glob patterns")
    text.add_argument("--validation", nargs="+", help="held-out text (default: some of the files)")
    hub = sources.add_parser("hf", help="a data set of Hugging Face, of text or of token files")
    hub.add_argument("name", help="its name on the hub, or the builder of `datasets` (text, json)")
    hub.add_argument("--config", help="its configuration, where it has several")
    hub.add_argument("--column", default="text", help="the column that holds the text")
    hub.add_argument("--files", nargs="+", help="local files, for a builder such as text or json")
    hub.add_argument("--shard", type=int, default=100_000_000, help="tokens of a file, about")
    for one in (text, hub):
        one.add_argument("--tokenizer", choices=TOKENIZERS, default="bytes")
        one.add_argument("--vocab", type=int, help="pieces of bpe (2048), or of ready token files")
        one.add_argument(
            "--percent", type=int, default=5, help="share of the text that is held out"
        )
        one.add_argument("--out", type=Path, required=True, help="folder of the token files")
    return parser


def _text(arguments: argparse.Namespace) -> tuple[str, str]:
    files = read_files(arguments.files, "data text")
    if arguments.validation:
        held_out = [text for _, text in read_files(arguments.validation, "--validation")]
        train = [text for _, text in files]
    else:
        held_out = [text for name, text in files if is_held_out(name, arguments.percent)]
        train = [text for name, text in files if not is_held_out(name, arguments.percent)]
    if not train or not held_out:
        raise ValueError(
            f"There are {len(train)} files for training and {len(held_out)} for validation: give more, "
            "or --validation."
        )
    tokenizer = Tokenizer(arguments, train)
    paths = [arguments.out / f"{part}.bin" for part in ("train", "validation")]
    for path, texts in zip(paths, (train, held_out), strict=True):
        tokenizer.write(path, tokenizer.encode(texts))
    return str(paths[0]), str(paths[1])


class Tokenizer:
    """Bytes, or a byte-pair encoding, whose model is kept beside the token files.

    Args:
        arguments: ``tokenizer``, ``vocab`` and ``out`` of the command line.
        texts: What byte pairs are learned from.

    Raises:
        ValueError: If the vocabulary does not fit the tokenizer or the texts.
    """

    def __init__(self, arguments: argparse.Namespace, texts: Sequence[bytes]) -> None:
        self._bpe = None
        self.vocab_size = BYTE_VOCABULARY
        self.name = "bytes, a zero byte after each text"
        if arguments.tokenizer == "bpe":
            self.vocab_size = arguments.vocab or 2048
            self._bpe = train_bpe([_decode(text) for text in texts], self.vocab_size)
            model = arguments.out / "tokenizer.model"
            model.write_bytes(self._bpe.serialized_model_proto())
            self.name = f"byte pairs of {model.name}"
        elif arguments.vocab not in (None, BYTE_VOCABULARY):
            raise ValueError(f"--vocab {arguments.vocab}, but bytes have a vocabulary of 256.")

    def encode(self, texts: Iterable[bytes]) -> Tensor:
        """Tokens of texts, each ended by the token for that.

        Args:
            texts: Their contents.

        Returns:
            1-D integer tensor.
        """
        if self._bpe is None:
            return encode_bytes(texts)
        return encode(self._bpe, map(_decode, texts))

    def write(self, path: Path, tokens: Tensor) -> None:
        """Write a token file.

        Args:
            path: Its place.
            tokens: 1-D integer tensor.
        """
        write_tokens(path, tokens, self.vocab_size, self.name)


def _decode(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def _documents(arguments: argparse.Namespace) -> tuple[str, str]:
    """Stream a data set's documents into shards, every so many of them into the validation file."""
    from datasets import load_dataset

    if not 1 <= arguments.percent <= 50:
        raise ValueError(f"--percent {arguments.percent} must lie in [1, 50].")
    local = {"data_files": arguments.files} if arguments.files else {}
    rows: Iterable[dict[str, Any]] = load_dataset(
        arguments.name, arguments.config, split="train", streaming=True, **local
    )
    texts = _texts(rows, arguments.column)
    first = list(itertools.islice(texts, _TOKENIZER_TEXTS))
    if not first:
        raise ValueError(f"{arguments.name} has no text in the column {arguments.column!r}.")
    tokenizer = Tokenizer(arguments, first)
    every = round(100 / arguments.percent)
    held_out: list[Tensor] = []
    shard: list[Tensor] = []
    shards = 0

    def finish() -> None:
        nonlocal shards
        tokenizer.write(arguments.out / f"train_{shards:05d}.bin", torch.cat(shard))
        shard.clear()
        shards += 1

    for number, text in enumerate(itertools.chain(first, texts)):
        (held_out if number % every == 0 else shard).append(tokenizer.encode([text]))
        size = sum(map(len, shard)) if number % 1000 == 0 else 0
        if size >= arguments.shard:
            finish()
    if shard:
        finish()
    if not shards:
        raise ValueError(f"{arguments.name} has one text only: there is none left to train on.")
    tokenizer.write(arguments.out / "validation.bin", torch.cat(held_out))
    return str(arguments.out / "train_*.bin"), str(arguments.out / "validation.bin")


def _texts(rows: Iterable[dict[str, Any]], column: str) -> Iterator[bytes]:
    for row in rows:
        if column not in row:
            raise ValueError(
                f"There is no column {column!r}; --column names one of {', '.join(row)}."
            )
        if text := row[column].replace("\0", ""):
            yield text.encode()


def _token_files_of(name: str) -> list[str]:
    """The token files of a data set on the hub, such as the authors' C4; empty where it has none."""
    if "/" not in name:
        return []
    from huggingface_hub import list_repo_files

    files = list_repo_files(name, repo_type="dataset")
    return [f for f in files if f.endswith(".bin") or f.rpartition("/")[2].startswith("chunk_")]


def _download(arguments: argparse.Namespace, files: Sequence[str]) -> tuple[str, str]:
    from huggingface_hub import hf_hub_download

    if arguments.vocab is None:
        raise ValueError(f"{arguments.name} holds token files: --vocab must tell their vocabulary.")
    held_out = [f for f in files if f.rpartition("/")[2].startswith("val")]
    train = [f for f in files if f not in held_out]
    if not train or not held_out:
        raise ValueError(
            f"{arguments.name} has no token files of both parts: {', '.join(files[:5])}."
        )
    for name in files:
        path = Path(
            hf_hub_download(arguments.name, name, repo_type="dataset", local_dir=arguments.out)
        )
        write_sidecar(path, arguments.vocab, f"as of {arguments.name}")
    pattern = f"{os.path.commonprefix(train)}*"  # noqa: RUF071 - of names, not of paths
    return str(arguments.out / pattern), str(arguments.out / held_out[0])
