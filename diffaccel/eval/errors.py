"""What can be wrong with an evaluation, told apart so that a script can react: each has its exit status."""


class DataError(ValueError):
    """Pictures, prompts or features are damaged, missing or do not fit together."""

    exit_code = 3


class MissingWeights(FileNotFoundError):  # noqa: N818 - the message begins with what is missing
    """The weights of a feature network are not on this machine; the message says which file, from where, to where."""

    exit_code = 4


class ProtocolMismatch(ValueError):  # noqa: N818
    """Numbers made under different protocols were to be compared."""

    exit_code = 5
