"""rapa-dist: a distributed emulator of RAPA ConvNets on analog arrays, one Ray actor per tile."""

__version__ = "0.1.0"
