"""Text <-> token ids, with the BOS and EOS tokens of a model. Reads files of the artifact only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcc.runtime.errors import QccError


class Tokenizer:
    """A tokenizer.json, and what tokenizer_config.json, generation_config.json say beside it."""

    def __init__(self, folder: Path, chat_config: dict[str, Any]) -> None:
        """Read the folder's files; all but tokenizer.json may be missing.

        Raises:
            QccError: no tokenizer.json, or one that cannot be read.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise QccError(f"{folder}: tokenizer.json is missing; copy it from the checkpoint")
        with _tokenizers_errors(f"{path}: the tokenizers library cannot read it"):
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        self.path = path
        # A file made for training may cut or pad what it encodes.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = optional_json(folder / "tokenizer_config.json")
        self.generation_config = optional_json(folder / "generation_config.json")
        added = self.backend.get_added_tokens_decoder().items()
        self.special_ids = {token.content: number for number, token in added if token.special}
        self.bos_id = self._bos(chat_config)
        self.eos_ids = _ids(chat_config.get("eos_token_id")) | _ids(
            self.generation_config.get("eos_token_id")
        )
        if not self.eos_ids:
            named = self.token_id(self.special_text("eos_token"))
            self.eos_ids = frozenset() if named is None else frozenset([named])

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt: with BOS where the model wants it; of "" the BOS alone.

        Raises:
            QccError: "" for a model without a BOS token; a tokenizer.json that does not fit itself.
        """
        ids = self._begun(text)
        if not ids and self.bos_id is not None:
            return [self.bos_id]
        if not ids:
            raise QccError("the prompt is empty, and the model has no BOS token to begin with")
        return ids

    def encode_within(self, text: str, limit: int) -> tuple[list[int], int]:
        """At most `limit` tokens of a text, the special ones at its end among them; of how many.

        Raises:
            QccError: as `encode`, but for "" where EOS is added; no room for special tokens alone.
        """
        ids = self._ended(self._begun(text)) or self.encode(text)
        count = len(ids)
        if count > limit:
            own = count - len(self._encode(text, add_special_tokens=True))  # BOS, EOS from here
            special = own + self.backend.num_special_tokens_to_add(False)
            if special > limit:
                raise QccError(f"a text has {special} special tokens, at most {limit} tokens fit")
            with _tokenizers_errors(f"{self.path}: a text does not cut to {limit} tokens"):
                self.backend.enable_truncation(limit - own)
                try:
                    ids = self._ended(self._begun(text))
                finally:
                    self.backend.no_truncation()
        return ids, count

    def _begun(self, text: str) -> list[int]:
        """The tokens with BOS, where tokenizer_config.json wants it and tokenizer.json lacks it."""
        ids = self._encode(text, add_special_tokens=True)
        adds = self.config.get("add_bos_token") is True
        if self.bos_id is not None and adds and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        """The tokens with EOS, where tokenizer_config.json wants it and tokenizer.json lacks it."""
        eos = self.token_id(self.special_text("eos_token"))
        if self.config.get("add_eos_token") is not True or eos is None or ids[-1:] == [eos]:
            return ids
        return [*ids, eos]

    def encode_rendered(self, text: str) -> list[int]:
        """The tokens of a rendered chat template, which holds its special tokens as text."""
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with _tokenizers_errors(f"{self.path}: the tokenizers library cannot encode the prompt"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def token_id(self, text: str | None) -> int | None:
        """The id of the token that is exactly `text`."""
        return None if text is None else self.backend.token_to_id(text)

    def special_text(self, key: str) -> str | None:
        """The text of a special token of tokenizer_config.json, as bos_token."""
        value = self.config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def special_texts(self) -> dict[str, str]:
        """All special tokens by their key: what a chat template may name."""
        texts = {key: self.special_text(key) for key in self.config if key.endswith("_token")}
        return {key: text for key, text in texts.items() if text is not None}

    def _bos(self, chat_config: dict[str, Any]) -> int | None:
        """tokenizer_config.json names it; else the ids of the configurations."""
        named = self.token_id(self.special_text("bos_token"))
        for value in (
            named,
            chat_config.get("bos_token_id"),
            self.generation_config.get("bos_token_id"),
        ):
            ids = sorted(_ids(value))
            if ids:
                return ids[0]
        return None


@contextmanager
def _tokenizers_errors(what: str) -> Iterator[None]:
    """Turn all that the tokenizers library raises into a QccError that begins with `what`.

    It raises bare Exceptions, and where its Rust code panics a BaseException without a public name.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as err:
        raise QccError(f"{what}: {err}") from err


def _ids(value: Any) -> frozenset[int]:
    """An id, a list of ids or null, as the configurations hold them."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file.

    Raises:
        QccError: the file is there and holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as err:
        raise QccError(f"{path}: not readable as JSON: {err}") from err
    if not isinstance(data, dict):
        raise QccError(f"{path}: holds no JSON object")
    return data
