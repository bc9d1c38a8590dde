"""Scheme: which weight is stored in which format, as data.

A scheme file maps shell wildcards on weight names to formats; see schemes/q4f16_1.yaml. Kernels are
not its business: a target decides how to compute with a format.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from qcc.quant_schemes.errors import SchemeError, did_you_mean
from qcc.quant_schemes.format import FLOAT_DTYPES, WeightFormat, float_format
from qcc.quant_schemes.format_text import format_of_dict, format_of_text, shown

__all__ = ["Scheme", "WeightFormat", "list_schemes", "load_scheme", "parse_scheme"]

SCHEME_DIR = Path(__file__).parent / "schemes"
ACTIVATIONS = ("none", "dynamic", "static")
# Never quantized, whatever a rule says: their bytes are few and their errors are not.
FLOATING_SUFFIXES = (".bias",)
DEFAULT = "*"  # the wildcard of `linear`, the last rule


@dataclass(frozen=True)
class Scheme:
    """A name, the dtype of what stays floating, and the rules weight name -> WeightFormat.

    `rules` are tried in order, the first whose wildcard (or several, `a|b`) matches the weight's
    name wins; a weight that none matches stays floating. A fused weight (`qkv_proj`) has the names
    of its sources (`q_proj`, `k_proj`, `v_proj`) as well. `embedding` and `lm_head` are for those
    two weights, whatever the model calls them. `activations`: what a quantized linear layer
    multiplies with: "none" as they are, "dynamic" int8 with a scale for each token and group of 32,
    "static" int8 with a scale from calibration text. `method` chooses codes where the user names
    none. `tuned_on` names the text, sha256 included, by which `qcc tune` chose the formats.
    `preferred` are rules that may match nothing: a shipped scheme's, which is for every model.
    """

    name: str
    dtype: str
    rules: tuple[tuple[str, WeightFormat], ...]
    embedding: WeightFormat
    lm_head: WeightFormat
    activations: str = "none"
    method: str = "mse"
    description: str = ""
    tuned_on: str = ""
    preferred: tuple[str, ...] = ()

    def format_of(
        self, name: str, *, role: str, ndim: int = 2, fused: str | None = None
    ) -> WeightFormat:
        """The format of weight `name`; `role` is "embedding", "lm_head", "linear" or "float".

        Only matrices are quantized: norms, biases and anything of role "float" stay floating.
        `fused` is the name of the weight that this one is a source of.
        """
        if _stays_floating(name, role, ndim):
            return float_format(self.dtype)
        if role == "embedding":
            return self.embedding
        if role == "lm_head":
            return self.lm_head
        names = [name, *([fused] if fused else [])]
        for pattern, fmt in self.rules:
            if any(_matches(each, pattern) for each in names):
                return fmt
        return float_format(self.dtype)

    def check(self, weights: Iterable[tuple[Sequence[str], str, int]]) -> None:
        """Refuse a rule that matches none of a model's linear weights.

        Args:
            weights: (names, role, dimensions) of every weight; a fused one has several names.

        Raises:
            SchemeError: says what the rule matches instead, if anything.
        """
        known = [(names, role, ndim) for names, role, ndim in weights]
        for pattern, fmt in self.rules:
            if pattern == DEFAULT or pattern in self.preferred:
                continue
            hits = [
                (name, role, ndim)
                for names, role, ndim in known
                for name in names
                if _matches(name, pattern)
            ]
            if any(r == "linear" and not _stays_floating(n, r, d) for n, r, d in hits):
                continue
            if not hits:
                every = [
                    name
                    for names, role, ndim in known
                    for name in names
                    if role == "linear" and not _stays_floating(name, role, ndim)
                ]
                raise SchemeError(
                    f"{self.name}: rule {pattern!r} matches no weight"
                    f"{did_you_mean(pattern, every)}; the first are {', '.join(every[:4])}"
                )
            name, role, _ = hits[0]
            if role in ("embedding", "lm_head"):
                raise SchemeError(
                    f"{self.name}: rule {pattern!r} matches {name!r}, the {role}, which has an "
                    f"entry of its own: `{role}` in a scheme, --{role.replace('_', '-')} FORMAT"
                )
            if fmt.is_float:
                continue
            raise SchemeError(
                f"{self.name}: rule {pattern!r} would quantize {name!r}; norms, biases and routers "
                "stay floating: their bytes are few and every token passes their errors"
            )

    def changed(
        self,
        rules: Sequence[tuple[str, str]] = (),
        embedding: str | None = None,
        lm_head: str | None = None,
    ) -> Scheme:
        """This scheme under --set (wildcard, FORMAT) rules, the first first, and its two entries.

        Raises:
            SchemeError: a FORMAT that is none.
        """
        if not rules and embedding is None and lm_head is None:
            return self
        parsed = [(key, self._format(value, f"--set {key}")) for key, value in rules]
        shown_rules = [f"{key}={value}" for key, value in rules]
        shown_rules += [f"embedding={embedding}"] if embedding is not None else []
        shown_rules += [f"lm_head={lm_head}"] if lm_head is not None else []
        return replace(
            self,
            name=f"{self.name}+{','.join(shown_rules)}",
            rules=(*parsed, *self.rules),
            embedding=self._or(self.embedding, embedding, "--embedding"),
            lm_head=self._or(self.lm_head, lm_head, "--lm-head"),
        )

    def _or(self, fmt: WeightFormat, text: str | None, flag: str) -> WeightFormat:
        return fmt if text is None else self._format(text, flag)

    def _format(self, text: str, where: str) -> WeightFormat:
        return format_of_text(text, self.dtype, where, uniform_format)


def _matches(name: str, pattern: str) -> bool:
    """Whether one of a rule's wildcards, `|` between them, matches a weight's name."""
    return any(fnmatch.fnmatchcase(name, each) for each in pattern.split("|"))


def _stays_floating(name: str, role: str, ndim: int) -> bool:
    return role == "float" or ndim != 2 or name.endswith(FLOATING_SUFFIXES)


_SCHEME_KEYS = {
    *("dtype", "linear", "embedding", "lm_head", "rules"),
    *("description", "activations", "method", "tuned_on"),
}


def list_schemes() -> list[str]:
    """Names of the shipped schemes, sorted."""
    return sorted(path.stem for path in SCHEME_DIR.glob("*.yaml"))


def uniform_format(name: str) -> WeightFormat | None:
    """The format of linear weights of a shipped scheme without other rules; None: no such."""
    if name not in list_schemes():
        return None
    scheme = load_scheme(name)
    return scheme.rules[-1][1] if len(scheme.rules) == 1 else None


def load_scheme(name_or_path: str) -> Scheme:
    """Read a shipped scheme by name, or a user's YAML file by path.

    Raises:
        SchemeError: unknown name, unreadable YAML, unknown key, impossible format.
    """
    path = SCHEME_DIR / f"{name_or_path}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_]+", name_or_path) or not path.is_file():
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            hint = did_you_mean(name_or_path, list_schemes())
            raise SchemeError(
                f"--quant: unknown scheme {name_or_path!r}{hint}; "
                f"shipped: {', '.join(list_schemes())}; or a path to a .yaml file"
            )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise SchemeError(f"--quant: cannot read {path}: {err.strerror}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        # ValueError: not UTF-8, a date 2001-99-99, an integer of 5000 digits.
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise SchemeError(f"--quant: {path} is not readable as YAML: {first}") from err
    scheme = parse_scheme(path.stem, data, where=str(path))
    if path.parent != SCHEME_DIR:
        return scheme
    return replace(scheme, preferred=tuple(pattern for pattern, _ in scheme.rules))


def parse_scheme(name: str, data: Any, where: str) -> Scheme:
    """Build a Scheme from the mapping that a YAML file holds; `where` begins every error."""
    if not isinstance(data, dict):
        raise SchemeError(f"{where}: a scheme is a mapping with the keys {sorted(_SCHEME_KEYS)}")
    for key in data:
        if key not in _SCHEME_KEYS:
            hint = did_you_mean(key, _SCHEME_KEYS) if isinstance(key, str) else ""
            allowed = ", ".join(sorted(_SCHEME_KEYS))
            raise SchemeError(f"{where}: unknown key {shown(key)}{hint}; allowed: {allowed}")
    dtype = data.get("dtype")
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise SchemeError(f"{where}: dtype is {shown(dtype)}, allowed: {', '.join(FLOAT_DTYPES)}")
    activations = data.get("activations", "none")
    if not isinstance(activations, str) or activations not in ACTIVATIONS:
        raise SchemeError(
            f"{where}: activations is {shown(activations)}, allowed: {', '.join(ACTIVATIONS)}"
        )
    rules = data.get("rules", {})
    if not isinstance(rules, Mapping):
        raise SchemeError(f"{where}: rules maps wildcards on weight names to formats")
    for key in rules:
        if not isinstance(key, str):
            raise SchemeError(f"{where}: rules[{shown(key)}] is no wildcard on weight names")

    def entry(key: str) -> WeightFormat:
        return _entry(data.get(key, "float"), dtype, f"{where}: {key}")

    parsed = [
        (key, _entry(value, dtype, f"{where}: rules[{shown(key)}]")) for key, value in rules.items()
    ]
    for key in ("method", "description", "tuned_on"):
        if key in data and not isinstance(data[key], str):
            raise SchemeError(f"{where}: {key} is {shown(data[key])}, it must be a text")
    return Scheme(
        name=name,
        dtype=dtype,
        rules=(*parsed, (DEFAULT, entry("linear"))),
        embedding=entry("embedding"),
        lm_head=entry("lm_head"),
        activations=activations,
        method=data.get("method", "mse"),
        description=data.get("description", ""),
        tuned_on=data.get("tuned_on", ""),
    )


def _entry(value: Any, dtype: str, where: str) -> WeightFormat:
    """A FORMAT text, or a mapping; without a dtype of its own its scales are in the scheme's."""
    if isinstance(value, str):
        return format_of_text(value, dtype, where, uniform_format)
    return format_of_dict(value, dtype, where)
