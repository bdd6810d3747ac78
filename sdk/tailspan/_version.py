"""The version, for parts of the SDK that must not import the package above them."""

# The metadata of the installed package has it too, but reading that takes longer than the first request.
__version__ = "0.1.0"
