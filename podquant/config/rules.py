"""The rules that say how each module is quantized: a YAML file in, frozen values out, then a decision per module name.

Knows nothing of checkpoints, shapes or arrays. The keys of the file are in `QUANTIZATION_KEYS`; `Rule` says how
patterns are applied.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from podquant.config.scheme import Scheme
from podquant.config.shipped import find_config
from podquant.config.yamlfile import Node, load_yaml
from podquant.dtypes import QUANTIZED_DTYPES
from podquant.errors import ConfigError
from podquant.families.modules import ModuleKind, Spelling, kind_of, router_neighbours, spell, unspell

_QUANTIZED = ", ".join(QUANTIZED_DTYPES)
SCHEME_KEYS = {
    "weight_dtype": f"{_QUANTIZED}, or null: the weight is left as it is",
    "activation_dtype": f"{_QUANTIZED}, or null: weight-only, activations keep their own type",
    "weight_qtype": "the same as `weight_dtype`",
    "act_qtype": "the same as `activation_dtype`",
}
"""Keys of `moe`, and what they mean: how a weight is quantized."""
RULE_KEYS = {
    "module_path": "a regular expression: which modules the rule decides",
    **SCHEME_KEYS,
    "weight_block_size": "`[rows, columns]` that share a scale; null: one scale per output channel. Default: that of "
    "the whole file",
}
"""Keys of each entry of `dense.rules`, and what they mean."""
QUANTIZATION_KEYS = {
    "dense": "`rules`, a list, tried in order; the first that takes a module decides. For all but routed experts: "
    "attention, MLP, shared experts, embedding, lm_head, and those routers that a rule names",
    "linear": "the same as `dense`",
    "moe": "how routed experts are quantized; without it they are left as they are",
    "weight_block_size": "`[rows, columns]` that share a scale, where a rule says nothing else; null: one scale per "
    "output channel",
    "ignored_layers": "modules that are always left as they are: names, which stand for everything below them too, and "
    "`re:` patterns",
    "is_static_checkpoint": "true: the file describes a checkpoint that is quantized already, whose codes and scales "
    "are taken as they are; any other checkpoint is refused",
    "allow_narrow_n_blockwise": "accepted for files of sglang-jax, where it lifts the guard of a kernel; it changes "
    "nothing here",
}
"""Keys of `quantization`, and what they mean."""
_ALIASES = {"weight_dtype": "weight_qtype", "activation_dtype": "act_qtype"}
_ALSO_CALLED = {
    "i8": "int8",
    "s8": "int8",
    "null": "null without quotes",
    "none": "null",
    **dict.fromkeys(("fp8", "f8", "float8", "e4m3", "e4m3fn", "f8_e4m3", "f8e4m3fn", "fp8_e4m3"), "float8_e4m3fn"),
}


@dataclass(frozen=True)
class Rule:
    r"""A pattern and what it means for the modules it matches.

    The pattern is applied with `re.match` (it must match from the start of the name, and need not reach its end) to the
    module's name in the Hugging Face checkpoint, dotted. A pattern with a `/` in it is applied to the name spelled with
    slashes, then with brackets (`model/layers[0]/mlp`). A negative lookaround that excludes a name in one
    spelling would match it in the other, so such a pattern is applied to one spelling: bracket if it has a `\[`, else
    slash.

    Attributes:
        label: where it is, and its pattern, `int8.yaml:4 ".*"`.
        scheme: None keeps the modules in their own dtype.
    """

    label: str
    pattern: re.Pattern[str]
    scheme: Scheme | None

    def matches(self, module: str) -> Spelling | None:
        """The spelling of a dotted module name that the pattern matches, if any."""
        for spelling in _spellings(self.pattern.pattern):
            if self.pattern.match(spell(module, spelling)):
                return spelling
        return None

    def takes(self, module: str, kind: ModuleKind) -> Spelling | None:
        """As `matches`, but a router is matched only by a pattern that names it.

        It names the router if it would not match a projection in the router's place: `.*` and
        `.*mlp.*` do not, `.*\\.mlp\\.gate$` does.
        """
        spelling = self.matches(module)
        if spelling and kind == "router" and any(map(self.matches, router_neighbours(module))):
            return None
        return spelling


@dataclass(frozen=True)
class Decision:
    """How one module is quantized (None: it keeps its own dtype), and by which rule."""

    scheme: Scheme | None
    rule: str


@dataclass(frozen=True)
class UnmatchedRule:
    """A rule, or an entry of `ignored_layers`, that decides no module of this model.

    Attributes:
        rule: its label.
        reason: one sentence without its full stop.
        near_misses: names of modules that resemble the pattern.
    """

    rule: str
    reason: str
    near_misses: tuple[str, ...]

    def __str__(self) -> str:
        near = f"; near misses: {', '.join(self.near_misses)}" if self.near_misses else ""
        return f"{self.rule}: {self.reason}{near}"


@dataclass(frozen=True)
class Resolution:
    """What the rules mean for one model: a decision for every module asked about, in that order."""

    decisions: Mapping[str, Decision]
    unmatched: tuple[UnmatchedRule, ...]


@dataclass(frozen=True)
class QuantizationConfig:
    """One quantization file.

    Attributes:
        name: the file's name without its directory.
        rules: of `dense:` (or `linear:`, the same), tried in order; the first that takes a module decides. They decide
            attention, MLP and shared experts, the embedding, lm_head, and the routers they name.
        moe: how routed experts are quantized, by this section alone; None keeps them in their own dtype.
        moe_label: where that section is, or that there is none.
        ignored: modules always left alone: names (a name stands for everything below it as well) and `re:` patterns.
        is_static_checkpoint: the file describes a checkpoint that is already quantized this way. Its codes and scales
            are to be taken as they are; a checkpoint that is not quantized, or in another way, does not fit this file.
        allow_narrow_n_blockwise: accepted for files of sglang-jax, where it lifts the guard of a kernel that podquant
            does not have; it changes nothing here.
    """

    name: str
    rules: tuple[Rule, ...]
    moe: Scheme | None = None
    moe_label: str = "no moe section"
    ignored: tuple[Rule, ...] = ()
    is_static_checkpoint: bool = False
    allow_narrow_n_blockwise: bool = False

    def resolve(self, modules: Sequence[str], *, tied_embeddings: bool = False) -> Resolution:
        """Decides every module.

        Args:
            modules: names of the modules that have a weight of two dimensions (or three, for fused experts).
            tied_embeddings: the embedding and lm_head are one tensor. It goes by the embedding's name
                (`model.embed_tokens`): a rule for lm_head alone then decides nothing, and an lm_head among `modules`
                gets the embedding's decision.
        """
        embedding = next((m for m in modules if kind_of(m) == "embedding"), None) if tied_embeddings else None
        decisions: dict[str, Decision] = {}
        at_work: set[Rule] = set()
        for module in modules:
            kind = kind_of(module)
            if embedding is not None and kind == "lm_head":
                scheme, label, _ = self._decide(embedding, "embedding")
                decisions[module] = Decision(scheme, f"tied to {embedding}: {label}")
                continue
            scheme, label, rule = self._decide(module, kind)
            decisions[module] = Decision(scheme, label)
            if rule is not None:
                at_work.add(rule)
        idle = [rule for rule in (*self.ignored, *self.rules) if rule not in at_work]
        return Resolution(decisions, tuple(_unmatched(rule, decisions, embedding) for rule in idle))

    def _decide(self, module: str, kind: ModuleKind) -> tuple[Scheme | None, str, Rule | None]:
        for rule in self.ignored:
            if spelling := rule.matches(module):
                return None, f"{rule.label} ({spelling})", rule
        if kind == "expert":
            return self.moe, self.moe_label, None
        for rule in self.rules:
            if spelling := rule.takes(module, kind):
                return rule.scheme, f"{rule.label} ({spelling})", rule
        return None, "router" if kind == "router" else "no rule", None


def load_quantization_config(path_or_bare_name: str) -> QuantizationConfig:
    """Read a quantization file, by its path or by the bare name of one that podquant ships (`int8.yaml`).

    Raises:
        ConfigError: there is no such file, or anything in it is wrong; names file and line.
    """
    path = find_config(path_or_bare_name, what="quantization file")
    root = load_yaml(path).mapping(("quantization",))
    if "quantization" not in root:
        raise ConfigError(f"{path}:1: the file is an empty mapping: expected the key quantization")
    section = root["quantization"]
    entries = section.mapping(tuple(QUANTIZATION_KEYS))
    dense = _either(entries, "dense", "linear")
    if dense is None and "moe" not in entries:
        section.fail("nothing to quantize: expected a dense: or a moe: section")
    block = _block_size(entries["weight_block_size"]) if "weight_block_size" in entries else None
    moe = entries.get("moe")
    return QuantizationConfig(
        name=path.name,
        rules=_rules(dense, block) if dense else (),
        moe=_scheme(moe, moe.mapping(tuple(SCHEME_KEYS)), block) if moe else None,
        moe_label=f"moe {path.name}:{moe.line}" if moe else "no moe section",
        ignored=_ignored(entries["ignored_layers"]) if "ignored_layers" in entries else (),
        is_static_checkpoint=_flag(entries, "is_static_checkpoint"),
        allow_narrow_n_blockwise=_flag(entries, "allow_narrow_n_blockwise"),
    )


def _rules(dense: Node, block: tuple[int, int] | None) -> tuple[Rule, ...]:
    entries = dense.mapping(("rules",))
    if "rules" not in entries:
        dense.fail("expected the key rules with a list of rules, got an empty mapping")
    rules = []
    for node in entries["rules"].items("a list of rules"):
        rule = node.mapping(tuple(RULE_KEYS))
        if "module_path" not in rule:
            node.fail("a rule without module_path: expected a regular expression that says which modules it decides")
        path = rule["module_path"]
        pattern = path.text("a regular expression in single quotes, such as '.*'")
        scheme = _scheme(node, rule, block)
        rules.append(Rule(_label(path, pattern), _compile(path, pattern), scheme))
    return tuple(rules)


def _scheme(node: Node, entries: Mapping[str, Node], default_block: tuple[int, int] | None) -> Scheme | None:
    weight = _either(entries, "weight_dtype", _ALIASES["weight_dtype"])
    activation = _either(entries, "activation_dtype", _ALIASES["activation_dtype"])
    block = entries.get("weight_block_size")
    block_size = _block_size(block) if block else default_block
    if weight is None:
        node.fail(f"no weight_dtype: expected {', '.join(QUANTIZED_DTYPES)}, or null to leave the weight as it is")
    activation_dtype = None if activation is None else _dtype(activation)
    weight_dtype = _dtype(weight)
    if weight_dtype is not None:
        return Scheme(weight_dtype, activation_dtype, block_size)
    if activation is not None and activation_dtype:
        activation.fail(f"{activation_dtype!r} without a weight dtype: set weight_dtype as well, or make this null")
    if block and block_size:
        block.fail("a block size without a weight dtype: set weight_dtype as well, or make this null")
    return None


def _dtype(node: Node) -> str | None:
    what = f"one of {', '.join(QUANTIZED_DTYPES)}, or null"
    return None if node.is_null else node.choice(QUANTIZED_DTYPES, what, _ALSO_CALLED)


def _block_size(node: Node) -> tuple[int, int] | None:
    if node.is_null:
        return None
    what = "two positive integers such as [128, 128], or null for one scale per output channel"
    items = node.items(what)
    if len(items) != 2:
        node.fail(f"expected {what}, got a list of {len(items)}")
    rows, columns = (item.positive_integer("a positive integer") for item in items)
    return rows, columns


def _ignored(node: Node) -> tuple[Rule, ...]:
    if node.is_null:
        return ()
    rules = []
    for item in node.items("a list of module names and 're:' patterns"):
        text = item.text("a module name such as lm_head, or a regular expression such as 're:.*down_proj'")
        is_pattern = text.startswith("re:")
        pattern = text.removeprefix("re:") if is_pattern else re.escape(unspell(text)) + r"(\.|$)"
        rules.append(Rule(f"ignored_layers {_label(item, text)}", _compile(item, pattern), None))
    return tuple(rules)


def _either(entries: Mapping[str, Node], name: str, alias: str) -> Node | None:
    if name in entries and alias in entries:
        second = max(entries[name], entries[alias], key=lambda node: node.line)
        second.fail(f"both {name!r} and {alias!r}, two names of one thing: keep {name!r} and delete {alias!r}")
    return entries.get(name) or entries.get(alias)


def _flag(entries: Mapping[str, Node], name: str) -> bool:
    return entries[name].boolean() if name in entries else False


def _label(node: Node, pattern: str) -> str:
    return f'{node.path.name}:{node.line} "{pattern}"'


def _compile(node: Node, pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # `[[` and the like, whose meaning will change in a later Python
            return re.compile(pattern)
    except (re.error, OverflowError, ValueError, RecursionError, Warning) as error:
        shown = pattern if len(pattern) <= 200 else pattern[:197] + "..."
        node.fail(f"expected a regular expression, got {shown!r}, which Python's re refuses: {error}")


def _spellings(pattern: str) -> Sequence[Spelling]:
    if "/" not in pattern:
        return ("dotted",)
    if "(?!" in pattern or "(?<!" in pattern:
        return ("bracket",) if r"\[" in pattern else ("slash",)
    return ("slash", "bracket")


def _unmatched(rule: Rule, decisions: Mapping[str, Decision], embedding: str | None) -> UnmatchedRule:
    matched = [module for module in decisions if rule.matches(module)]
    if matched:
        first = matched[0]
        reason = f"decides none of the {len(matched)} modules it matches: {first} is decided by {decisions[first].rule}"
        return UnmatchedRule(rule.label, reason, ())
    if embedding is not None and rule.matches("lm_head"):
        reason = f"lm_head is the same tensor as {embedding} in this model: name that one"
        return UnmatchedRule(rule.label, reason, (embedding,))
    return UnmatchedRule(rule.label, "matches no module of this model", _near_misses(rule, list(decisions)))


def _near_misses(rule: Rule, modules: Sequence[str]) -> tuple[str, ...]:
    """Up to three modules, one for each kind of layer, whose components resemble the words of the pattern most."""
    words = re.findall(r"[A-Za-z_]\w+", re.sub(r"\\[A-Za-z]|\\", " ", rule.pattern.pattern))[:16]
    examples: dict[str, str] = {}
    for module in modules:
        examples.setdefault(re.sub(r"\d+", "N", module), module)
    scored = []
    for shape, module in examples.items():
        parts = shape.split(".")
        best = [max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts) for word in words]
        if best and sum(best) / len(best) >= 0.6:
            scored.append((-sum(best) / len(best), module))
    return tuple(module for _, module in sorted(scored)[:3])
