"""What can be wrong with a model that is to be exported."""


class ForeshardExportError(ValueError):
    """Names the argument, the value found and the way out."""
