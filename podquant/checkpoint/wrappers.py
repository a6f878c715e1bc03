"""Names as training wrappers leave them in a checkpoint, and the same names without. Knows nothing of any model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LEADING = ("base_model.model.", "_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.")
"""Of PEFT, torch.compile, DataParallel and DDP, Lightning, FSDP: in front of every name."""

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Of wrappers around single modules: anywhere between dots."""


def unwrapped(names: Iterable[str]) -> Mapping[str, str]:
    """From each name to the same without wrappers; empty where there are none, or where two names would be one."""
    names = list(names)
    bare = names
    while lead := _common_lead(bare):
        bare = [name.removeprefix(lead) for name in bare]
    for word in _INSIDE:
        bare = [name.replace(f".{word}", ".").removeprefix(word) for name in bare]
    if bare == names or len(set(bare)) < len(bare):
        return {}
    return dict(zip(names, bare, strict=True))


def _common_lead(names: list[str]) -> str | None:
    """The wrapper that all names begin with, if one does."""
    return next((each for each in _LEADING if names and all(name.startswith(each) for name in names)), None)
