"""Errors that a user can mend; the command line prints them as one line."""


class ScfeatError(Exception):
    """Base of the errors below; the message names what is wrong and the remedy."""


class InputError(ScfeatError):
    """An input file, folder, topic or value that cannot be used."""


class ModelError(ScfeatError):
    """A model file that is missing, damaged or of another architecture."""


class OutputExistsError(ScfeatError):
    """The output is there already and overwriting was not asked for."""


class OptionError(ScfeatError, ValueError):
    """An option outside its range, or one that does not go with the others."""
