"""The licence of an encoder's weights."""

from __future__ import annotations

SHIPPED = ("mini@arcmargin", "mini@2sft", "mini@mcip_realigned")  # weights of this course


def find_licence(name: str) -> str:
    """The licence of an encoder's weights as its library states it, else where to look."""
    import open_clip
    import timm

    kind, _, rest = name.partition(":")
    if name in SHIPPED:
        return "MIT"  # this course's
    if "@" in name or kind == "gpnns":
        return "see where the file is from"
    if not rest:
        return "MIT"
    if kind == "timm":
        config = timm.get_pretrained_cfg(rest.partition("?")[0], allow_unregistered=True)
        return getattr(config, "license", None) or "see its model card"
    repository = (open_clip.get_pretrained_cfg(*f"{rest}/".split("/")[:2]) or {}).get("hf_hub", "").strip("/")
    twin = timm.get_pretrained_cfg(repository.removeprefix("timm/")) if repository.startswith("timm/") else None
    if twin and twin.license not in (None, "apache-2.0"):  # the latter is what timm writes by default
        return twin.license
    return "see its model card" + (f", {repository}" if repository else "")
