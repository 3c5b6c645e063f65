"""Parameters of a notebook, as a profile sets them: profiles/NAME.yml beside this file."""

import yaml

import gpnns_utils as gu


def profile_parameters(profile: str, notebook: str, given: dict) -> dict:
    """What notebooks/profiles/<profile>.yml sets in a notebook, except where `given` differs from the default.

    mini.yml holds the defaults, so a value equal to its default counts as left alone. A profile without a file sets
    nothing: it is only a name for the results. Raises ValueError when a file sets what the notebook does not know.
    """
    folder = gu.HERE / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yml"))
    if profile not in known:
        print(f"profile {profile}: a name for results only; with parameters of their own: {', '.join(known)}")
        return {}
    values, defaults = (
        yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))["notebooks"].get(notebook, {})
        for name in (profile, "mini")
    )
    if unknown := values.keys() - defaults.keys():
        raise ValueError(f"profiles/{profile}.yml sets {', '.join(sorted(unknown))}, which {notebook} does not know")
    chosen = {name: value for name, value in values.items() if given[name] == defaults[name] != value}
    if chosen:
        print(f"profile {profile} sets " + ", ".join(f"{name} = {value!r}" for name, value in chosen.items()))
    return chosen
