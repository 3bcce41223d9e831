"""Which part of the model a weight belongs to, by its name in the checkpoint."""

PREFIXES = {"vision": "visual.", "projector": "visual.merger.", "language": ("model.", "lm_head.")}


def is_frozen(name: str, freeze: tuple[str, ...]) -> bool:
    """Whether a parameter is in one of the parts that are not trained.

    name: Of the parameter in the checkpoint.
    freeze: Names of parts. "vision" is the tower without its projector.
    """
    if name.startswith(PREFIXES["projector"]):
        return "projector" in freeze
    return any(name.startswith(PREFIXES[part]) for part in freeze)
