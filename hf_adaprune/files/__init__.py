"""The files of a stored adapter: what they must hold, in which order they are written, and their fingerprints."""
